"""The benchmark of head plans: its key-value sequences, and the tables it writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
head_plans = pytest.importorskip("head_plans")
combined = pytest.importorskip("combined")
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


def test_the_table_of_combined_stages():
    """Rows in their order, the later of two lines counts, and what was not timed says so."""
    quality = {"kind": "quality", "model": "m", "nsamples": 16, "windows": 8, "window": 64}
    lines = [
        quality | {"variant": "all three", "perplexity": 5.5, "cache_bytes": 4000, "file_bytes": 9000},
        quality | {"variant": "dense", "perplexity": 9.0, "cache_bytes": 8000, "file_bytes": 18000},
        quality | {"variant": "dense", "perplexity": 4.25, "cache_bytes": 8000, "file_bytes": 18000},
        {"kind": "speed", "model": "m", "variant": "dense", "threads": 1, "prompt": 32, "ms": 2.0, "read_bytes": 7000},
    ]
    rows = [line for line in combined.tables(lines).splitlines() if line.startswith("| ")]
    assert rows[1:] == ["| dense | 4.250 | 18 | 7 | 8 | 500 |", "| all three | 5.500 | 9 | - | 4 | - |"]
    assert "8 windows of 64 tokens, 16 calibration sequences; tokens/s after 32 tokens" in combined.tables(lines)


def test_every_row_of_combined_stages_is_one_recipe(tmp_path):
    protocol = combined.PROTOCOLS["tiny-llama"]
    stages = [
        [stage.stage for stage in combined.recipe_of(variant, protocol, tmp_path, combined.Effort()).stages]
        for variant, wanted in combined.VARIANTS.items()
        if wanted
    ]
    assert stages == [["prune"], ["prune", "activation"], ["prune", "heads"], ["prune", "activation", "heads"]]
