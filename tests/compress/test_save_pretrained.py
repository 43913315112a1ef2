"""`save_pretrained` keeps weights and masks to the bit, tells the truth after training, and never misleads others."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from checkpoints import same_bits
from exports import assert_same, dense_twin, expanded, plain, save_family_sparse
from families import save_family
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import gossamer
from gossamer.compress.convert import convert
from gossamer.errors import CheckpointError, RecipeError

# Plain transformers, where importing Gossamer is impossible: loads folder after folder, saves what it got.
ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "gossamer":
            raise ImportError("no gossamer here")
sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    except OSError as error:
        print("OSError:", str(error).splitlines()[0])
    else:
        torch.save(model.state_dict(), folder + ".pt")
        print("loaded")
assert "gossamer" not in sys.modules
"""


def alone(*folders: Path) -> list[str]:
    """What plain transformers says to each folder; of a loaded one the state is beside it."""
    command = [sys.executable, "-I", "-c", ALONE, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folders[0].parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def assert_same_files(a: Path, b: Path) -> None:
    """The same tensors under the same names, the same records; the distribution over files may differ."""
    x, y = plain(a), plain(b)
    assert x.keys() == y.keys()
    assert all(same_bits(x[key], y[key]) for key in x)
    assert records(a) == records(b) != {}


def records(folder: Path, pattern: str = "model.sparse*.safetensors") -> dict:
    found = {}
    for path in folder.glob(pattern):
        with safe_open(path, "pt") as file:
            found |= json.loads((file.metadata() or {}).get("gossamer", '{"matrices": {}}'))["matrices"]
    return found


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


CASES = [
    ("llama", torch.bfloat16, 1),
    ("qwen3", torch.float16, 2),
    ("gpt2", torch.float32, 1),
    ("opt", torch.float32, 2),
    ("mixtral", torch.bfloat16, 3),
    ("qwen3_moe", torch.float32, 1),
    ("gpt_oss", torch.bfloat16, 1),
]


@pytest.mark.parametrize(("family", "dtype", "every"), CASES)
def test_round_trip_gives_the_same_tensors_records_and_masks(tmp_path, family, dtype, every):
    folder = save_family_sparse(family, tmp_path / "sparse", dtype=dtype, every=every)
    model = AutoModelForCausalLM.from_pretrained(folder, variant="sparse", dtype="auto")
    model.save_pretrained(tmp_path / "again")
    assert_same_files(folder, tmp_path / "again")
    again = gossamer.load(tmp_path / "again")
    assert_same(model, again)
    assert {k: m.record for k, m in model.gossamer_masks.items()} == {
        k: m.record for k, m in again.gossamer_masks.items()
    }
    for key in ("quantization_config", "gossamer"):
        assert config_of(tmp_path / "again")[key] == config_of(folder)[key]


def test_plain_transformers_without_gossamer(tmp_path):
    """Sparse folders are a loud OSError, dense ones load to the same bits; random weights never."""
    folder = save_family_sparse("mixtral", tmp_path / "sparse", dtype=torch.bfloat16)
    convert(folder, tmp_path / "dense", "dense")
    model = gossamer.load(folder)
    model.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "shards", max_shard_size="80KB")
    type(model).save_pretrained(model, tmp_path / "by-class")
    gossamer.load(tmp_path / "dense").save_pretrained(tmp_path / "dense-again")
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto").save_pretrained(tmp_path / "dense-plain")
    trained = gossamer.load(folder, packed=False)
    train(trained, keep_zeros=False)
    with pytest.warns(UserWarning, match="saved dense"):
        trained.save_pretrained(tmp_path / "filled")
    loud = [folder, tmp_path / "again", tmp_path / "shards", tmp_path / "filled"]
    good = [tmp_path / name for name in ("dense", "dense-again", "dense-plain", "by-class")]
    said = alone(*loud, *good)
    for line in said[:4]:
        assert line.startswith("OSError:")
        assert "model.safetensors" in line
    assert said[4:] == ["loaded"] * 4
    expected = AutoModelForCausalLM.from_pretrained(dense_twin(folder, tmp_path / "twin"), dtype="auto").state_dict()
    for place in good:
        state = torch.load(f"{place}.pt")
        assert all(same_bits(state[name], tensor) for name, tensor in expected.items()), place
    assert not any(Path(f"{place}.pt").exists() for place in loud)


def test_the_dense_export_stays_plain_and_keeps_its_masks(tmp_path):
    folder = save_family_sparse("gpt2", tmp_path / "sparse", dtype=torch.bfloat16)
    convert(folder, tmp_path / "dense", "dense")
    model = gossamer.load(tmp_path / "dense")
    model.save_pretrained(tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").glob("*.safetensors")) == ["model.safetensors"]
    assert "quantization_config" not in config_of(tmp_path / "again")
    masks = "gossamer/masks.safetensors"
    assert records(tmp_path / "again", masks) == records(tmp_path / "dense", masks) == records(folder)
    convert(tmp_path / "again", tmp_path / "sparse-again", "sparse")
    assert_same_files(folder, tmp_path / "sparse-again")


def test_gpt2_dense_to_sparse_to_dense(tmp_path):
    base = save_family_sparse("gpt2", tmp_path / "start", dtype=torch.float16)
    convert(base, tmp_path / "dense", "dense")
    convert(tmp_path / "dense", tmp_path / "sparse", "sparse")
    convert(tmp_path / "sparse", tmp_path / "back", "dense")
    first, last = plain(tmp_path / "dense"), plain(tmp_path / "back")
    assert first.keys() == last.keys()
    assert all(same_bits(first[key], last[key]) for key in first)
    assert_same(
        gossamer.load(tmp_path / "sparse"), AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    )


def test_sharded_on_saving(tmp_path):
    folder = save_family_sparse("llama", tmp_path / "sparse", dtype=torch.bfloat16)
    model = gossamer.load(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    files = sorted(path.name for path in (tmp_path / "shards").iterdir())
    assert "model.safetensors.index.sparse.json" in files
    assert len([name for name in files if name.endswith(".safetensors")]) >= 3
    assert_same_files(folder, tmp_path / "shards")
    assert_same(gossamer.load(tmp_path / "shards"), model)


def test_saving_again_leaves_nothing_old(tmp_path):
    """transformers leaves a single file beside new shards, and would read it."""
    folder = save_family_sparse("llama", tmp_path / "sparse")
    model = gossamer.load(folder)
    for size, single in [("50GB", True), ("30KB", False), ("50GB", True), ("50GB", True)]:
        with torch.no_grad():
            model.model.norm.weight.add_(1)
        model.save_pretrained(folder, max_shard_size=size)
        assert (folder / "model.sparse.safetensors").exists() == single
        assert (folder / "model.safetensors.index.sparse.json").exists() != single
        assert len(list(folder.glob("model.sparse-*"))) == 0 or not single
        assert_same(gossamer.load(folder), model)


def test_other_weights_in_the_folder_are_not_joined(tmp_path):
    folder = save_family_sparse("llama", tmp_path / "sparse")
    convert(folder, tmp_path / "dense", "dense")
    before = {path: path.read_bytes() for path in (tmp_path / "dense").iterdir() if path.is_file()}
    with pytest.raises(RecipeError, match=r"model\.safetensors"):
        gossamer.load(folder).save_pretrained(tmp_path / "dense")
    assert all(path.read_bytes() == content for path, content in before.items())
    with pytest.raises(RecipeError, match=r"model\.sparse"):
        gossamer.load(tmp_path / "dense").save_pretrained(folder)


def test_another_variant_is_refused(tmp_path):
    model = gossamer.load(save_family_sparse("llama", tmp_path / "sparse"))
    with pytest.raises(RecipeError, match="fp16"):
        model.save_pretrained(tmp_path / "out", variant="fp16")
    with pytest.raises(RecipeError, match="distributed"):
        model.save_pretrained(tmp_path / "out", distributed_checkpoint=True)
    model.save_pretrained(tmp_path / "out", variant="sparse")
    assert_same(gossamer.load(tmp_path / "out"), model)


def test_the_method_of_the_class_writes_plain_weights(tmp_path):
    """Whatever goes past the model's own method must not write packed tensors under the plain name."""
    folder = save_family_sparse("mixtral", tmp_path / "sparse")
    model = gossamer.load(folder)
    type(model).save_pretrained(model, tmp_path / "plain")
    twin = plain(dense_twin(folder, tmp_path / "twin"))
    written = plain(tmp_path / "plain")
    assert written.keys() == twin.keys()
    assert all(same_bits(written[key], twin[key]) for key in twin)


def test_dequantize_makes_it_an_ordinary_model(tmp_path):
    folder = save_family_sparse("llama", tmp_path / "sparse")
    model = gossamer.load(folder).dequantize()
    model.save_pretrained(tmp_path / "plain")
    assert {"quantization_config", "gossamer"}.isdisjoint(config_of(tmp_path / "plain"))
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), model)


# ---- after training --------------------------------------------------------------------------------------------------


def train(model, *, keep_zeros: bool) -> None:
    ids = torch.arange(3, 33)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for name, mask in model.gossamer_masks.items() if keep_zeros else ():
            model.get_parameter(name).mul_(mask.to_bool())
    model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_trained_with_zeros_kept(tmp_path, family):
    folder = save_family_sparse(family, tmp_path / "sparse")
    model = gossamer.load(folder)
    train(model, keep_zeros=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "tuned")
    again = gossamer.load(tmp_path / "tuned")
    for name, parameter in model.named_parameters():  # -0.0 at a pruned place becomes +0.0
        assert torch.equal(again.get_parameter(name), parameter), name
    assert records(tmp_path / "tuned") == records(folder)
    changed = [k for k, t in expanded(folder)[0].items() if not torch.equal(t, expanded(tmp_path / "tuned")[0][k])]
    assert changed


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_filled_zeros_are_stored_as_they_are_and_said(tmp_path, family):
    folder = save_family_sparse(family, tmp_path / "sparse")
    model = gossamer.load(folder)
    train(model, keep_zeros=False)
    with pytest.warns(UserWarning, match=r"saved dense.*without their masks"):
        model.save_pretrained(tmp_path / "tuned")
    again = gossamer.load(tmp_path / "tuned")
    assert_same(again, model)
    said = config_of(tmp_path / "tuned")["quantization_config"]["modules"]
    assert said == len(records(tmp_path / "tuned")) < len(records(folder))


def test_only_the_filled_matrix_loses_its_mask(tmp_path):
    folder = save_family_sparse("mixtral", tmp_path / "sparse")
    model = gossamer.load(folder)
    fused = model.model.layers[1].mlp.experts.gate_up_proj
    hole = (~model.gossamer_masks["model.layers.1.mlp.experts.gate_up_proj"].to_bool()).nonzero()
    expert, row, column = next(place for place in hole.tolist() if place[0] == 3 and place[1] >= 80)
    with torch.no_grad():
        fused[expert, row, column] = 2.0
    with pytest.warns(UserWarning, match="1 of"):
        model.save_pretrained(tmp_path / "out")
    gone = set(records(folder)) - set(records(tmp_path / "out"))
    assert gone == {key for key in records(folder) if "layers.1." in key and ".experts.3." in key and "w3" in key}
    assert len(gone) == 1
    assert_same(gossamer.load(tmp_path / "out"), model)


def test_filled_zeros_of_a_dense_export(tmp_path):
    folder = save_family_sparse("llama", tmp_path / "sparse")
    convert(folder, tmp_path / "dense", "dense")
    model = gossamer.load(tmp_path / "dense")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(0.5)
    with pytest.warns(UserWarning, match="1 of"):
        model.save_pretrained(tmp_path / "out")
    left = records(tmp_path / "out", "gossamer/masks.safetensors")
    assert set(records(folder)) - set(left) == {"model.layers.0.mlp.up_proj.weight"}
    assert_same(gossamer.load(tmp_path / "out"), model)


def test_a_given_state_dict_is_what_is_saved(tmp_path):
    """The Trainer gathers the state and passes it."""
    folder = save_family_sparse("llama", tmp_path / "sparse")
    model = gossamer.load(folder)
    state = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "out", state_dict=state)
    again = gossamer.load(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in state.items())


def test_masks_may_be_replaced_and_removed(tmp_path):
    folder = save_family_sparse("llama", tmp_path / "sparse")
    model = gossamer.load(folder)
    del model.gossamer_masks["model.layers.0.mlp.up_proj.weight"]
    model.gossamer_masks["model.layers.1.mlp.up_proj.weight"] = model.gossamer_masks[
        "model.layers.0.mlp.down_proj.weight"
    ]
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        model.save_pretrained(tmp_path / "out")
    del model.gossamer_masks["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path / "out")
    assert len(records(folder)) - len(records(tmp_path / "out")) == 2
    assert_same(gossamer.load(tmp_path / "out"), model)


def test_another_dtype_and_new_embeddings(tmp_path):
    folder = save_family_sparse("qwen3", tmp_path / "sparse")
    model = gossamer.load(folder).to(torch.bfloat16)
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "out")
    again = gossamer.load(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert again.get_input_embeddings().weight.shape[0] == 100
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert_same(again, model)
    assert records(tmp_path / "out") == records(folder)


# ---- peft ------------------------------------------------------------------------------------------------------------


def test_lora_on_the_dense_gpt2_export(tmp_path):
    """Plain peft, without a word of Gossamer: train a step, save, load, merge."""
    from peft import LoraConfig, PeftModel, get_peft_model

    convert(save_family_sparse("gpt2", tmp_path / "sparse"), tmp_path / "dense", "dense")
    config = LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.arange(3, 33)[None]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    model.eval()
    assert model(ids, labels=ids).loss.item() < loss.item()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_lora_on_a_sparse_model_keeps_the_base_and_merging_is_said(tmp_path):
    from peft import LoraConfig, get_peft_model

    folder = save_family_sparse("llama", tmp_path / "sparse")
    base = gossamer.load(folder)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    with gossamer.merging("dense"):
        merged = model.merge_and_unload()
    with pytest.warns(UserWarning, match="3 of"):
        merged.save_pretrained(tmp_path / "merged")
    assert_same(gossamer.load(tmp_path / "merged"), merged)


def test_an_adapter_loaded_by_transformers_is_saved_alone(tmp_path):
    from peft import LoraConfig

    model = gossamer.load(save_family_sparse("llama", tmp_path / "sparse"))
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    assert [path.name for path in (tmp_path / "adapter").glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert all("lora" in key for key in plain(tmp_path / "adapter", "adapter_model.safetensors"))


def test_an_ordinary_model_is_left_alone(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_family("llama", tmp_path / "model"))
    assert "save_pretrained" not in vars(model)
