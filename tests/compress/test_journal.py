"""The journal: what is finished survives a kill, and a run of another kind is refused by name."""

import pytest

from gossamer.compress.journal import Journal, begun
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


@pytest.mark.parametrize(
    ("line", "garbage"),
    [
        (0, b"{]"), (0, b"\xff\xfe"), (0, b"5"), (0, b"null"), (0, b"{}"), (0, b'{"identity": 3}'),
        (1, b"{]"), (1, b"5"), (1, b'{"done": "a"}'), (1, b'{"done": 1, "result": {}}'), (1, b'{"result": {}}'),
        (1, b'{"done": "a", "result": []}'), (1, b""), (2, b"\x00\x00\x00"),
    ],
)  # fmt: skip
def test_garbage_is_an_error_that_names_the_line(tmp_path, line, garbage):
    journal = Journal.start(tmp_path / "p", IDENTITY)
    journal.finish("a", {})
    journal.finish("b", {})
    rows = journal.path.read_bytes().splitlines()
    rows[line] = garbage
    damaged = b"\n".join(rows) + b"\n"
    journal.path.write_bytes(damaged)
    with pytest.raises(ResumeError, match=f"is damaged.*line {line + 1}") as caught:
        Journal.resume(tmp_path / "p", IDENTITY)
    assert "--overwrite" in (caught.value.hint or "")
    assert journal.path.read_bytes() == damaged


@pytest.mark.parametrize("separator", ["\u2028", "\x0b", "\x85", "\n"])
def test_results_hold_any_text(tmp_path, separator):
    """Only a line feed ends a line: names and notes may hold the other characters that split lines."""
    journal = Journal.start(tmp_path / "p", IDENTITY | {"model": f"a{separator}b"})
    journal.finish("a", {"note": f"x{separator}y"})
    again = Journal.resume(tmp_path / "p", IDENTITY | {"model": f"a{separator}b"})
    assert again.done("a") == {"note": f"x{separator}y"}


def test_a_refused_resume_leaves_the_journal_as_it_is(tmp_path):
    journal = Journal.start(tmp_path / "p", IDENTITY)
    with open(journal.path, "ab") as file:
        file.write(b'{"done": "ha')
    before = journal.path.read_bytes()
    with pytest.raises(ResumeError):
        Journal.resume(tmp_path / "p", IDENTITY | {"threads": 3})
    assert journal.path.read_bytes() == before


def test_a_unit_finished_twice_has_its_last_result(tmp_path):
    journal = Journal.start(tmp_path / "p", IDENTITY)
    journal.finish("a", {"n": 1})
    journal.finish("a", {"n": 2})
    assert journal.done("a") == Journal.resume(tmp_path / "p", IDENTITY).done("a") == {"n": 2}


def test_a_journal_is_not_started_over_another(tmp_path):
    Journal.start(tmp_path / "p", IDENTITY)
    with pytest.raises(FileExistsError):
        Journal.start(tmp_path / "p", IDENTITY)


def test_what_counts_as_begun(tmp_path):
    partial = tmp_path / "p"
    assert not begun(partial)
    partial.mkdir()
    assert not begun(partial)
    (partial / "journal.jsonl").write_text('{"identity": {"ver')
    assert not begun(partial)
    (partial / "journal.jsonl").write_text('{"identity": {}}\n')
    assert begun(partial)
    (partial / "journal.jsonl").unlink()
    (partial / "other").touch()
    assert begun(partial)
    file = tmp_path / "file"
    file.touch()
    assert begun(file)


def test_a_folder_without_journal_is_not_resumed(tmp_path):
    (tmp_path / "p").mkdir()
    with pytest.raises(ResumeError, match="cannot be read"):
        Journal.resume(tmp_path / "p", IDENTITY)
