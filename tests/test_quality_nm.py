"""The pure parts of the N:M quality suite: which lines are run, which options win, when the claim holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import quality_nm
from quality_nm import DENSE, ONE_SHOT, ROWS, best_options, key, render, stages, trials, verdict, wanted

from gossamer.compress.recipe import EvaluateStage, FinetuneStage, NmFlowStage, PruneStage


def cell(row: str, seed: int, after: float, pattern: str | None = "1:8", **more: Any) -> dict[str, Any]:
    return {
        "kind": "cell", "row": row, "pattern": pattern, "seed": seed, "tokens": 200_000,
        "options": {"learning_rate": 0.001}, "before": 4.5, "after": after, "heldout": 1.0,
    } | more  # fmt: skip


def test_every_row_has_as_many_trials():
    assert {len(trials(row)) for row in ROWS} == {6}
    options = quality_nm._options(["--search"])
    lines = wanted(options, [])
    assert len({key(line) for line in lines}) == len(lines) == 6 * len(ROWS)
    assert {line["tokens"] for line in lines} == {50_000}


def test_every_line_is_a_recipe(tmp_path):
    options = quality_nm._options([])
    for line in [*wanted(options, []), *wanted(quality_nm._options(["--search"]), [])]:
        kinds = [type(stage) for stage in stages(line, tmp_path)]
        trained = [FinetuneStage] if line["row"] in (DENSE, ONE_SHOT) else [NmFlowStage]
        first = [PruneStage] if line["row"] == ONE_SHOT else []
        assert kinds == first + trained + ([EvaluateStage] if line["kind"] == "cell" else [])


def test_the_dense_row_is_run_once_per_seed():
    lines = wanted(quality_nm._options(["--seeds", "0", "1"]), [])
    assert sum(line["row"] == DENSE for line in lines) == 2
    assert len(lines) == 2 * (1 + 4 * (len(ROWS) - 1))


def test_the_trial_with_the_lowest_loss_wins_and_infinite_ones_never():
    found = [
        {"kind": "trial", "row": "ste", "options": {"a": 1}, "heldout": 2.0},
        {"kind": "trial", "row": "ste", "options": {"a": 2}, "heldout": 1.5},
        {"kind": "trial", "row": "ste", "options": {"a": 3}, "heldout": float("nan")},
        {"kind": "trial", "row": "sr-ste", "options": {"a": 4}, "heldout": 0.5},
    ]
    assert best_options(found, "ste") == {"a": 2}
    assert best_options(found, "mdgf-exp") == trials("mdgf-exp")[0]


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ([9.0, 9.1, 8.9], "mdgf-exp - sr-ste = -1.000, standard error 0.058, 3 seeds: the claim holds"),
        ([10.5, 9.0, 9.9], "the claim fails"),  # -0.2, but with an error of 0.44
        ([11.0, 11.1, 10.9], "the claim fails"),
        ([9.0], "one seed: decides nothing"),
    ],
)
def test_the_claim_needs_twice_its_standard_error(ours, said):
    lines = [cell("sr-ste", seed, 10.0) for seed in range(3)]
    lines += [cell("mdgf-exp", seed, value) for seed, value in enumerate(ours)]
    lines += [cell("sdgf-stepwise", seed, 50.0) for seed in range(3)]
    assert said in verdict(lines, "1:8")


def test_the_page_has_every_row_and_the_last_line_of_a_cell_counts():
    lines = [cell("sr-ste", 0, 99.0), cell("sr-ste", 0, 10.0), cell("sr-ste", 1, 12.0), cell(DENSE, 0, 4.2, None)]
    page = render(lines)
    assert "| sr-ste | - | - | 11.00 (10.00 to 12.00) | - |" in page
    assert f"| {DENSE} | 4.20 | same | same | same |" in page
    assert all(f"\n| {row} |" in page for row in ROWS)
    assert "- 1:16: not measured" in page


def test_the_evaluation_text_does_not_choose_the_row():
    """Lower on the evaluation text, but not on held-out rows: it is not the row that the claim is about."""
    lines = [cell("sr-ste", seed, 10.0) for seed in range(3)]
    lines += [cell("mdgf-exp", seed, 9.0 - seed / 100, heldout=1.2) for seed in range(3)]
    lines += [cell("sdgf-stepwise", seed, 11.0 + seed / 100, heldout=1.1) for seed in range(3)]
    assert verdict(lines, "1:8").startswith("sdgf-stepwise")
