"""Folders that are no readable checkpoint, and ids of the hub: one line that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import (
    bits_of,
    model_folder,
    own_metadata,
    packed_of,
    random_mask,
    random_tensor,
    same_bits,
    write_raw,
)
from source_folders import EMBED, MASK, TENSORS, A, B, sharded, single, write_index

from gossamer.compress.source import open_source
from gossamer.errors import CheckpointError, ModelError


def bad_index(folder: Path, names) -> None:
    sharded(folder)
    write_index(folder, names)


def lost(path: str):
    def make(folder: Path) -> None:
        sharded(folder)
        (folder / path).unlink()

    return make


def one_key_twice(folder: Path) -> None:
    sharded(folder)
    write_raw(folder / "s2.safetensors", {k: TENSORS[k] for k in (A, B, EMBED)})


def masks_of(key: str, shape):
    def make(folder: Path) -> None:
        single(folder)
        packed, record = packed_of(key, random_tensor(*shape), random_mask(*shape))
        bits = {f"{key}_bitmask": packed[f"{key}_bitmask"]}
        write_raw(folder / "gossamer/masks.safetensors", bits, own_metadata({key: record}))

    return make


def loose_mask(folder: Path) -> None:
    single(folder)
    write_raw(folder / "gossamer/masks.safetensors", {f"{B}_bitmask": bits_of(MASK)})


def only(name: str):
    return lambda folder: (model_folder(folder) / name).write_bytes(b"x")


def config_text(text: str):
    return lambda folder: (single(folder) / "config.json").write_text(text)


UNREADABLE = {
    "no config": (lambda f: single(f).joinpath("config.json").unlink(), ModelError, "has no config.json"),
    "config is garbage": (config_text("{'a': 1}"), CheckpointError, r"config\.json is not JSON"),
    "config is a list": (config_text("[]"), CheckpointError, "not a JSON object"),
    "config is binary": (
        lambda f: (single(f) / "config.json").write_bytes(b"\xff\xfe"), CheckpointError, "is not JSON"
    ),
    "no weights": (model_folder, ModelError, r"no model\.safetensors"),
    "only torch weights": (only("pytorch_model.bin"), ModelError, r"only pytorch_model\.bin"),
    "only gguf": (only("model.Q4.gguf"), ModelError, r"only model\.Q4\.gguf"),
    "adapter": (only("adapter_model.safetensors"), ModelError, "adapter"),
    "shards without index": (only("model-00001-of-00002.safetensors"), ModelError, "but no model.safetensors.index"),
    "absent shard": (lost("s2.safetensors"), CheckpointError, r"names s2\.safetensors, which does not exist"),
    "index without map": (lambda f: bad_index(f, {}), CheckpointError, "no weight_map"),
    "index is a list": (lambda f: bad_index(f, [1]), CheckpointError, "no weight_map"),
    "index leaves the folder": (
        lambda f: bad_index(f, {A: "../s1.safetensors"}), CheckpointError, "is no file beside it"
    ),
    "index names no text": (lambda f: bad_index(f, {A: 3}), CheckpointError, "is no file beside it"),
    "index of another model": (
        lambda f: bad_index(f, {A: "s1.safetensors", B: "s2.safetensors"}), CheckpointError, f"{A} is not in s1"
    ),
    "key in two shards": (one_key_twice, CheckpointError, f"{EMBED} is in s1.safetensors and again"),
    "truncated": (
        lambda f: write_raw(model_folder(f) / "model.safetensors", TENSORS, cut=700), CheckpointError, "is cut short"
    ),
    "mask of no tensor": (masks_of("nothing.weight", (4, 4)), CheckpointError, r"mask of nothing\.weight"),
    "mask of another shape": (masks_of(B, (13, 7)), CheckpointError, f"mask of {B}"),
    "mask without record": (loose_mask, CheckpointError, f"{B}_bitmask has no record"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_folders_are_one_line(tmp_path, name):
    make, kind, message = UNREADABLE[name]
    make(tmp_path / "m")
    with pytest.raises(kind, match=message) as caught:
        open_source(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_what_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        open_source(tmp_path / "absent")
    with pytest.raises(ModelError, match="does not exist"):
        open_source("./absent/or/deeper")
    with pytest.raises(ModelError, match="is a file"):
        open_source(single(tmp_path) / "model.safetensors")


def test_a_hub_id_without_network(monkeypatch):
    """The test suite runs offline; an id that is not in the cache is told as such."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="nobody/no-such-model is not a folder here") as caught:
        open_source("nobody/no-such-model")
    assert caught.value.hint is not None


def test_a_hub_id_is_downloaded_without_needless_files(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(model, **options):
        asked.update(options, model=model)
        return str(single(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert same_bits(open_source("name/model", revision="r", token="t").read(A), TENSORS[A])
    assert (asked["model"], asked["revision"], asked["token"]) == ("name/model", "r", "t")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])
