"""Hidden states come back bit for bit, from memory and from the spill file alike."""

import pytest
import torch

from gossamer.compress.hidden import HiddenStore


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fit", [0, 2, 5])
def test_round_trip_and_overwrite(tmp_path, dtype, fit):
    shape = (1, 7, 5)
    size = 35 * dtype.itemsize
    store = HiddenStore(tmp_path / "spill", fit * size)
    values = [torch.randn(shape).to(dtype) for _ in range(5)]
    for index in (3, 0, 4, 1, 2):  # not in order, with gaps in the file
        store.put(index, values[index])
    assert len(store) == 5
    assert (tmp_path / "spill").exists() == (fit < 5)
    for index, value in enumerate(values):
        assert torch.equal(store.get(index), value)
    for index in range(5):
        store.put(index, -values[index])
    for index, value in enumerate(values):
        assert torch.equal(store.get(index), -value)
    store.close()
    assert not (tmp_path / "spill").exists()


def test_what_comes_back_is_a_copy(tmp_path):
    store = HiddenStore(tmp_path / "spill", 10**6)
    value = torch.ones(1, 2, 3)
    store.put(0, value)
    store.get(0).zero_()
    value.zero_()
    assert store.get(0).sum() == 6


def test_another_shape_or_an_unknown_window_is_an_error(tmp_path):
    store = HiddenStore(tmp_path / "spill", 0)
    store.put(0, torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match="window 1"):
        store.put(1, torch.ones(1, 3, 3))
    with pytest.raises(KeyError):
        store.get(1)
    store.close()
