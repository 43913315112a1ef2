"""Sparse prefill: equal to masked attention, mergeable, measured; other methods fit the interface."""

from __future__ import annotations

import torch

from gossamer.attention.minference import Lines, MInference
from gossamer.attention.prefill import measure, sparse_prefill

KV, GROUP, WIDTH, LENGTH = 2, 2, 8, 200
SCALE = WIDTH**-0.5
SMALL = (
    {"kind": "a-shape", "sink": 4, "window": 20},
    {"kind": "vertical-slash", "vertical": 6, "slash": 18},
)


def case():
    generator = torch.Generator().manual_seed(0)
    draw = lambda heads: torch.randn(heads, LENGTH, WIDTH, generator=generator)
    return draw(KV * GROUP), draw(KV), draw(KV)


def method():
    return MInference(SMALL, length=LENGTH)


def seen_by_hand(p, q, k):
    """The mask [N, N] of one head, from the words of the paper."""
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    if p["kind"] == "a-shape":
        return (j <= i) & ((j < p["sink"]) | (i - j < p["window"]))
    a = (q @ k.T * SCALE).masked_fill(j > i, -torch.inf).softmax(-1)[-64:]
    column = a.sum(0)
    slash = torch.stack([a.diagonal(LENGTH - 64 - d).sum() for d in range(LENGTH)])
    column[:30] = 9e9
    slash[:100] = 9e9
    columns = set(column.topk(p["vertical"]).indices.tolist())
    slashes = set(slash.topk(p["slash"]).indices.tolist())
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for row in range(LENGTH):
        for col in range(row + 1):
            mask[row, col] = col in columns or row - col in slashes
    return mask


def test_output_is_that_of_masked_attention():
    q, k, v = case()
    # Enough lines that those forced do not fill the budget.
    parameters = [SMALL[0], {"kind": "vertical-slash", "vertical": 45, "slash": 130}] * 2
    out, lse = sparse_prefill(q, k, v, method(), parameters)
    for h, p in enumerate(parameters):
        mask = seen_by_hand(p, q[h], k[h // GROUP]) | torch.eye(LENGTH, dtype=torch.bool)
        logits = (q[h] @ k[h // GROUP].T * SCALE).masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(out[h], logits.softmax(-1) @ v[h // GROUP], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[h], logits.logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_recall_and_density():
    q, k, _ = case()
    for p in SMALL[:1]:
        mask = seen_by_hand(p, q[0], k[0])
        causal = torch.ones(LENGTH, LENGTH).tril().bool()
        a = (q[0] @ k[0].T * SCALE).masked_fill(~causal, -torch.inf).softmax(-1)
        found = measure(q[0], k[0], method(), p, SCALE)
        assert abs(found.recall - float((a * mask).sum() / LENGTH)) < 1e-5
        assert found.density == int(mask.sum()) / int(causal.sum())
    everything = {"kind": "a-shape", "sink": 1, "window": LENGTH}
    found = measure(q[0], k[0], method(), everything, SCALE)
    assert found.density == 1
    assert abs(found.recall - 1) < 1e-5


def test_the_search_finds_the_shape_of_a_head():
    """A head that looks at one early column, and one that looks at its neighbours."""
    torch.manual_seed(0)
    far = torch.nn.functional.one_hot(torch.full((LENGTH,), 0), WIDTH).float() * 30
    key = torch.randn(LENGTH, WIDTH) * 0.1
    key[120, 0] = 3.0
    chosen = method()
    lines = chosen.select(far, key, SCALE, SMALL[1], 0)
    assert isinstance(lines, Lines)
    p = MInference((SMALL[0], {"kind": "vertical-slash", "vertical": 40, "slash": 18}), length=LENGTH).search(
        far, key, SCALE
    )
    assert p["kind"] == "vertical-slash"
    assert p["recall"] > 0.9
    angle = torch.arange(LENGTH) * 0.3
    turning = torch.stack([angle.cos(), angle.sin(), *[angle * 0] * (WIDTH - 2)], 1) * 6
    assert chosen.search(turning, turning, SCALE)["recall"] > 0.2


def test_a_prompt_in_pieces_sees_what_its_last_queries_choose():
    q, k, v = case()
    out, _ = sparse_prefill(q, k, v, method(), [SMALL[0]] * 4)
    second, _ = sparse_prefill(q[:, 120:], k, v, method(), [SMALL[0]] * 4, offset=120)
    torch.testing.assert_close(second, out[:, 120:], atol=1e-5, rtol=1e-5)


class Blocks:
    """FlexPrefill's kind of answer: a map of blocks, chosen anew for every prompt, without an offline part."""

    name = "blocks"

    def search(self, query, key, scale):
        return {}

    def select(self, query, key, scale, parameters, offset):
        size = 20
        pooled = lambda x: x.view(-1, size, x.shape[1]).mean(1)
        chosen = (pooled(query) @ pooled(key).T) > 0

        class Chosen:
            def rows(self, first, last):
                wide = chosen.repeat_interleave(size, 0).repeat_interleave(size, 1)
                return wide[first - offset : last - offset]

        return Chosen()


class Stripes:
    """AnchorAttention's kind: for a group of rows, every single key whose pooled logit comes near an anchor."""

    name = "stripes"

    def search(self, query, key, scale):
        return {"theta": 0.5}

    def select(self, query, key, scale, parameters, offset):
        group = 50

        class Chosen:
            def rows(self, first, last):
                mask = torch.zeros(last - first, len(key), dtype=torch.bool)
                for row in range(first, last):
                    start = (row - offset) // group * group
                    logits = query[start : start + group].mean(0) @ key.T * scale
                    mask[row - first] = logits >= logits[:4].max() - parameters["theta"]
                return mask

        return Chosen()


def test_other_methods_fit_without_change():
    q, k, v = case()
    for other in (Blocks(), Stripes()):
        parameters = [other.search(q[h], k[h // GROUP], SCALE) for h in range(4)]
        out, _ = sparse_prefill(q, k, v, other, parameters)
        assert bool(out.isfinite().all())
        found = measure(q[0], k[0], other, parameters[0], SCALE)
        assert 0 < found.density < 1
        assert 0 < found.recall < 1
