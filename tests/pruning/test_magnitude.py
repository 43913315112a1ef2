"""Magnitude pruning, worked by hand."""

from __future__ import annotations

import torch

from gossamer.pruning.base import LayerStats
from gossamer.pruning.magnitude import Magnitude
from gossamer.pruning.pattern import Unstructured, parse_pattern

WEIGHT = torch.tensor([[4.0, -1.0, 3.0, -2.0], [-9.0, 8.0, 7.0, -6.0]])


def pruned(pattern: object) -> list[list[float]]:
    return Magnitude().prune(WEIGHT, LayerStats(0), pattern)[0].tolist()


def test_row_scope() -> None:
    assert pruned(Unstructured(0.5, "row")) == [[4, 0, 3, 0], [-9, 8, 0, 0]]


def test_matrix_scope() -> None:
    assert pruned(Unstructured(0.5, "matrix")) == [[0, 0, 0, 0], [-9, 8, 7, -6]]


def test_group_scope() -> None:
    assert pruned(parse_pattern("1:2")) == [[4, 0, 3, 0], [-9, 0, 7, 0]]
    assert pruned(parse_pattern("1:4")) == [[4, 0, 0, 0], [-9, 0, 0, 0]]


def test_block() -> None:
    assert pruned(parse_pattern("block:2x2:0.5")) == [[4, -1, 0, 0], [-9, 8, 0, 0]]
