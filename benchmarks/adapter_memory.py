"""Peak memory of one training step beside a base in bfloat16, and beside the same base quantised.

    python benchmarks/random_llama.py big                  # a random model of 1.1 billion weights
    python benchmarks/adapter_memory.py big                # 512 tokens, sparse deltas at density 0.01
    python benchmarks/adapter_memory.py big --adapter lora --bases bfloat16 nf4

The base is read block by block in the same way, quantised or not, then one forward, backward and optimizer step on
random tokens. Every base has a process of its own. Reported: the largest resident memory of the process (mapped files
included) less what it was after imports, for the whole run and for the step alone, and the seconds of both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BASES = ("bfloat16", "int8", "fp4", "nf4")
ADAPTERS = ("static", "spiel-ag", "spiel-ma", "lora")


def main() -> None:
    options = _options()
    if options.base:
        print(json.dumps(measure(options)))
        return
    print(f"{options.model.name}, {options.tokens} tokens, {options.adapter}, density {options.density:g}")
    first = None
    for base in options.bases:
        words = [sys.executable, __file__, *sys.argv[1:], "--base", base]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        first = first or found
        print(
            f"{base:9} peak {found['peak'] / 1e9:6.3f} GB ({found['peak'] / first['peak']:.2f}x), of loading "
            f"{found['loaded'] / 1e9:6.3f}, the step's own {found['step'] / 1e9:6.3f}; {found['trained']:,} trained; "
            f"loading {found['load_s']:.0f} s, step {found['step_s']:.0f} s; loss {found['loss']:.3f}",
            flush=True,
        )


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One base: bytes above those after imports."""
    import torch

    import gossamer  # noqa: F401
    from gossamer.compress.blocks import StreamedModel
    from gossamer.compress.memory import bound_heap, release
    from gossamer.compress.source import FolderSource
    from gossamer.finetune import quantised
    from gossamer.finetune.spiel.optimizer import SpielOptimizer

    if options.base != "bfloat16":
        import bitsandbytes  # noqa: F401
    bound_heap()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    imported = _peak()
    started = time.monotonic()
    source = FolderSource(options.model)
    streamed = StreamedModel.open(source, options.model, dtype=torch.bfloat16)

    def blocks() -> Iterator[Any]:
        for i, prefix in enumerate(streamed.block_names):
            block = streamed.load_block(i)
            names = [p.name.removeprefix(f"{prefix}.") for p in streamed.prunables(i) if p.kind == "linear"]
            if options.base != "bfloat16":
                quantised.quantise(block, names, options.base, torch.bfloat16)
            release()
            yield block

    base = streamed.assembled(blocks())
    base.is_loaded_in_8bit, base.is_loaded_in_4bit = options.base == "int8", options.base in ("nf4", "fp4")
    loaded, seconds = _peak(), time.monotonic() - started
    model = _adapted(base, options)
    trained = [p for p in model.parameters() if p.requires_grad]
    if options.adapter == "lora":
        optimizer: Any = torch.optim.AdamW(trained, 1e-4)
    else:
        optimizer = SpielOptimizer(model, 1e-4, 1000)
    resident = _now()
    ids = torch.randint(0, base.config.vocab_size, (1, options.tokens))
    started = time.monotonic()
    loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    return {
        "peak": _peak() - imported,
        "loaded": loaded - imported,
        "step": _peak() - resident,
        "trained": sum(p.numel() for p in trained),
        "load_s": seconds,
        "step_s": time.monotonic() - started,
        "loss": float(loss),
    }


def _adapted(base: Any, options: argparse.Namespace) -> Any:
    from peft import LoraConfig, get_peft_model

    from gossamer.finetune.spiel.config import SpielConfig

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if options.adapter == "lora":
        return get_peft_model(base, LoraConfig(r=options.rank, target_modules=targets))
    policy = options.adapter.removeprefix("spiel-")
    return get_peft_model(base, SpielConfig(density=options.density, policy=policy, target_modules=targets))


def _peak() -> int:
    return _status("VmHWM")


def _now() -> int:
    return _status("VmRSS")


def _status(field: str) -> int:
    """Bytes that /proc says of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a Llama")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=["bfloat16", "int8", "nf4"])
    parser.add_argument("--adapter", choices=ADAPTERS, default="static")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base", choices=BASES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
