"""Windows for a perplexity target share no token with calibration or with each other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gossamer.compress.activation.validation import two_parts
from gossamer.compress.textdata import TextData
from gossamer.errors import DataError


class Words:
    """Every word is a number and its own token."""

    bos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}


def texts_of(text, seed=0):
    seen = []
    return SimpleNamespace(
        text=lambda *_: text, tokenizer=Words(), recipe=SimpleNamespace(seed=seed), seen=seen,
        check_vocabulary=lambda _: None, calibrated=lambda text, ids: seen.append(ids),
    )  # fmt: skip


def running(tokens):
    return TextData(" ".join(map(str, range(tokens))), "text", "whole")


@pytest.mark.parametrize(
    ("tokens", "windows", "validation"), [(1000, 16, 16), (1000, 2, 61), (97, 8, 8), (10_000, 4, 4)]
)
@pytest.mark.parametrize("seed", range(3))
def test_no_token_is_in_two_places(tokens, windows, validation, seed):
    texts = texts_of(running(tokens), seed)
    first, second, source = two_parts(texts, "text", windows, validation, 8)
    assert first.shape == (windows, 8)
    assert second.shape == (validation, 8)
    assert len(second.unique()) == second.numel()
    assert not torch.isin(second, first).any()
    assert source.name == "text"
    assert texts.seen == [first, second]


def test_validation_lies_all_over_its_part():
    _, second, _ = two_parts(texts_of(running(10_000)), "text", 4, 4, 8)
    assert int(second.max() - second.min()) > 3500


def test_documents_are_disjoint():
    text = TextData("", "many", "documents", documents=[" ".join([str(k)] * 20) for k in range(40)])
    first, second, _ = two_parts(texts_of(text), "many", 10, 10, 8)
    assert int(first.max()) < 20 <= int(second.min())
    assert len(second[:, 0].unique()) == 10


def test_too_little_text_says_what_to_do():
    with pytest.raises(DataError, match=r"gives 71 tokens; 8 windows of 8 tokens .* need 72") as caught:
        two_parts(texts_of(running(71)), "text", 8, 8, 8)
    assert "--nsamples" in caught.value.hint
    two_parts(texts_of(running(72)), "text", 8, 8, 8)
    few = TextData("", "few", "documents", documents=["1 2 3"] * 12)
    with pytest.raises(DataError, match="few has 12 documents; 8 windows") as caught:
        two_parts(texts_of(few), "few", 8, 8, 2)
    assert "--nsamples" in caught.value.hint
