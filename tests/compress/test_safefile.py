"""Safetensors files that lie about themselves are refused with their name; honest ones are read bit for bit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from checkpoints import header_of, same_bits, write_raw
from safetensors.torch import _TYPES, load_file, save_file

from gossamer.compress.safefile import DTYPES, SafeFile
from gossamer.errors import CheckpointError, ResourceError

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.tensor([1, 2, 3], dtype=torch.uint8),  # the next one is not aligned: readers that copy need not care
    "c": torch.randn(5, 3).bfloat16(),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "none": torch.empty(0, 4, dtype=torch.float16),
    "flags": torch.tensor([[True, False]]),
    "eight": torch.randn(2, 2).to(torch.float8_e4m3fn),
}


@pytest.fixture
def good(tmp_path) -> Path:
    return write_raw(tmp_path / "good.safetensors", TENSORS, {"format": "pt"})


def test_reads_every_tensor_bit_for_bit(good):
    file = SafeFile(good)
    assert list(file.entries) == list(TENSORS)
    assert file.metadata == {"format": "pt"}
    for name, tensor in TENSORS.items():
        assert same_bits(file.read(name), tensor), name
        assert b"".join(bytes(piece.tolist()) for piece in file.chunks(name)) == bytes(
            tensor.flatten().view(torch.uint8).tolist()
        )


def test_reads_are_independent_memory(good):
    file = SafeFile(good)
    file.read("a").zero_()
    assert same_bits(file.read("a"), TENSORS["a"])


def test_rows(good):
    file = SafeFile(good)
    assert same_bits(file.read_rows("c", 1, 4), TENSORS["c"][1:4])
    assert same_bits(file.read_rows("c", 2, 2), TENSORS["c"][2:2])
    assert same_bits(file.read_rows("none", 0, 0), TENSORS["none"])
    for start, stop in ((-1, 2), (0, 6), (3, 2)):
        with pytest.raises(ValueError, match="rows"):
            file.read_rows("c", start, stop)
    with pytest.raises(ValueError, match="rows"):
        file.read_rows("scalar", 0, 1)


def test_nothing_is_mapped(good):
    SafeFile(good).read("a")
    assert str(good) not in Path("/proc/self/maps").read_text()


def test_large_tensors_come_in_chunks(tmp_path):
    big = torch.arange(5_000_000, dtype=torch.float32)
    save_file({"big": big}, tmp_path / "g")
    file = SafeFile(tmp_path / "g")
    pieces = list(file.chunks("big"))
    assert [len(p) for p in pieces] == [16 * 2**20, 20_000_000 - 16 * 2**20]
    assert torch.equal(torch.cat(pieces).view(torch.float32), big)
    assert torch.equal(file.read("big"), big)


def test_all_dtypes_of_the_library_are_known():
    missing = {name for name in _TYPES if name not in DTYPES}
    assert missing <= {"F4", "F6_E2M3", "F6_E3M2"}
    assert all(_TYPES[name] == dtype for name, dtype in DTYPES.items() if name in _TYPES)


def entry(name: str, **change):
    def edit(header):
        header[name].update(change)

    return edit


def drop(name: str, field: str):
    def edit(header):
        del header[name][field]

    return edit


def offsets(name: str, begin: int, end: int):
    return entry(name, data_offsets=[begin, end])


FLOAT = {"x": torch.zeros(2, 3), "y": torch.ones(4)}
BAD = {
    "empty": ({"cut": 0}, "fewer than a safetensors header"),
    "half a length": ({"cut": 5}, "fewer than a safetensors header"),
    "huge header": ({"length": 2**63}, "announces a header of 9223372036854775808 bytes"),
    "header longer than the file": ({"length": 5000}, "announces a header of 5000 bytes"),
    "header cut": ({"cut": 40}, "announces a header"),
    "garbage": ({"text": "\x00\x01 not json"}, "not JSON"),
    "no object": ({"text": "[1, 2]"}, "not a JSON object"),
    "deep": ({"text": "[" * 200_000}, "not JSON"),
    "number of many digits": ({"text": '{"x": ' + "9" * 5000 + "}"}, "(not JSON|tensor x)"),
    "twice": ({"text": '{"x": {}, "x": {}}'}, "'x' occurs twice"),
    "truncated data": ({"cut": -3}, "is cut short: tensor y ends"),
    "metadata": ({"edit": lambda h: h.update(__metadata__={"a": 1})}, "__metadata__"),
    "metadata list": ({"edit": lambda h: h.update(__metadata__=[])}, "__metadata__"),
    "no entry": ({"edit": lambda h: h.update(x=3)}, "of tensor x"),
    "no dtype": ({"edit": drop("x", "dtype")}, "of tensor x"),
    "no shape": ({"edit": drop("x", "shape")}, "of tensor x"),
    "unknown dtype": ({"edit": entry("x", dtype="F4")}, "tensor x of unknown dtype 'F4'"),
    "dtype of another type": ({"edit": entry("x", dtype=["F32"])}, "tensor x of unknown dtype"),
    "wrong dtype": ({"edit": entry("x", dtype="F64")}, "24 bytes to tensor x"),
    "negative shape": ({"edit": entry("x", shape=[-2, -3])}, "tensor x of impossible shape"),
    "shape of floats": ({"edit": entry("x", shape=[2.0, 3])}, "tensor x of impossible shape"),
    "shape of booleans": ({"edit": entry("x", shape=[True, 6])}, "tensor x of impossible shape"),
    "shape is no list": ({"edit": entry("x", shape=6)}, "tensor x of impossible shape"),
    "too large shape": ({"edit": entry("x", shape=[2**62, 2**62])}, "24 bytes to tensor x"),
    "shape beyond 64 bits": ({"edit": entry("x", shape=[2**64])}, "tensor x of impossible shape"),
    "offsets backwards": ({"edit": offsets("x", 24, 0)}, "tensor x at impossible offsets"),
    "negative offsets": ({"edit": offsets("x", -24, 0)}, "tensor x at impossible offsets"),
    "three offsets": ({"edit": entry("x", data_offsets=[0, 24, 24])}, "tensor x at impossible offsets"),
    "overlap": ({"edit": offsets("y", 8, 24)}, "tensor y at byte .* overlaps"),
    "gap": ({"edit": lambda h: h.pop("x") and None}, "tensor y at byte .* gap"),
    "rest": ({"edit": lambda h: h.pop("y") and None}, "16 bytes that belong to no tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_attacks_end_in_one_error_that_names_the_file(name, tmp_path):
    change, message = BAD[name]
    change = dict(change)
    if change.get("cut", 0) < 0:
        change["cut"] += write_raw(tmp_path / "whole", FLOAT).stat().st_size
    path = write_raw(tmp_path / "bad.safetensors", FLOAT, **change)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafeFile(path)
    assert "bad.safetensors" in caught.value.message
    assert "\n" not in caught.value.message


def test_header_that_is_not_utf8(tmp_path):
    (tmp_path / "f").write_bytes((4).to_bytes(8, "little") + b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match="not JSON"):
        SafeFile(tmp_path / "f")


def test_every_truncation_is_noticed(tmp_path):
    whole = write_raw(tmp_path / "whole", FLOAT, {"format": "pt"}).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "part").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            SafeFile(tmp_path / "part")


def test_every_changed_header_byte_is_an_error_or_harmless(tmp_path):
    """No byte of the header can make a read crash or leave the file's own data."""
    whole = bytearray(write_raw(tmp_path / "whole", FLOAT).read_bytes())
    length = 8 + int.from_bytes(whole[:8], "little")
    for position in range(length):
        changed = bytearray(whole)
        changed[position] ^= 0x15
        (tmp_path / "changed").write_bytes(changed)
        try:
            file = SafeFile(tmp_path / "changed")
        except CheckpointError:
            continue
        for name, item in file.entries.items():
            assert file.read(name).numel() * item.dtype.itemsize == item.nbytes


def test_a_file_that_shrinks_while_it_is_read(good):
    file = SafeFile(good)
    os.truncate(good, good.stat().st_size - 3)
    with pytest.raises(CheckpointError, match="became shorter"):
        file.read("eight")


def test_missing_and_forbidden(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="cannot be opened"):
        SafeFile(tmp_path / "absent")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ResourceError, match="no permission to read"):
        SafeFile(tmp_path / "absent")


def test_files_are_not_left_open(good):
    before = len(os.listdir("/proc/self/fd"))
    files = [SafeFile(good) for _ in range(200)]
    for file in files:
        file.read("a")
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_the_helper_writes_what_the_library_reads(good):
    aligned = {name: TENSORS[name] for name in ("scalar", "a", "c", "b")}
    path = write_raw(good.with_name("aligned"), aligned)
    loaded = load_file(path)
    assert header_of(aligned).keys() == loaded.keys()
    assert all(same_bits(loaded[name], aligned[name]) for name in aligned)
