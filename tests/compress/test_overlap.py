"""Overlap between evaluation and calibration text."""

from __future__ import annotations

import time

import pytest
import torch

from gossamer.compress.overlap import check_overlap, overlap_share
from gossamer.compress.textdata import TextData
from gossamer.errors import DataError


def by_sets(evaluation, calibration, window):
    """Independent and slow: every calibration window as a tuple in a set."""
    rows = [calibration] if calibration.ndim == 1 else list(calibration)
    seen = {tuple(r[i : i + window].tolist()) for r in rows for i in range(len(r) - window + 1)}
    flat = evaluation.flatten()
    blocks = [tuple(flat[i : i + window].tolist()) for i in range(0, len(flat) - window + 1, window)]
    return sum(block in seen for block in blocks) / len(blocks)


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("shape", [(200,), (20, 10), (3, 67)])
def test_equals_a_plain_search(window, shape):
    generator = torch.Generator().manual_seed(window)
    evaluation = torch.randint(0, 3, (103,), generator=generator)
    calibration = torch.randint(0, 3, shape, generator=generator)
    got = overlap_share(evaluation, calibration, window)
    assert got == by_sets(evaluation, calibration, window)
    assert 0 < got <= 1


def test_found_at_any_offset_but_not_across_calibration_windows():
    evaluation = torch.arange(64)
    padded = torch.cat([torch.full((17,), 999), evaluation, torch.full((5,), 998)])
    assert overlap_share(evaluation, padded) == 1.0
    assert overlap_share(evaluation, torch.cat([evaluation[:32], evaluation[32:]]).reshape(1, 64)) == 1.0
    split = torch.stack([torch.arange(1000, 1064), torch.arange(2000, 2064)])
    split[0, 32:], split[1, :32] = evaluation[:32], evaluation[32:]
    assert overlap_share(evaluation, split) == 0.0


def test_one_changed_token_is_no_match():
    evaluation = torch.arange(640)
    calibration = evaluation.clone()
    calibration[3] = 5000
    assert overlap_share(evaluation, calibration) == 0.9


def test_equal_tokens_everywhere():
    assert overlap_share(torch.zeros(256, dtype=torch.int64), torch.zeros(1000, dtype=torch.int64)) == 1.0
    assert overlap_share(torch.zeros(256, dtype=torch.int64), torch.ones(1000, dtype=torch.int64)) == 0.0


def test_short_windows_are_compared_at_their_own_length():
    assert overlap_share(torch.arange(40), torch.arange(16).reshape(1, 16)) == 0.5


def test_ten_million_tokens_in_seconds():
    generator = torch.Generator().manual_seed(0)
    calibration = torch.randint(0, 32000, (10_000_000,), generator=generator)
    evaluation = torch.randint(0, 32000, (300_000,), generator=generator)
    evaluation[64:128] = calibration[7_654_321 : 7_654_321 + 64]
    started = time.process_time()
    assert overlap_share(evaluation, calibration) == 1 / (300_000 // 64)
    assert time.process_time() - started < 20


def test_check_refuses_same_text_and_more_than_one_percent():
    one, two = TextData("one", "a.txt", "p"), TextData("two", "b.txt", "p")
    ids = torch.arange(6400)
    with pytest.raises(DataError, match="a.txt is used both for calibration and for evaluation"):
        check_overlap(one, ids, one, ids + 10_000)
    with pytest.raises(DataError, match=r"2\.0% of the 64-token windows of a.txt occur in .* b.txt") as caught:
        check_overlap(one, ids, two, ids[:128])
    assert "--allow-overlap" in str(caught.value.hint)
    assert check_overlap(one, ids, two, ids[:64]) == 0.01
    assert check_overlap(one, ids, two, ids[:128], allow=True) == 0.02
    assert check_overlap(one, ids, one, ids + 10_000, allow=True) == 1.0
