"""int8 values loaded into models and saved again: the same bits, the same files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from checkpoints import same_bits
from exports import assert_same, plain
from int8_folders import records
from transformers import AutoModelForCausalLM

import gossamer
from gossamer.compress.convert import convert
from gossamer.compress.source import open_source


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, variant="sparse", **{"dtype": "auto"} | options)


@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.float16])
def test_loads_to_the_bits_of_the_dense_export(int8_pair, tmp_path, dtype):
    first, int8 = int8_pair
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


def assert_same_files(a: Path, b: Path) -> None:
    x, y = plain(a, "model.sparse*"), plain(b, "model.sparse*")
    assert x.keys() == y.keys()
    assert all(same_bits(x[key], y[key]) for key in x)
    assert records(a) == records(b)


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_saved_again_with_the_very_same_values(int8_pair, tmp_path, dtype):
    _, int8 = int8_pair
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


def test_changed_weights_are_saved_as_they_are(int8_pair, tmp_path):
    """One matrix is trained (under its mask): its checkpoint tensors get floats, all others their own values."""
    _, int8 = int8_pair
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


def test_a_smaller_mask_keeps_int8_values(int8_llama, tmp_path):
    from gossamer.compress.parametermasks import mask_of

    model = gossamer.load(int8_llama[1], packed=False)
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


def test_dequantize_makes_an_ordinary_model(int8_llama, tmp_path):
    model = load(int8_llama[1])
    model.dequantize()
    model.save_pretrained(tmp_path / "plain")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto"), load(int8_llama[1]))
