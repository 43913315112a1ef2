"""Records of files and folders: in the order of their names, and never taken for running text."""

from __future__ import annotations

import json

import pytest
from tiny import save_tokenizer, words
from transformers import AutoTokenizer

from gossamer.compress.textfile import read_records
from gossamer.compress.traindata import load_training
from gossamer.errors import DataError


def pairs(first: int, count: int) -> list[dict[str, str]]:
    return [{"prompt": words(4, k), "response": words(5, 1000 + k)} for k in range(first, first + count)]


def lines(records) -> str:
    return "\n".join(map(json.dumps, records))


@pytest.fixture
def folder(tmp_path):
    """JSONL and a JSON list, one of them deeper, and what is passed over."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.jsonl").write_text(lines(pairs(10, 10)))
    (tmp_path / "a.json").write_text(json.dumps(pairs(0, 10), indent=1))
    (tmp_path / "deep" / "c.ndjson").write_text(lines(pairs(20, 10)))
    (tmp_path / ".hidden.txt").write_text("ka")
    (tmp_path / "README.md").write_text("what this is")
    (tmp_path / "picture.png").write_bytes(b"x")
    return tmp_path


def test_records_of_a_folder_follow_one_another_by_name(folder):
    found = list(read_records(folder))
    assert [record for record, _ in found] == pairs(0, 30)
    assert [where for _, where in found[9:11]] == [f"{folder / 'a.json'} entry 10", f"{folder / 'b.jsonl'} line 1"]


def test_a_list_of_records_in_one_file(folder):
    assert [record for record, _ in read_records(folder / "a.json")] == pairs(0, 10)


def test_a_folder_of_instructions_is_trained_on_as_instructions(folder, tmp_path_factory):
    own = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(own)
    text = load_training(str(folder), AutoTokenizer.from_pretrained(own), 32)
    assert "only responses learned" in text.protocol
    assert text.train.labels is not None
    assert (text.train.labels == -100).any()


def test_running_text_holds_no_records(tmp_path):
    (tmp_path / "a.txt").write_text("ka to")
    (tmp_path / "b.md").write_text("mi")
    assert read_records(tmp_path) is None
    assert read_records(tmp_path / "a.txt") is None


def test_a_folder_of_both_is_refused(folder):
    (folder / "notes.md").write_text("ka to")
    with pytest.raises(DataError, match=r"mixes records \(a\.json\) and running text \(notes\.md\)") as error:
        read_records(folder)
    assert "folder of one kind" in error.value.hint
