"""What the suites of quality.py that train share: options, one resumable run, the choice among trials, the claim.

A line of a results file is a trial (judged by held-out loss alone) or a cell (it reads the evaluation text). A suite
says which lines there are and how one is run; a line that is in the file already is not run again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quality_table import Spread

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {  # model -> training text, evaluation text, evaluation windows, tokens of a run
    "stories260k": ("data/tinystories/calibration.txt", "data/tinystories/evaluation.txt", 400, 500_000),
    "tiny-llama": ("data/gsm8k/train.txt", "data/gsm8k/test.txt", 200, 200_000),
}
# at most 128 rows are measured; 49 are enough for tiny-llama, where 128 would take longer than a trial's steps
HELDOUT = {"stories260k": 0.1, "tiny-llama": 0.01}
TRIALS = "judged by the loss on the held-out split of the training text"

Line = Mapping[str, Any]


def parser(name: str, description: str | None, rows: Sequence[str]) -> argparse.ArgumentParser:
    """The options of every suite; results and page are named after it."""
    made = argparse.ArgumentParser(prog=f"quality.py {name}", description=(description or "").split("\n")[0])
    made.add_argument("--search", action="store_true", help="trials instead of final cells")
    made.add_argument("--rows", nargs="+", choices=rows, default=list(rows))
    made.add_argument("--seeds", nargs="+", type=int, default=[0])
    made.add_argument("--redo", action="store_true", help="run again what is there; the later line counts")
    made.add_argument("--render", action="store_true", help="run nothing, write the page")
    made.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with models/ and data/")
    made.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / f"quality_{name}.jsonl")
    made.add_argument("--page", type=Path, default=ROOT / "docs" / f"quality-{name}.md")
    made.add_argument("--device", default="cpu")
    return made


def by_sparsity(
    name: str, description: str | None, rows: Sequence[str], sparsities: Sequence[str]
) -> argparse.ArgumentParser:
    """The options of a suite on the models of TEXTS at several sparsities."""
    made = parser(name, description, rows)
    made.add_argument("--models", nargs="+", choices=list(TEXTS), default=list(TEXTS))
    made.add_argument("--sparsities", nargs="+", choices=sparsities, default=list(sparsities))
    made.add_argument("--tokens", type=int, help="of one training run, a soup's candidate; default: the model's")
    return made


def run(
    options: argparse.Namespace,
    *,
    key: Callable[[Line], tuple[Any, ...]],
    wanted: Callable[[argparse.Namespace, Sequence[Line]], list[dict[str, Any]]],
    run_line: Callable[[dict[str, Any], Path, str], dict[str, Any]],
    render: Callable[[Sequence[Line]], str],
    told: Callable[[Line], str],
) -> None:
    """Run the lines that are wanted and not there, or write the page. `told`: a line in words, for people."""
    from quality import append_result, read_results

    lines = read_results(options.results)
    if options.render:
        options.page.write_text(render(lines), encoding="utf-8")
        print(f"wrote {options.page}")
        return
    done = set() if options.redo else {key(line) for line in lines}
    asked = wanted(options, lines)
    todo = [line for line in asked if key(line) not in done]
    print(f"{len(todo)} of {len(asked)} to run")
    for number, line in enumerate(todo, 1):
        result = run_line(line, options.shared.resolve(), options.device)
        append_result(options.results, result)
        figure = f"perplexity {result['after']:.3f}" if "after" in result else f"held-out loss {result['heldout']:.4f}"
        print(f"[{number}/{len(todo)}] {told(line)}: {figure} in {result['seconds']:.1f} s", flush=True)


def compressed(
    line: Line, stages: list[Any], model: Path, device: str, read: Callable[[Path], Any] = lambda out: None
) -> tuple[Any, Any, dict[str, Any]]:
    """(report, what `read` finds in OUT, seconds and version, and of a cell the perplexities) of one compression."""
    from gossamer import __version__
    from gossamer.compress.recipe import Machine, Recipe
    from gossamer.compress.run import compress

    started = time.monotonic()
    recipe = Recipe(stages=stages, seed=line["seed"])
    with tempfile.TemporaryDirectory(prefix="gossamer-quality-") as folder:
        out = Path(folder) / "out"
        report = compress(str(model), out, recipe, Machine(dtype="float32", device=device))
        found = read(out)
    result: dict[str, Any] = {"seconds": round(time.monotonic() - started, 2), "version": __version__}
    if line["kind"] == "cell":
        result |= {name: report["evaluation"][name]["perplexity"] for name in ("before", "after")}
    return report, found, result


def best_trial(lines: Sequence[Line], **of: Any) -> Line | None:
    """The trial with the lowest finite held-out loss among those with these values; None where there is none."""
    trials = [line for line in lines if line["kind"] == "trial" and all(line[name] == of[name] for name in of)]
    return min((t for t in trials if math.isfinite(t["heldout"])), key=lambda line: line["heldout"], default=None)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    """ours - theirs over the seeds that both have, and whether it is below 0 by more than two standard errors."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not differences:
        return "not measured"
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{mean:+.3f}, one seed: decides nothing"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    holds = "holds" if mean < 0 and -mean > 2 * error else "fails"
    return f"{mean:+.3f}, standard error {error:.3f}, {len(differences)} seeds: the claim {holds}"


def next_best(
    ours: Mapping[int, float], rivals: Mapping[str, Mapping[int, float]]
) -> tuple[str, dict[int, float]] | None:
    """The rival of the lowest mean among those that share most seeds with ours, and its figures; None below two."""
    shared = {name: {seed: v for seed, v in of.items() if seed in ours} for name, of in rivals.items()}
    most = max(map(len, shared.values()), default=0)
    if most < 2:
        return None
    return min(((name, of) for name, of in shared.items() if len(of) == most), key=lambda pair: sum(pair[1].values()))


def spread(values: Mapping[int, float] | None, digits: int = 3) -> str:
    """Mean, and of several seeds the smallest and the largest in brackets."""
    if not values:
        return "-"
    of = Spread.of(list(values.values()))
    around = "" if of.count == 1 else f" ({of.low:.{digits}f} to {of.high:.{digits}f})"
    return f"{of.mean:.{digits}f}{around}"


def said(options: Mapping[str, Any]) -> str:
    """Options in words."""
    return ", ".join(f"{name} {value}" for name, value in options.items())
