"""Pruning, activation sparsity and a head plan in one checkpoint, beside each of them: the table of docs/head-plans.md.

    python benchmarks/combined.py --shared ../shared                  # both models, what is missing
    python benchmarks/combined.py --models stories260k --threads 1
    python benchmarks/combined.py --smoke --results smoke.jsonl       # hardly any data, a minute
    python benchmarks/combined.py --render                            # only write the tables into the page

Every checkpoint is made by one recipe, with the stages of its row, and loaded by `gossamer.load(folder)` in bfloat16,
which is what our kernels run. Figures are of the model as it then runs:

- perplexity: held-out windows, the first quarter of each as a prompt in one pass, every further token in a step of its
  own through the model's own cache. Only those are scored: skipping and dropped keys count as they do in `generate`.
- bytes: weights on disk and what one step reads of them; keys and values in the cache after the last token.
- tokens per second: `gossamer bench model`, all five in turns in one process.

A finished row is a JSON line, a rerun skips those it finds, and checkpoints are kept in `--work`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pages import put
from quality import append_result, read_results

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "combined.jsonl"
PAGE = ROOT / "docs" / "head-plans.md"
WORK = ROOT / "build" / "combined"
BEGIN, END = "<!-- combined -->", "<!-- end of combined -->"
WEIGHT_SPARSITY, ACTIVATION_SPARSITY, DENSITY = 0.5, 0.4, 0.5
VARIANTS = {  # row -> its stages
    "dense": (),
    "pruned": ("prune",),
    "pruned + activation": ("prune", "activation"),
    "pruned + heads": ("prune", "heads"),
    "all three": ("prune", "activation", "heads"),
}
PROMPT = 0.25


@dataclass(frozen=True)
class Protocol:
    """Texts below the shared folder, lengths of the head plan, and tokens of an evaluation window."""

    calibration: str
    evaluation: str
    lengths: tuple[int, ...]
    window: int


PROTOCOLS = {
    "stories260k": Protocol(
        "data/tinystories/calibration.txt", "data/tinystories/evaluation.txt", (128, 256, 384), 512
    ),
    "tiny-llama": Protocol("data/gsm8k/train.txt", "data/gsm8k/test.txt", (64, 128, 192), 256),
}


@dataclass(frozen=True)
class Effort:
    """Sequences that calibrate and windows that judge."""

    nsamples: int = 32
    windows: int = 20
    tokens: int = 96
    rounds: int = 4


def effort_of(options: argparse.Namespace) -> Effort:
    return SMOKE if options.smoke else Effort(options.nsamples, options.windows)


SMOKE = Effort(nsamples=2, windows=1, tokens=4, rounds=1)


def recipe_of(variant: str, protocol: Protocol, shared: Path, effort: Effort) -> Any:
    """The recipe of a row; its stages say everything, so that it could stand in a YAML file."""
    from gossamer.compress.recipe import ActivationStage, HeadsStage, PruneStage, Recipe

    common = {"calibration": str(shared / protocol.calibration), "nsamples": effort.nsamples}
    stages = {
        "prune": PruneStage(sparsity=WEIGHT_SPARSITY, seqlen=protocol.window, **common),
        "activation": ActivationStage(method="auto", sparsity=ACTIVATION_SPARSITY, seqlen=protocol.window, **common),
        "heads": HeadsStage(density=DENSITY, lengths=protocol.lengths, block=16, sinks=(0, 1, 4, 8), **common),
    }
    return Recipe(stages=tuple(stages[name] for name in VARIANTS[variant]))


def folder_of(name: str, variant: str, shared: Path, work: Path, effort: Effort) -> Path:
    """The checkpoint of a row, made where it is missing."""
    from gossamer.compress.plan import partial_of
    from gossamer.compress.run import compress

    source = shared / "models" / name
    if not VARIANTS[variant]:
        return source
    folder = work / f"{name}-{variant.replace(' + ', '-').replace(' ', '-')}-{effort.nsamples}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        recipe = recipe_of(variant, PROTOCOLS[name], shared, effort)
        compress(str(source), folder, recipe, resume=partial_of(folder).exists())
    return folder


def decode_loss(model: Any, windows: torch.Tensor) -> tuple[float, int]:
    """(mean loss of the tokens after each window's prompt, taken one at a time; bytes of the cache at the end)."""
    from transformers import DynamicCache

    from gossamer.compress.heads import new_cache

    count, length = windows.shape
    prompt, losses, held = int(length * PROMPT), [], 0
    with torch.no_grad():
        for window in windows:
            ids, cache = window[None], new_cache(model, length) or DynamicCache(config=model.config)
            logits = model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True).logits[:, -1]
            for position in range(prompt, length):
                losses.append(float(torch.nn.functional.cross_entropy(logits.float(), ids[:, position])))
                logits = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True).logits[
                    :, -1
                ]
            held = cache_bytes(cache)
    return sum(losses) / len(losses), held


def cache_bytes(cache: Any) -> int:
    """Of every key and value that a cache holds, whichever kind it is."""
    layers = [getattr(layer, "store", None) or layer for layer in cache.layers]
    return sum(t.untyped_storage().nbytes() for layer in layers for t in (layer.keys, layer.values))


def weight_file_bytes(folder: Path) -> int:
    """Weights on disk: the sparse file where there is one, and the files beside it that a policy or plan needs."""
    sparse = sorted(folder.glob("*.sparse*.safetensors"))
    return sum(file.stat().st_size for file in sparse or sorted(folder.glob("*.safetensors")))


def row(name: str, variant: str, options: argparse.Namespace, effort: Effort) -> dict[str, Any]:
    """Everything about a row but its speed."""
    from transformers import AutoTokenizer

    import gossamer
    from gossamer.compress.data import evaluation_windows, load_text, token_ids

    started, protocol = time.monotonic(), PROTOCOLS[name]
    folder = folder_of(name, variant, options.shared, options.work, effort)
    made = time.monotonic() - started
    model = gossamer.load(folder, dtype="bfloat16")
    text = load_text(str(options.shared / protocol.evaluation), "evaluation")
    ids = token_ids(AutoTokenizer.from_pretrained(folder), text)
    windows = evaluation_windows(ids, protocol.window, effort.windows)
    loss, held = decode_loss(model, windows)
    return {
        "kind": "quality", "model": name, "variant": variant, "nsamples": effort.nsamples,
        "windows": len(windows), "window": protocol.window, "perplexity": math.exp(loss), "cache_bytes": held,
        "file_bytes": weight_file_bytes(folder), "making_seconds": round(made, 1),
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def speeds(name: str, options: argparse.Namespace, effort: Effort) -> Iterator[dict[str, Any]]:
    """Milliseconds per token of all rows, in turns."""
    from gossamer.compress.benchmodel import bench_models

    folders = {
        variant: str(folder_of(name, variant, options.shared, options.work, effort)) for variant in VARIANTS
    }  # fmt: skip
    prompt = max(PROTOCOLS[name].window - effort.tokens, 8)
    report = bench_models(
        list(folders.values()), prompt_tokens=prompt, new_tokens=effort.tokens, rounds=effort.rounds
    )  # fmt: skip
    for variant, folder in folders.items():
        own = [c for c in report["contenders"] if c["model"] == folder]
        found = next(c for c in own if c["name"].startswith("ours"))
        fastest = min((c for c in own if c["decile_ms"]), key=lambda c: c["decile_ms"], default=found)
        yield {
            "kind": "speed", "model": name, "variant": variant, "threads": report["machine"]["threads"],
            "prompt": prompt, "ms": found["decile_ms"], "fastest_ms": fastest["decile_ms"],
            "fastest": fastest["name"], "read_bytes": found["bytes_per_token"],
            "memory_bytes": found["weight_bytes"], "skipped": found["activation_sparsity"],
            "relative_error": found["relative_error"],
        }  # fmt: skip


def cells(options: argparse.Namespace, done: set[Any]) -> Iterator[dict[str, Any]]:
    """Everything asked for that is not done; speeds of a model are taken together."""
    effort = effort_of(options)
    for name in options.models[:1] if options.smoke else options.models:
        for variant in VARIANTS:
            if ("quality", name, variant, effort.nsamples, effort.windows) not in done:
                yield row(name, variant, options, effort)
        if any(("speed", name, variant) not in done for variant in VARIANTS):
            yield from speeds(name, options, effort)


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    """What identifies a line of the results."""
    effort = (line["nsamples"], line["windows"]) if line["kind"] == "quality" else ()
    return (line["kind"], line["model"], line["variant"], *effort)


def tables(lines: list[dict[str, Any]]) -> str:
    """Markdown of what was measured: the last line of every row, of those with the effort of the first row."""
    parts: list[str] = []
    for name in dict.fromkeys(c["model"] for c in lines):
        effort = next((e[3:] for e in map(key, lines) if e[:2] == ("quality", name)), ())
        known = {key(c)[:3]: c for c in lines if key(c)[3:] in (effort, ())}
        rows = [(v, known.get(("quality", name, v)), known.get(("speed", name, v), {})) for v in VARIANTS]
        first = next(q for _, q, _ in rows if q)
        speed = next((s for _, _, s in rows if s), {})
        timed = f"; tokens/s after {speed['prompt']} tokens, threads: {speed['threads']}" if speed else ""
        parts += [
            f"{name}: {first['windows']} windows of {first['window']} tokens, {first['nsamples']} calibration "
            f"sequences{timed}.",
            "",
            "| | perplexity | weights on disk, kB | read per token, kB | keys and values, kB | tokens/s |",
            "|---|---|---|---|---|---|",
        ]
        for variant, quality, timing in rows:
            if quality:
                numbers = [
                    f"{quality['perplexity']:.3f}", kilo(quality["file_bytes"]), kilo(timing.get("read_bytes")),
                    kilo(quality["cache_bytes"]), f"{1e3 / timing['ms']:.0f}" if timing.get("ms") else "-",
                ]  # fmt: skip
                parts.append(f"| {variant} | {' | '.join(numbers)} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def kilo(count: int | None) -> str:
    return "-" if count is None else f"{count / 1000:.0f}"


def render(results: Path, page: Path) -> None:
    """Write the tables between the marks of the page."""
    put(page, BEGIN, END, tables(read_results(results)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(PROTOCOLS), default=list(PROTOCOLS))
    parser.add_argument("--nsamples", type=int, default=Effort.nsamples, help="calibration sequences of every stage")
    parser.add_argument("--windows", type=int, default=Effort.windows, help="evaluation windows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="one model with hardly any data")
    parser.add_argument("--render", action="store_true", help="run nothing, write the tables into the page")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with models/ and data/")
    parser.add_argument("--work", type=Path, default=WORK, help="where the checkpoints are kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    if options.render:
        render(options.results, options.page)
        return
    options.shared, options.work = options.shared.resolve(), options.work.resolve()
    torch.set_num_threads(options.threads)
    done = set(map(key, read_results(options.results)))
    for cell in cells(options, done):
        append_result(options.results, cell)
        print(json.dumps(cell), flush=True)


if __name__ == "__main__":
    main()
