"""The guard: what is pruned stays +0.0 through every optimizer, and a save without it fails."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.errors import TrainingError
from gossamer.finetune.masked import MaskGuard
from gossamer.pruning.mask import Mask


class Two(nn.Module):
    """Two matrices of awkward shapes and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(9, 7)
        self.second = nn.Linear(7, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def masks_of(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.rand(p.shape, generator=generator) > 0.6 for name, p in model.named_parameters() if p.dim() == 2
    }


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(6, 9, generator=generator), torch.randn(6, 5, generator=generator)) for _ in range(count)]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "nesterov and decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.2),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_equal_to_training_the_kept_weights_alone(make):
    """Reference: only the kept entries exist, as one parameter each; so nothing can leak in from pruned ones."""
    torch.manual_seed(0)
    model = Two()
    masks = masks_of(model)
    reference = Two()
    reference.load_state_dict(model.state_dict())
    kept = {name: nn.Parameter(reference.get_parameter(name)[mask].detach().clone()) for name, mask in masks.items()}
    bias = nn.Parameter(reference.first.bias.detach().clone())
    other = make([kept["first.weight"], bias, kept["second.weight"]])
    guard = MaskGuard(model, masks)
    optimizer = make(model.parameters())
    guard.watch(optimizer)
    guard.watch(optimizer)  # idempotent
    guard.attach()
    for x, y in batches(200):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        guard.prove()
        other.zero_grad()
        full = {n: torch.zeros(m.shape).masked_scatter(m, kept[n]) for n, m in masks.items()} | {"first.bias": bias}
        (torch.func.functional_call(reference, full, (x,)) - y).square().mean().backward()
        nn.utils.clip_grad_norm_([kept["first.weight"], bias, kept["second.weight"]], 0.3)
        other.step()
    for name, mask in masks.items():
        found = model.get_parameter(name).detach()
        torch.testing.assert_close(found[mask], kept[name].detach(), rtol=2e-4, atol=2e-5)
        assert torch.equal(found[~mask], torch.zeros(int((~mask).sum())))
        assert not torch.signbit(found[~mask]).any()
        for value in optimizer.state[model.get_parameter(name)].values():
            if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                assert not value[~mask].any()
    assert guard.prove() == sum(int((~mask).sum()) for mask in masks.values()) == guard.zeros


def test_momentum_of_an_earlier_life_is_caught():
    """Without `watch`, momentum filled before pruning moves a pruned weight; with it, it cannot."""
    for watched in (False, True):
        torch.manual_seed(0)
        model = Two()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        (x, y) = batches(1)[0]
        (model(x) - y).square().mean().backward()
        optimizer.step()
        guard = MaskGuard(model, masks_of(model))
        if watched:
            guard.watch(optimizer)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        if watched:
            assert guard.prove() == guard.zeros
        else:
            with pytest.raises(TrainingError, match=r"pruned weights of first\.weight are no longer zero"):
                guard.prove()


def test_detach_lets_go_and_says_so():
    model = Two()
    guard = MaskGuard(model, masks_of(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard.watch(optimizer)
    guard.detach()
    guard.detach()
    (x, y) = batches(1)[0]
    (model(x) - y).square().mean().backward()
    optimizer.step()
    with pytest.raises(TrainingError, match="no longer zero"):
        guard.prove()


@pytest.mark.parametrize("value", [-0.0, float("nan"), 1e-30])
def test_what_counts_as_revived(value):
    model = Two()
    masks = masks_of(model)
    guard = MaskGuard(model, masks)
    at = tuple((~masks["second.weight"]).nonzero()[2].tolist())
    with torch.no_grad():
        model.second.weight[at] = value
    with pytest.raises(TrainingError, match=r"1 pruned weights of second\.weight"):
        guard.prove()


def test_gradients_that_are_thrown_away_use_up_no_clipping_norm():
    """The pruned input is huge: its gradient would scale everything down to nothing."""
    model = nn.Linear(2, 1, bias=False)
    guard = MaskGuard(model, {"weight": torch.tensor([[True, False]])})
    model(torch.tensor([[1.0, 1e6]])).sum().backward()
    assert model.weight.grad.tolist() == [[1.0, 0.0]]
    assert nn.utils.clip_grad_norm_(model.parameters(), 2.0).item() == 1.0
    guard.detach()


def test_averages_and_masters_follow():
    model = Two()
    masks = masks_of(model)
    guard = MaskGuard(model, masks)
    average = {name: torch.full_like(p, 7.0) for name, p in model.named_parameters()}
    guard.follow(average)
    guard.apply()
    for name, mask in masks.items():
        assert torch.equal(average[name] == 0, ~mask)
    assert (average["first.bias"] == 7).all()


def test_eight_bit_state_is_masked_by_its_code():
    import bitsandbytes

    torch.manual_seed(0)
    model = nn.Linear(128, 64, bias=False)
    mask = torch.rand(64, 128) > 0.5
    guard = MaskGuard(model, {"weight": mask})
    guard.detach()  # so that pruned entries get gradients and moments
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-2)
    guard.watch(optimizer)
    for _ in range(3):
        model(torch.randn(4, 128)).square().sum().backward()
        optimizer.step()
    state = optimizer.state[model.weight]
    assert state["state1"].dtype is torch.uint8
    for number in ("1", "2"):
        decoded = state[f"qmap{number}"][state[f"state{number}"].int()]
        assert not decoded[~mask].any()
        assert decoded[mask].any()
    guard.prove()


def test_masks_may_be_objects_and_may_be_replaced():
    model = Two()
    keep = masks_of(model)["first.weight"]
    guard = MaskGuard(model, {"first.weight": Mask.from_bool(keep, "0.6")})
    assert (len(guard), list(guard), guard.size) == (1, ["first.weight"], 63)
    assert guard.sparsity == pytest.approx(float((~keep).float().mean()))
    before = guard.digests()
    other = keep.clone()
    other[0] = ~other[0]
    guard.replace("first.weight", other)
    guard.apply()
    assert guard.digests() != before
    assert guard.prove() == int((~other).sum())


@pytest.mark.parametrize(
    ("masks", "match"),
    [
        ({"third.weight": torch.ones(2, 2, dtype=torch.bool)}, "no such parameter"),
        ({"first.weight": torch.ones(9, 7, dtype=torch.bool)}, r"\[9, 7\], the parameter is \[7, 9\]"),
        ({"first.weight": torch.ones(7, 9)}, "a mask|float32"),
    ],
)
def test_masks_that_do_not_fit(masks, match):
    with pytest.raises(TrainingError, match=match):
        MaskGuard(Two(), masks)
