"""The format against its specification: an independent reader, the page's own example, and malformed files."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import (
    bits_of,
    model_folder,
    own_metadata,
    packed_of,
    random_mask,
    random_tensor,
    raw,
    same_bits,
    write_raw,
)

from gossamer.compress.format import (
    MatrixRecord,
    dense_config,
    metadata,
    pack,
    parse_metadata,
    sparse_config,
    summarise,
    unpack,
)
from gossamer.compress.source import open_source
from gossamer.compress.writer import write_part
from gossamer.errors import CheckpointError

# ---- a reader made from docs/format.md alone: numpy, json, hashlib ---------------------------------------------------

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "F8_E4M3": 1, "I64": 8}


def read_by_the_page(path: Path) -> dict[str, np.ndarray]:
    """Key -> dense tensor as unsigned integers of its element size, in the source's shape."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    own = json.loads(header.pop("__metadata__", {}).get("gossamer", '{"matrices": {}}'))

    def tensor(name: str) -> np.ndarray:
        about = header.pop(name)
        begin, end = about["data_offsets"]
        return np.frombuffer(data[begin:end], f"<u{SIZES[about['dtype']]}").reshape(about["shape"])

    result = {}
    for key, record in own["matrices"].items():
        bits, values = tensor(f"{key}_bitmask"), tensor(f"{key}_values")
        assert hashlib.sha256(bits.tobytes()).hexdigest() == record["mask_sha256"]
        width, elements = record["in"], math.prod(record["shape"])
        kept = np.unpackbits(bits, axis=1, bitorder="little")[:, :width].astype(bool)
        assert kept.sum() == record["nnz"] == len(values)
        dense = np.zeros((elements // width if width else len(bits), width), values.dtype)
        dense[kept] = values
        if record["transposed"]:
            *stack, inputs, outputs = record["shape"]
            dense = dense.reshape(*stack, outputs, inputs).swapaxes(-1, -2)
        result[key] = dense.reshape(record["shape"])
    return result | {name: tensor(name) for name in list(header)}


LAYOUTS = [
    ((1, 1), False),
    ((3, 63), False),
    ((100, 257), False),
    ((63, 5), True),
    ((4, 7, 9), False),
    ((3, 10, 6), True),
    ((0, 8), False),
    ((5, 0), False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize(("shape", "transposed"), LAYOUTS)
def test_the_pages_reader_reads_what_we_write(tmp_path, shape, transposed, dtype):
    tensor, mask = random_tensor(*shape, dtype=dtype), random_mask(*shape)
    plain = random_tensor(3, dtype=dtype, seed=3)
    packed = pack(tensor, mask, pattern="0.5", transposed=transposed)
    write_part(tmp_path / "f.safetensors", {"plain": plain}, {"m": packed})
    found = read_by_the_page(tmp_path / "f.safetensors")
    wanted = np.where(mask.numpy(), np.frombuffer(raw(tensor), f"<u{dtype.itemsize}").reshape(shape), 0)
    assert np.array_equal(found["m"], wanted)
    assert found["plain"].tobytes() == raw(plain)
    assert same_bits(unpack(packed, "m"), torch.from_numpy(wanted.copy()).view(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_odd_values_survive(dtype):
    """Kept -0.0, kept 0.0, NaN payloads, infinities; what is pruned comes back as +0.0."""
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    top = -(2 ** (8 * dtype.itemsize - 1))
    values = torch.tensor([[top, 0, -1, -2, 1, 0x7F81 << (8 * dtype.itemsize - 16)]], dtype=torch.int64).to(integers)
    mask = torch.tensor([[True, True, True, False, True, True]])
    back = unpack(pack(values.view(dtype), mask, pattern="x"), "k").view(integers)
    assert torch.equal(back, values.masked_fill(~mask, 0))


def page() -> str:
    return (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


def test_the_example_of_the_page(tmp_path):
    content = bytes.fromhex(re.search(r"```hex\n(.*?)```", page(), re.S)[1].replace("\n", ""))
    assert len(content) == 406
    (tmp_path / "example").write_bytes(content)
    values = torch.tensor([1.0, -0.0, 2.0, 0.5, -3.0]).bfloat16()
    dense, mask = torch.zeros(2, 10, dtype=torch.bfloat16), torch.zeros(2, 10, dtype=torch.bool)
    places = ([0, 0, 0, 1, 1], [0, 3, 9, 7, 8])
    dense[places], mask[places] = values, True
    assert np.array_equal(read_by_the_page(tmp_path / "example")["w"].view(np.int16), dense.view(torch.int16).numpy())
    write_part(tmp_path / "written", {}, {"w": pack(dense, mask, pattern="0.75")})
    assert (tmp_path / "written").read_bytes() == content


def test_the_page_names_every_field_and_file():
    record = MatrixRecord((2, 2), False, "2:4", 1, "0" * 64)
    for word in (*record.to_json(), "int8", "format_version", "model.sparse.safetensors",
                 "model.safetensors.index.sparse.json", "gossamer/masks.safetensors", "modules",
                 "recipe_sha256"):  # fmt: skip
        assert f"`{word}`" in page(), word


# ---- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(256, 256), (300, 256), (256, 1021)])
def test_half_of_bf16_takes_at_most_57_percent(tmp_path, shape):
    tensor = random_tensor(*shape, dtype=torch.bfloat16)
    order = tensor.float().abs().argsort(1)
    mask = torch.ones(shape, dtype=torch.bool).scatter_(1, order[:, : shape[1] // 2], False)
    write_part(tmp_path / "f", {}, {"m": pack(tensor, mask, pattern="0.5")})
    content = (tmp_path / "f").read_bytes()
    payload = len(content) - 8 - int.from_bytes(content[:8], "little")
    assert payload <= 0.57 * tensor.numel() * 2


# ---- malformed -------------------------------------------------------------------------------------------------------

KEY = "model.layers.0.mlp.up_proj.weight"
TENSOR, MASK = random_tensor(6, 11, dtype=torch.bfloat16), random_mask(6, 11)


def damaged(folder: Path, change) -> Path:
    """A sparse folder whose tensors and record went through `change(tensors, record)`."""
    tensors, record = packed_of(KEY, TENSOR, MASK)
    tensors["model.norm.weight"] = random_tensor(11)
    result = change(tensors, record)
    file_metadata = own_metadata({KEY: record}) if result is None else result
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    write_raw(model_folder(folder) / "model.sparse.safetensors", ordered, file_metadata)
    return folder


def test_the_undamaged_one_is_read(tmp_path):
    source = open_source(damaged(tmp_path, lambda tensors, record: None))
    assert same_bits(source.read(KEY), TENSOR.masked_fill(~MASK, 0))


def put(field, value):
    return lambda tensors, record: record.update({field: value})


def flip(tensors, record):
    tensors[f"{KEY}_bitmask"][2, 0] ^= 1


def swap_bits(tensors, record):
    """Same count, another mask: only the hash can tell."""
    bits = tensors[f"{KEY}_bitmask"]
    first, second = bits[0].clone(), bits[1].clone()
    assert not torch.equal(first, second)
    bits[0], bits[1] = second, first


def stray_bit(tensors, record):
    bits = tensors[f"{KEY}_bitmask"]
    bits[0, 1] |= 0x80
    record.update(nnz=record["nnz"] + 1, mask_sha256=hashlib.sha256(raw(bits)).hexdigest())
    tensors[f"{KEY}_values"] = torch.cat([tensors[f"{KEY}_values"], torch.ones(1, dtype=torch.bfloat16)])


def replace(end, make):
    def change(tensors, record):
        tensors[KEY + end] = make(tensors[KEY + end])

    return change


def remove(end):
    def change(tensors, record):
        del tensors[KEY + end]

    return change


def text(value):
    return lambda tensors, record: {"format": "pt", "gossamer": value}


def version(number):
    return lambda tensors, record: own_metadata({KEY: record}, number)


DAMAGE = {
    "flipped mask bit": (flip, f"{KEY}_bitmask has .* bits set, its record says"),
    "exchanged rows": (swap_bits, f"{KEY}_bitmask does not have the sha256"),
    "wrong hash": (put("mask_sha256", "0" * 64), f"{KEY}_bitmask does not have the sha256"),
    "hash is no hash": (put("mask_sha256", "xyz"), f"record of {KEY}: mask_sha256"),
    "hash in capitals": (put("mask_sha256", "A" * 64), f"record of {KEY}: mask_sha256"),
    "bit beyond the columns": (stray_bit, f"{KEY}_bitmask has bits beyond column 10"),
    "values too short": (replace("_values", lambda v: v[:-1].clone()), f"{KEY}_values must be floats"),
    "values too long": (replace("_values", lambda v: torch.cat([v, v[:1]])), f"{KEY}_values must be floats"),
    "values as a matrix": (replace("_values", lambda v: v[None].clone()), f"{KEY}_values must be floats"),
    "values of integers": (replace("_values", lambda v: v.to(torch.int32)), f"{KEY}_values must be floats"),
    "bitmask of another dtype": (replace("_bitmask", lambda b: b.to(torch.int64)), f"{KEY}_bitmask must be uint8"),
    "bitmask too narrow": (replace("_bitmask", lambda b: b[:, :1].clone()), f"{KEY}_bitmask must be uint8"),
    "bitmask too short": (replace("_bitmask", lambda b: b[:-1].clone()), f"{KEY}_bitmask must be uint8"),
    "no values": (remove("_values"), f"{KEY}_values is missing"),
    "no bitmask": (remove("_bitmask"), f"{KEY}_bitmask is missing"),
    "wrong in": (put("in", 6), f"record of {KEY}: 'in' is 6"),
    "transposed, in not": (put("transposed", True), f"record of {KEY}: 'in' is 11"),
    "in is text": (put("in", "11"), f"record of {KEY}: 'in' must be int"),
    "in is boolean": (put("in", True), f"record of {KEY}: 'in' must be int"),
    "negative shape": (put("shape", [-6, 11]), f"record of {KEY}: shape"),
    "one dimension": (put("shape", [11]), f"record of {KEY}: shape"),
    "four dimensions": (put("shape", [1, 1, 6, 11]), f"record of {KEY}: shape"),
    "huge shape": (put("shape", [2**40, 11]), f"record of {KEY}: shape"),
    "other shape": (put("shape", [7, 11]), f"{KEY}_bitmask must be uint8"),
    "negative nnz": (put("nnz", -1), f"record of {KEY}: nnz -1"),
    "nnz too large": (put("nnz", 67), f"record of {KEY}: nnz 67"),
    "nnz is a float": (put("nnz", 33.0), f"record of {KEY}: 'nnz' must be int"),
    "no pattern": (lambda tensors, record: record.pop("pattern") and None, f"record of {KEY}: 'pattern' must be str"),
    "record is no object": (text(json.dumps({"format_version": 1, "matrices": {KEY: 5}})), f"record of {KEY} is not"),
    "metadata is not JSON": (text("{"), "'gossamer' is not JSON"),
    "metadata nested": (text("[" * 100_000), "'gossamer' is not JSON"),
    "metadata is a list": (text("[]"), "no format_version"),
    "no version": (text('{"matrices": {}}'), "no format_version"),
    "version is text": (text('{"format_version": "1", "matrices": {}}'), "no format_version"),
    "no matrices": (text('{"format_version": 1}'), "no object 'matrices'"),
    "newer version": (version(3), "format version 3"),
    "metadata lost": (lambda tensors, record: {"format": "pt"}, f"{KEY}_bitmask is packed, but the metadata"),
    "stored both ways": (
        lambda tensors, record: tensors.update({KEY: TENSOR}),
        f"{KEY} is stored both dense and packed",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_a_checkpoint_error_naming_the_tensor(tmp_path, name):
    change, message = DAMAGE[name]
    folder = damaged(tmp_path, change)
    with pytest.raises(CheckpointError, match=re.escape(message).replace(r"\.\*", ".*")) as caught:
        open_source(folder).read(KEY)
    assert "\n" not in caught.value.message


def test_damaged_masks_are_found_by_mask_too(tmp_path):
    source = open_source(damaged(tmp_path, flip))
    with pytest.raises(CheckpointError, match="bits set"):
        source.mask(KEY)


def test_unknown_fields_are_ignored(tmp_path):
    source = open_source(damaged(tmp_path, put("scale", 3)))
    assert same_bits(source.read(KEY), TENSOR.masked_fill(~MASK, 0))


def test_unpack_of_values_that_do_not_fit():
    packed = pack(TENSOR, MASK, pattern="0.5")
    wrong = type(packed)(packed.bits, packed.values[1:], packed.record)
    with pytest.raises(CheckpointError, match=f"tensor {KEY}"):
        unpack(wrong, KEY)


@pytest.mark.parametrize("mask", [MASK[:5], MASK.float(), MASK.flatten()])
def test_pack_takes_a_mask_of_the_tensors_shape(mask):
    with pytest.raises(ValueError, match="a mask"):
        pack(TENSOR, mask, pattern="0.5")


# ---- records, summaries, config.json ---------------------------------------------------------------------------------


def test_metadata_round_trip():
    records = {"a": pack(TENSOR, MASK, pattern="2:4").record, "b": pack(TENSOR, ~MASK, pattern="x").record}
    assert parse_metadata(metadata(records), "f") == records
    assert metadata({}) == {"format": "pt"}
    assert parse_metadata({"format": "pt"}, "f") == {}


def test_mask_of_a_transposed_stack():
    tensor, mask = random_tensor(3, 10, 6), random_mask(3, 10, 6)
    packed = pack(tensor, mask, pattern="0.5", transposed=True)
    assert packed.record.bits_shape == (18, 2)
    assert torch.equal(packed.mask.to_bool(), mask)
    rows = mask.transpose(1, 2).reshape(18, 10)
    assert torch.equal(packed.mask.rows_bool(), rows)
    assert torch.equal(packed.bits, bits_of(rows))
    assert (packed.mask.zeros, packed.mask.pattern) == (int((~mask).sum()), "0.5")
    assert packed.mask.sha256() == hashlib.sha256(raw(bits_of(rows))).hexdigest()


def test_config_of_both_forms():
    record = pack(TENSOR, MASK, pattern="0.5").record
    summary = summarise({"b": record, "a": record})
    lines = f"a {record.mask_sha256}\nb {record.mask_sha256}\n"
    assert summary.masks_sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert (summary.matrices, summary.entries, summary.kept) == (2, 132, 2 * int(MASK.sum()))
    plain = {"model_type": "llama", "hidden_size": 8}
    dense = dense_config(plain, summary, recipe="f" * 64)
    assert dense.pop("gossamer") == {
        "matrices": 2, "masks_sha256": summary.masks_sha256, "recipe_sha256": "f" * 64, "format_version": 1
    }  # fmt: skip
    assert dense == plain
    sparse = sparse_config(plain, summary)
    assert sparse["quantization_config"] == {
        "quant_method": "gossamer", "format_version": 1, "modules": 2, "masks_sha256": summary.masks_sha256
    }  # fmt: skip
    assert plain == {"model_type": "llama", "hidden_size": 8}


def test_config_there_and_back():
    summary = summarise({"a": pack(TENSOR, MASK, pattern="0.5").record})
    sparse = sparse_config({"model_type": "llama"}, summary, recipe="e" * 64)
    dense = dense_config(sparse, summary)
    assert "quantization_config" not in dense
    assert dense["gossamer"]["recipe_sha256"] == "e" * 64
    assert sparse_config(dense, summary) == sparse
    assert dense_config({"model_type": "llama"}, summarise({})) == {"model_type": "llama"}
