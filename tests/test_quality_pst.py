"""The pure parts of the PST quality suite: which lines are run, that both sides train as many numbers, the verdict."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import quality_pst as suite
from quality_pst import DENSE, EQUAL, PST, ROWS, best_rate, key, render, stages, wanted


def cell(row: str, seed: int, after: float, **more: Any) -> dict[str, Any]:
    return {
        "kind": "cell", "model": "stories260k", "row": row, "sparsity": None if row == DENSE else "0.7", "seed": seed,
        "tokens": 500_000, "rate": 0.003, "before": 4.0, "after": after, "heldout": 1.0, "trained": 1234,
    } | more  # fmt: skip


def test_every_row_has_as_many_trials():
    lines = wanted(suite._options(["--search"]), [])
    assert len({key(line) for line in lines}) == len(lines) == 2 * 3 * (3 * (len(ROWS) - 1) + 1)  # dense: no sparsity
    assert {(line["model"], line["tokens"]) for line in lines} == {("stories260k", 125_000), ("tiny-llama", 50_000)}


def test_every_line_is_a_recipe(tmp_path):
    for line in [*wanted(suite._options([]), []), *wanted(suite._options(["--search"]), [])]:
        kinds = [stage.stage for stage in stages(line, tmp_path)]
        assert kinds[: len(kinds) - (line["kind"] == "cell")] == (
            ["finetune"] if line["row"] in (DENSE, PST) else ["prune", "finetune"]
        )
        if line["kind"] == "trial":
            assert "evaluation" not in str(stages(line, tmp_path))


@pytest.mark.parametrize("row", EQUAL)
def test_as_many_numbers_are_trained(tiny, row):
    from transformers import AutoModelForCausalLM

    from gossamer.finetune.methods import get_method

    def trained(line: dict[str, Any]) -> int:
        stage = next(s for s in stages(line, Path()) if s.stage == "finetune")
        model = AutoModelForCausalLM.from_pretrained(tiny)
        names = [n for n, p in model.named_parameters() if "layers" in n and p.dim() == 2]
        masks = {} if line["row"] == PST else {n: model.get_parameter(n) != 0 for n in names}
        get_method(stage.method).attach(model, masks, names, stage.model_dump(), 0)
        return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "norm" not in n)

    head = AutoModelForCausalLM.from_pretrained(tiny).lm_head.weight.numel()
    assert trained(cell(row, 0, 1.0)) == trained(cell(PST, 0, 1.0)) - head


def test_the_best_trial_wins_and_its_cells_count():
    trials = [cell(PST, 0, 9.0, kind="trial", heldout=h, rate=r) for h, r in ((2.0, 0.1), (1.0, 0.2), (3.0, 0.3))]
    assert best_rate(trials, "stories260k", PST, "0.7") == 0.2
    assert best_rate(trials, "stories260k", PST, "0.5") is None
    lines = [*trials, cell(PST, 0, 9.0, rate=0.1), cell(PST, 1, 8.0, rate=0.2)]
    assert list(suite.final_cells(lines, "stories260k")[PST, "0.7"]) == [1]
    found = wanted(suite._options(["--rows", PST, "--models", "stories260k", "--sparsities", "0.7", "0.9"]), lines)
    assert [line["rate"] for line in found] == [0.2, suite.rates(PST)[1]]


def test_the_page_and_its_verdict():
    lines = [cell(PST, s, 8.0 + s) for s in range(3)] + [cell("wanda + masklora", s, 9.0 + s) for s in range(3)]
    lines += [cell("magnitude + masklora", s, 19.0 + s) for s in range(3)] + [cell("magnitude + full", 0, 5.0)]
    page = render(lines)
    assert "| pst | 1,234 | - | 9.000 (8.000 to 10.000) | - | -, 0.003, - |" in page
    assert "- 0.7: pst - wanda + masklora: -1.000, standard error 0.000, 3 seeds: the claim holds" in page
    one = render([cell(PST, 0, 8.0), cell("magnitude + masklora", 0, 7.0)])
    assert "- 0.7: pst - magnitude + masklora: +1.000, one seed: decides nothing" in one
    assert "not measured" in render([cell(PST, 0, 8.0)])
