"""IMP: the schedule by hand, exact counts in every scope, masks that only shrink, and the loop with a toy training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gossamer.errors import ModelError, RecipeError
from gossamer.pruning.imp import Phase, phase_patterns, phase_rate, phase_sparsity, run_phases, tighten
from gossamer.pruning.mask import Mask
from gossamer.pruning.pattern import NM, Block, Unstructured, parse_pattern
from gossamer.pruning.random_search import best, random_masks, share


def weights(**shapes: tuple[int, int]) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


# ---- the schedule --------------------------------------------------------------------------------------------------


def test_rates_by_hand() -> None:
    assert phase_rate(0.75, 2) == pytest.approx(0.5)  # half, then half of the half
    assert [phase_sparsity(0.75, 2, p) for p in (0, 1, 2)] == pytest.approx([0.0, 0.5, 0.75])
    assert phase_rate(0.9, 3) == pytest.approx(1 - 0.1 ** (1 / 3))
    assert [phase_sparsity(0.9, 3, p) for p in (1, 2, 3)] == pytest.approx([0.5358411, 0.7845565, 0.9])
    assert phase_sparsity(0.9, 3, 3) == 0.9  # exactly
    # From half of the weights: 1 - 0.5 * 0.5 in the first of two phases to 0.875.
    assert [phase_sparsity(0.875, 2, p, before=0.5) for p in (0, 1, 2)] == pytest.approx([0.5, 0.75, 0.875])


def test_every_phase_prunes_the_same_share_of_what_is_left() -> None:
    left = [1 - phase_sparsity(0.93, 5, p, before=0.2) for p in range(6)]
    shares = [1 - after / before for before, after in zip(left, left[1:], strict=False)]
    assert shares == pytest.approx([phase_rate(0.93, 5, 0.2)] * 5)


def test_patterns_of_the_phases() -> None:
    assert [str(p) for p in phase_patterns(NM(1, 8), 3)] == ["4:8", "2:8", "1:8"]
    assert [str(p) for p in phase_patterns(NM(2, 4), 3)] == ["3:4", "3:4", "2:4"]
    assert [str(p) for p in phase_patterns(NM(1, 16), 1)] == ["1:16"]
    assert [p.sparsity for p in phase_patterns(Block(2, 4, 0.75), 2)] == pytest.approx([0.5, 0.75])
    assert [(p.sparsity, p.scope) for p in phase_patterns(Unstructured(0.75, "model"), 2)] == [
        (pytest.approx(0.5), "model"), (0.75, "model"),
    ]  # fmt: skip


def test_a_target_below_what_is_pruned_is_refused() -> None:
    for phases in (1, 3):
        with pytest.raises(RecipeError, match=r"0\.5 is below the 0\.6"):
            phase_patterns(Unstructured(0.5), phases, before=0.6)
    with pytest.raises(RecipeError, match="at least 1"):
        phase_rate(0.5, 0)


# ---- the masks -----------------------------------------------------------------------------------------------------


def test_a_phase_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0, 0.5, 0.0, 8.0], [9.0, 0.1, 0.2, 0.3, 7.0, 7.0, 7.0, 7.0]])
    first = tighten({"w": weight}, {}, Unstructured(0.25, "matrix"))["w"].to_bool()
    # The four smallest: 0.0 above, 0.1, 0.2, 0.3 below.
    assert first.int().tolist() == [[1, 1, 1, 1, 1, 1, 0, 1], [1, 0, 0, 0, 1, 1, 1, 1]]
    trained = weight.clone()
    trained[0, 6] = 100.0  # pruned: must stay so whatever is stored there
    trained[0, 0] = 0.0  # kept, and now the smallest of all
    second = tighten({"w": trained}, {"w": Mask.from_bool(first, "")}, Unstructured(0.5, "matrix"))["w"].to_bool()
    # Four more: 0.0, 0.5, 2.0 and 3.0.
    assert second.int().tolist() == [[0, 0, 0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 1, 1, 1, 1]]
    # Three more: 4.0, 5.0 and, of the four 7.0, the one with the highest index.
    third = tighten({"w": trained}, {"w": Mask.from_bool(second, "")}, Unstructured(11 / 16, "matrix"))["w"].to_bool()
    assert third.int().tolist() == [[0, 0, 0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 1, 1, 1, 0]]


@pytest.mark.parametrize("text", ["0.9", "0.37"])
@pytest.mark.parametrize("scope", ["row", "matrix", "model"])
def test_counts_are_exact_and_masks_only_shrink(text: str, scope: str) -> None:
    pattern = parse_pattern(text, scope)
    made = weights(a=(7, 13), b=(5, 16), c=(1, 9))
    made["b"][:, 3:9] = 0.25  # ties
    masks: dict[str, Mask] = {}
    for now in phase_patterns(pattern, 3):
        new = tighten(made, masks, now)
        total = sum(mask.zeros for mask in new.values())
        if scope == "model":
            assert total == round(now.sparsity * 180)
        else:
            assert [new[n].zeros for n in made] == [now.zeros(*made[n].shape) for n in made]
        for name, mask in new.items():
            if name in masks:
                assert not bool((mask.to_bool() & ~masks[name].to_bool()).any())
        masks = new
        for name in made:  # "training": everything moves, the pruned entries too
            made[name] = made[name] + torch.randn(made[name].shape, generator=torch.Generator().manual_seed(5))


def test_model_scope_equals_one_big_sort() -> None:
    made = weights(a=(6, 11), b=(4, 20))
    made["b"] *= 3
    first = tighten(made, {}, Unstructured(0.4, "model"))
    second = tighten(made, first, Unstructured(0.8, "model"))
    everything = torch.cat([weight.abs().flatten() for weight in made.values()])
    kept = torch.cat([second[name].to_bool().flatten() for name in made])
    assert set(everything[kept].tolist()) == set(everything.sort(descending=True).values[: int(kept.sum())].tolist())
    assert int((~kept).sum()) == round(0.8 * 146)


def test_groups_and_blocks_shrink_too() -> None:
    made = weights(a=(4, 16))
    masks: dict[str, Mask] = {}
    for keep, now in zip((4, 2, 1), phase_patterns(NM(1, 8), 3), strict=True):
        masks = tighten(made, masks, now)
        assert bool((masks["a"].to_bool().view(4, 2, 8).sum(-1) == keep).all())
        made["a"] = made["a"].flip(1)
    masks = {}
    for now in phase_patterns(Block(2, 4, 0.75), 2):
        masks = tighten(made, masks, now)
        tiles = masks["a"].to_bool().view(2, 2, 4, 4).sum((1, 3))
        assert set(tiles.unique().tolist()) == {0, 8}
        assert int((tiles == 0).sum()) == round(now.sparsity * 8)
        made["a"] = -made["a"].flip(0)  # large where it was pruned


def test_blocks_after_an_unstructured_mask_prune_the_emptiest_first() -> None:
    weight = torch.ones(2, 8)
    before = torch.ones(2, 8, dtype=torch.bool)
    before[0, :4] = False
    before[1, 6] = False
    found = tighten({"a": weight}, {"a": Mask.from_bool(before, "")}, Block(1, 4, 0.5))["a"].to_bool()
    assert found.int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0]]


def test_what_earlier_masks_pruned_beyond_the_pattern_stays_pruned() -> None:
    made = weights(a=(2, 8))
    before = torch.zeros(2, 8, dtype=torch.bool)
    before[1] = True
    found = tighten(made, {"a": Mask.from_bool(before, "")}, Unstructured(0.25, "row"))["a"]
    assert not bool(found.to_bool()[0].any())
    assert int(found.to_bool()[1].sum()) == 6


def test_scores_that_are_no_numbers_are_refused() -> None:
    made = {"a.b": torch.tensor([[1.0, math.nan]])}
    for scope in ("row", "model"):
        with pytest.raises(ModelError, match=r"a\.b: scores must be finite"):
            tighten(made, {}, Unstructured(0.5, scope))
    with pytest.raises(RecipeError, match="6 inputs are not a multiple of 4"):
        tighten({"x": torch.ones(2, 6)}, {}, NM(2, 4))


# ---- the loop ------------------------------------------------------------------------------------------------------


def test_imp_with_a_toy_training_and_resume() -> None:
    """Training that pulls the kept weights to a target: after it every phase sees its own result."""
    target = torch.arange(1.0, 97.0).view(6, 16)

    def run(model: dict[str, Any], first: int = 1) -> list[tuple[int, int]]:
        def prune(model: dict[str, Any], phase: Phase) -> None:
            model["masks"] = tighten({"w": model["w"]}, model["masks"], phase.pattern)
            model["w"] = model["masks"]["w"].apply(model["w"])

        def retrain(model: dict[str, Any], phase: Phase) -> dict[str, Any]:
            model["w"] = model["masks"]["w"].apply((model["w"] + target) / 2)
            return {"zeros": int((model["w"] == 0).sum())}

        patterns = phase_patterns(Unstructured(0.875, "matrix"), 3)
        return [(p.number, m["zeros"]) for p, m in run_phases(model, patterns, prune, retrain, first=first)]

    start = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    whole = {"w": start.clone(), "masks": {}}
    assert run(whole) == [(1, 48), (2, 72), (3, 84)]

    halted = {"w": start.clone(), "masks": {}}
    patterns = phase_patterns(Unstructured(0.875, "matrix"), 3)
    halted["masks"] = tighten({"w": halted["w"]}, {}, patterns[0])
    halted["w"] = halted["masks"]["w"].apply((halted["masks"]["w"].apply(halted["w"]) + target) / 2)
    assert run(halted, first=2) == [(2, 72), (3, 84)]
    assert torch.equal(halted["w"], whole["w"])


# ---- the random baseline -------------------------------------------------------------------------------------------


def test_random_subnetworks_have_the_count_and_depend_on_seed_and_name_alone() -> None:
    made = weights(a=(6, 16), b=(6, 16))
    first = random_masks(made, {}, Unstructured(0.7, "model"), seed=3)
    again = random_masks({name: w * 2 + 1 for name, w in made.items()}, {}, Unstructured(0.7, "model"), seed=3)
    other = random_masks(made, {}, Unstructured(0.7, "model"), seed=4)
    assert sum(mask.zeros for mask in first.values()) == round(0.7 * 192)
    assert all(torch.equal(first[n].bits, again[n].bits) for n in made)
    assert not torch.equal(first["a"].bits, other["a"].bits)
    assert not torch.equal(first["a"].bits, first["b"].bits)
    inside = random_masks(made, first, Unstructured(0.9, "matrix"), seed=9)
    assert all(not bool((inside[n].to_bool() & ~first[n].to_bool()).any()) for n in made)
    assert bool((random_masks(made, {}, NM(1, 4), 0)["a"].to_bool().view(6, 4, 4).sum(-1) == 1).all())


def test_the_budget_is_shared_and_the_best_taken() -> None:
    assert share(100, 8) == 12
    for steps, tries in ((3, 4), (5, 0)):
        with pytest.raises(RecipeError, match="cannot be shared"):
            share(steps, tries)
    assert best([{"heldout_loss": 2.0}, {"heldout_loss": 1.0}, {"heldout_loss": 1.0}]) == 1
