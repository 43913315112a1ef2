"""The journal: what is finished survives a kill, and a run of another kind is refused by name."""

import pytest

from gossamer.compress.journal import Journal
from gossamer.errors import ResumeError

IDENTITY = {"recipe": "abc", "threads": 2, "model": "m"}


def test_finished_units_are_there_after_a_restart(tmp_path):
    journal = Journal.start(tmp_path / "p", IDENTITY)
    journal.finish("a/block-0", {"rows": [1]})
    journal.finish("a/block-1", {"rows": [2, 3]})
    again = Journal.resume(tmp_path / "p", dict(IDENTITY))
    assert again.done("a/block-0") == {"rows": [1]}
    assert again.done("a/block-1") == {"rows": [2, 3]}
    assert again.done("a/block-2") is None


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_cut_short_by_a_kill_does_not_count(tmp_path, cut):
    journal = Journal.start(tmp_path / "p", IDENTITY)
    journal.finish("first", {"n": 1})
    journal.finish("second", {"n": 2})
    data = journal.path.read_bytes()
    journal.path.write_bytes(data[:-cut])
    again = Journal.resume(tmp_path / "p", IDENTITY)
    assert again.done("first") == {"n": 1}
    assert again.done("second") is None
    again.finish("second", {"n": 22})
    assert Journal.resume(tmp_path / "p", IDENTITY).done("second") == {"n": 22}


@pytest.mark.parametrize("key", list(IDENTITY))
def test_another_identity_is_refused_and_named(tmp_path, key):
    Journal.start(tmp_path / "p", IDENTITY)
    with pytest.raises(ResumeError, match=key) as caught:
        Journal.resume(tmp_path / "p", IDENTITY | {key: "other"})
    assert "--overwrite" in (caught.value.hint or "")


def test_a_missing_key_is_a_difference_too(tmp_path):
    Journal.start(tmp_path / "p", IDENTITY)
    with pytest.raises(ResumeError, match="extra"):
        Journal.resume(tmp_path / "p", IDENTITY | {"extra": 1})


def test_garbage_is_an_error_not_an_empty_journal(tmp_path):
    journal = Journal.start(tmp_path / "p", IDENTITY)
    journal.path.write_text("{]\n")
    with pytest.raises(ResumeError, match="damaged"):
        Journal.resume(tmp_path / "p", IDENTITY)


def test_a_folder_without_journal_is_not_resumed(tmp_path):
    (tmp_path / "p").mkdir()
    with pytest.raises(ResumeError, match="cannot be read"):
        Journal.resume(tmp_path / "p", IDENTITY)
