"""int8 values on disk: against a reader of our own, malformed files, conversion, loading and saving."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from checkpoints import model_folder, own_metadata, packed_of, random_mask, random_tensor, same_bits, write_raw
from exports import assert_same, expanded, plain, rewrite, save_sparse
from int8_cases import quantised, weights
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import gossamer
from gossamer.compress.convert import convert
from gossamer.compress.format import pack
from gossamer.compress.source import OverlaySource, open_source
from gossamer.compress.values import with_values
from gossamer.compress.writer import write_part
from gossamer.errors import CheckpointError, GossamerError, RecipeError

SIZE = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 32}
WIDE = {  # rows of two groups, the last one short; experts that lie in several tensors; Conv1D stored as [in, out]
    "llama": lambda: transformers.LlamaConfig(hidden_size=160, intermediate_size=136, num_key_value_heads=2, **SIZE),
    "gpt2": lambda: transformers.GPT2Config(n_embd=160, n_layer=2, n_head=4, vocab_size=64, n_positions=32),
    "mixtral": lambda: transformers.MixtralConfig(
        hidden_size=160, intermediate_size=136, num_key_value_heads=2, num_local_experts=3, **SIZE
    ),
}


def save_wide(name: str, folder: Path, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(WIDE[name](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[("llama", torch.bfloat16), ("gpt2", torch.float32), ("mixtral", torch.float16)])
def pair(request, tmp_path_factory) -> tuple[Path, Path]:
    """(sparse folder with float values, the same with int8 values); every second matrix is not pruned."""
    name, dtype = request.param
    folder = tmp_path_factory.mktemp(name)
    first = save_sparse(save_wide(name, folder / "base", dtype), folder / "floats", every=2)
    convert(first, folder / "int8", "sparse", values="int8")
    return first, folder / "int8"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("one")
    first = save_sparse(save_wide("llama", folder / "base", torch.bfloat16), folder / "floats", every=2)
    convert(first, folder / "int8", "sparse", values="int8")
    return first, folder / "int8"


def by_the_page(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
    """(dense tensors, records) of a sparse folder by docs/format.md: safetensors, json and numpy."""
    stored, records = plain(folder, "model.sparse*.safetensors"), {}
    for path in folder.glob("model.sparse*.safetensors"):
        with safe_open(path, "pt") as file:
            document = json.loads((file.metadata() or {}).get("gossamer", '{"format_version": 1, "matrices": {}}'))
        assert document["format_version"] == (2 if any("int8" in r for r in document["matrices"].values()) else 1)
        records |= document["matrices"]
    for key, record in records.items():
        bits, values = stored.pop(f"{key}_bitmask"), stored.pop(f"{key}_values")
        kept = np.unpackbits(bits.numpy(), axis=1, count=record["in"], bitorder="little").astype(bool)
        rows = torch.zeros(kept.shape, dtype=values.dtype)
        rows[torch.from_numpy(kept)] = values
        if "int8" in record:
            assert record["int8"]["group"] == 128
            dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[record["int8"]["dtype"]]
            rows = weights(rows.numpy(), stored.pop(f"{key}_scales").numpy(), dtype)
        *stack, a, b = record["shape"]
        stored[key] = rows.view(*stack, b, a).transpose(-1, -2) if record["transposed"] else rows.view(*stack, a, b)
    return stored, records


def test_the_file_is_what_numpy_makes_of_the_floats(pair):
    first, int8 = pair
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


def test_size(pair):
    """Masks, one byte per kept weight, two bytes per row and 128 inputs."""
    _, int8 = pair
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


def test_dense_and_floats_are_the_rounded_weights(pair, tmp_path):
    first, int8 = pair
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


def test_int8_values_are_copied_and_never_rounded_twice(pair, tmp_path):
    first, int8 = pair
    convert(first, tmp_path / "masked", "dense")
    convert(tmp_path / "masked", tmp_path / "from-dense", "sparse", values="int8")
    convert(int8, tmp_path / "shards", "sparse", values="int8", max_shard_size=60_000)
    assert len(list((tmp_path / "shards").glob("model.sparse-*"))) > 2
    convert(tmp_path / "shards", tmp_path / "one", "sparse", values="int8")
    for folder in ("from-dense", "one"):
        assert (tmp_path / folder / "model.sparse.safetensors").read_bytes() == next(
            int8.glob("*.safetensors")
        ).read_bytes()


def test_refusals(llama, tmp_path):
    first, int8 = llama
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


# ---- malformed -------------------------------------------------------------------------------------------------------

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
def test_a_damaged_file_does_not_load(llama, tmp_path, end, index, value, names):
    convert(llama[1], tmp_path / "int8", "sparse", values="int8")
    key = next(key for key in open_source(llama[1]).records() if "up_proj" in key)

    def damage(tensors, metadata):
        tensors[key + end].view(-1)[index] = value

    rewrite(tmp_path / "int8", damage)
    with pytest.raises(GossamerError, match=names):
        gossamer.load(tmp_path / "int8")


# ---- loading and saving ----------------------------------------------------------------------------------------------


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, variant="sparse", **{"dtype": "auto"} | options)


@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.float16])
def test_loads_to_the_bits_of_the_dense_export(pair, tmp_path, dtype):
    first, int8 = pair
    convert(int8, tmp_path / "dense", "dense")
    (tmp_path / "dense" / "gossamer" / "masks.safetensors").unlink()
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(load(int8, dtype=dtype), reference)
        model = gossamer.load(int8, dtype=dtype)
    assert_same(model, reference)
    masks = load(first).gossamer_masks
    assert model.gossamer_masks.keys() == masks.keys()
    assert all(torch.equal(mask.bits, masks[name].bits) for name, mask in model.gossamer_masks.items())


def records(folder: Path) -> tuple[int, dict[str, dict]]:
    with safe_open(folder / "model.sparse.safetensors", "pt") as file:
        document = json.loads(file.metadata()["gossamer"])
    return document["format_version"], document["matrices"]


def assert_same_files(a: Path, b: Path) -> None:
    x, y = plain(a, "model.sparse*"), plain(b, "model.sparse*")
    assert x.keys() == y.keys()
    assert all(same_bits(x[key], y[key]) for key in x)
    assert records(a) == records(b)


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_saved_again_with_the_very_same_values(pair, tmp_path, dtype):
    _, int8 = pair
    model = load(int8, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "again")
    if dtype == "auto":
        assert_same_files(tmp_path / "again", int8)
    wanted, found = open_source(int8), open_source(tmp_path / "again")
    for key in wanted.records():
        assert torch.equal(found.values(key), wanted.values(key))
        assert torch.equal(found.scales(key), wanted.scales(key))
        assert found.record(key) == wanted.record(key)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == 2
    assert_same(load(tmp_path / "again"), model)


def test_changed_weights_are_saved_as_they_are(pair, tmp_path):
    """One matrix is trained (under its mask): its checkpoint tensors get floats, all others their own values."""
    _, int8 = pair
    model = gossamer.load(int8, packed=False)
    name = list(model.gossamer_masks)[-1]
    with torch.no_grad():
        model.get_parameter(name).mul_(1.25)
    with pytest.warns(UserWarning, match="had int8 values and other weights now"):
        model.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again"), model)
    version, found = records(tmp_path / "again")
    floats = {key for key, record in found.items() if "int8" not in record}
    assert 0 < len(floats) < len(found)
    assert version == 2
    wanted = open_source(int8)
    for key, record in found.items():
        if key not in floats:
            assert record == wanted.record(key).to_json()
    with torch.no_grad():
        for other in model.gossamer_masks:
            model.get_parameter(other).mul_(1.25)
    with pytest.warns(UserWarning, match="saved with float values"):
        model.save_pretrained(tmp_path / "floats")
    assert records(tmp_path / "floats")[0] == 1
    config = json.loads((tmp_path / "floats" / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == config["gossamer"]["format_version"] == 1
    assert_same(load(tmp_path / "floats"), model)


def test_a_smaller_mask_keeps_int8_values(llama, tmp_path):
    from gossamer.compress.parametermasks import mask_of

    model = gossamer.load(llama[1], packed=False)
    name = next(iter(model.gossamer_masks))
    kept = model.gossamer_masks[name].to_bool()
    kept[:, ::3] = False
    model.gossamer_masks[name] = mask_of(kept, transposed=False, pattern="other")
    with torch.no_grad():
        model.get_parameter(name).mul_(kept).add_(0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again"), model)
    assert all("int8" in record for record in records(tmp_path / "again")[1].values())


def test_dequantize_makes_an_ordinary_model(llama, tmp_path):
    model = load(llama[1])
    model.dequantize()
    model.save_pretrained(tmp_path / "plain")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto"), load(llama[1]))
