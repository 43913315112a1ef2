"""Files appear whole or not at all, read back with safetensors' own reader, and say what they needed when they fail."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import random_mask, random_tensor, raw, same_bits
from safetensors import safe_open
from safetensors.torch import load_file

from gossamer.compress import writer
from gossamer.compress.format import metadata, pack
from gossamer.compress.safefile import SafeFile
from gossamer.compress.writer import Output, atomic_write_text, output, write_file, write_part
from gossamer.errors import ResourceError

TENSORS = {
    "h.10.w": random_tensor(3, 5, dtype=torch.bfloat16),
    "h.2.w": random_tensor(2, 2, dtype=torch.bfloat16, seed=1),
    "flags": torch.tensor([True, False, True]),
    "ids": torch.tensor([5, -1]),
    "wide": random_tensor(3, dtype=torch.float64),
    "scalar": torch.tensor(1.5),
    "none": torch.empty(0, 7),
    "eight": random_tensor(3, 3).to(torch.float8_e5m2),
    "view": random_tensor(4, 6).t()[1:, ::2],
}


def header_of_file(path: Path) -> dict:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def test_safetensors_reads_it_back(tmp_path):
    path = tmp_path / "deeper" / "f.safetensors"
    size = write_file(path, [output(name, tensor) for name, tensor in TENSORS.items()], {"format": "pt"})
    assert size == path.stat().st_size
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    assert all(same_bits(loaded[name], tensor) for name, tensor in TENSORS.items())
    assert [p.name for p in path.parent.iterdir()] == ["f.safetensors"]


def test_order_and_alignment(tmp_path):
    path = tmp_path / "f"
    write_file(path, [output(name, tensor) for name, tensor in TENSORS.items()], {"format": "pt"})
    names = [name for name in header_of_file(path) if name != "__metadata__"]
    assert names == ["ids", "wide", "none", "scalar", "view", "h.2.w", "h.10.w", "eight", "flags"]
    for entry in SafeFile(path).entries.values():
        assert entry.offset % entry.dtype.itemsize == 0
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    items = [output(name, tensor) for name, tensor in TENSORS.items()]
    write_file(tmp_path / "a", items, {"format": "pt"})
    write_file(tmp_path / "b", items[::-1], {"format": "pt"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_parts(tmp_path):
    tensor, mask = random_tensor(4, 9), random_mask(4, 9)
    packed = pack(tensor, mask, pattern="2:4")
    path = tmp_path / "block-00000.safetensors"
    write_part(path, {"norm": torch.ones(3, requires_grad=True)}, {"w": packed})
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"norm", "w_bitmask", "w_values"}
        assert file.metadata() == metadata({"w": packed.record})
        assert same_bits(file.get_tensor("w_values"), tensor[mask])
    write_part(path, {"norm": torch.zeros(3)}, {})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("norm").tolist() == [0, 0, 0]


def test_an_empty_file(tmp_path):
    write_part(tmp_path / "f", {}, {})
    assert SafeFile(tmp_path / "f").entries == {}


def test_data_is_asked_for_in_its_turn_and_streamed(tmp_path):
    """No tensor is produced before the one in front of it is written."""
    log = []

    def pieces(name):
        for i in range(3):
            log.append(f"{name}{i}")
            yield torch.full((4,), i, dtype=torch.uint8)

    items = [Output(name, torch.uint8, (12,), lambda name=name: pieces(name)) for name in ("b", "a")]
    write_file(tmp_path / "f", items, {})
    assert log == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert raw(load_file(tmp_path / "f")["b"]) == bytes([0] * 4 + [1] * 4 + [2] * 4)


@pytest.mark.parametrize("size", [11, 13])
def test_data_of_another_size_than_announced_leaves_nothing(tmp_path, size):
    item = Output("x", torch.uint8, (12,), lambda: iter([torch.zeros(size, dtype=torch.uint8)]))
    with pytest.raises(ValueError, match=f"{size} bytes given, 12 announced"):
        write_file(tmp_path / "f", [item], {})
    assert list(tmp_path.iterdir()) == []


def test_a_name_twice(tmp_path):
    with pytest.raises(ValueError, match="twice"):
        write_file(tmp_path / "f", [output("x", torch.ones(1))] * 2, {})


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "needs .* bytes and cannot be written"),
        (errno.EDQUOT, "needs .* bytes and cannot be written"),
        (errno.EACCES, "no permission to write"),
        (errno.EROFS, "no permission to write"),
    ],
)
def test_storage_errors(tmp_path, monkeypatch, number, message):
    """The disk fails while data is flushed; the old file stays."""
    write_part(tmp_path / "f", {"x": torch.ones(3)}, {})
    before = (tmp_path / "f").read_bytes()

    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ResourceError, match=message) as caught:
        write_part(tmp_path / "f", {"x": torch.zeros(1000)}, {})
    assert "4" in caught.value.message
    assert caught.value.hint is not None
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("f", before)]


def test_other_os_errors_stay_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(OSError, match="I/O error"):
        write_part(tmp_path / "f", {"x": torch.ones(3)}, {})


def test_too_little_room_is_seen_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceError, match=r"needs \d{5} bytes, 1000 are free"):
        write_part(tmp_path / "f", {"x": torch.zeros(4000)}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_real_full_device():
    """/dev/full takes the place of a disk: the first flush fails as on a full one."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with pytest.raises(ResourceError, match="needs 7 bytes"), writer.storage_errors(Path("/dev/full"), 7):
        with open("/dev/full", "wb") as file:
            file.write(b"1234567")


def test_text(tmp_path):
    path = tmp_path / "a.json"
    atomic_write_text(path, "ä\n")
    atomic_write_text(path, "ö\n")
    assert path.read_text(encoding="utf-8") == "ö\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


CHILD = """
import sys, torch
from pathlib import Path
from gossamer.compress.writer import write_part
for i in range(2):
    write_part(Path(sys.argv[1]) / f"block-0000{i}.safetensors", {"x": torch.full((5000,), i)}, {})
"""


@pytest.mark.parametrize(
    ("point", "finished"), [("part", []), ("part:2", ["block-00000.safetensors"]), ("other", None)]
)
def test_killed_in_the_middle_of_a_part(tmp_path, point, finished):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], env={**os.environ, "GOSSAMER_FAILPOINT": point}, check=False
    )
    parts = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    if finished is None:
        assert done.returncode == 0
        assert parts == ["block-00000.safetensors", "block-00001.safetensors"]
        return
    assert done.returncode == -signal.SIGKILL
    assert parts == finished
    left = list(tmp_path.glob("*.tmp"))
    assert len(left) == 1
    assert left[0].stat().st_size > 20_000  # half of the data is there, under a name that nobody reads
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], check=False)
    assert done.returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["block-00000.safetensors", "block-00001.safetensors"]
