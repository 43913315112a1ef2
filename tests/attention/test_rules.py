"""The search space is MoA's, and no rule in it is there twice."""

from __future__ import annotations

import torch

from gossamer.attention.plan import FULL, HeadRule
from gossamer.attention.rules import default_lengths, kept_by, search_space, spans


def test_the_published_space_has_48_spans():
    found = spans((2048, 4096, 8192), 64, 16384)
    assert len(found) == 48
    assert {rule.alpha for rule in found} <= set(range(-2048, 8193, 1024))
    assert HeadRule(0, 0, 1.0) in found
    assert HeadRule(0, 8192, 0.125) not in found  # keeps more than there is at 8192


def test_every_rule_is_another_and_everything_is_kept_once():
    lengths, block, sinks = (64, 128, 192), 16, (0, 1, 4, 8)
    rules = search_space(lengths, block, sinks, 4, 256)
    curves = {(rule.sink, *(rule.kept(n, 4) for n in range(16, 257, 16))) for rule in rules}
    assert len(curves) == len(rules)
    assert [rule for rule in rules if rule.kept(256, 4) == 256] == [FULL]
    assert {rule.sink for rule in rules} == set(sinks)
    at = torch.arange(0, 300)
    expected = [[rule.kept(int(n), 4) for n in at] for rule in rules]
    assert kept_by(rules, at, 4).tolist() == expected


def test_lengths_of_small_and_large_models():
    assert default_lengths(256) == (64, 128, 192)
    assert default_lengths(512) == (128, 256, 384)
    assert default_lengths(131072) == default_lengths(None) == (2048, 4096, 8192)
