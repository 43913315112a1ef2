"""Calibration sequences of a head plan: what counts, whatever the chat template, and how they are cut to length."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoTokenizer

from gossamer.compress.headplans.items import (
    Item,
    example_item,
    items_of_length,
    text_item,
    trim,
)
from gossamer.compress.headplans.probe import probe_items
from gossamer.compress.instructions import example_of
from gossamer.errors import DataError

PROMPT = "{% if add_generation_prompt %}[assistant]\n{% endif %}"
PLAIN = "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}\n{% endfor %}" + PROMPT
TALK = [
    {"role": "user", "content": "kato mito"},
    {"role": "assistant", "content": "renka solto"},
    {"role": "user", "content": "uxba"},
    {"role": "assistant", "content": "lindor pemi kaka"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def counted_text(tokenizer, item):
    return tokenizer.decode(item.ids[item.counted])


def item_of(tokenizer):
    return example_item(example_of({"messages": TALK}, "x", tokenizer))


@pytest.mark.parametrize("template", [None, PLAIN])
def test_only_what_the_assistant_says_counts(tokenizer, template):
    tokenizer.chat_template = template
    item = item_of(tokenizer)
    said = counted_text(tokenizer, item)
    assert "renka solto" in said
    assert "lindor pemi kaka" in said
    assert "kato" not in said
    assert "uxba" not in said
    assert "lindor pemi kaka" in tokenizer.decode(item.ids[item.answer :])
    assert "uxba" not in tokenizer.decode(item.ids[item.answer :])


def made(prompt: int, answer: int) -> Item:
    ids = torch.arange(prompt + answer)
    return Item(ids, ids >= prompt)


def test_trimming_keeps_the_answer_and_both_ends_of_what_is_before_it():
    item = trim(made(90, 10), 40)
    assert item.ids.tolist() == [*range(15), *range(75, 100)]
    assert int(item.counted.sum()) == 10
    long = trim(made(30, 70), 40)
    assert len(long.ids) == 40
    assert int(long.counted.sum()) == 20  # at most half is answer
    assert trim(made(10, 10), 40).ids.tolist() == list(range(20))


def test_short_conversations_are_joined():
    found = items_of_length([made(8, 4)] * 10, 40, 2, "x")
    assert [len(item.ids) for item in found] == [40, 40]
    assert int(found[0].counted.sum()) == 12
    with pytest.raises(DataError, match="x holds 24 tokens, one sequence needs 40"):
        items_of_length([made(8, 4)] * 2, 40, 2, "x")


def test_plain_text_counts_everything_but_the_first_token():
    assert text_item(torch.arange(5)).counted.tolist() == [False, True, True, True, True]


def test_the_probe_asks_for_a_value_that_is_there(tokenizer):
    items = probe_items(tokenizer, 400, 4, 0)
    assert len(items) == 4
    for item in items:
        assert len(item.ids) <= 400
        text, answer = tokenizer.decode(item.ids[~item.counted]), tokenizer.decode(item.ids[item.counted])
        key = text.rsplit("The value of ", 1)[1].split()[0]
        assert f"The value of {key} is{answer}." in text
    assert [i.ids.tolist() for i in probe_items(tokenizer, 400, 4, 0)] == [i.ids.tolist() for i in items]
    assert probe_items(tokenizer, 20, 4, 0) == []
