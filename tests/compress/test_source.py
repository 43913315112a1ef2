"""Sources: every form of a checkpoint folder, parts laid over it, the old layout, digests."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import (
    bits_of,
    legacy,
    model_folder,
    own_metadata,
    packed_of,
    random_tensor,
    same_bits,
    write_raw,
)
from source_folders import EMBED, MASK, TENSORS, A, B, dense_with_masks, sharded, single, sparse, write_index

from gossamer.compress.modelfolder import find_weights
from gossamer.compress.source import FolderSource, OverlaySource, open_source
from gossamer.compress.table import natural_key
from gossamer.errors import CheckpointError


@pytest.mark.parametrize("make", [single, sharded])
def test_dense_folders(make, tmp_path):
    source = open_source(make(tmp_path))
    assert source.keys() == [EMBED, A, B, "model.norm.bias"]
    for key, tensor in TENSORS.items():
        assert same_bits(source.read(key), tensor)
        assert (source.meta(key).dtype, source.meta(key).shape) == (tensor.dtype, tuple(tensor.shape))
        assert source.mask(key) is None
        assert source.pattern(key) is None
        assert source.values(key) is None
    assert same_bits(source.read_rows(EMBED, 2, 5), TENSORS[EMBED][2:5])
    assert source.nbytes() == 11 * 9 * 4 + 7 * 13 * 2 + 5 * 3 * 2 + 8
    assert source.config["model_type"] == "llama"
    assert source.folder == tmp_path
    assert source.records() == {}


@pytest.mark.parametrize("make", [sparse, dense_with_masks])
def test_masked_folders(make, tmp_path):
    source = open_source(str(make(tmp_path)))
    assert source.keys() == [EMBED, A, B, "model.norm.bias"]
    pruned = TENSORS[B].masked_fill(~MASK, 0)
    assert same_bits(source.read(B), pruned)
    assert same_bits(source.read_rows(B, 1, 4), pruned[1:4])
    assert b"".join(bytes(p.tolist()) for p in source.chunks(B)) == bytes(pruned.flatten().view(torch.uint8).tolist())
    assert (source.meta(B).dtype, source.meta(B).shape) == (torch.bfloat16, (7, 13))
    mask = source.mask(B)
    assert mask is not None
    assert torch.equal(mask.to_bool(), MASK)
    assert torch.equal(mask.bits, bits_of(MASK))
    assert mask.zeros == int((~MASK).sum())
    assert source.pattern(B) == "0.5"
    assert list(source.records()) == [B]
    assert source.mask(EMBED) is None
    assert source.nbytes() == open_source(single(tmp_path / "dense")).nbytes()


def test_dense_file_comes_before_the_sparse_one(tmp_path):
    dense_with_masks(tmp_path)
    other, record = packed_of(B, TENSORS[B], ~MASK)
    write_raw(tmp_path / "model.sparse.safetensors", other, own_metadata({B: record}))
    source = open_source(tmp_path)
    assert source.values(B) is None
    assert torch.equal(source.mask(B).to_bool(), MASK)
    sparse_one = FolderSource(tmp_path, find_weights(tmp_path, "sparse"))
    assert torch.equal(sparse_one.mask(B).to_bool(), ~MASK)


def test_bits_values_and_record_in_different_shards(tmp_path):
    """As a library that knows nothing of the format splits a state dict, every file with the whole metadata."""
    packed, record = packed_of(B, TENSORS[B], MASK)
    names = {B + "_bitmask": "one", B + "_values": "two", EMBED: "two"}
    every = packed | {EMBED: TENSORS[EMBED]}
    for shard in ("one", "two"):
        inside = {k: every[k] for k in names if names[k] == shard}
        write_raw(model_folder(tmp_path) / shard, inside, own_metadata({B: record}))
    write_index(tmp_path, names, "model.safetensors.index.sparse.json")
    assert same_bits(open_source(tmp_path).read(B), TENSORS[B].masked_fill(~MASK, 0))
    write_raw(
        tmp_path / "one", {B + "_bitmask": packed[B + "_bitmask"]}, own_metadata({B: record | {"pattern": "2:4"}})
    )
    with pytest.raises(CheckpointError, match=f"record of {B} differs"):
        open_source(tmp_path)


def test_a_hub_cache_is_a_folder_of_links(tmp_path):
    real = sharded(tmp_path / "blobs")
    folder = tmp_path / "snapshots" / "0"
    folder.mkdir(parents=True)
    for path in real.iterdir():
        (folder / path.name).symlink_to(os.path.relpath(path, folder))
    assert same_bits(open_source(folder).read(B), TENSORS[B])
    assert open_source(folder).digest() == open_source(real).digest()


def test_natural_order():
    keys = ["h.10.w", "h.2.w", "h.2.b", "a", "h.w"]
    assert sorted(keys, key=natural_key) == ["a", "h.2.b", "h.2.w", "h.10.w", "h.w"]


def test_digest_depends_on_the_contents_and_not_on_the_place(tmp_path):
    first, second = open_source(single(tmp_path / "a")).digest(), open_source(single(tmp_path / "b")).digest()
    assert first == second
    changed = TENSORS | {A: TENSORS[A] + 1}
    assert open_source(single(tmp_path / "c", changed)).digest() != first
    (tmp_path / "a" / "config.json").write_text('{"model_type": "opt"}')
    assert open_source(tmp_path / "a").digest() != first
    masked = open_source(dense_with_masks(tmp_path / "d")).digest()
    (tmp_path / "d" / "gossamer" / "masks.safetensors").unlink()
    assert open_source(tmp_path / "d").digest() != masked


def test_digest_of_large_files_samples_them(tmp_path, monkeypatch):
    from gossamer.compress import table

    monkeypatch.setattr(table, "SMALL_FILE", 100)
    monkeypatch.setattr(table, "SAMPLE", 50)
    content = bytearray(np.random.default_rng(0).integers(0, 256, 8000, dtype=np.uint8).tobytes())
    (tmp_path / "f").write_bytes(content)
    before = table.file_digest(tmp_path / "f")
    for position in (0, 7999):
        changed = bytearray(content)
        changed[position] ^= 1
        (tmp_path / "f").write_bytes(changed)
        assert table.file_digest(tmp_path / "f") != before
    (tmp_path / "f").write_bytes(content + b"x")
    assert table.file_digest(tmp_path / "f") != before


# ---- parts laid over it ----------------------------------------------------------------------------------------------


def overlay(tmp_path: Path, **parts) -> OverlaySource:
    folder = tmp_path / "parts"
    folder.mkdir()
    for name, (tensors, file_metadata) in parts.items():
        write_raw(folder / f"{name}.safetensors", tensors, file_metadata)
    (folder / "block-00009.safetensors.tmp").write_bytes(b"a part that was being written")
    return OverlaySource(open_source(single(tmp_path / "base")), folder)


def test_parts_replace_and_add_keys(tmp_path):
    packed, record = packed_of(B, TENSORS[B], MASK)
    head = random_tensor(11, 9, seed=9)
    new = random_tensor(5, 3, dtype=torch.float16, seed=8)
    source = overlay(
        tmp_path,
        **{"block-00000": ({A: new}, None), "block-00001": (packed, own_metadata({B: record}))},
        head=({"lm_head.weight": head}, {"format": "pt"}),
    )
    assert source.keys() == ["lm_head.weight", EMBED, A, B, "model.norm.bias"]
    assert same_bits(source.read(A), new)
    assert same_bits(source.read(B), TENSORS[B].masked_fill(~MASK, 0))
    assert same_bits(source.read(EMBED), TENSORS[EMBED])
    assert same_bits(source.read("lm_head.weight"), head)
    assert same_bits(source.read_rows(EMBED, 1, 3), TENSORS[EMBED][1:3])
    assert torch.equal(source.mask(B).to_bool(), MASK)
    assert source.mask(A) is None
    assert source.values(A) is None
    assert len(source.values(B)) == int(MASK.sum())
    assert list(source.records()) == [B]
    assert source.nbytes() == source.base.nbytes() + head.numel() * 4
    assert source.digest() != source.base.digest()


def test_overlays_stack(tmp_path):
    packed, record = packed_of(B, TENSORS[B], MASK)
    first = overlay(tmp_path, **{"block-00000": (packed, own_metadata({B: record}))})
    (tmp_path / "second").mkdir()
    dense = random_tensor(7, 13, dtype=torch.bfloat16, seed=5)
    write_raw(tmp_path / "second" / "block-00000.safetensors", {B: dense})
    second = OverlaySource(first, tmp_path / "second")
    assert same_bits(second.read(B), dense)
    assert second.mask(B) is None
    assert second.records() == {}
    (tmp_path / "third").mkdir()
    third = OverlaySource(first, tmp_path / "third")
    assert torch.equal(third.mask(B).to_bool(), MASK)
    assert torch.equal(third.values(B), first.values(B))


def test_a_key_in_two_parts(tmp_path):
    with pytest.raises(CheckpointError, match=f"tensor {A} is in .* and again in"):
        overlay(tmp_path, a=({A: TENSORS[A]}, None), b=({A: TENSORS[A]}, None))


# ---- the old compressed-tensors bitmask layout -----------------------------------------------------------------------


def legacy_folder(folder: Path, change=None) -> Path:
    tensor = TENSORS[B].masked_fill(~MASK, 0)
    tensors = {EMBED: TENSORS[EMBED]} | legacy(B.removesuffix(".weight"), tensor)
    if change is not None:
        change(tensors, B.removesuffix(".weight"))
    return single(folder, tensors)


@pytest.mark.parametrize("prefix", [B, B.removesuffix(".weight")])
def test_old_layout(tmp_path, prefix):
    tensor = TENSORS[B].masked_fill(~MASK, 0)
    source = open_source(single(tmp_path, {EMBED: TENSORS[EMBED]} | legacy(prefix, tensor)))
    assert source.keys() == [EMBED, B]
    assert same_bits(source.read(B), tensor)
    assert (source.meta(B).dtype, source.meta(B).shape) == (torch.bfloat16, (7, 13))
    assert torch.equal(source.mask(B).to_bool(), tensor != 0)
    assert source.record(B).nnz == len(source.values(B)) == int((tensor != 0).sum())


def test_old_two_of_four_variant(tmp_path):
    tensor = torch.tensor([[1.0, 0, 2, 0, 0, 0, 3, 4], [0, 5, 0, 6, 7, 8, 0, 0]])
    source = open_source(single(tmp_path, legacy("m", tensor, offsets=False)))
    assert same_bits(source.read("m.weight"), tensor)


def set_(end, make):
    return lambda tensors, p: tensors.update({p + end: make(tensors[p + end])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, p: t.pop(f"{p}.bitmask"), r"a\.bitmask is missing"),
        (lambda t, p: t.pop(f"{p}.shape"), r"a\.shape is missing"),
        (set_(".shape", lambda s: s + 8), r"a\.bitmask does not fit"),
        (set_(".shape", lambda s: -s), r"a\.shape must be"),
        (set_(".shape", lambda s: torch.cat([s, s])), r"a\.shape must be"),
        (set_(".compressed", lambda v: v[1:].clone()), r"a\.compressed has"),
        (set_(".bitmask", lambda b: b ^ 1), r"a\.(compressed|row_offsets)"),
        (set_(".row_offsets", lambda o: o + 1), r"a\.row_offsets does not agree"),
        (set_(".bitmask", lambda b: b.to(torch.int32)), r"a\.bitmask does not fit"),
        (lambda t, p: t.update({f"{p}.weight": TENSORS[B]}), r"a\.weight is stored both"),
    ],
)
def test_damaged_old_layout(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        open_source(legacy_folder(tmp_path, change)).read(B)
