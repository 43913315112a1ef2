"""MaskLoRA against the formula written out, its memory, and merges that keep every zero."""

from __future__ import annotations

import math

import pytest
import torch
from small import llama, masks_of, rows, zeros_of
from torch import nn
from transformers.pytorch_utils import Conv1D

from gossamer.errors import TrainingError
from gossamer.finetune import masklora
from gossamer.finetune.masklora import MaskLoRALinear, unwrap, wrap
from gossamer.finetune.training import TrainingConfig, train

SHAPES = [(7, 5), (16, 33), (1, 9)]


def linear(rows_: int, cols: int, conv: bool, bias: bool = True) -> nn.Module:
    base = Conv1D(rows_, cols) if conv else nn.Linear(cols, rows_, bias=bias)
    if conv:
        nn.init.normal_(base.weight)
        nn.init.normal_(base.bias)
    return base


def adapter(rows_: int, cols: int, *, conv: bool = False, mask: bool = True) -> tuple[MaskLoRALinear, torch.Tensor]:
    """With B set to something, and the mask as [out, in]."""
    torch.manual_seed(rows_ * 100 + cols)
    base = linear(rows_, cols, conv)
    keep = torch.rand(rows_, cols) > 0.5 if mask else torch.ones(rows_, cols, dtype=torch.bool)
    stored = keep.t() if conv else keep
    with torch.no_grad():
        base.weight.mul_(stored)
    made = MaskLoRALinear(base, stored.contiguous() if mask else None, rank=3, alpha=6.0)
    nn.init.normal_(made.up)
    return made, keep


def written_out(made: MaskLoRALinear, keep: torch.Tensor, x: torch.Tensor, down, up) -> torch.Tensor:
    weight = made.weight.detach() + 2.0 * keep * (up @ down)
    return x @ weight.t() + made.base.bias.detach()


@pytest.mark.parametrize("tile", [1, 16, 2**20])
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(monkeypatch, shape, mask, conv, tile):
    monkeypatch.setattr(masklora, "TILE", tile)
    made, keep = adapter(*shape, conv=conv, mask=mask)
    x = torch.randn(2, 3, shape[1], requires_grad=True)
    other = x.detach().clone().requires_grad_()
    down, up = (t.detach().clone().requires_grad_() for t in (made.down, made.up))
    goal = torch.randn(2, 3, shape[0])
    y, expected = made(x), written_out(made, keep, other, down, up)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    (y * goal).sum().backward()
    (expected * goal).sum().backward()
    for found, wanted in ((x.grad, other.grad), (made.down.grad, down.grad), (made.up.grad, up.grad)):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert made.base.weight.grad is None
    torch.testing.assert_close(made.base.bias.grad, goal.sum((0, 1)))


def test_gradcheck():
    base = nn.Linear(6, 4, bias=False).double()
    keep = torch.rand(4, 6) > 0.4
    x, down, up = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 6), (2, 6), (4, 2)))
    # The tiles are summed in float32, so the step is wide and the tolerance that of float32.
    assert torch.autograd.gradcheck(
        lambda *t: masklora._Masked.apply(t[0], base.weight, keep, t[1], t[2], 0.5), (x, down, up),
        eps=1e-2, atol=1e-3, rtol=1e-3,
    )  # fmt: skip


def test_nothing_of_the_size_of_the_matrix_is_kept_for_backward(monkeypatch):
    monkeypatch.setattr(masklora, "TILE", 256)
    base = nn.Linear(64, 128, bias=False)
    made = MaskLoRALinear(base, torch.rand(128, 64) > 0.5, rank=2, alpha=4.0)
    held: dict[int, torch.Tensor] = {}

    def pack(tensor):
        held[tensor.data_ptr()] = tensor
        return tensor

    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        made(x)
    known = {t.data_ptr() for t in (x, base.weight, made.mask, made.down, made.up)}
    assert held.keys() <= known
    # and while it runs, no temporary of its size exists either
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
            nonlocal largest
            result = function(*arguments, **(options or {}))
            known_storage = {t.untyped_storage().data_ptr() for t in (base.weight, made.mask)}
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known_storage:
                largest = max(largest, result.numel())
            return result

    with Sizes():
        made(x.detach())
    assert largest <= 3 * 128  # the output; a tile has 256 entries


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_the_trained_matrix_rounded_once(monkeypatch, conv, dtype):
    monkeypatch.setattr(masklora, "TILE", 50)
    made, keep = adapter(16, 33, conv=conv)
    made.base.to(dtype)
    exact = made.weight.detach().float() + 2.0 * keep * (made.up.detach() @ made.down.detach())
    merged = made.merge()
    weight = merged.weight.detach().t() if conv else merged.weight.detach()
    torch.testing.assert_close(
        weight.float(), exact.to(dtype).float(), rtol=0, atol=1e-6 if dtype is torch.float32 else 0
    )
    assert not weight[~keep].any()
    assert not torch.signbit(weight[~keep]).any()
    assert weight.dtype is dtype


def test_a_kept_weight_that_happens_to_be_zero_is_trained():
    """The mask is explicit: a kept zero moves, which a mask of W != 0 would forbid for ever."""
    base = nn.Linear(4, 2, bias=False)
    nn.init.zeros_(base.weight)
    keep = torch.tensor([[True, True, False, False]] * 2)
    made = MaskLoRALinear(base, keep, rank=1, alpha=1.0)
    nn.init.ones_(made.up)
    nn.init.ones_(made.down)
    assert made.merge().weight.tolist() == [[1.0, 1.0, 0.0, 0.0]] * 2


def test_under_autocast_in_bfloat16():
    made, keep = adapter(16, 33)
    x = torch.randn(5, 33)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    assert y.dtype is torch.bfloat16
    expected = written_out(made, keep, x, made.down.detach(), made.up.detach())
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)
    y.float().sum().backward()
    assert made.up.grad.dtype is torch.float32


def test_a_model_is_wrapped_trained_and_unwrapped(tmp_path):
    model = llama()
    masks = masks_of(model)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    names = [name for name, _ in model.named_parameters()]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = rows()
    expected = model.eval()(data.ids[:2]).logits
    model.requires_grad_(False)
    wrapped = wrap(model, masks, masks, rank=4, alpha=8.0, seed=1)
    assert len(wrapped) == 7
    assert torch.equal(model.eval()(data.ids[:2]).logits, expected) or torch.allclose(
        model(data.ids[:2]).logits, expected, atol=1e-5
    )
    inner = {f"{name.removesuffix('weight')}base.weight": mask for name, mask in masks.items()}
    metrics = train(model, TrainingConfig(folder=tmp_path, steps=40, batch=8, learning_rate=2e-2), inner, data=data)
    assert metrics.loss < 0.9 * metrics.history[0]["loss"]
    trained = model(data.ids[:2]).logits
    unwrap(model, wrapped)
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(model(data.ids[:2]).logits, trained, rtol=1e-4, atol=1e-4)
    assert zeros_of(model, masks) == sum(int((~mask).sum()) for mask in masks.values())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in masks), name


def test_equal_seeds_draw_equal_factors():
    factors = []
    for seed in (1, 1, 2):
        model = llama()
        wrap(model, masks_of(model), masks_of(model), rank=2, alpha=4.0, seed=seed)
        factors.append(model.model.layers[0].mlp.up_proj.down.detach())
    assert torch.equal(factors[0], factors[1])
    assert not torch.equal(factors[0], factors[2])
    assert factors[0].abs().max() <= 1 / math.sqrt(16)


def test_fused_experts_have_nowhere_to_put_it():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 3, 4))

    model = nn.Sequential(Experts())
    with pytest.raises(TrainingError, match="fused expert parameters"):
        wrap(model, ["0.weight"], {}, rank=2, alpha=4.0)
