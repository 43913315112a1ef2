"""PST: forward and gradients against autograd with an explicit straight-through mask, schedules, exact export."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from gossamer.errors import RecipeError
from gossamer.finetune.pst import PstConfig, PstWeight, cubic_sparsity
from gossamer.pruning.pattern import NM, Block, Unstructured

HALF = Unstructured(0.5, "matrix")


def filled(weight, pattern, config=None, **options) -> PstWeight:
    """All factors random, so that every path has a gradient."""
    made = PstWeight(weight, pattern, config, **options)
    generator = torch.Generator().manual_seed(7)
    for parameter in made.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made.double()


def straight_through(pst: PstWeight, weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The paper's forward pass written out, with M = S + (M - S) without gradient."""
    c = pst.config
    effective = weight + c.beta * pst.left @ pst.right
    score = effective.abs() + c.alpha * pst.score_left @ pst.score_right
    score = score + c.gamma * (pst.row_score[:, None] + pst.column_score[None, :])
    mask = score + (keep.double() - score).detach()
    return mask * effective


@pytest.mark.parametrize(("rows", "cols"), [(6, 8), (5, 16), (1, 8)])
@pytest.mark.parametrize("pattern", [HALF, NM(1, 4), NM(2, 8)])
def test_values_and_gradients(rows, cols, pattern):
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pst = filled(weight, pattern, PstConfig(rank=2, score_rank=3, beta=0.7, alpha=1.3, gamma=0.4, warmup=0, tail=1))
    pst.advance(weight, 0, 10)
    out = pst(weight)
    keep = out != 0
    assert int((~keep).sum()) == pattern.zeros(rows, cols)
    probe = torch.randn(rows, cols, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = torch.autograd.grad((out * probe).sum(), list(pst.parameters()))
    expected = torch.autograd.grad((straight_through(pst, weight, keep) * probe).sum(), list(pst.parameters()))
    for (name, _), a, b in zip(pst.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_it_begins_as_the_weight_and_keeps_nothing_of_its_size():
    """Zero factors: the first pass is the weight; what is saved for backward is references and thin factors."""
    layer = nn.Linear(64, 48, bias=False)
    before = layer.weight.detach().clone()
    layer.weight.requires_grad_(False)
    parametrize.register_parametrization(
        layer, "weight", PstWeight(layer.weight, HALF, PstConfig(rank=2, score_rank=2))
    )
    own = layer.parametrizations.weight.original.data_ptr()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x = torch.randn(3, 64)
        y = layer(x)
    torch.testing.assert_close(y, x @ before.t())
    big = [t for t in saved if t.numel() >= before.numel() and t.data_ptr() != own]
    assert len(big) <= 1  # the product's own reference to its weight
    assert layer.parametrizations.weight[0].trainable == (64 + 48) * 4 + 64 + 48


def test_schedule_by_hand():
    config = PstConfig(initial=0.2, warmup=0.25, tail=0.25)
    found = [cubic_sparsity(step, 8, 0.9, config) for step in (0, 2, 3, 4, 5, 6, 7)]
    ramp = [0.9 - 0.7 * (1 - x) ** 3 for x in (0.25, 0.5, 0.75)]
    assert found == pytest.approx([0.2, 0.2, *ramp, 0.9, 0.9])
    assert cubic_sparsity(0, 8, 0.9, PstConfig(warmup=0, tail=1)) == 0.9


@pytest.mark.parametrize("transposed", [False, True])
def test_export_is_exact_and_only_shrinks_an_earlier_mask(transposed):
    weight = torch.randn(12, 16, generator=torch.Generator().manual_seed(3))
    allowed = torch.rand(12, 16, generator=torch.Generator().manual_seed(4)) > 0.3
    weight[~allowed] = 0
    stored = weight.t().contiguous() if transposed else weight
    pst = filled(stored, Unstructured(0.6, "matrix"), allowed=allowed, transposed=transposed).float()
    pst.advance(stored, 9, 10)
    out, keep = pst.finish(stored)
    assert out.shape == keep.shape == stored.shape
    matrix, mask = (out.t(), keep.t()) if transposed else (out, keep)
    assert int((~mask).sum()) == round(0.6 * 192)
    assert not bool((mask & ~allowed).any())
    assert torch.equal(matrix != 0, mask)
    effective = weight + pst.left @ pst.right
    assert torch.equal(matrix[mask], effective[mask].detach())


def test_groups_never_choose_a_pruned_weight():
    allowed = torch.tensor([[True, False, True, True, False, False, False, True]])
    weight = torch.randn(1, 8) * allowed
    pst = filled(weight, NM(2, 4), PstConfig(warmup=0), allowed=allowed).float()
    pst.advance(weight, 5, 10)
    with torch.no_grad():
        out = pst(weight)
    assert not bool((out[~allowed] != 0).any())
    assert int((out[0, :4] != 0).sum()) == 2
    assert int((out[0, 4:] != 0).sum()) == 1


def test_the_threshold_waits_for_its_turn_and_survives_a_checkpoint():
    weight = torch.randn(8, 8)
    pst = PstWeight(weight, HALF, PstConfig(refresh=4, warmup=0, tail=0.5))
    assert float(pst.threshold) == -math.inf
    pst.advance(weight, 80, 100)
    first = float(pst.threshold)
    pst.right.data.fill_(0.5)
    pst.advance(weight, 81, 100)
    assert float(pst.threshold) == first
    again = PstWeight(weight, HALF, PstConfig(refresh=4, warmup=0, tail=0.5))
    again.load_state_dict(pst.state_dict())
    assert torch.equal(again(weight), pst(weight))
    pst.advance(weight, 84, 100)
    assert float(pst.threshold) != first


@pytest.mark.parametrize("steps", [1, 8, 10, 25, 93])
def test_short_runs_prune_while_they_train(steps):
    """The last steps are trained under the sparsity asked for, and so is whatever comes before by the schedule."""
    weight = torch.randn(40, 50)
    pst = PstWeight(weight, HALF)
    for step in range(steps):
        pst.advance(weight, step, steps)
        share = float((pst(weight) == 0).float().mean())
        assert share == pytest.approx(float(pst.sparsity), abs=0.25 if steps > 25 else 0.02)
    if steps > 1:
        assert share == pytest.approx(0.5, abs=1e-3)


def test_autocast_does_not_move_the_mask():
    weight = torch.randn(64, 48)
    pst = PstWeight(weight, HALF, PstConfig(warmup=0, tail=1.0))
    for parameter in pst.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pst.advance(weight, 0, 10)
    wanted = pst(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pst(weight), wanted)


def test_what_cannot_be_done_is_refused():
    weight = torch.zeros(4, 6)
    with pytest.raises(RecipeError, match="unstructured or N:M"):
        PstWeight(weight, Block(2, 2, 0.5))
    with pytest.raises(RecipeError, match="not a multiple of 4"):
        PstWeight(weight, NM(2, 4))
    for wrong in ({"rank": 0}, {"initial": 1.0}, {"warmup": 0.8, "tail": 0.3}):
        with pytest.raises(RecipeError):
            PstConfig(**wrong)
