"""The benchmark of head plans: its key-value sequences, and the tables it writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
head_plans = pytest.importorskip("head_plans")
retrieval_model = pytest.importorskip("retrieval_model")


def test_every_asked_value_was_said_before():
    ids, counted = retrieval_model.sequences(3, 64, torch.Generator().manual_seed(0), 0.5)
    assert ids.shape == counted.shape == (3, 64)
    for row, asked in zip(ids.tolist(), counted, strict=True):
        pairs = list(zip(row[1:-1:2], row[2::2], strict=False))
        first = [p for p, place in zip(pairs, range(2, 64, 2), strict=False) if not asked[place]]
        later = [p for p, place in zip(pairs, range(2, 64, 2), strict=False) if asked[place]]
        assert len(dict(first)) == len(first)  # every key once
        assert len(later) == 15
        assert all(pair in first for pair in later)
        assert row[0] == retrieval_model.START


def test_tables():
    base = {"suite": "perplexity", "model": "tiny-llama", "dense": {"perplexity": 20.0}}
    lines = [
        {**base, "density": 0.25, "method": "uniform", "perplexity": 30.0},
        {**base, "density": 0.25, "method": "uniform", "perplexity": 24.0},
        {**base, "density": 0.5, "method": "gossamer", "perplexity": 21.0},
    ]
    page = head_plans.tables(lines)
    assert "tiny-llama, perplexity; dense 20:" in page
    assert "| method | 25 % of the KV bytes | 50 % of the KV bytes |" in page
    assert "| uniform | 24 | - |" in page
    assert "| gossamer | - | 21 |" in page
