"""Malformed files of int8 values are errors that name the tensor."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from checkpoints import model_folder, own_metadata, packed_of, random_mask, random_tensor, same_bits, write_raw
from exports import rewrite
from int8_cases import quantised
from int8_folders import by_the_page

import gossamer
from gossamer.compress.convert import convert
from gossamer.compress.source import open_source
from gossamer.errors import CheckpointError, GossamerError

KEY = "model.layers.0.mlp.up_proj.weight"
MASK = random_mask(6, 140)


def damaged(folder: Path, change) -> Path:
    """A sparse folder with one int8 matrix whose tensors and record went through `change(tensors, record)`."""
    tensor = random_tensor(6, 140, dtype=torch.bfloat16)
    tensors, record = packed_of(KEY, tensor, MASK)
    codes, scales = quantised(tensor, MASK)
    tensors[f"{KEY}_values"] = torch.from_numpy(codes)[MASK]
    tensors[f"{KEY}_scales"] = torch.from_numpy(scales)
    record["int8"] = {"group": 128, "dtype": "BF16"}
    file_metadata = change(tensors, record) or own_metadata({KEY: record}, 2)
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    write_raw(model_folder(folder) / "model.sparse.safetensors", ordered, file_metadata)
    return folder


def replace(end, make):
    def change(tensors, record):
        tensors[KEY + end] = make(tensors[KEY + end])

    return change


def int8(**fields):
    return lambda tensors, record: record["int8"].update(fields)


def put(name, index, value):
    def change(tensors, record):
        tensors[KEY + name].view(-1)[index] = value

    return change


DAMAGE = {
    "no scales": (lambda tensors, record: tensors.pop(f"{KEY}_scales") is None, f"{KEY}_scales is missing"),
    "scales of float32": (replace("_scales", torch.Tensor.float), f"{KEY}_scales must be float16 [6, 2], it is"),
    "scales of one group": (replace("_scales", lambda s: s[:, :1].clone()), f"{KEY}_scales must be float16 [6, 2]"),
    "scales of five rows": (replace("_scales", lambda s: s[:5].clone()), f"{KEY}_scales must be float16 [6, 2]"),
    "negative scale": (put("_scales", 3, -1.0), f"{KEY}_scales: scales of bfloat16 weights must be numbers from 0"),
    "infinite scale": (put("_scales", 3, float("inf")), f"{KEY}_scales: scales of bfloat16 weights"),
    "NaN scale": (put("_scales", 3, float("nan")), f"{KEY}_scales: scales of bfloat16 weights"),
    "scale beyond float16 weights": (
        lambda tensors, record: (int8(dtype="F16")(tensors, record), put("_scales", 3, 516.0)(tensors, record))[1],
        f"{KEY}_scales: scales of float16 weights must be numbers from 0 to 515.5",
    ),
    "no scale, but values": (put("_scales", 3, 0.0), f"tensor {KEY}: values are not 0 in a group whose scale is 0"),
    "-128": (put("_values", 7, -128), f"tensor {KEY}: values hold -128"),
    "values of floats": (replace("_values", torch.Tensor.bfloat16), f"{KEY}_values must be int8 ["),
    "values of uint8": (replace("_values", lambda v: v.view(torch.uint8)), f"{KEY}_values must be int8 ["),
    "values too short": (replace("_values", lambda v: v[:-1].clone()), f"{KEY}_values must be int8 ["),
    "group of 64": (int8(group=64), f"record of {KEY}: int8 values in groups of 64, allowed: 128"),
    "group is text": (int8(group="128"), f"record of {KEY}: 'int8' must be an object with group and dtype"),
    "group is a boolean": (int8(group=True), f"record of {KEY}: 'int8' must be an object"),
    "dtype is missing": (lambda t, r: r["int8"].pop("dtype") is None, f"record of {KEY}: 'int8' must be an object"),
    "dtype of integers": (int8(dtype="I8"), f"record of {KEY}: int8 values of I8, allowed: BF16, F16, F32, F64"),
    "dtype of eight bits": (int8(dtype="F8_E4M3"), f"record of {KEY}: int8 values of F8_E4M3"),
    "int8 is no object": (lambda t, r: r.update(int8=5), f"record of {KEY}: 'int8' must be an object"),
    "as an older reader sees it": (lambda t, r: own_metadata({KEY: r}, 1), f"{KEY}_values must be floats"),
    "no field": (lambda t, r: r.pop("int8") is None, f"{KEY}_values must be floats"),
    "metadata lost": (lambda t, r: {"format": "pt"}, f"{KEY}_bitmask is packed, but the metadata"),
}


def test_the_undamaged_one_is_read(tmp_path):
    source = open_source(damaged(tmp_path, lambda tensors, record: None))
    assert torch.equal(source.mask(KEY).to_bool(), MASK)
    assert source.meta(KEY).dtype == torch.bfloat16
    assert same_bits(source.read(KEY), by_the_page(tmp_path)[0][KEY])


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_a_checkpoint_error_naming_the_tensor(tmp_path, name):
    change, message = DAMAGE[name]
    folder = damaged(tmp_path, change)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        open_source(folder).read(KEY)
    assert "\n" not in caught.value.message


def test_records_beside_dense_weights_speak_of_masks_alone(tmp_path):
    tensor = random_tensor(6, 140).masked_fill(~MASK, 0)
    tensors, record = packed_of(KEY, tensor, MASK)
    write_raw(model_folder(tmp_path) / "model.safetensors", {KEY: tensor}, {"format": "pt"})
    bits = {f"{KEY}_bitmask": tensors[f"{KEY}_bitmask"]}
    record["int8"] = {"group": 128, "dtype": "F32"}
    write_raw(tmp_path / "gossamer" / "masks.safetensors", bits, own_metadata({KEY: record}, 2))
    with pytest.raises(CheckpointError, match=f"record of {KEY} speaks of int8 values"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("end", "index", "value", "names"),
    [
        ("_values", 5, -128, "up_proj|cannot be loaded"),
        ("_scales", 0, -1.0, "up_proj.weight_scales"),
        ("_scales", 0, float("nan"), "_scales"),
    ],
)
def test_a_damaged_file_does_not_load(int8_llama, tmp_path, end, index, value, names):
    convert(int8_llama[1], tmp_path / "int8", "sparse", values="int8")
    key = next(key for key in open_source(int8_llama[1]).records() if "up_proj" in key)

    def damage(tensors, metadata):
        tensors[key + end].view(-1)[index] = value

    rewrite(tmp_path / "int8", damage)
    with pytest.raises(GossamerError, match=names):
        gossamer.load(tmp_path / "int8")
