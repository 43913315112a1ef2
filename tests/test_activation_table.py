"""The tables of activation policies from lines of results: seed 0 in the table, seeds in the comparison."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import activation_quality


def cell(method: str, seed: int, after: float, **more: Any) -> dict[str, Any]:
    return {
        "model": "tiny-opt", "weights": "dense", "seed": seed, "method": method, "target": 0.5, "before": 59.5,
        "after": after, "realised": 0.499, "windows": 200, "nsamples": 64,
    } | more  # fmt: skip


def test_the_comparison_is_with_the_best_rival_that_has_the_seeds() -> None:
    lines = [cell("auto", seed, value) for seed, value in enumerate((60.0, 60.5, 60.25))]
    lines += [cell("wina", seed, value) for seed, value in enumerate((61.0, 61.0, 61.5))]
    lines += [cell("threshold", seed, value) for seed, value in enumerate((70.0, 70.0, 70.0))]
    lines += [cell("rsparse", 0, 59.75), cell("coreinfer", 0, 50.0, target=0.2)]
    page = activation_quality.tables(lines)
    assert "| auto | 60.000 (49.9) |" in page
    assert "| rsparse | 59.750 (49.9) |" in page
    assert "- 50%: auto - wina: -0.917, standard error 0.220, 3 seeds: the claim holds" in page
    assert page.count("auto - ") == 1
    assert "Over calibration seeds" not in activation_quality.tables([line for line in lines if line["seed"] == 0])


def test_combinations_are_of_one_seed() -> None:
    lines = [cell("auto", 0, 60.0), cell("auto", 1, 99.0), cell("auto", 0, 65.0, weights="2:4", before=62.0)]
    page = activation_quality.tables(lines)
    assert "| tiny-opt | dense | 59.500 | - | 60.000 (49.9) |" in page
    assert "| tiny-opt | 2:4 | 62.000 | - | 65.000 (49.9) |" in page
