"""`gossamer.load` reads every kind of folder and says in one line why it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import legacy, random_tensor
from exports import assert_same, dense_twin, expanded, inside, plain, save_family_sparse, save_sparse
from families import save_family
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gossamer
from gossamer.compress.convert import convert
from gossamer.errors import CheckpointError, GossamerError, ModelError


def reference(folder: Path, tmp_path: Path, **options):
    return AutoModelForCausalLM.from_pretrained(dense_twin(folder, tmp_path / "twin"), **{"dtype": "auto"} | options)


@pytest.mark.parametrize(("family", "shard"), [("llama", 10**9), ("gpt2", 75_000), ("qwen3_moe", 10**9)])
def test_sparse_and_dense_give_the_same_model_and_masks(tmp_path, family, shard):
    folder = save_family_sparse(family, tmp_path / "sparse", dtype=torch.bfloat16, shard=shard)
    convert(folder, tmp_path / "dense", "dense", max_shard_size=shard)
    a, b = gossamer.load(folder), gossamer.load(str(tmp_path / "dense"))
    assert not a.training
    assert not b.training
    assert_same(a, reference(folder, tmp_path))
    assert_same(a, b)
    assert a.gossamer_masks.keys() == b.gossamer_masks.keys() != set()
    for name, mask in a.gossamer_masks.items():
        assert torch.equal(mask.bits, b.gossamer_masks[name].bits)
        assert mask.record == b.gossamer_masks[name].record


def test_masks_have_the_parameter_shape_and_say_what_they_are(tmp_path):
    folder = save_family_sparse("gpt2", tmp_path / "sparse")
    model = gossamer.load(folder)
    _, masks = expanded(folder)
    mask = model.gossamer_masks["transformer.h.1.mlp.c_fc.weight"]
    assert mask.to_bool().shape == model.transformer.h[1].mlp.c_fc.weight.shape == (48, 80)
    assert torch.equal(mask.to_bool(), masks["transformer.h.1.mlp.c_fc.weight"])
    assert (mask.pattern, mask.record.transposed, mask.bits.shape) == ("0.6", True, (80, 6))


def test_an_ordinary_folder(tmp_path):
    folder = save_family("llama", tmp_path / "model", dtype=torch.float16)
    model = gossamer.load(folder)
    assert (model.dtype, model.gossamer_masks, model.training) == (torch.float16, {}, False)
    assert_same(model, AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
    model.save_pretrained(tmp_path / "again")
    assert plain(tmp_path / "again").keys() == plain(folder).keys()


def test_of_both_forms_the_sparse_one(tmp_path):
    folder = save_family_sparse("llama", tmp_path / "sparse")
    twin = dense_twin(folder, tmp_path / "twin")
    tensors = load_file(twin / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    norm = plain(twin)["model.norm.weight"]
    assert torch.equal(gossamer.load(folder).model.norm.weight, norm)


def test_options_reach_transformers(tmp_path):
    folder = save_family_sparse("llama", tmp_path / "sparse", dtype=torch.bfloat16)
    model = gossamer.load(folder, dtype=torch.float32, device_map="auto", attn_implementation="eager")
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "eager"
    assert_same(model, reference(folder, tmp_path, dtype=torch.float32))


def test_dense_masks_survive_another_dtype(tmp_path):
    folder = save_family_sparse("mixtral", tmp_path / "sparse")
    convert(folder, tmp_path / "dense", "dense")
    model = gossamer.load(tmp_path / "dense", dtype="bfloat16")
    for name, mask in model.gossamer_masks.items():
        assert bool((model.get_parameter(name)[~mask.to_bool()] == 0).all())


# ---- errors ----------------------------------------------------------------------------------------------------------


def one_line(folder, error=GossamerError, match=None, **options):
    with pytest.raises(error, match=match) as caught:
        gossamer.load(folder, **options)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", ["nowhere/at/all", "no-such-model-here"])
def test_no_such_model(name):
    assert one_line(name, ModelError, name).hint


def test_a_file_and_an_empty_folder(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    one_line(tmp_path / "file", ModelError, "is a file")
    one_line(tmp_path / "empty", ModelError, r"config\.json")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_that_is_no_config(tmp_path, text):
    folder = save_family("llama", tmp_path / "model")
    (folder / "config.json").write_text(text)
    one_line(folder, CheckpointError, r"config\.json")


def test_an_unknown_architecture(tmp_path):
    folder = save_family("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of", "architectures": None}))
    one_line(folder, ModelError, "unheard-of")


def test_own_code_needs_consent(tmp_path):
    folder = save_family("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('code was run')\n")
    assert "trust_remote_code" in str(one_line(folder, ModelError))


def test_only_pickled_weights(tmp_path):
    folder = save_family("llama", tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    one_line(folder, ModelError, r"pytorch_model\.bin")


@pytest.mark.parametrize("form", ["sparse", "plain"])
@pytest.mark.parametrize("key", ["model.norm.weight", "model.layers.2.post_attention_layernorm.weight"])
def test_a_missing_tensor_is_an_error_in_every_form(tmp_path, form, key):
    folder = save_family("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    short = {name: tensor for name, tensor in tensors.items() if name != key}
    save_file(short, folder / "model.safetensors", {"format": "pt"})
    if form == "sparse":
        folder = save_sparse(folder, tmp_path / "sparse")
    one_line(folder, CheckpointError, key.replace(".", r"\."))


def test_a_misshapen_tensor(tmp_path):
    folder = save_family("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = random_tensor(47)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    one_line(folder, CheckpointError, r"model\.norm\.weight has shape \[47\]")


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_a_config_of_fewer_blocks(tmp_path, form):
    folder = save_family_sparse("llama", tmp_path / "sparse", dtype=torch.bfloat16)
    if form == "dense":
        convert(folder, tmp_path / "dense", "dense")
    path = tmp_path / form / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    with pytest.raises((CheckpointError, ModelError), match=r"has a mask of model\.layers\.1\."):
        gossamer.load(tmp_path / form)


def test_a_config_that_contradicts_itself(tmp_path):
    folder = save_family_sparse("llama", tmp_path / "sparse", dtype=torch.bfloat16)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 7}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        gossamer.load(folder)


def test_a_missing_expert_of_an_ordinary_folder(tmp_path):
    folder = save_family("mixtral", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if ".experts.2.w3" in name)
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    one_line(folder, CheckpointError)


@pytest.mark.parametrize("shard", [10**9, 45_000])
def test_truncated_and_absent_files(tmp_path, shard):
    folder = save_family_sparse("llama", tmp_path / "sparse", shard=shard)
    last = sorted(folder.glob("model.sparse*.safetensors"))[-1]
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    one_line(folder, CheckpointError, "cut short")
    last.unlink()
    one_line(folder, GossamerError, "does not exist|no model")


def test_dense_masks_of_another_model(tmp_path):
    folder = save_family_sparse("llama", tmp_path / "sparse")
    convert(folder, tmp_path / "dense", "dense")
    path = tmp_path / "dense" / "gossamer" / "masks.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    one_line(tmp_path / "dense", CheckpointError, "bitmask")


def test_sparse_weights_without_word_of_them_in_the_config(tmp_path):
    folder = save_family_sparse("llama", tmp_path / "sparse", quantization_config=None)
    assert "quant_method" in str(one_line(folder, CheckpointError, "does not say so"))


def test_the_old_bitmask_layout_is_to_be_converted(tmp_path):
    folder = save_family("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for key in inside(folder):
        tensors |= legacy(key, torch.where(random_tensor(*tensors[key].shape, seed=3) > 0, tensors.pop(key), 0.0))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "sparsity_config": {"format": "sparse-bitmask"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert "gossamer convert" in str(one_line(folder, ModelError))
    convert(folder, tmp_path / "sparse", "sparse")
    assert gossamer.load(tmp_path / "sparse").gossamer_masks
