"""Sparse deltas as a method of peft: everything that peft does with an adapter."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from spiel_models import Net, adapted, batch, fill, loss_of
from tiny import save_llama
from torch import nn

from gossamer.errors import CheckpointError, ModelError, RecipeError
from gossamer.finetune.spiel.config import SpielConfig
from gossamer.finetune.spiel.layer import layers_of

X = batch(7)[0]
COLUMNS = "base_model.model.first.spiel_columns"


def dense(net, model, adapter="default"):
    """`net` with the deltas of `model` added to its weights."""
    net = copy.deepcopy(net)
    for layer in layers_of(model, adapter):
        net.get_submodule(layer.name).weight.data += layer.get_delta_weight(adapter)
    return net


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import gossamer, peft; check()", marks=pytest.mark.slow),
        "import peft, gossamer; check()",
        "import gossamer, importlib; importlib.reload(gossamer); gossamer._hook.install(); import peft; check(); "
        "gossamer._hook.install(); gossamer._hook.register_tuner(); check()",
    ],
)
def test_registration_in_every_order(code):
    check = (
        "def check():\n"
        " from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as c, PEFT_TYPE_TO_TUNER_MAPPING as t\n"
        " assert c['SPIEL'].__name__ == 'SpielConfig' and t['SPIEL'].__name__ == 'SpielModel'\n"
    )
    done = subprocess.run([sys.executable, "-c", check + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_peft_with_a_method_of_that_name_is_left_alone(monkeypatch):
    from gossamer.finetune.spiel import registration

    monkeypatch.setattr(registration, "PeftType", type("T", (), {"__members__": {"SPIEL": 1}}))
    with pytest.warns(UserWarning, match="method SPIEL of its own"):
        registration.register()


def test_only_deltas_are_trained_and_they_begin_at_zero():
    net = Net()
    model = adapted(copy.deepcopy(net))
    torch.testing.assert_close(model(X), net(X), rtol=0, atol=0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == 60
    assert all("spiel_values" in name and p.dtype == torch.float32 for name, p in trained.items())
    loss_of(model, 0).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())


@pytest.mark.parametrize("backend", ["csr", "dense", "weight"])
def test_merge_is_the_unmerged_model_and_unmerge_is_exact(backend):
    net = Net()
    model = adapted(copy.deepcopy(net), backend=backend)
    fill(model)
    before = model(X)
    torch.testing.assert_close(before, dense(net, model)(X))
    assert not torch.allclose(before, net(X), atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(model(X), net(X), rtol=0, atol=0)
    model.merge_adapter()
    torch.testing.assert_close(model(X), before)
    model.unmerge_adapter()
    for name in ("first", "second"):
        assert torch.equal(
            model.base_model.model.get_submodule(name).get_base_layer().weight, net.get_submodule(name).weight
        )
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(X), before)
    assert type(merged.first) is nn.Linear
    assert merged.spiel_reports["first"]["default"].lost == 0


def test_merging_into_bfloat16_tells_what_is_lost():
    model = adapted(Net(dtype=torch.bfloat16))
    fill(model, scale=1e-6)
    with pytest.warns(UserWarning, match="entries are lost in merging"):
        merged = model.merge_and_unload()
    report = merged.spiel_reports["first"]["default"]
    assert report.entries > 0
    assert report.lost_share > 0.5
    assert report.error > 0.5


def test_several_adapters_add_up_and_can_be_merged_deleted_and_chosen():
    net = Net()
    model = adapted(copy.deepcopy(net))
    fill(model)
    model.add_adapter("other", SpielConfig(target_modules=["second"], density=0.1, seed=9))
    fill(model, "other", 0.3)
    torch.testing.assert_close(model(X), dense(net, model)(X))
    model.set_adapter("other")
    torch.testing.assert_close(model(X), dense(net, model, "other")(X))
    model.base_model.set_adapter(["default", "other"])
    both = dense(dense(net, model), model, "other")
    torch.testing.assert_close(model(X), both(X))
    model.merge_adapter()
    torch.testing.assert_close(model(X), both(X))
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.second.get_base_layer().weight, net.second.weight)
    model.set_adapter("default")
    model.delete_adapter("other")
    torch.testing.assert_close(model(X), dense(net, model)(X))


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_save_and_load_are_exact(tmp_path, low_memory, trainable):
    net = Net()
    model = adapted(copy.deepcopy(net), modules_to_save=["head"], allocation="erk")
    fill(model)
    model.base_model.model.head.modules_to_save["default"].weight.data += 1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        copy.deepcopy(net), tmp_path, low_cpu_mem_usage=low_memory, is_trainable=trainable
    )
    assert torch.equal(loaded(X), model(X))
    for a, b in zip(layers_of(loaded, "default"), layers_of(model, "default"), strict=True):
        assert torch.equal(a.flat("default"), b.flat("default"))
        assert torch.equal(a.spiel_values["default"], b.spiel_values["default"])
        assert a.spiel_values["default"].requires_grad == trainable
    loaded.load_adapter(tmp_path, "second name")
    loaded.set_adapter("second name")
    assert torch.equal(loaded(X), model(X))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "SPIEL"
    assert written["gossamer_version"]


def test_a_configuration_can_be_used_again_after_saving(tmp_path):
    config = SpielConfig(target_modules=["first"], density=0.1)
    model = get_peft_model(Net(), config)
    fill(model)
    model.save_pretrained(tmp_path)
    model.add_adapter("second", config)
    model.set_adapter("second")
    again = get_peft_model(Net(), config)
    for one in (model, again):
        torch.testing.assert_close(one(X), Net()(X))
        assert all(len(layer.spiel_values["default"]) for layer in layers_of(one, "default"))
    assert config.base_fingerprint is None
    loaded = SpielConfig.from_pretrained(tmp_path)
    assert loaded.is_loaded
    assert loaded.layer_fingerprints.keys() == {"first"}


def test_the_file_has_4_2_bytes_per_entry(tmp_path):
    net = nn.Sequential(nn.Linear(2048, 2048, bias=False))
    model = get_peft_model(net, SpielConfig(target_modules=["0"], density=0.01, file_dtype="bfloat16"))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition("_")[2]: str(t.dtype) for key, t in stored.items()} == {
        "values": "torch.bfloat16", "columns": "torch.uint16", "counts": "torch.uint16",
    }  # fmt: skip
    entries = round(0.01 * 2048 * 2048)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= 4.2 * entries


def test_an_adapter_of_another_base_is_refused(tmp_path):
    model = adapted(Net())
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="trained on other weights"):
        PeftModel.from_pretrained(Net(seed=1), tmp_path)
    config = SpielConfig.from_pretrained(tmp_path)
    config.check_base = False
    PeftModel.from_pretrained(Net(seed=1), tmp_path, config=config)
    with pytest.raises(CheckpointError, match="first: column|first: .*inputs|other weights"):
        PeftModel.from_pretrained(Net(width=4), tmp_path)
    config = SpielConfig.from_pretrained(tmp_path)
    config.check_base = False
    narrow = Net()
    narrow.first, narrow.second = nn.Linear(13, 16), nn.Linear(16, 11, bias=False)
    with pytest.raises(CheckpointError, match="the layer has 16 rows"):
        PeftModel.from_pretrained(narrow, tmp_path, config=config)
    PeftModel.from_pretrained(Net().to(torch.bfloat16), tmp_path)  # the same weights, rounded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("base_model.model.first.spiel_values"), "no spiel_values for first"),
        (lambda t: t.update({COLUMNS: t[COLUMNS][:-1]}), "values for"),
        (lambda t: t.update({COLUMNS: t[COLUMNS].int().flip(0)}), "ascending"),
        (lambda t: t[COLUMNS].fill_(13), "column 13 of a layer with 13 inputs"),
        (lambda t: t["base_model.model.first.spiel_counts"][:1].fill_(14), "a row of 14 entries"),
        (lambda t: t["base_model.model.first.spiel_values"].fill_(float("nan")), "not finite"),
        (lambda t: t.update({"base_model.model.third.spiel_values": torch.zeros(1)}), "third"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path, change, message):
    model = adapted(Net())
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    stored = load_file(path)
    change(stored)
    save_file({key: t.contiguous() for key, t in stored.items()}, path)
    with pytest.raises(CheckpointError, match=message):
        PeftModel.from_pretrained(Net(), tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"density": 0}, "density must be in"),
        ({"density": 1.01}, "density must be in"),
        ({"density": "0.1"}, "density must be a number, got '0.1'"),
        ({"num_weights": True}, "num_weights must be a number, got True"),
        ({"density": 0.1, "rank_equivalent": 2}, "are both given"),
        ({"num_weights": -3}, "num_weights must be greater"),
        ({"num_weights": 2.5}, "num_weights must be a whole number"),
        ({"policy": "sgd"}, "allowed: static, ag, ma"),
        ({"selection": "best"}, "allowed: random"),
        ({"allocation": "global"}, "compares scores"),
        ({"window": 9, "interval": 5}, "window of 9"),
        ({"share": 0}, r"\(0, 1\]"),
        ({"where": "here"}, "allowed: all, kept"),
    ],
)
def test_configurations_that_cannot_work(config, message):
    with pytest.raises(RecipeError, match=message):
        SpielConfig(**config)


def test_layers_that_cannot_be_adapted():
    with pytest.raises(RecipeError, match="'third' is not in the model"):
        adapted(target_modules=["first", "third"])
    with pytest.raises(ModelError, match="needs a linear layer, got Tanh"):
        adapted(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), target_modules=["1"])
    with pytest.raises(RecipeError, match="is more than the 408 weights"):
        adapted(num_weights=409)
    with pytest.raises(RecipeError, match="needs masks, and first has none"):
        adapted(where="kept")


def test_budgets():
    def counts(**config):
        return [len(l.spiel_values["default"]) for l in layers_of(adapted(num_weights=None, **config), "default")]

    assert sum(counts(density=0.25)) == round(0.25 * (13 * 17 + 17 * 11))
    assert sum(counts(rank_equivalent=2)) == 2 * (13 + 17 + 17 + 11)
    assert sum(counts()) == round(0.01 * (13 * 17 + 17 * 11))
    assert counts(density=1.0) == [221, 187]
    uniform, erk = counts(density=0.25), counts(density=0.25, allocation="erk")
    assert sum(uniform) == sum(erk)
    assert erk[1] > uniform[1]  # the narrower layer gets more


def test_a_transformers_model_of_all_its_linear_layers(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = save_llama(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(base, SpielConfig(rank_equivalent=1, task_type="CAUSAL_LM"))
    names = [layer.name for layer in layers_of(model, "default")]
    assert len(names) == 21
    assert not any("lm_head" in name for name in names)
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=1, target_modules="all-linear"))
    assert model.get_nb_trainable_parameters()[0] == lora.get_nb_trainable_parameters()[0]
    fill(model)
    ids = torch.arange(12).view(1, 12)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    with_checkpoints = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.gradient_checkpointing_disable()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(with_checkpoints[name], parameter.grad)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    # transformers' own loader of adapters knows nothing of our layout: that must not pass as a model without an adapter
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_conv1d_of_gpt2(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)).eval()
    plain = copy.deepcopy(base)
    model = get_peft_model(base, SpielConfig(target_modules=["c_attn", "c_fc", "mlp.c_proj"], density=0.2)).eval()
    fill(model)
    ids = torch.arange(9).view(1, 9)
    before = model(ids).logits
    torch.testing.assert_close(before, dense(plain, model)(ids).logits)
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, before)


def test_injection_without_a_peft_model(tmp_path):
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    net = inject_adapter_in_model(SpielConfig(target_modules=["first"], num_weights=9), Net())
    fill(net)
    stored = get_peft_model_state_dict(net)
    assert sorted(stored) == ["first.spiel_columns", "first.spiel_counts", "first.spiel_values"]
    other = inject_adapter_in_model(SpielConfig(target_modules=["first"], num_weights=5), Net())
    set_peft_model_state_dict(other, stored)
    assert torch.equal(other(X), net(X))


def test_autocast_keeps_small_deltas():
    model = adapted(backend="weight")
    fill(model, scale=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model, 1).backward()
    assert all(layer.spiel_values["default"].grad.abs().sum() > 0 for layer in layers_of(model, "default"))


def test_saved_bytes_are_at_most_those_of_lora():
    def saved(config):
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))
        model, held = get_peft_model(net, config), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: held.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
        ):
            model(torch.randn(32, 256))
        return sum(held.values())

    rank = 4
    for backend in ("csr", "dense", "weight"):
        ours = saved(SpielConfig(target_modules=["0", "1", "2", "3"], rank_equivalent=rank, backend=backend))
        assert ours <= 1.2 * saved(LoraConfig(r=rank, target_modules=["0", "1", "2", "3"]))
