"""int8 values on disk: against a reader of our own, sizes, awkward shapes, conversions."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import model_folder, random_mask, random_tensor, same_bits, write_raw
from exports import expanded, plain
from int8_cases import quantised, weights
from int8_folders import by_the_page
from safetensors import safe_open

from gossamer.compress.convert import convert
from gossamer.compress.format import pack
from gossamer.compress.source import OverlaySource, open_source
from gossamer.compress.values import with_values
from gossamer.compress.writer import write_part
from gossamer.errors import CheckpointError, RecipeError


def test_the_file_is_what_numpy_makes_of_the_floats(int8_pair):
    first, int8 = int8_pair
    dense, masks = expanded(first)
    found, records = by_the_page(int8)
    assert records.keys() == masks.keys()
    assert all("int8" in record for record in records.values())
    assert found.keys() == dense.keys()
    for key, tensor in dense.items():
        if key in masks:
            swap = (lambda t: t.transpose(-1, -2)) if records[key]["transposed"] else (lambda t: t)
            rows, kept = (swap(t).reshape(-1, records[key]["in"]) for t in (tensor, masks[key]))
            codes, scales = quantised(rows, kept)
            assert np.array_equal(plain(int8, "model.sparse*")[f"{key}_scales"].numpy(), scales)
            assert np.array_equal(plain(int8, "model.sparse*")[f"{key}_values"].numpy(), codes[kept.numpy()])
            tensor = swap(weights(codes, scales, tensor.dtype).reshape(swap(tensor).shape))
        assert same_bits(found[key].contiguous(), tensor.contiguous()), key
        assert same_bits(open_source(int8).read(key), tensor.contiguous()), key


def test_size(int8_pair):
    """Masks, one byte per kept weight, two bytes per row and 128 inputs."""
    _, int8 = int8_pair
    source = open_source(int8)
    for key, record in source.records().items():
        rows, cols = record.rows, record.cols
        names = [f"{key}_bitmask", f"{key}_values", f"{key}_scales"]
        stored = sum(tensor.nbytes for name, tensor in plain(int8, "model.sparse*").items() if name in names)
        assert stored == rows * -(-cols // 8) + record.nnz + 2 * rows * -(-cols // 128)
        assert stored == record.nbytes(source.meta(key).dtype)


AWKWARD = [((1, 1), False), ((5, 300), False), ((2, 130, 6), True), ((0, 8), False), ((5, 0), False)]


@pytest.mark.parametrize(("shape", "transposed"), AWKWARD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_awkward_shapes(tmp_path, shape, transposed, dtype):
    tensor, mask = random_tensor(*shape, dtype=dtype), random_mask(*shape)
    packed = pack(tensor, mask, pattern="0.5", transposed=transposed)
    write_part(model_folder(tmp_path / "m") / "model.sparse.safetensors", {"plain": tensor}, {"w": packed})
    view = with_values(open_source(tmp_path / "m"), "int8")
    convert(tmp_path / "m", tmp_path / "out", "sparse", values="int8")
    source, (found, _) = open_source(tmp_path / "out"), by_the_page(tmp_path / "out")
    assert same_bits(source.read("w"), found["w"].contiguous())
    assert same_bits(view.read("w"), source.read("w"))
    assert same_bits(torch.cat(list(view.chunks("w"))), source.read("w").flatten().view(torch.uint8))
    assert same_bits(view.read_rows("w", 1, 3), source.read("w")[1:3])
    assert torch.equal(view.values("w"), source.values("w"))
    assert torch.equal(view.scales("w"), source.scales("w"))
    assert same_bits(source.read("plain"), tensor)
    assert source.values("plain") is source.scales("plain") is None


def test_the_example_of_the_page(tmp_path):
    page = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```hex\n(.*?)```", page, re.S)
    content = bytes.fromhex(blocks[1].replace("\n", ""))
    path = model_folder(tmp_path / "m") / "model.sparse.safetensors"
    path.write_bytes(content)
    wanted = torch.tensor([[127, 0, 0, -2.0], [0, 0, 0.5, 0]]).bfloat16()
    assert same_bits(by_the_page(tmp_path / "m")[0]["w"], wanted)
    dense = torch.tensor([[127, 9, 0, -2.4], [0, 0, 0.5, 0]]).bfloat16()
    mask = torch.tensor([[True, False, False, True], [False, False, True, False]])
    write_part(tmp_path / "part" / "p.safetensors", {}, {"w": pack(dense, mask, pattern="0.625")})
    write_raw(model_folder(tmp_path / "base") / "model.safetensors", {})
    from gossamer.compress.checkpoint import assemble

    source = OverlaySource(open_source(tmp_path / "base"), tmp_path / "part")
    assemble(with_values(source, "int8"), tmp_path / "again", "sparse")
    assert (tmp_path / "again" / "model.sparse.safetensors").read_bytes() == content


# ---- conversion ------------------------------------------------------------------------------------------------------


def test_dense_and_floats_are_the_rounded_weights(int8_pair, tmp_path):
    first, int8 = int8_pair
    wanted, _ = by_the_page(int8)
    masks = expanded(first)[1]
    convert(int8, tmp_path / "dense", "dense")
    convert(int8, tmp_path / "floats", "sparse")
    convert(tmp_path / "dense", tmp_path / "floats-too", "sparse")
    convert(first, tmp_path / "at-once", "dense", values="int8")
    assert plain(tmp_path / "floats").keys() == plain(first).keys()
    for folder in ("dense", "floats", "floats-too", "at-once"):
        source = open_source(tmp_path / folder)
        assert source.keys() == sorted(wanted, key=source.keys().index)
        assert all(same_bits(source.read(key), tensor.contiguous()) for key, tensor in wanted.items()), folder
        assert {key: source.mask(key).to_bool().tolist() for key in masks} == {k: m.tolist() for k, m in masks.items()}
        assert all(record.int8 is None for record in source.records().values())
    config = json.loads((tmp_path / "floats" / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == config["gossamer"]["format_version"] == 1
    assert json.loads((int8 / "config.json").read_text())["quantization_config"]["format_version"] == 2


def test_int8_values_are_copied_and_never_rounded_twice(int8_pair, tmp_path):
    first, int8 = int8_pair
    convert(first, tmp_path / "masked", "dense")
    convert(tmp_path / "masked", tmp_path / "from-dense", "sparse", values="int8")
    convert(int8, tmp_path / "shards", "sparse", values="int8", max_shard_size=60_000)
    assert len(list((tmp_path / "shards").glob("model.sparse-*"))) > 2
    convert(tmp_path / "shards", tmp_path / "one", "sparse", values="int8")
    for folder in ("from-dense", "one"):
        assert (tmp_path / folder / "model.sparse.safetensors").read_bytes() == next(
            int8.glob("*.safetensors")
        ).read_bytes()


def test_refusals(int8_llama, tmp_path):
    first, int8 = int8_llama
    with pytest.raises(RecipeError, match="'int4' is unknown; allowed: same, int8"):
        convert(first, tmp_path / "out", "sparse", values="int4")
    base = first.with_name("base")
    with pytest.raises(RecipeError, match="has no masks"):
        convert(base, tmp_path / "out", "dense", values="int8")
    broken = convert(first, tmp_path / "dense", "dense")[0].parent
    with safe_open(broken / "model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    key = next(iter(open_source(first).records()))
    for value, message in [
        (1.0, "its mask prunes them"),
        (float("nan"), "cannot have int8 values: a kept weight is nan"),
    ]:
        changed = tensors | {key: torch.full_like(tensors[key], value) if value == 1 else tensors[key] * value}
        if value != 1:
            changed[key][~open_source(first).mask(key).to_bool()] = 0
        write_raw(broken / "model.safetensors", changed, {"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            convert(broken, tmp_path / "out", "sparse", values="int8")
    assert not list(tmp_path.glob("out*"))
