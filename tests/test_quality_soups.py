"""The pure parts of the soups quality suite: which lines are run, which options win, when a claim holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import quality_soups as suite
from quality_soups import (
    DENSE,
    IMP,
    ONE_SHOT,
    RATES,
    ROWS,
    SOUPS,
    at,
    best_options,
    key,
    paired,
    render,
    stages,
    trials,
    wanted,
)


def cell(row: str, seed: int, after: float, **more: Any) -> dict[str, Any]:
    return {
        "kind": "cell", "model": "stories260k", "row": row, "sparsity": None if row == DENSE else "0.9", "seed": seed,
        "tokens": 500_000, "options": {"learning_rate": 0.001}, "before": 4.0, "after": after, "heldout": 1.0,
    } | more  # fmt: skip


def test_every_row_that_trains_has_as_many_trials() -> None:
    for model, tokens in (("stories260k", 125_000), ("tiny-llama", 50_000)):
        each = 2 * len(RATES[model][None])
        every = {(row, at(row, sparsity)) for row in ROWS for sparsity in suite.SPARSITIES if row != ONE_SHOT}
        assert {len(trials(model, *one)) for one in every} == {each}
        lines = wanted(suite._options(["--search", "--models", model]), [])
        rows = 2 * (len(ROWS) - len(SOUPS)) - 1  # two sparsities; the dense row has none, soups those of one
        assert len({key(line) for line in lines}) == len(lines) == each * rows
        assert {line["tokens"] for line in lines} == {tokens}


def test_every_line_is_a_recipe(tmp_path: Path) -> None:
    lines = [*wanted(suite._options([]), []), *wanted(suite._options(["--search"]), [])]
    for line in lines:
        kinds = [stage.stage for stage in stages(line, tmp_path)]
        assert (kinds[-1] == "evaluate") == (line["kind"] == "cell")
        assert kinds[0] == {DENSE: "finetune", ONE_SHOT: "prune"}.get(
            line["row"], "soup" if line["row"] in SOUPS else "imp"
        )
        if line["kind"] == "trial":
            assert "evaluation" not in str(stages(line, tmp_path))


def test_the_best_trial_wins() -> None:
    found = [cell(IMP, 0, 9.0, kind="trial", heldout=h, options={"learning_rate": r}) for h, r in ((2, 0.1), (1, 0.2))]
    assert best_options(found, "stories260k", IMP, "0.9") == {"learning_rate": 0.2}
    assert best_options(found, "stories260k", IMP, "0.7") == trials("stories260k", IMP, "0.7")[0]
    assert best_options(found, "tiny-llama", IMP, "0.9") == trials("tiny-llama", IMP, "0.9")[0]
    of_soups = cell("soup m=3 uniform", 0, 9.0, kind="trial", heldout=1.0, options={"learning_rate": 0.3})
    assert {best_options([of_soups], "stories260k", row, "0.9")["learning_rate"] for row in SOUPS} == {0.3}


def test_cells_of_options_that_lost_do_not_count() -> None:
    trial = cell(IMP, 0, 9.0, kind="trial", heldout=1.0, options={"learning_rate": 0.3})
    lines = [trial, cell(IMP, 0, 9.0), cell(IMP, 1, 8.0, options={"learning_rate": 0.3})]
    assert suite.final_cells(lines, "stories260k") == {(IMP, "0.9"): {1: 8.0}}
    assert suite.final_cells(lines[1:2], "stories260k") == {(IMP, "0.9"): {0: 9.0}}


def test_when_a_claim_holds() -> None:
    theirs = {0: 10.0, 1: 11.0, 2: 12.0}
    assert paired({0: 9.0, 1: 10.1, 2: 10.9}, theirs).endswith("the claim holds")
    assert paired({0: 9.0, 1: 12.0, 2: 11.0}, theirs).endswith("the claim fails")
    assert paired({0: 11.0, 1: 12.0, 2: 13.0}, theirs).endswith("the claim fails")
    assert "decides nothing" in paired({0: 9.0}, theirs)
    assert paired({5: 9.0}, theirs) == "not measured"


def test_the_page_has_the_derived_rows() -> None:
    lines = [cell(IMP, s, 9.0 + s) for s in range(3)]
    lines += [cell("soup m=3 greedy", s, 8.0 + s, best=8.5 + s, ensemble=7.9 + s) for s in range(3)]
    page = render(lines)
    assert "| soup m=3 greedy | - | 9.000 (8.000 to 10.000) |" in page
    assert "| best of soup m=3 greedy | - | 9.500 (8.500 to 10.500) |" in page
    assert "soup m=3 greedy - imp: -1.000, standard error 0.000, 3 seeds: the claim holds" in page
