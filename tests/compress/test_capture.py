"""CaptureStub: blocks out of order, hidden states changed in between, and what blocks return."""

from __future__ import annotations

import pytest
import torch
from streamed import ids

from gossamer.compress.capture import CaptureStub, Recorder, Returns, injecting_stub, returns_of
from gossamer.errors import ModelError


def chain(n: int = 3, returns: Returns | None = None) -> CaptureStub:
    names = [f"b.{i}" for i in range(n)]
    return CaptureStub(names, Recorder(ids(1), n), lambda w, h: None, lambda i, h: returns or Returns())


def test_blocks_out_of_order_or_twice_are_refused():
    x = torch.ones(1, 4, 2)
    stub = chain()
    stub(0, (x,), {})
    with pytest.raises(ModelError, match=r"calls b\.2 where b\.1"):
        stub(2, (x,), {})
    stub = chain()
    stub(0, (x,), {})
    with pytest.raises(ModelError, match=r"calls b\.0 where b\.1"):
        stub(0, (x,), {})


def test_a_hidden_state_changed_between_blocks_is_refused():
    x, stub = torch.ones(1, 4, 2), chain()
    stub(0, (x,), {})
    with pytest.raises(ModelError, match=r"changes the hidden state before b\.1"):
        stub(1, (x * 2,), {})


def test_a_second_output_fed_to_the_next_block_is_refused():
    x = torch.ones(1, 4, 2)
    stub = chain(returns=returns_of("b", (x, torch.ones(3), None), x))
    hidden, extra, none = stub(0, (x,), {})
    assert hidden is x
    assert none is None
    with pytest.raises(ModelError, match="another block's second output"):
        stub(1, (hidden,), {"memory": [extra]})


def test_returned_structures():
    x = torch.ones(1, 4, 2)
    assert returns_of("b", x, x).pack(x, x) is x
    listed = returns_of("b", [None, x], x)
    assert listed.place == 1
    assert isinstance(listed.pack(x, torch.empty(0)), list)
    assert listed.unpack([1, x]) is x
    for odd in (None, {"hidden": x}, torch.ones(1, 4, 3), (torch.ones(2),)):
        with pytest.raises(ModelError, match="no hidden state"):
            returns_of("b", odd, x)
    stub = injecting_stub(["b.0", "b.1"], [Returns(), listed], x * 3)
    assert stub(0, (x,), {}) is x
    assert torch.equal(stub(1, (), {"hidden_states": x})[1], x * 3)


def test_a_block_called_without_hidden_state_is_refused():
    with pytest.raises(ModelError, match="first positional argument"):
        chain()(0, (torch.ones(2, 2),), {"mask": None})
