"""Memory for weights: ordinary tensors, wherever their memory comes from."""

from __future__ import annotations

import copy
import gc
import io
import sys
from pathlib import Path

import pytest
import torch

from gossamer.kernels import extension
from gossamer.kernels.memory import HUGE, empty_weight

SHAPES = [(), (0, 5), (3, 5), (1024, 1024), (1025, 1031)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_an_ordinary_tensor(shape, dtype):
    tensor = empty_weight(*shape, dtype=dtype)
    assert (tensor.shape, tensor.dtype, tensor.device.type) == (torch.Size(shape), dtype, "cpu")
    assert tensor.is_contiguous()
    assert tensor.untyped_storage().nbytes() >= tensor.nbytes
    tensor.fill_(3)
    assert (tensor == 3).all()


def test_it_survives_its_maker_and_copies_are_copies():
    tensor = empty_weight(2048, 1024, dtype=torch.bfloat16).fill_(1.0)
    view = tensor[1:].t()
    copied = copy.deepcopy(tensor)
    saved = io.BytesIO()
    torch.save(tensor, saved)
    del tensor
    gc.collect()
    view += 1
    assert (view == 2).all()
    assert (copied == 1).all()
    assert (torch.load(io.BytesIO(saved.getvalue())) == 1).all()


def test_loading_contexts_do_not_reach_it():
    with torch.device("meta"):
        assert empty_weight(4, 4, dtype=torch.float32).device.type == "cpu"
        assert empty_weight(1024, 1024, dtype=torch.float32).device.type == "cpu"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/statm")
def test_memory_is_given_back():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    empty_weight(16 << 20, dtype=torch.uint8).fill_(1)
    before = resident()
    for _ in range(4):
        empty_weight(64 << 20, dtype=torch.uint8).fill_(1)
    gc.collect()
    assert resident() - before < 32 << 20


@pytest.mark.skipif(extension.compiled() is None or sys.platform != "linux", reason="plain memory")
def test_large_tensors_begin_on_a_large_page():
    assert empty_weight(1024, 1024, dtype=torch.bfloat16).data_ptr() % HUGE == 0
    assert empty_weight(HUGE + 1, dtype=torch.uint8).data_ptr() % HUGE == 0
