"""The benchmark of head plans: its key-value sequences, and the tables it writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
head_plan_table = pytest.importorskip("head_plan_table")
combined = pytest.importorskip("combined")
retrieval_model = pytest.importorskip("retrieval_model")


def test_every_question_has_one_answer_in_the_context():
    of = retrieval_model
    for length, asked in ((32, 7), (64, 15), (1024, 128)):  # of a quarter questions; no more than there are entries
        ids, counted = of.sequences(3, length, torch.Generator().manual_seed(0), 0.25)
        assert ids.shape == counted.shape == (3, length)
        for row, answers in zip(ids.tolist(), counted.tolist(), strict=True):
            entries = [divmod(token, of.VALUES) for token in row if token < of.QUESTION]
            places = [place for place, answer in enumerate(answers) if answer]
            questions = [(row[p - 1] - of.QUESTION, row[p] - of.ANSWER) for p in places]
            assert len(dict(entries)) == len(entries) == min((length - 1) // 4, of.KEYS)  # every key at most once
            assert len(dict(questions)) == len(questions) == asked
            assert set(questions) <= set(entries)
            assert places == list(range(length - 2 * asked + 1, length, 2))
            assert row[0] == of.START
            assert row.count(of.START) == 1


def test_tables():
    base = {"suite": "perplexity", "model": "tiny-llama", "dense": {"perplexity": 20.0}}
    lines = [
        {**base, "density": 0.25, "method": "uniform", "perplexity": 30.0},
        {**base, "density": 0.25, "method": "uniform", "perplexity": 24.0},
        {**base, "density": 0.5, "method": "gossamer", "perplexity": 21.0},
    ]
    page = head_plan_table.tables(lines)
    assert "tiny-llama, perplexity; dense 20:" in page
    assert "| method | 25 % of the KV bytes | 50 % of the KV bytes |" in page
    assert "| uniform | 24.000 | - |" in page
    assert "| gossamer | - | 21.000 |" in page


def test_seeds_and_the_next_best():
    """Means with their range; the best rival that has all seeds; accuracy the other way round."""
    base = {"suite": "perplexity", "model": "m", "dense": {"perplexity": 20.0}, "density": 0.25}
    figures = {"uniform": (30, 31, 32), "moa": (24.5, 24.1, 24.3), "per-layer": (24,), "gossamer": (24.0, 23.9, 23.8)}
    lines = [
        base | {"method": method, "seed": seed, "perplexity": value}
        for method, values in figures.items()
        for seed, value in enumerate(values)
    ]
    page = head_plan_table.tables(lines)
    assert "| moa | 24.300 (24.100 to 24.500) |" in page
    assert "- 25 %: better than moa, the next best: by 0.400, standard error 0.100, 3 seeds" in page
    lines = [
        {"suite": "retrieval", "model": "m", "dense": {"accuracy": 1.0}, "density": 0.5, "method": method, "seed": seed,
         "accuracy": value}
        for method, values in {"moa": (0.5, 0.6), "gossamer": (0.5, 0.7)}.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip
    page = head_plan_table.tables(lines)
    assert "- 50 %: level with moa, the next best: better by 0.050, standard error 0.050, 2 seeds" in page


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
