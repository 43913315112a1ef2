"""Training text: what is held out, what is learned, what is packed together and what it may see."""

from __future__ import annotations

import json
import random

import pytest
import torch
from tiny import save_tokenizer, words
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gossamer.compress.instructions import Example, example_of, is_instruction
from gossamer.compress.traindata import load_training, pack
from gossamer.errors import DataError
from gossamer.finetune.losses import IGNORED, row_losses
from gossamer.finetune.tokens import TokenRows, order

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def write(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{words(4, k)}?", "response": words(3 + k % 5, 1000 + k)} for k in range(count)]


def learned(example: Example, tokenizer) -> str:
    return tokenizer.decode(
        [token for token, label in zip(example.ids, example.labels, strict=True) if label != IGNORED]
    )


# ---- plain text and documents ----------------------------------------------------------------------------------------


def test_plain_text_is_cut_and_split_by_content(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(words(4000, 1))
    text = load_training(str(tmp_path / "a.txt"), tokenizer, 16)
    ids = tokenizer(words(4000, 1))["input_ids"]
    rows = [tuple(row) for row in [*text.train.ids.tolist(), *text.heldout.ids.tolist()]]
    assert sorted(rows) == sorted(tuple(ids[k * 16 : k * 16 + 16]) for k in range(len(ids) // 16))
    assert 0.05 < len(text.heldout) / len(rows) < 0.15
    assert text.train.labels is None
    assert text.train.predicted == 15 * len(text.train)
    (tmp_path / "b.txt").write_text(words(4000, 1)[:9000])
    shorter = load_training(str(tmp_path / "b.txt"), tokenizer, 16)
    held = {tuple(row) for row in text.heldout.ids.tolist()}
    assert {tuple(row) for row in shorter.heldout.ids.tolist()} <= held
    assert not held & {tuple(row) for row in shorter.train.ids.tolist()}


def test_records_are_held_out_as_a_whole_and_in_any_order(tokenizer, tmp_path):
    records = [{"text": words(30, k)} for k in range(200)]
    first = load_training(str(write(tmp_path / "a.jsonl", records)), tokenizer, 24)
    random.Random(0).shuffle(records)
    second = load_training(str(write(tmp_path / "b.jsonl", records)), tokenizer, 24)

    def documents(rows) -> set[tuple[int, ...]]:
        """Everything between two ends of text that is complete."""
        stream = rows.ids.flatten().tolist()
        ends = [k for k, token in enumerate(stream) if token == tokenizer.eos_token_id]
        return {tuple(stream[a + 1 : b + 1]) for a, b in zip(ends, ends[1:], strict=False)}

    for one, other in ((first.train, second.heldout), (first.heldout, second.train)):
        assert documents(one)
        assert not documents(one) & documents(other)
    assert 0.04 < len(first.heldout) / (len(first.train) + len(first.heldout)) < 0.17
    assert first.digest != second.digest


def test_no_more_is_read_than_needed(tokenizer, tmp_path):
    records = [{"text": words(30, k)} for k in range(200)]
    path = write(tmp_path / "a.jsonl", records)
    whole, part = (load_training(str(path), tokenizer, 24, limit=limit) for limit in (None, 1000))
    assert 1000 <= part.train.ids.numel() < whole.train.ids.numel() / 2


# ---- instructions ----------------------------------------------------------------------------------------------------


def test_only_the_response_is_learned(tokenizer):
    record = {"prompt": "kato kami?", "response": "ren sol"}
    example = example_of(record, "here", tokenizer)
    assert learned(example, tokenizer) == "ren sol</s>"
    assert tokenizer.decode(example.ids) == "<s>kato kami?\nren sol</s>"
    assert example.ids.count(tokenizer.bos_token_id) == 1


def test_a_prompt_and_its_completion_follow_each_other_as_they_are(tokenizer):
    record = {"prompt": "kato kami", "completion": " ren sol"}
    tokenizer.chat_template = TEMPLATE
    try:
        for _ in range(2):
            example = example_of(record, "here", tokenizer)
            assert learned(example, tokenizer) == " ren sol</s>"
            assert tokenizer.decode(example.ids) == "<s>kato kami ren sol</s>"
            tokenizer.chat_template = None
    finally:
        tokenizer.chat_template = None


def test_of_a_conversation_in_two_parts_the_second_is_learned(tokenizer):
    turn = [{"role": "user", "content": "kato"}, {"role": "assistant", "content": "ren"}]
    record = {"prompt": [*turn, {"role": "user", "content": "ba"}], "completion": [turn[1] | {"content": "sol ux"}]}
    assert learned(example_of(record, "here", tokenizer), tokenizer) == "sol ux</s>"
    tokenizer.chat_template = TEMPLATE
    try:
        example = example_of(record, "here", tokenizer)
        assert learned(example, tokenizer) == "sol ux</s>"
        whole = "<|user|>kato</s><|assistant|>ren</s><|user|>ba</s><|assistant|>sol ux</s>"
        assert tokenizer.decode(example.ids) == whole
    finally:
        tokenizer.chat_template = None


def test_a_chat_template_decides_what_a_response_is(tokenizer):
    tokenizer.chat_template = TEMPLATE
    try:
        messages = [
            {"role": "system", "content": "mi"},
            {"role": "user", "content": "kato"},
            {"role": "assistant", "content": "ren"},
            {"role": "user", "content": "ba"},
            {"role": "assistant", "content": "sol ux"},
        ]
        example = example_of({"messages": messages}, "here", tokenizer)
        assert learned(example, tokenizer) == "ren</s>sol ux</s>"
        whole = "<|system|>mi</s><|user|>kato</s><|assistant|>ren</s><|user|>ba</s><|assistant|>sol ux</s>"
        assert tokenizer.decode(example.ids) == whole
        pair = example_of({"prompt": "kato", "response": "ren"}, "here", tokenizer)
        assert learned(pair, tokenizer) == "ren</s>"
    finally:
        tokenizer.chat_template = None


def test_a_template_that_hides_earlier_turns_still_labels_the_response(tokenizer):
    """Its text of a prefix is no prefix of its text: the response is looked up instead."""
    tokenizer.chat_template = (
        "{{ messages|length }}{% for m in messages %}|{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}|{% endif %}"
    )
    try:
        example = example_of({"prompt": "kato", "response": "ren sol"}, "here", tokenizer)
        assert learned(example, tokenizer) == "ren sol"
    finally:
        tokenizer.chat_template = None


def test_packed_examples_do_not_see_each_other(tokenizer, tmp_path):
    """The loss of every response, packed, is that of its example alone."""
    examples = [example_of(record, "", tokenizer) for record in pairs(12)]
    packed = pack(examples, 64, 1)
    assert len(packed) < 12
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=None,
            initializer_range=0.2,
        )  # fmt: skip
    ).eval()
    alone = 0.0
    for example in examples:
        row = TokenRows(torch.tensor([example.ids]), torch.tensor([example.labels]))
        alone += float(row_losses(model, row)) * row.predicted
    found = row_losses(model, packed)
    counts = (packed.labels[:, 1:] != IGNORED).sum(1)
    assert int(counts.sum()) == packed.predicted == sum(sum(x != IGNORED for x in e.labels[1:]) for e in examples)
    assert float((found * counts).sum()) == pytest.approx(alone, rel=1e-4)


def test_packing_by_hand():
    examples = [Example([1, 2, 3], [-100, 2, 3]), Example([4, 5], [4, 5]), Example([6, 7, 8, 9], [-100, -100, 8, 9])]
    rows = pack(examples, 6, 0)
    assert rows.ids.tolist() == [[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 0, 0]]
    assert rows.labels.tolist() == [[-100, 2, 3, -100, 5, -100], [-100, -100, 8, 9, -100, -100]]
    assert rows.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]]


def test_long_examples_lose_their_end_and_empty_ones_go():
    rows = pack([Example([1, 2, 3, 4], [-100, -100, -100, 4]), Example([1, 2, 3, 4], [-100, 2, 3, 4])], 3, 0)
    assert rows.ids.tolist() == [[1, 2, 3]]
    assert rows.labels.tolist() == [[-100, 2, 3]]


def test_a_file_of_instructions(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(200))
    text = load_training(str(path), tokenizer, 32)
    assert text.train.labels is not None
    assert text.train.positions is not None
    assert "only responses learned" in text.protocol
    assert 0 < text.train.predicted < text.train.ids.numel() * 0.8


def test_what_is_an_instruction():
    assert is_instruction({"prompt": "a", "response": "b"})
    assert is_instruction({"messages": []})
    assert is_instruction({"prompt": "a", "completion": "b"})
    assert not is_instruction({"prompt": "a"})
    assert not is_instruction({"text": "a", "messages": []})
    assert not is_instruction("a")


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD = [
    ([{"messages": "hello"}], "holds no list of messages"),
    ([{"messages": [{"content": "a"}]}], "has no `role`"),
    ([{"messages": [{"role": "user", "content": "a"}]}], "has no response to learn from"),
    ([{"prompt": "a", "response": 3}], "content of assistant is int"),
    ([{"prompt": "a", "completion": " "}], "has no response to learn from"),
    ([{"prompt": ["a"], "completion": "b"}], "content of prompt is list"),
    ([{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}], "'prompt' holds no list of messages"),
    ([{"text": "ka"}], "is too short to train on: 0 rows of 32 tokens"),
    ([{"question": "a"}], "has none of the fields"),
    ([7], "line 1 is int"),
]


@pytest.mark.parametrize(("records", "match"), BAD)
def test_records_that_are_no_training_text(tokenizer, tmp_path, records, match):
    with pytest.raises(DataError, match=match):
        load_training(str(write(tmp_path / "a.jsonl", records)), tokenizer, 32)


@pytest.mark.parametrize("content", ["", "  \n", "kato mi ren"])
def test_texts_that_are_too_short(tokenizer, tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(DataError, match="is empty|too short"):
        load_training(str(tmp_path / "a.txt"), tokenizer, 32)


def test_prompts_that_fill_a_row_ask_for_longer_ones(tokenizer, tmp_path):
    records = [{"prompt": "ka to mi ren sol ux ba lin dor pe", "response": f"ka {i}"} for i in range(20)]
    path = str(write(tmp_path / "a.jsonl", records))
    with pytest.raises(DataError, match="0 rows of 8 tokens") as told:
        load_training(path, tokenizer, 8)
    assert "the prompts of 20 examples fill a row" in told.value.hint
    assert "larger --seqlen" in told.value.hint
    records += [{"prompt": "ka", "response": f"to {i}"} for i in range(9)]
    found = load_training(str(write(tmp_path / "b.jsonl", records)), tokenizer, 8)
    assert "20 left out, whose prompt fills a row" in found.protocol


def test_a_text_that_is_held_out_as_a_whole(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("ka to mi ren sol ux ba lin dor pe. " * 99)
    with pytest.raises(DataError, match="is held out as a whole") as told:
        load_training(str(tmp_path / "a.txt"), tokenizer, 16, heldout=0.99999)
    assert "smaller heldout" in told.value.hint


def test_a_missing_file():
    with pytest.raises(DataError, match="does not exist"):
        load_training("./nowhere.txt", None, 32)


def test_a_template_that_fails(tokenizer, tmp_path):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(DataError, match=r"line 1 does not fit the tokenizer's chat template: roles must alternate"):
            load_training(str(write(tmp_path / "a.jsonl", pairs(3))), tokenizer, 32)
    finally:
        tokenizer.chat_template = None


# ---- the order of rows -----------------------------------------------------------------------------------------------


def test_order_is_a_pure_function_and_every_pass_is_complete():
    found = order(7, 20, 3)
    assert torch.equal(found, order(7, 20, 3))
    assert torch.equal(found[:12], order(7, 12, 3))
    for start in (0, 7):
        assert sorted(found[start : start + 7].tolist()) == list(range(7))
    assert not torch.equal(found[:7], found[7:14])
    assert not torch.equal(found, order(7, 20, 4))
