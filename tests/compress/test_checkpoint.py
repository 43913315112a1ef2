"""Assembling, verifying and publishing: names, shards, bytes, and what verification must notice."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import model_folder, packed_of, random_mask, random_tensor, raw, same_bits, write_raw
from safetensors.torch import load_file, save_file

from gossamer.compress import checkpoint
from gossamer.compress.checkpoint import assemble, publish, verify
from gossamer.compress.format import MatrixRecord, pack
from gossamer.compress.modelfolder import find_weights
from gossamer.compress.packing import holds
from gossamer.compress.source import FolderSource, OverlaySource, open_source
from gossamer.compress.writer import write_part
from gossamer.errors import CheckpointError, RecipeError, ResourceError

UP, DOWN, CONV, EXPERTS = (f"model.layers.{i}.weight" for i in (0, 1, 10, 2))
NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"
BASE = {
    EMBED: random_tensor(40, 24, seed=1),
    UP: random_tensor(30, 24, dtype=torch.bfloat16, seed=2),
    DOWN: random_tensor(24, 30, dtype=torch.bfloat16, seed=3),
    CONV: random_tensor(24, 36, seed=4),
    EXPERTS: random_tensor(3, 24, 10, dtype=torch.float16, seed=5),
    NORM: random_tensor(24, seed=6),
}


def two_of_four(*shape: int, transposed: bool) -> torch.Tensor:
    """A 2:4 mask along the input dimension."""
    scores = random_tensor(*shape, seed=7)
    scores = scores.transpose(-1, -2) if transposed else scores
    groups = scores.reshape(*scores.shape[:-1], -1, 4)
    kept = groups.argsort(-1).argsort(-1) >= 2
    kept = kept.view(scores.shape)
    return (kept.transpose(-1, -2) if transposed else kept).contiguous()


MASKS = {
    UP: (random_mask(30, 24), "0.5", False),
    CONV: (two_of_four(24, 36, transposed=True), "2:4", True),
    EXPERTS: (two_of_four(3, 24, 10, transposed=True), "2:4", True),
}
WANTED = {k: t.masked_fill(~MASKS[k][0], 0) if k in MASKS else t for k, t in BASE.items()}


@pytest.fixture
def source(tmp_path) -> OverlaySource:
    base = model_folder(tmp_path / "base")
    write_raw(base / "model.safetensors", BASE, {"format": "pt"})
    for i, (key, (mask, pattern, transposed)) in enumerate(MASKS.items()):
        packed = pack(BASE[key], mask, pattern=pattern, transposed=transposed)
        write_part(tmp_path / "parts" / f"block-{i:05d}.safetensors", {}, {key: packed})
    return OverlaySource(open_source(base), tmp_path / "parts")


def opened(folder: Path, kind: str) -> FolderSource:
    model_folder(folder)
    return FolderSource(folder, find_weights(folder, kind))


@pytest.mark.parametrize("limit", [10**9, 3000, 1])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_what_is_assembled_reads_as_the_source(source, tmp_path, kind, limit):
    out = tmp_path / "out"
    files = assemble(source, out, kind, limit)
    assert {p for p in out.rglob("*") if p.is_file()} == set(files)
    found = verify(out, source, kind)
    again = opened(out, kind)
    assert again.keys() == source.keys()
    for key, tensor in WANTED.items():
        assert same_bits(again.read(key), tensor)
        assert again.pattern(key) == (MASKS[key][1] if key in MASKS else None)
    for key, (mask, _, _) in MASKS.items():
        assert torch.equal(again.mask(key).to_bool(), mask)
    assert found.tensors == len(BASE)
    assert found.summary.matrices == 3
    assert found.zeros == sum(int((~mask).sum()) for mask, _, _ in MASKS.values())


def test_names_of_single_files(source, tmp_path):
    sparse, dense = assemble(source, tmp_path / "s", "sparse"), assemble(source, tmp_path / "d", "dense")
    assert [str(p.relative_to(tmp_path)) for p in sparse] == ["s/model.sparse.safetensors"]
    names = [str(p.relative_to(tmp_path)) for p in dense]
    assert names == ["d/model.safetensors", "d/gossamer/masks.safetensors"]
    loaded = load_file(dense[0])
    assert loaded.keys() == BASE.keys()
    assert all(same_bits(loaded[key], WANTED[key]) for key in BASE)


def test_shards_in_natural_order_with_an_index(source, tmp_path):
    files = assemble(source, tmp_path / "s", "sparse", 3000)
    count = len(files) - 1
    names = [f"model.sparse-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert count > 2
    assert [p.name for p in files[:-1]] == names
    assert files[-1].name == "model.safetensors.index.sparse.json"
    index = json.loads(files[-1].read_text())
    stored = {name: tensor for path in files[:-1] for name, tensor in load_file(path).items()}
    assert index["weight_map"] == {name: path.name for path in files[:-1] for name in load_file(path)}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in stored.values())
    keys = source.keys()
    order = [index["weight_map"].get(key, index["weight_map"].get(f"{key}_bitmask")) for key in keys]
    assert order == sorted(order)
    for key in MASKS:
        assert index["weight_map"][f"{key}_bitmask"] == index["weight_map"][f"{key}_values"]
    dense = assemble(source, tmp_path / "d", "dense", 3000)
    assert [p.name for p in dense[-2:]] == ["masks.safetensors", "model.safetensors.index.json"]
    assert dense[0].name == f"model-00001-of-{len(dense) - 2:05d}.safetensors"


def test_transformers_accepts_the_sharded_names(source, tmp_path):
    from transformers.modeling_utils import _add_variant
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

    files = assemble(source, tmp_path / "s", "sparse", 3000)
    assert files[-1].name == _add_variant(SAFE_WEIGHTS_INDEX_NAME, "sparse")


def test_assembling_twice_gives_the_same_bytes(source, tmp_path):
    for kind in ("sparse", "dense"):
        first = {p.name: p.read_bytes() for p in assemble(source, tmp_path / kind, kind, 3000)}
        second = {p.name: p.read_bytes() for p in assemble(source, tmp_path / kind, kind, 3000)}
        assert first == second


def test_without_masks_nothing_of_ours_is_written(source, tmp_path):
    files = assemble(source.base, tmp_path / "d", "dense")
    assert [p.name for p in files] == ["model.safetensors"]
    assert verify(tmp_path / "d", source.base, "dense").summary.matrices == 0


def test_packed_parts_are_copied_and_not_packed_again(source, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("packed again")

    monkeypatch.setattr("gossamer.compress.packing.compress", refuse)
    monkeypatch.setattr("gossamer.compress.format.expand", refuse)
    assemble(source, tmp_path / "s", "sparse")


def test_from_a_dense_folder_with_masks(source, tmp_path):
    assemble(source, tmp_path / "d", "dense")
    dense = opened(tmp_path / "d", "dense")
    assemble(dense, tmp_path / "s", "sparse")
    verify(tmp_path / "s", dense, "sparse")
    verify(tmp_path / "s", source, "sparse")


def test_weights_that_left_their_mask_are_not_packed(source, tmp_path):
    assemble(source, tmp_path / "d", "dense")
    path = tmp_path / "d" / "model.safetensors"
    tensors = load_file(path)
    row, col = (~MASKS[UP][0]).nonzero()[0].tolist()
    for value in (1.0, -0.0, float("nan")):
        tensors[UP][row, col] = value
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=f"tensor {UP} has 1 entries that are not"):
            assemble(opened(tmp_path / "d", "dense"), tmp_path / "s", "sparse")
    assert not list((tmp_path / "s").glob("*"))


def test_one_tensor_at_a_time(source, tmp_path, monkeypatch):
    """Plain tensors pass in pieces, whatever their size."""
    monkeypatch.setattr("gossamer.compress.safefile.CHUNK_BYTES", 100)
    sizes = []
    real = checkpoint.write_file

    def watched(path, outputs, *rest, **options):
        for item in outputs:
            sizes.extend(piece.numel() for piece in item.data() if item.name == EMBED)
        return real(path, outputs, *rest, **options)

    monkeypatch.setattr(checkpoint, "write_file", watched)
    assemble(source, tmp_path / "s", "sparse")
    assert max(sizes) == 100
    assert sum(sizes) == 40 * 24 * 4
    verify(tmp_path / "s", source, "sparse")


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (1, 1)])
def test_matrices_with_nothing_in_them(tmp_path, kind, shape):
    base = model_folder(tmp_path / "b")
    write_raw(base / "model.safetensors", {"a.w": torch.ones(shape), "empty": torch.empty(0)})
    packed = pack(torch.ones(shape), torch.zeros(shape).bool(), pattern="1.0")
    write_part(tmp_path / "p" / "x.safetensors", {}, {"a.w": packed})
    source = OverlaySource(open_source(base), tmp_path / "p")
    assemble(source, tmp_path / "out", kind)
    assert verify(tmp_path / "out", source, kind).zeros == shape[0] * shape[1]
    assert same_bits(opened(tmp_path / "out", kind).read("a.w"), torch.zeros(shape))


# ---- verification ----------------------------------------------------------------------------------------------------


def rewrite(path: Path, change) -> None:
    """Change tensors (and metadata) of a file as another program would."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        file_metadata = file.metadata()
    tensors = load_file(path)
    result = change(tensors, file_metadata)
    save_file(tensors, path, metadata=result or file_metadata)


def bump(key: str):
    def change(tensors, _):
        tensors[key].view(torch.uint8).flatten()[3] ^= 1

    return change


def negative_zero(tensors, _):
    row, col = (~MASKS[UP][0]).nonzero()[0].tolist()
    tensors[UP][row, col] = -0.0


def lose(key: str):
    return lambda tensors, _: tensors.pop(key) is None or None


def other_record(tensors, file_metadata):
    document = json.loads(file_metadata["gossamer"])
    document["matrices"][UP]["pattern"] = "2:4"
    return file_metadata | {"gossamer": json.dumps(document)}


def bad_json(tensors, file_metadata):
    return file_metadata | {"gossamer": "{"}


WEIGHTS = {"sparse": "model.sparse.safetensors", "dense": "model.safetensors"}
NOTICED = [
    ("sparse", WEIGHTS["sparse"], bump(EMBED), f"{EMBED} is not bit-equal"),
    ("sparse", WEIGHTS["sparse"], bump(f"{UP}_values"), f"{UP} is not bit-equal"),
    ("sparse", WEIGHTS["sparse"], bump(f"{UP}_bitmask"), f"mask of {UP} is not bit-equal"),
    ("sparse", WEIGHTS["sparse"], lose(NORM), f"{NORM} is missing"),
    ("sparse", WEIGHTS["sparse"], lose(f"{UP}_values"), f"{UP}_values is missing"),
    ("sparse", WEIGHTS["sparse"], lambda t, _: t.update(extra=torch.ones(1)), "extra is not in the source"),
    ("sparse", WEIGHTS["sparse"], other_record, f"record of {UP}"),
    ("sparse", WEIGHTS["sparse"], bad_json, "is not JSON"),
    ("sparse", WEIGHTS["sparse"], lambda t, _: {"format": "pt"}, "record of"),
    ("sparse", WEIGHTS["sparse"], lambda t, _: t.update({f"{UP}_values": t[f"{UP}_values"][1:]}), "has shape"),
    ("dense", WEIGHTS["dense"], bump(DOWN), f"{DOWN} is not bit-equal"),
    ("dense", WEIGHTS["dense"], negative_zero, f"{UP} is not bit-equal"),
    ("dense", WEIGHTS["dense"], lambda t, _: t.update({NORM: t[NORM].double()}), f"{NORM} is torch.float64"),
    ("dense", WEIGHTS["dense"], lambda t, _: t.update({NORM: t[NORM][None]}), r"\[1, 24\], not"),
    ("dense", "gossamer/masks.safetensors", bump(f"{CONV}_bitmask"), f"mask of {CONV} is not bit-equal"),
    ("dense", "gossamer/masks.safetensors", other_record, f"record of {UP}"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "change", "message"), NOTICED)
def test_verification_notices(source, tmp_path, kind, name, change, message):
    assemble(source, tmp_path / "out", kind)
    verify(tmp_path / "out", source, kind)
    rewrite(tmp_path / "out" / name, change)
    with pytest.raises(CheckpointError, match=message):
        verify(tmp_path / "out", source, kind)


def test_verification_notices_missing_masks_and_cut_files(source, tmp_path):
    assemble(source, tmp_path, "dense")
    (tmp_path / "gossamer" / "masks.safetensors").unlink()
    with pytest.raises(CheckpointError, match="masks.safetensors is missing"):
        verify(tmp_path, source, "dense")
    os.truncate(tmp_path / "model.safetensors", 900)
    with pytest.raises(CheckpointError, match="cannot be read back"):
        verify(tmp_path, source, "dense")


def test_verification_reads_the_index(source, tmp_path):
    index = assemble(source, tmp_path, "sparse", 3000)[-1]
    document = json.loads(index.read_text())
    first, second = sorted(set(document["weight_map"].values()))[:2]
    swapped = {first: second, second: first}
    document["weight_map"] = {k: swapped.get(v, v) for k, v in document["weight_map"].items()}
    index.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="index"):
        verify(tmp_path, source, "sparse")


def part_with(tmp_path: Path, mask: torch.Tensor, pattern: str, *, values=None) -> OverlaySource:
    """A source whose own part is wrong: verification must not trust it either."""
    base = model_folder(tmp_path / "b")
    write_raw(base / "model.safetensors", {UP: BASE[UP]})
    packed = pack(BASE[UP] if values is None else values, mask, pattern=pattern)
    write_part(tmp_path / "p" / "block-00000.safetensors", {}, {UP: packed})
    return OverlaySource(open_source(base), tmp_path / "p")


@pytest.mark.parametrize("pattern", ["2:4", "block:2x4", "block:2x4:0.5", "2:5", "0:4"])
def test_a_pattern_that_does_not_hold(tmp_path, pattern):
    source = part_with(tmp_path, random_mask(30, 24), pattern)
    assemble(source, tmp_path / "out", "sparse")
    with pytest.raises(CheckpointError, match=f"does not have the pattern {pattern}"):
        verify(tmp_path / "out", source, "sparse")


def test_weights_with_zeros_of_their_own(tmp_path):
    values = BASE[UP].clone()
    values[:, 0] = -0.0
    source = part_with(tmp_path, random_mask(30, 24), "mixed", values=values)
    assemble(source, tmp_path / "out", "sparse")
    found = verify(tmp_path / "out", source, "sparse")
    mask = random_mask(30, 24)
    assert found.zeros == int((~mask).sum()) + int(mask[:, 0].sum())


def record(rows: int, cols: int, pattern: str, stack: int | None = None) -> MatrixRecord:
    shape = (rows, cols) if stack is None else (stack, rows, cols)
    return MatrixRecord(shape, False, pattern, 0, "0" * 64)


def test_patterns_by_hand():
    good = torch.tensor([[1, 1, 0, 0, 0, 1, 0, 1]]).bool()
    assert holds(record(1, 8, "2:4"), good)
    assert holds(record(1, 8, "2:4"), good & torch.tensor([[1, 0] * 4]).bool())  # shrunk by a second pruning
    assert not holds(record(1, 8, "1:4"), good)
    assert not holds(record(1, 8, "2:4"), good.roll(2, 1))
    assert not holds(record(1, 6, "2:4"), good[:, :6])
    tiles = torch.zeros(4, 6, dtype=torch.bool)
    tiles[:2, 3:] = True
    assert holds(record(4, 6, "block:2x3"), tiles)
    assert not holds(record(4, 6, "block:4x3"), tiles)
    assert holds(record(4, 6, "block:3x3:0.5"), tiles)  # does not tile this tensor, so it promises nothing
    assert holds(record(2, 6, "block:2x3", stack=2), tiles)
    assert holds(record(4, 6, "0.7"), tiles)
    assert holds(record(4, 6, "whatever:this:is"), tiles)


# ---- publishing ------------------------------------------------------------------------------------------------------


def test_publish_renames(tmp_path):
    partial, out = tmp_path / "o.partial", tmp_path / "o"
    (partial / "gossamer").mkdir(parents=True)
    (partial / "gossamer" / "f").write_text("x")
    out.mkdir()
    publish(partial, out)
    assert (out / "gossamer" / "f").read_text() == "x"
    assert not partial.exists()


def test_publish_does_not_replace_unless_told(tmp_path):
    partial, out = tmp_path / "o.partial", tmp_path / "o"
    for folder, text in ((partial, "new"), (out, "old")):
        folder.mkdir()
        (folder / "f").write_text(text)
    with pytest.raises(RecipeError, match="is not empty"):
        publish(partial, out)
    assert (out / "f").read_text() == "old"
    publish(partial, out, overwrite=True)
    assert (out / "f").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


def test_publish_without_permission(tmp_path, monkeypatch):
    partial = tmp_path / "o.partial"
    partial.mkdir()

    def refuse(*_):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ResourceError, match="no permission"):
        publish(partial, tmp_path / "o")


def test_unknown_kind(source, tmp_path):
    with pytest.raises(ValueError, match="both"):
        assemble(source, tmp_path, "both")
    with pytest.raises(ValueError, match="both"):
        verify(tmp_path, source, "both")


def test_the_helpers_packing_agrees():
    for key, (mask, pattern, transposed) in MASKS.items():
        tensors, about = packed_of(key, BASE[key], mask, transposed=transposed, pattern=pattern)
        packed = pack(BASE[key], mask, pattern=pattern, transposed=transposed)
        assert packed.record.to_json() == about
        assert raw(packed.bits) == raw(tensors[f"{key}_bitmask"])
        assert raw(packed.values) == raw(tensors[f"{key}_values"])
