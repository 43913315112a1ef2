"""Head plans against their rivals at equal KV bytes: the tables of docs/head-plans.md, in a resumable run.

    python benchmarks/head_plans.py --shared ../shared                      # run what is missing, cell by cell
    python benchmarks/head_plans.py --suites perplexity --models tiny-llama --densities 0.5
    python benchmarks/head_plans.py --suites retrieval --train-seconds 900  # trains its model first, then keeps it
    python benchmarks/head_plans.py --seeds 0 1 2 --methods per-layer moa gossamer   # other calibration texts
    python benchmarks/head_plans.py --smoke --results smoke.jsonl           # every suite, tiny, in two minutes
    python benchmarks/head_plans.py --render                                # only write the tables into the page

Suites: `influence` (Spearman correlation of predicted with measured loss, every head under several rules), `perplexity`
(tiny-llama and stories260k) and `retrieval` (a small key-value model). A cell is one model, density, method and
calibration seed; each finished one is a JSON line, and a rerun skips those it finds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from head_plan_table import METHODS, render
from quality import append_result, read_results

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "head_plans.jsonl"
PAGE = ROOT / "docs" / "head-plans.md"
MODEL_CACHE = ROOT / "build" / "retrieval-model"
SUITES = ["influence", "perplexity", "retrieval"]
DENSITIES = [0.25, 0.5]
BLOCK, SINKS = 16, (0, 1, 4, 8)
RULES_PER_HEAD = 6


@dataclass(frozen=True)
class Protocol:
    """Where a model is calibrated and evaluated, below the folder of models and texts."""

    calibration: str
    evaluation: str
    lengths: tuple[int, ...]
    validation: int


PROTOCOLS = {
    "tiny-llama": Protocol("data/gsm8k/train.txt", "data/gsm8k/test.txt", (64, 128, 192), 256),
    "stories260k": Protocol(
        "data/tinystories/calibration.txt", "data/tinystories/evaluation.txt", (128, 256, 384), 512
    ),
}


@dataclass
class Case:
    """A model with its calibration and held-out sequences. `measure`: of a plan, the figure of the suite."""

    name: str
    model: Any
    texts: Any
    lengths: tuple[int, ...]
    measure: Callable[[Any | None], dict[str, float]]

    @cached_property
    def facts(self) -> Any:
        from gossamer.compress.headplans.facts import head_facts

        return head_facts(self.model.config)

    def settings(self, method: str, density: float) -> Any:
        """Of a rival, or of our method; MoA's objective is ours with its loss, on KV heads and with our sinks."""
        from gossamer.compress.headplans.settings import settle
        from gossamer.compress.recipe import HeadsStage

        ours = {"method": "gossamer", "loss": "moa"} if method == "moa" else {"method": method}
        stage = HeadsStage(density=density, lengths=self.lengths, block=BLOCK, sinks=SINKS, **ours)
        return replace(settle(stage, self.facts), validation=self.lengths[-1])

    @cached_property
    def profiles(self) -> Any:
        """One pass for every method and density: the search space does not depend on them."""
        from gossamer.compress.headplans.make import measure
        from gossamer.compress.progress import Progress

        return measure(self.model, self.settings("gossamer", 0.5), self.texts, Progress())

    held_out: Sequence[Any] = ()


def text_case(name: str, shared: Path, nsamples: int, held: int, windows: int, seed: int) -> Case:
    """A language model; its figure is the perplexity at the validation length."""
    import gossamer
    from gossamer.compress.data import evaluation_windows, load_text, token_ids
    from gossamer.compress.headplans.items import text_item
    from gossamer.compress.headplans.texts import head_texts
    from gossamer.compress.headplans.validate import judge
    from gossamer.compress.recipe import HeadsStage, Recipe
    from gossamer.compress.text import Texts

    protocol, folder = PROTOCOLS[name], shared / "models" / name
    model = gossamer.load(folder, dtype="float32")
    texts = Texts(folder, Recipe(stages=(HeadsStage(),)), SimpleNamespace(vocab_size=model.config.vocab_size))
    calibration = str(shared / protocol.calibration)
    read = head_texts(texts, calibration, None, protocol.lengths, protocol.validation, nsamples, held, seed)
    ids = token_ids(texts.tokenizer, load_text(str(shared / protocol.evaluation), "evaluation"))
    items = [text_item(window) for window in evaluation_windows(ids, protocol.validation, windows)]

    def figure(plan: Any | None) -> dict[str, float]:
        if plan is None:  # a plan that keeps everything is the dense model
            return {"perplexity": math.exp(judge(model, [everything(case.facts)], items)[0].dense_loss)}
        found = judge(model, [plan], items)[0]
        return {"perplexity": math.exp(found.loss), "kl": found.kl}

    case = Case(name, model, read.items, protocol.lengths, figure)
    case.held_out = read.validation
    return case


def retrieval_case(folder: Path, seconds: float, longest: int, nsamples: int, held: int, tests: int, seed: int) -> Case:
    """The key-value model; its figure is the accuracy at its longest context."""
    import retrieval_model as lookup

    from gossamer.compress.headplans.items import Item
    from gossamer.compress.heads import applied

    model = lookup.cached(folder, seconds, longest)
    generator = torch.Generator().manual_seed(1 + seed)

    def items(count: int, length: int) -> list[Any]:
        return [Item(i, c) for i, c in zip(*lookup.sequences(count, length, generator), strict=True)]

    lengths = tuple(longest * part // 4 for part in (1, 2, 3))

    def figure(plan: Any | None) -> dict[str, float]:
        if plan is None:
            return {"accuracy": lookup.accuracy(model, longest, tests, 2)}
        with applied(model, plan):
            return {"accuracy": lookup.accuracy(model, longest, tests, 2)}

    case = Case("key-value", model, {n: items(nsamples, n) for n in lengths}, lengths, figure)
    case.held_out = items(held, longest)
    return case


def everything(facts: Any) -> Any:
    """The plan that drops nothing."""
    from gossamer.attention.plan import FULL

    return facts.plan(((FULL,) * facts.kv_heads,) * facts.layers, 1, (1,))


def plan_of(case: Case, method: str, density: float) -> tuple[Any, str]:
    """(the method's plan, what it is): its own candidates, judged on held-out text where there are several."""
    from gossamer.compress.headplans.candidates import candidates
    from gossamer.compress.headplans.make import measure, refined
    from gossamer.compress.headplans.validate import judge
    from gossamer.compress.progress import Progress

    settings = case.settings(method, density)
    profiles = measure(case.model, settings, case.texts, Progress()) if method == "duo" else case.profiles
    found = candidates(settings, profiles)
    if method == "gossamer":
        found.insert(0, refined(case.model, settings, profiles, found, case.texts[case.lengths[-1]], 0))
    if method == "moa":
        found = [c for c in found if c.name == "gossamer (moa)"]  # without our further candidates
    plans = [case.facts.plan(c.rules, settings.least, settings.lengths) for c in found]
    verdicts = judge(case.model, plans, case.held_out) if len(plans) > 1 else []
    best = min(range(len(verdicts)), key=lambda i: verdicts[i].badness, default=0)
    return plans[best], found[best].name


def comparison_cells(case: Case, keys: Sequence[Any], done: set[Any]) -> Iterator[dict[str, Any]]:
    """One cell per key, of keys_of, that is not done."""
    dense: dict[str, float] | None = None
    for suite, model, density, method, seed in keys:
        if (suite, model, density, method, seed) in done:
            continue
        started = time.monotonic()
        dense = dense or case.measure(None)
        plan, name = plan_of(case, method, density)
        budgeted = case.settings(method, density).budgeted
        yield {
            "suite": suite, "model": model, "density": density, "method": method, "seed": seed, "chosen": name,
            "dense": dense, **case.measure(plan),
            "kv": {str(n): round(plan.density(n), 4) for n in budgeted},
            "seconds": round(time.monotonic() - started, 1),
        }  # fmt: skip


def influence_cell(case: Case, items: int, rules_per_head: int) -> dict[str, Any]:
    """Spearman correlation of every loss with the measured change, one head under one rule at a time."""
    from scipy.stats import spearmanr

    from gossamer.attention.plan import FULL
    from gossamer.compress.headplans.validate import judge

    started = time.monotonic()
    settings, facts, length = case.settings("gossamer", 0.5), case.facts, case.lengths[-1]
    profile = case.profiles[length]
    draw = random.Random(0)
    plans: list[Any] = []
    predicted: dict[str, list[float]] = {"group": [], "fisher": [], "moa": []}
    choices = [i for i, rule in enumerate(settings.rules) if rule.kept(length, settings.least) < length]
    for layer in range(facts.layers):
        for head in range(facts.kv_heads):
            for index in draw.sample(choices, min(rules_per_head, len(choices))):
                rules = [[FULL] * facts.kv_heads for _ in range(facts.layers)]
                rules[layer][head] = settings.rules[index]
                plans.append(facts.plan(tuple(map(tuple, rules)), settings.least, settings.lengths))
                for name, values in predicted.items():
                    values.append(float(getattr(profile, name)[layer, head, index]))
    verdicts = judge(case.model, plans, case.texts[length][:items])
    measured = {"loss": [v.loss - v.dense_loss for v in verdicts], "kl": [v.kl for v in verdicts]}
    table = {
        name: {what: round(float(spearmanr(values, real).statistic), 4) for what, real in measured.items()}
        for name, values in predicted.items()
    }
    return {
        "suite": "influence", "model": case.name, "density": 0.0, "method": "all", "length": length,
        "cases": len(measured["kl"]), "spearman": table, "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def cells(options: argparse.Namespace, done: set[Any]) -> Iterator[dict[str, Any]]:
    """Everything asked for that is not done."""
    size = {"nsamples": 2, "held": 2, "windows": 4} if options.smoke else {"nsamples": 32, "held": 32, "windows": 100}
    if options.smoke:
        options.densities, options.models, options.seeds = options.densities[:1], options.models[:1], [0]
    for name, seed in itertools.product(options.models, options.seeds):
        keys = {suite: keys_of(suite, name, options, seed) for suite in ("influence", "perplexity")}
        if name != "tiny-llama" or seed:
            keys["influence"] = []
        wanted = [suite for suite, own in keys.items() if suite in options.suites and not done.issuperset(own)]
        if not wanted:
            continue
        case = text_case(name, options.shared.resolve(), **size, seed=seed)
        if "influence" in wanted:
            yield influence_cell(case, 2 if options.smoke else 16, 1 if options.smoke else RULES_PER_HEAD)
        if "perplexity" in wanted:
            yield from comparison_cells(case, keys["perplexity"], done)
    for seed in options.seeds if "retrieval" in options.suites else ():
        looked_up = keys_of("retrieval", "key-value", options, seed)
        if done.issuperset(looked_up):
            continue
        with tempfile.TemporaryDirectory() as folder:
            smoke = (Path(folder) / "model", 5, 64, 2, 2, 2, seed)
            full = (options.model_cache, options.train_seconds, 1024, 16, 8, 32, seed)
            yield from comparison_cells(retrieval_case(*(smoke if options.smoke else full)), looked_up, done)


def keys_of(suite: str, model: str, options: argparse.Namespace, seed: int) -> list[tuple[Any, ...]]:
    if suite == "influence":
        return [(suite, model, 0.0, "all", 0)]
    return [(suite, model, density, m, seed) for density in options.densities for m in METHODS if m in options.methods]


def main() -> None:
    options = _options()
    if options.render:
        render(options.results, options.page)
        return
    done = {
        (c["suite"], c["model"], c["density"], c["method"], c.get("seed", 0)) for c in read_results(options.results)
    }
    for cell in cells(options, done):
        append_result(options.results, cell)
        print(json.dumps(cell), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--models", nargs="+", choices=list(PROTOCOLS), default=list(PROTOCOLS))
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the calibration text")
    parser.add_argument("--train-seconds", type=float, default=900, help="at most, for the key-value model")
    parser.add_argument("--model-cache", type=Path, default=MODEL_CACHE, help="where the key-value model is kept")
    parser.add_argument("--smoke", action="store_true", help="every suite with hardly any data")
    parser.add_argument("--render", action="store_true", help="run nothing, write the tables into the page")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with models/ and data/")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    return parser.parse_args()


if __name__ == "__main__":
    main()
