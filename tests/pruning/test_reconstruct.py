"""Local reconstruction: zeros stay zero, held-out error never rises, order of the samples is fixed by the seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gossamer.pruning.reconstruct import ReconstructOptions, reconstruct


def window(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))


def task(seed: int = 0) -> tuple[nn.Sequential, dict[str, Tensor], list[Tensor], list[Tensor]]:
    """A window with a third of its weights gone, and the intact window's outputs as targets."""
    module = window(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = [torch.randn(1, 16, 12, generator=generator) for _ in range(20)]
    with torch.no_grad():
        targets = [module(x) for x in inputs]
        masks = {}
        for name in ("1.weight", "3.weight"):
            weight = module.get_parameter(name)
            masks[name] = torch.rand(weight.shape, generator=generator) > 0.33
            weight.masked_fill_(~masks[name], 0.0)
    return module, masks, inputs, targets


def test_lowers_the_error_and_keeps_zeros() -> None:
    module, masks, inputs, targets = task()
    result = reconstruct(module, lambda x, i: module(x), masks, inputs, targets, ReconstructOptions(epochs=16, batch=4))
    assert result.after < 0.5 * result.before
    assert result.steps == 16 * 5  # 18 training samples in batches of 4
    for name, mask in masks.items():
        weight = module.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert not torch.signbit(weight[~mask]).any()
        assert weight.grad is None


def test_only_masked_parameters_move_unless_asked() -> None:
    for train_all in (False, True):
        module, masks, inputs, targets = task()
        frozen = module[0].weight.detach().clone(), module[1].bias.detach().clone()
        options = ReconstructOptions(train_all=train_all)
        reconstruct(module, lambda x, i, m=module: m(x), masks, inputs, targets, options)
        moved = [not torch.equal(a, b) for a, b in zip(frozen, (module[0].weight, module[1].bias), strict=True)]
        assert moved == [train_all, train_all]


def test_never_worse_on_held_out() -> None:
    """A rate that destroys the window leaves it exactly as it came."""
    module, masks, inputs, targets = task()
    before = {name: value.detach().clone() for name, value in module.state_dict().items()}
    result = reconstruct(module, lambda x, i: module(x), masks, inputs, targets, ReconstructOptions(rate=1e4))
    assert result.after == result.before
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_diverging_window_is_restored() -> None:
    module, masks, inputs, targets = task()
    before = module[1].weight.detach().clone()
    result = reconstruct(module, lambda x, i: module(x), masks, inputs, targets, ReconstructOptions(rate=1e38))
    assert result.after == result.before
    assert torch.equal(module[1].weight, before)


def test_deterministic_and_requires_grad_restored() -> None:
    results = []
    for _ in range(2):
        module, masks, inputs, targets = task(seed=3)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        torch.manual_seed(len(results))  # the global state must not matter
        reconstruct(module, lambda x, i, m=module: m(x), masks, inputs, targets)
        assert not any(parameter.requires_grad for parameter in module.parameters())
        results.append(module[3].weight.detach().clone())
    assert torch.equal(*results)


def test_forward_gets_the_sample_number() -> None:
    module, masks, inputs, targets = task()
    seen = set()

    def forward(x: Tensor, index: int) -> Tensor:
        assert torch.equal(x, inputs[index])
        seen.add(index)
        return module(x)

    reconstruct(module, forward, masks, inputs, targets, ReconstructOptions(epochs=1))
    assert seen == set(range(20))


def test_a_dead_matrix_stays_dead() -> None:
    module, masks, inputs, targets = task()
    with torch.no_grad():
        module[1].weight.zero_()
    masks["1.weight"] = torch.zeros_like(masks["1.weight"])
    reconstruct(module, lambda x, i: module(x), masks, inputs, targets)
    assert (module[1].weight == 0).all()


def test_bad_arguments() -> None:
    module, masks, inputs, targets = task()

    def forward(x: Tensor, index: int) -> Tensor:
        return module(x)

    with pytest.raises(ValueError, match="at least 2 pairs"):
        reconstruct(module, forward, masks, inputs[:1], targets[:1])
    with pytest.raises(ValueError, match="no parameter 'x.weight'"):
        reconstruct(module, forward, {"x.weight": masks["1.weight"]}, inputs, targets)
    with pytest.raises(ValueError, match="the mask of '1.weight'"):
        reconstruct(module, forward, {"1.weight": masks["1.weight"].T}, inputs, targets)
    with pytest.raises(ValueError, match="before any training"):
        reconstruct(module, forward, masks, inputs, [torch.full_like(t, torch.nan) for t in targets])
    for options in ({"epochs": 0}, {"batch": 0}, {"rate": 0.0}, {"holdout": 1.0}):
        with pytest.raises(ValueError, match="epochs and batch"):
            ReconstructOptions(**options)
