"""Decode speed of a model that skips: policies at a given realised sparsity beside all dense baselines, in turns.

    python benchmarks/random_llama.py MODEL
    gossamer compress MODEL PRUNED --method magnitude --sparsity 0.5
    python benchmarks/activation_speed.py MODEL --pruned PRUNED --sparsity 0.4,0.5 --cores 0.4 --json speed.json

Thresholds are magnitudes, one per input site, calibrated on random tokens and corrected until the kernels' own count of
a decode is within half a percentage point of the target: speed depends on how much is skipped, not on what. Core
neurons are those of the prompt. The folders that are measured lie beside MODEL (MODEL-a50, MODEL-c40, PRUNED-a50) as
links to its files, with a policy of their own; `gossamer generate` runs them too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gossamer
from gossamer.activation_sparsity.base import CoreGuide, CoreNeurons, LinearPolicy, MLPParts, Policy
from gossamer.compress.activation.file import FILE, NAME, write_policy
from gossamer.compress.activation.report import realised
from gossamer.compress.benchmodel import bench_models, markdown
from gossamer.compress.generate import generate
from gossamer.kernels.modules.counting import counting

WINDOW, WINDOWS, PROMPT, DECODED = 256, 2, 32, 24
SITES = {  # leader -> the maps that get the same input, of a Llama block
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


def main() -> int:
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    folders: list[str] = [options.model]
    notes: dict[str, Any] = {}
    for base in [options.model, *options.pruned]:
        folders += [] if base == options.model else [base]
        samples = _samples(base)
        for target in options.sparsity:
            out = Path(f"{base}-a{round(100 * target)}")
            notes[str(out)] = _at(Path(base), out, samples, target)
            folders.append(str(out))
    for share in options.cores:
        out = Path(f"{options.model}-c{round(100 * share)}")
        notes[str(out)] = _give(Path(options.model), out, _cores(Path(options.model), share))
        folders.append(str(out))
    report = bench_models(folders, prompt_tokens=PROMPT, new_tokens=options.tokens, rounds=options.rounds)
    report["realised"] = notes
    print(markdown(report))
    for name, note in notes.items():
        print(f"{Path(name).name}: {100 * note['skipped']:.1f} % of the blocks' weights skipped at decode")
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    return 1 if report["wrong"] else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [float(word) for word in text.split(",") if word]
    parser.add_argument("model", help="folder of a dense Llama")
    parser.add_argument("--pruned", action="append", default=[], help="the same model with sparse weights")
    parser.add_argument("--sparsity", type=numbers, default=[0.5], help="realised shares of skipped weights")
    parser.add_argument("--cores", type=numbers, default=[], help="shares of neurons that are kept")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json")
    return parser.parse_args()


def _ids(vocabulary: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def _samples(folder: str) -> dict[str, Tensor]:
    """Sorted magnitudes of the inputs of every site, the first token of each window excluded."""
    model = gossamer.load(folder, dtype=torch.bfloat16, attachments=False)
    found: dict[str, list[Tensor]] = {}
    handles = []
    for i in range(model.config.num_hidden_layers):
        for leader in SITES:
            name = f"model.layers.{i}.{leader}"

            def before(layer: nn.Module, args: Any, name: str = name) -> None:
                found.setdefault(name, []).append(args[0][:, 1:].float().abs().flatten()[::7])

            handles.append(model.get_submodule(name).register_forward_pre_hook(before))
    with torch.no_grad():
        for window in range(WINDOWS):
            model(_ids(model.config.vocab_size, 1, WINDOW, seed=window))
    return {name: torch.cat(parts).sort().values for name, parts in found.items()}


def _at(base: Path, out: Path, samples: dict[str, Tensor], target: float) -> dict[str, Any]:
    """A folder whose realised sparsity is within half a point of the target."""
    asked, note = target, {"skipped": 0.0}
    for _ in range(4):
        note = _give(base, out, _thresholds(base, samples, asked))
        if abs(note["skipped"] - target) <= 0.005:
            break
        asked = min(max(asked + target - note["skipped"], 0.0), 0.99)
    return note


def _thresholds(base: Path, samples: dict[str, Tensor], share: float) -> Policy:
    shapes, linears, sites = _shapes(base), {}, {}
    for name in shapes:
        block, own = name.split(".self_attn.")[0].split(".mlp.")[0], name
        leader = next(lead for lead, members in SITES.items() if any(own == f"{block}.{member}" for member in members))
        values = samples[f"{block}.{leader}"]
        limit = values[min(int(share * len(values)), len(values) - 1)]
        linears[name] = LinearPolicy(torch.full((shapes[name][1],), float(limit)))
        sites[name] = f"{block}.{leader}"
    return Policy("threshold", shapes, linears, sites=sites)


def _cores(base: Path, share: float) -> Policy:
    shapes = _shapes(base)
    mlps = {}
    for name, (_, neurons) in shapes.items():
        if name.endswith(".down_proj"):
            mlp = name.removesuffix(".down_proj")
            parts = MLPParts(f"{mlp}.gate_proj", f"{mlp}.up_proj", name, "silu", neurons)
            mlps[mlp] = CoreNeurons(parts, int(share * neurons), torch.ones(neurons))
    return Policy("coreinfer", shapes, {}, mlps, {name: name for name in shapes}, CoreGuide(0.4))


def _shapes(base: Path) -> dict[str, tuple[int, int]]:
    config = json.loads((base / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    own = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    return {f"model.layers.{i}.{name}": s for i in range(config["num_hidden_layers"]) for name, s in own.items()}


def _give(base: Path, out: Path, policy: Policy) -> dict[str, Any]:
    """`out` as `base` with the policy; what a decode of it skips."""
    for path in base.rglob("*"):
        target = out / path.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.name != "config.json" and not target.exists():
            os.symlink(path.resolve(), target)
    entry = write_policy(out / FILE, policy)
    config = json.loads((base / "config.json").read_text())
    config.setdefault("gossamer", {"format_version": 1})[NAME] = entry
    (out / "config.json").write_text(json.dumps(config, indent=2))
    model = gossamer.load(out, dtype=torch.bfloat16)
    with counting() as counted:
        for _ in generate(model, _ids(model.config.vocab_size, 1, PROMPT, seed=99), DECODED):
            pass
    return realised(model, counted)


if __name__ == "__main__":
    sys.exit(main())
