"""Reading texts and cutting windows."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch

from gossamer.compress import data, hubdata
from gossamer.compress.data import (
    calibration_tokens,
    calibration_windows,
    evaluation_windows,
    load_text,
    token_ids,
)
from gossamer.compress.textdata import TextData
from gossamer.errors import DataError

STORY = "Once there was a fox.\n\nIt slept — long."


class Letters:
    """A tokenizer: BOS 1, then one token per character."""

    bos_token_id = 1

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [1] + [ord(letter) for letter in text]}


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".raw", ".weird", ""])
def test_any_utf8_file_is_read_as_it_is(tmp_path, suffix):
    text = load_text(write(tmp_path / f"story{suffix}", STORY), "calibration")
    assert text.text == STORY
    assert text.digest == hashlib.sha256(STORY.encode()).hexdigest()
    assert text.name == f"story{suffix}"


def test_byte_order_mark_and_line_ends_do_not_change_the_text(tmp_path):
    text = load_text(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n"), "evaluation")
    assert text.text == "one\ntwo\nthree\n"


def test_gzip(tmp_path):
    assert load_text(write(tmp_path / "a.txt.gz", gzip.compress(STORY.encode())), "calibration").text == STORY
    row = gzip.compress(json.dumps({"text": "x", "url": "u"}).encode())
    assert load_text(write(tmp_path / "c4.json.gz", row), "calibration").text == "x"
    with pytest.raises(DataError, match="cannot be read"):
        load_text(write(tmp_path / "bad.txt.gz", b"not gzip"), "calibration")


@pytest.mark.parametrize(
    "record",
    [
        {"text": "ask\nanswer", "id": 3},
        {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]},
        {"prompt": "ask", "response": "answer"},
        {"prompt": "ask\nans", "completion": "wer"},
        {"prompt": [{"role": "user", "content": "ask"}], "completion": [{"role": "assistant", "content": "answer"}]},
    ],
)
def test_jsonl_records(tmp_path, record):
    lines = f"{json.dumps(record)}\n\n{json.dumps({'text': 'end'})}\n"
    assert load_text(write(tmp_path / "a.jsonl", lines), "calibration").text == "ask\nanswer\n\nend"


def test_json_array(tmp_path):
    assert load_text(write(tmp_path / "a.json", '[{"text": "a"}, "b"]'), "calibration").text == "a\n\nb"


def test_unknown_fields_are_named(tmp_path):
    with pytest.raises(DataError, match=r"line 1 has none of .*; it has body, title"):
        load_text(write(tmp_path / "a.jsonl", '{"title": "t", "body": "b"}'), "calibration")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("3\n", "line 1 is int"),
        ('{"text": 4}', "field 'text' holds int"),
        ('{"messages": [{"role": "user"}]}', "no text under `content`"),
    ],
)
def test_broken_jsonl(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        load_text(write(tmp_path / "a.jsonl", content), "calibration")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert load_text(str(tmp_path / "a.parquet"), "calibration").text == "one\n\ntwo"
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="it has body"):
        load_text(str(tmp_path / "b.parquet"), "calibration")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load_text(write(tmp_path / "c.parquet", b"PAR1 rubbish"), "calibration")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError) as caught:
        load_text(write(tmp_path / "a.parquet", b"PAR1"), "calibration")
    assert caught.value.hint == "pip install pyarrow"


def test_folder_is_read_in_sorted_order(tmp_path):
    write(tmp_path / "b.txt", "two")
    write(tmp_path / "a.jsonl", '{"text": "one"}')
    write(tmp_path / "deep" / "c.md", "three")
    write(tmp_path / ".hidden" / "d.txt", "no")
    write(tmp_path / "picture.png", b"\x89PNG")
    text = load_text(str(tmp_path), "calibration")
    assert text.text == "one\n\ntwo\n\nthree"
    assert text.protocol == "3 files joined by an empty line"


def test_errors_of_local_text(tmp_path):
    with pytest.raises(DataError, match="is empty"):
        load_text(write(tmp_path / "a.txt", " \n"), "calibration")
    with pytest.raises(DataError, match="not UTF-8 text .byte 2 is 0xff"):
        load_text(write(tmp_path / "b.txt", b"ab\xff"), "calibration")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no text files"):
        load_text(str(tmp_path / "none"), "calibration")
    for spec in ("./missing", "missing.txt", "/no/such/file", "data\\x", "a/b.jsonl", ""):
        with pytest.raises(DataError, match="does not exist"):
            load_text(spec, "calibration")
    with pytest.raises(DataError, match="neither a file nor a dataset id"):
        load_text("a b", "calibration")


def test_calibration_windows_are_random_seeded_and_inside():
    ids = torch.arange(1000)
    state = torch.get_rng_state()
    windows = calibration_windows(ids, 200, 37, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert windows.shape == (200, 37)
    assert torch.equal(windows - windows[:, :1], torch.arange(37).expand(200, 37))
    starts = windows[:, 0]
    assert starts.max() <= 963
    assert starts.unique().numel() > 150
    assert torch.equal(windows, calibration_windows(ids, 200, 37, seed=3))
    assert not torch.equal(windows, calibration_windows(ids, 200, 37, seed=4))


def test_calibration_windows_reach_both_ends():
    starts = calibration_windows(torch.arange(12), 300, 10, seed=0)[:, 0]
    assert set(starts.tolist()) == {0, 1, 2}


def test_text_of_exactly_one_window():
    assert calibration_windows(torch.arange(8), 3, 8, seed=0).tolist() == [list(range(8))] * 3
    assert evaluation_windows(torch.arange(8), 8).tolist() == [list(range(8))]
    with pytest.raises(DataError, match="gives 7 tokens, one window needs 8"):
        calibration_windows(torch.arange(7), 1, 8, seed=0)
    with pytest.raises(DataError, match="book gives 7 tokens, one window needs 8"):
        evaluation_windows(torch.arange(7), 8, name="book")


def test_evaluation_windows_do_not_overlap_and_drop_the_tail():
    assert evaluation_windows(torch.arange(11), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert evaluation_windows(torch.arange(11), 3, 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert len(evaluation_windows(torch.arange(11), 3, 99)) == 3


def test_tokens_in_one_go_with_one_bos():
    ids = token_ids(Letters(), TextData("abc", "t", "p"))
    assert ids.dtype == torch.int64
    assert ids.tolist() == [1, 97, 98, 99]


def test_documents_give_one_window_each_from_inside_one_document():
    documents = ["a" * 5, "b" * 9, "c" * 30, "d" * 50]
    text = TextData("", "docs", "p", documents=documents)
    windows = calibration_tokens(Letters(), text, 40, 12, seed=1)
    assert windows.shape == (40, 12)
    for window in windows:
        assert len({int(token) for token in window if token != 1}) == 1  # one document, at most its BOS
        assert {chr(int(token)) for token in window if token != 1} <= {"c", "d"}
    assert torch.equal(windows, calibration_tokens(Letters(), text, 40, 12, seed=1))
    with pytest.raises(DataError, match="0 of 2 windows found, the longest document seen has 51 tokens"):
        calibration_tokens(Letters(), text, 2, 60, seed=1)


def test_one_text_takes_the_plain_path():
    text = TextData("abcdefgh" * 4, "t", "p")
    want = calibration_windows(token_ids(Letters(), text), 5, 7, seed=2)
    assert torch.equal(calibration_tokens(Letters(), text, 5, 7, seed=2), want)


def test_long_text_raises_no_length_warning(demo, caplog, recwarn):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo)
    assert tokenizer.model_max_length < 2000
    ids = token_ids(tokenizer, TextData("word and word " * 2000, "t", "p"))
    assert len(ids) > tokenizer.model_max_length
    assert not [record for record in caplog.records if "longer than" in record.getMessage()]
    assert not recwarn.list


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("a/b", ("a/b", None, None, None)),
        ("b:c", ("b", "c", None, None)),
        ("b::test:body", ("b", None, "test", "body")),
        ("a/b:c:d:e", ("a/b", "c", "d", "e")),
    ],
)
def test_dataset_spec(spec, parts):
    found = hubdata.DatasetSpec.parse(spec)
    assert (found.id, found.config, found.split, found.column) == parts


@pytest.mark.parametrize("spec", ["a:b:c:d:e", "a b", "a/b/c", "", "http://x"])
def test_bad_dataset_spec(spec):
    with pytest.raises(DataError):
        hubdata.DatasetSpec.parse(spec)


def test_without_datasets_the_hint_says_what_to_install(monkeypatch):
    monkeypatch.setattr(hubdata.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError) as caught:
        load_text("wikitext2", "evaluation")
    assert "gossamer[train]" in str(caught.value.hint)


@pytest.mark.parametrize("spec", ["wikitext2", "c4", "ptb", "someone/dataset"])
@pytest.mark.parametrize(("role", "option"), [("calibration", "--calibration FILE"), ("evaluation", "--no-eval")])
def test_unreachable_hub_names_the_file_to_give(spec, role, option, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused at once
    with pytest.raises(DataError, match="cannot be reached") as caught:
        load_text(spec, role)
    assert option in str(caught.value.hint)


def fake_hub(monkeypatch, tables):
    """Serve `tables` {split: rows} instead of the network, and record how they were asked for."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*arguments, split, streaming=False, **options):
        calls.append((arguments, split, options))
        table = datasets.Dataset.from_list(tables[split])
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *arguments: list(tables))
    return calls


def test_wikitext2_protocol(monkeypatch):
    rows = {"train": [{"text": "a"}, {"text": ""}], "test": [{"text": "b"}, {"text": ""}, {"text": "c"}]}
    calls = fake_hub(monkeypatch, rows)
    assert load_text("wikitext2", "evaluation").text == "b\n\n\n\nc"
    assert load_text("wikitext2", "calibration").text == "a "
    assert calls[0][0] == ("Salesforce/wikitext", "wikitext-2-raw-v1")


def test_c4_protocol(monkeypatch):
    rows = [{"text": f"d{i}"} for i in range(1200)]
    calls = fake_hub(monkeypatch, {"train": rows, "validation": rows})
    calibration = load_text("c4", "calibration")
    assert list(calibration.documents) == [row["text"] for row in rows]
    assert calibration.documents[1199] == "d1199"
    assert calibration.digest == hashlib.sha256("".join(row["text"] for row in rows).encode()).hexdigest()
    evaluation = load_text("c4", "evaluation")
    assert evaluation.text == " ".join(f"d{i}" for i in range(1100))
    assert evaluation.window_limit == 256
    assert [call[2]["data_files"] for call in calls] == [
        {"train": "en/c4-train.00000-of-01024.json.gz"},
        {"validation": "en/c4-validation.00000-of-00008.json.gz"},
    ]


def test_ptb_protocol(monkeypatch):
    fake_hub(monkeypatch, {"train": [{"sentence": "t"}], "test": [{"sentence": "a"}, {"sentence": "b"}]})
    assert load_text("ptb", "evaluation").text == "a b"
    assert load_text("ptb", "calibration").text == "t"


def test_any_dataset(monkeypatch):
    fake_hub(
        monkeypatch, {"train": [{"text": "a", "body": "x"}, {"text": "b", "body": "y"}], "validation": [{"text": "v"}]}
    )
    assert load_text("some/set", "calibration").text == "a\n\nb"
    assert load_text("some/set", "evaluation").text == "v"
    assert load_text("some/set::train:body", "evaluation").text == "x\n\ny"
    with pytest.raises(DataError, match="has no column 'nope'"):
        load_text("some/set::train:nope", "calibration")
    monkeypatch.setattr(hubdata, "MAX_CHARACTERS", 0)
    cut = load_text("some/set", "calibration")
    assert (cut.text, cut.protocol) == ("a", "the first 1 rows, joined by an empty line")


def test_dataset_without_a_fitting_split(monkeypatch):
    fake_hub(monkeypatch, {"dev": [{"text": "a"}]})
    with pytest.raises(DataError, match="no split test or validation for evaluation; it has dev"):
        load_text("some/set", "evaluation")


def test_public_names_exist():
    assert all(hasattr(data, name) for name in data.__all__)


@pytest.mark.parametrize(("length", "count"), [(1000, 7), (64, 5), (40, 128)])
def test_every_part_of_the_text_gives_one_window(length, count):
    seqlen, places = 32, length - 31
    windows = calibration_windows(torch.arange(length), count, seqlen, 3)
    starts = windows[:, 0].tolist()
    for part, start in enumerate(starts):
        assert math.floor(part * places / count) <= start <= math.ceil((part + 1) * places / count)
        assert 0 <= start < places
    assert torch.equal(windows, windows[:, :1] + torch.arange(seqlen))
    if length == 1000:
        assert starts != calibration_windows(torch.arange(length), count, seqlen, 4)[:, 0].tolist()
