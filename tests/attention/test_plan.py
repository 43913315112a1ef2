"""The head plan: what it keeps, that nothing dropped is ever needed again, and that a bad file is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from gossamer.attention.plan import FULL, HeadPlan, HeadRule
from gossamer.errors import CheckpointError, ModelError, RecipeError

RULES = [
    HeadRule(0, 7, 0.0),
    HeadRule(4, -9, 0.625),
    HeadRule(3, 5, 0.25),
    HeadRule(1, 0, 0.3),
    HeadRule(50, 0, 0.5),
    FULL,
]


def plan(**changes):
    values = {
        "model_type": "llama", "query_heads": 6, "head_dim": 8, "block": 4, "lengths": (16, 40), "positions": 64,
        "heads": (tuple(RULES[:3]), tuple(RULES[3:])), "made": {"seed": 0},
    }  # fmt: skip
    return HeadPlan(**{**values, **changes})


def by_hand(rule: HeadRule, block: int, n: int) -> set[int]:
    """The keys (0-based) that the n-th token sees, from the words of the contract."""
    span = (rule.alpha * 1024 + round(rule.beta * 1024) * n) // 1024
    kept = max(rule.sink + block, span)
    if kept >= n:
        return set(range(n))
    return set(range(rule.sink)) | set(range(n - (kept - rule.sink), n))


@pytest.mark.parametrize("layer", [0, 1])
def test_kept_and_the_mask_are_those_of_the_words(layer):
    p = plan()
    length = 57
    mask = p.visible(layer, torch.arange(length), torch.arange(length))
    kept = p.kept_at(layer, torch.arange(length + 1))
    for head, rule in enumerate(p.heads[layer]):
        for n in range(1, length + 1):
            expected = by_hand(rule, p.block, n)
            assert set(mask[head, n - 1].nonzero().flatten().tolist()) == expected
            assert p.kept(layer, head, n) == len(expected) == int(kept[head, n])
    assert kept[:, 0].tolist() == [0, 0, 0]


def test_what_was_dropped_is_never_needed_again():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        sink, alpha = (int(torch.randint(low, 40, (), generator=generator)) for low in (0, -40))
        rule = HeadRule(sink, alpha, float(torch.rand((), generator=generator)))
        dropped: set[int] = set()
        for n in range(1, 90):
            seen = by_hand(rule, 4, n)
            assert not seen & dropped
            dropped = set(range(n)) - seen


def test_padding_is_never_seen_and_batches_keep_their_own_positions():
    p = plan()
    queries = torch.stack([torch.arange(10, 13), torch.arange(7, 10)])
    keys = torch.stack([torch.arange(13), torch.arange(13) - 3])
    mask = p.visible(0, queries, keys)
    assert mask.shape == (2, 3, 3, 13)
    assert not mask[1, :, :, :3].any()
    for row in (0, 1):
        assert torch.equal(mask[row], p.visible(0, queries[row], keys[row]))


def test_bytes_and_density():
    p = plan()
    kept = [min(40, max(r.sink + 4, r.span(40))) for r in RULES]
    assert p.tokens(40) == sum(kept)
    assert p.density(40) == sum(kept) / (6 * 40)
    assert p.kv_bytes(40, batch=3, element_size=4) == 2 * 3 * 8 * 4 * sum(kept)
    assert p.dense_kv_bytes(40) == 2 * 8 * 2 * 6 * 40
    assert plan(heads=((FULL,) * 3,) * 2).density(40) == 1


def test_json_there_and_back():
    p = plan()
    again = HeadPlan.from_json(json.loads(json.dumps(p.to_json())))
    assert again == p
    assert again.made == {"seed": 0}
    assert again.heads[1][0].slope == 307  # 0.3, rounded to 1/1024


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("schema_version", 2, "schema version"),
        ("layers", 3, "sink"),
        ("kv_heads", True, "kv_heads"),
        ("beta", [[0.0, 0.5, 1.5], [0, 0, 0]], "beta"),
        ("beta", [[0.0, 0.5, float("nan")], [0, 0, 0]], "beta"),
        ("sink", [[0, 0, -1], [0, 0, 0]], "sink"),
        ("alpha", [[0, 0, "1"], [0, 0, 0]], "alpha"),
        ("alpha", [[0, 0, 2**40], [0, 0, 0]], "alpha"),
        ("lengths", [40, 16], "lengths"),
        ("lengths", "40", "lengths"),
        ("positions", 20, "positions"),
        ("query_heads", 7, "query heads"),
        ("model_type", None, "model_type"),
    ],
)
def test_a_bad_file_is_refused(field, value, word):
    values = copy.deepcopy(plan().to_json())
    values[field] = value
    with pytest.raises(CheckpointError, match=word):
        HeadPlan.from_json(values)


def test_a_plan_of_another_model_is_refused():
    p = plan()
    p.check_model("llama", 2, 6, 3, 8)
    with pytest.raises(ModelError, match=r"layers 2 \(the model: 4\), KV heads 3 \(the model: 2\)"):
        p.check_model("llama", 4, 6, 2, 8)


def test_impossible_rules_and_plans():
    for rule in [(-1, 0, 0.5), (0, 0, 1.1), (0, 0, -0.1), (0, 0.5, 0.5)]:
        with pytest.raises(RecipeError):
            HeadRule(*rule)
    for changes in [{"heads": ()}, {"heads": ((FULL,), (FULL, FULL))}, {"block": 0}, {"lengths": ()}]:
        with pytest.raises(RecipeError):
            plan(**changes)
    with pytest.raises(RecipeError, match="beyond the model's 64 positions"):
        plan(lengths=(16, 128))
