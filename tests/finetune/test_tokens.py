"""Rows and their order: what has no rows is refused at once, and named."""

from __future__ import annotations

import pytest
import torch
from small import llama, rows

from gossamer.errors import DataError
from gossamer.finetune.tokens import TokenRows, order
from gossamer.finetune.training import TrainingConfig, train


@pytest.mark.timeout(20)
@pytest.mark.parametrize("count", [0, -1])
def test_an_order_of_no_rows(count):
    with pytest.raises(ValueError, match=f"at least one row, got {count}"):
        order(count, 8, 0)


def test_an_order_of_no_length():
    assert order(3, 0, 0).tolist() == []


@pytest.mark.timeout(60)
def test_training_on_no_rows(tmp_path):
    empty = TokenRows(torch.empty(0, rows().length, dtype=torch.int64), name="notes.txt")
    with pytest.raises(DataError, match="notes.txt has no rows to train on"):
        train(llama(), TrainingConfig(folder=tmp_path / "run", steps=2, batch=4), {}, data=empty)
    assert not (tmp_path / "run").exists()
