"""What a prepared call looks at: every change of modules and tensors shows, and looking changes and holds nothing."""

from __future__ import annotations

import gc
import sys
import types
import weakref

import pytest
import torch
from torch import nn

from gossamer.kernels.extension import compiled
from gossamer.kernels.modules import watch as module
from gossamer.kernels.modules.watch import Watch

pytestmark = pytest.mark.skipif(compiled() is None, reason="the compiled kernels are needed")


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaling = 0.5
        self.linear = nn.Linear(4, 4)
        self.act = nn.SiLU()
        self.register_buffer("table", torch.arange(6.0).view(2, 3))
        self.register_buffer("center", None)


@pytest.fixture
def part() -> Part:
    return Part().requires_grad_(False)


@pytest.fixture(params=["views", "attributes"])
def way(request, monkeypatch):
    """How tensors are looked at: through torch's table of functions, or attribute by attribute where there is none."""
    own = compiled()
    if request.param == "attributes":
        blind = types.SimpleNamespace(watch_same=own.watch_same, watch_view=lambda tensor: [])
        monkeypatch.setattr(module, "compiled", lambda: blind)
    elif not own.watch_view(torch.zeros(1)):
        pytest.skip("this torch has no such table")


def watched(part: Part) -> Watch:
    return Watch([part, part.linear, part.act], ("scaling",))


class Other(Part):
    pass


def _data(part: Part, made: torch.Tensor) -> None:
    part.linear.weight.data = made


CHANGES = {
    "another tensor": lambda p: setattr(p.linear, "weight", nn.Parameter(torch.zeros(4, 4))),
    "another tensor that is equal": lambda p: setattr(p.linear, "weight", nn.Parameter(p.linear.weight.clone())),
    "data": lambda p: _data(p, torch.zeros(4, 4)),
    "cut short": lambda p: _data(p, p.linear.weight.data[:3]),
    "turned": lambda p: _data(p, p.linear.weight.data.t()),
    "dtype": lambda p: p.to(torch.bfloat16),
    "written": lambda p: p.table.add_(1),
    "a tensor for None": lambda p: setattr(p, "center", torch.zeros(3)),
    "None for a tensor": lambda p: setattr(p, "table", None),
    "no tensor": lambda p: delattr(p, "table"),
    "one more tensor": lambda p: p.register_buffer("more", torch.zeros(1)),
    "renamed": lambda p: p._buffers.update(board=p._buffers.pop("table")),
    "class": lambda p: setattr(p, "__class__", Other),
    "forward": lambda p: setattr(p.act, "forward", lambda x: x),
    "hook": lambda p: p.linear.register_forward_hook(lambda *_: None),
    "pre-hook": lambda p: p.linear.register_forward_pre_hook(lambda *_: None),
    "child": lambda p: setattr(p, "act", nn.SiLU()),
    "one more child": lambda p: p.add_module("more", nn.SiLU()),
    "no child": lambda p: delattr(p, "act"),
    "child None": lambda p: setattr(p, "act", None),
    "constant": lambda p: setattr(p, "scaling", 0.25),
    "no constant": lambda p: delattr(p, "scaling"),
    "no hooks at all": lambda p: p.__dict__.pop("_forward_hooks"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("way")
def test_a_change_is_seen(part, change):
    found = watched(part)
    assert found.plain()
    assert found.same()
    CHANGES[change](part)
    assert not found.same()
    if change not in ("no hooks at all", "no child", "child None"):
        assert watched(part).same()


@pytest.mark.usefixtures("way")
def test_what_changes_nothing_is_none(part):
    found = watched(part)
    part.scaling = 1.0 / 2.0
    part.linear.weight.data = part.linear.weight.data
    part.extra = 3
    part.linear.weight.grad = torch.ones(4, 4)
    part.linear(torch.ones(1, 4))
    for number in range(100):  # their dictionaries move in memory
        setattr(part, f"extra_{number}", number)
    assert found.same()


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3, 4, dtype=torch.bfloat16).t(), torch.zeros(5)[2:], torch.tensor(1.0), torch.zeros(0, 3),
     nn.Parameter(torch.ones(2, 2)), torch.zeros(2, dtype=torch.uint16), torch.zeros(3, dtype=torch.bool)],
)  # fmt: skip
def test_the_view_of_a_tensor(tensor):
    """Behind the table's address: place, dtype, device, and sizes and strides in turn."""
    found = compiled().watch_view(tensor)
    if not found:
        pytest.skip("this torch has no such table")
    place, kind, device, dims, *rest = found[1:]
    assert place == tensor.data_ptr()
    assert kind >> 16 & 255 == 8 * tensor.element_size()
    assert (device >> 32, dims) == (1, tensor.dim())
    assert rest[::2] == list(tensor.shape)
    # Where there is nothing or one thing in a dimension, its stride is anybody's.
    assert all(
        given == own for given, own, size in zip(rest[1::2], tensor.stride(), tensor.shape, strict=True) if size > 1
    )


def test_what_has_no_memory_has_no_view():
    for other in (nn.Linear(2, 2), 3, "tensor"):
        assert compiled().watch_view(other) == []


def test_hooks_that_were_there(part):
    handle = part.act.register_forward_hook(lambda *_: None)
    found = watched(part)
    assert not found.plain()
    assert found.same()
    handle.remove()
    assert not found.same()


@pytest.mark.usefixtures("way")
def test_inference_tensors_have_no_version():
    with torch.inference_mode():
        part = Part()
        found = watched(part)
        assert found.same()
        part.table.add_(1)  # not counted by torch
        assert found.same()


@pytest.mark.usefixtures("way")
def test_nothing_is_kept_alive_and_nothing_leaks(part):
    found = watched(part)
    tensor = weakref.ref(part.table)
    before = [sys.getrefcount(one) for one in (part, part.linear.weight, part.table, torch.float32, None)]
    for _ in range(1000):
        found.same()
    after = [sys.getrefcount(one) for one in (part, part.linear.weight, part.table, torch.float32, None)]
    assert all(abs(one - other) < 50 for one, other in zip(before, after, strict=True))
    part.table = None
    assert tensor() is None
    assert not found.same()


def test_a_cycle_is_collected():
    part = Part()
    part.watch = watched(part)
    gone = weakref.ref(part)
    del part
    gc.collect()
    assert gone() is None


def test_without_compiled_code_nothing_is_the_same(part, monkeypatch):
    monkeypatch.setattr(module, "compiled", lambda: None)
    assert not watched(part).same()
