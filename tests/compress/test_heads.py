"""A head plan in a checkpoint: applied by every way of loading, saved, run by our loop, with packed weights."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exports import dense_twin, save_family_sparse
from families import save_family
from transformers import AutoModelForCausalLM

import gossamer
from gossamer.attention.plan import HeadPlan, HeadRule
from gossamer.attention.ragged import RaggedCache
from gossamer.compress import benchmodel
from gossamer.compress.generate import generate
from gossamer.compress.heads import applied, apply, remove
from gossamer.errors import CheckpointError


def plan_of(config) -> HeadPlan:
    rules = [HeadRule(1, 6, 0.0), HeadRule(2, -1, 0.5), HeadRule(0, 9, 0.0), HeadRule(4, 1, 0.25)]
    heads = [
        tuple(rules[(layer + head) % 4] for head in range(config.num_key_value_heads))
        for layer in range(config.num_hidden_layers)
    ]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return HeadPlan(config.model_type, config.num_attention_heads, width, 4, (32,), None, tuple(heads))


def with_plan(folder: Path) -> HeadPlan:
    """Writes a plan into the folder's config.json."""
    from transformers import AutoConfig

    plan = plan_of(AutoConfig.from_pretrained(folder))
    config = json.loads((folder / "config.json").read_text())
    config.setdefault("gossamer", {"format_version": 1})["heads"] = plan.to_json()
    (folder / "config.json").write_text(json.dumps(config))
    return plan


IDS = torch.tensor([[5, 9, 2, 14, 7, 3, 8, 11, 6, 4, 12, 10, 9, 13, 5, 2]])


@torch.no_grad()
def test_a_sparse_checkpoint_with_a_plan(tmp_path):
    """Weights from the packed form, attention by the plan; loaded in both ways, saved and loaded again."""
    folder = save_family_sparse("llama", tmp_path / "sparse")
    twin = AutoModelForCausalLM.from_pretrained(dense_twin(folder, tmp_path / "twin"))
    dense = twin(IDS).logits
    plan = with_plan(folder)
    wanted = apply(twin, plan)(IDS).logits
    assert (dense - wanted).abs().max() > 1e-3
    first = gossamer.load(folder)
    second = AutoModelForCausalLM.from_pretrained(folder, variant="sparse")
    first.save_pretrained(tmp_path / "again")
    third = gossamer.load(tmp_path / "again")
    for model in (first, second, third):
        torch.testing.assert_close(model(IDS).logits, wanted, atol=1e-5, rtol=1e-5)
        assert model.gossamer_heads.plan == plan
    without = gossamer.load(folder, attachments=False)
    torch.testing.assert_close(without(IDS).logits, dense, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_dense_checkpoint_with_a_plan(tmp_path):
    """Ours with the plan, plain transformers without."""
    folder = save_family("llama", tmp_path / "model")
    dense = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    plan = with_plan(folder)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(IDS).logits, dense)
    model = gossamer.load(folder)
    found = model(IDS).logits
    assert (found - dense).abs().max() > 1e-3
    assert model.gossamer_heads.plan == plan
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(gossamer.load(tmp_path / "again")(IDS).logits, found, atol=1e-5, rtol=1e-5)


def test_a_plan_of_another_model(tmp_path):
    folder = save_family("llama", tmp_path / "model")
    with_plan(folder)
    path = folder / "config.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"model_type": "qwen2"}, "model type qwen2"),
        ({"schema_version": 9}, "schema version 9"),
        ({"sink": [[1]]}, "field sink"),
    ):
        path.write_text(json.dumps(good | {"gossamer": {"heads": good["gossamer"]["heads"] | change}}))
        with pytest.raises(CheckpointError, match=message) as caught:
            gossamer.load(folder)
        assert str(folder) in caught.value.message
        assert "attachments=False loads the model without it" in caught.value.hint
        assert "None" not in caught.value.hint
    gossamer.load(folder, attachments=False)


def test_our_loop_runs_on_what_the_plan_keeps(tmp_path, monkeypatch):
    folder = save_family("llama", tmp_path / "model")
    with_plan(folder)
    made = []
    usual = RaggedCache.__init__
    monkeypatch.setattr(RaggedCache, "__init__", lambda self, *a, **k: (usual(self, *a, **k), made.append(self))[0])
    model = gossamer.load(folder)
    found = torch.stack(list(generate(model, IDS, 12)), 1)
    assert len(made) == 1
    assert made[0].layers[0].store.keys.shape[1] == sum(
        made[0].plan.kept(0, head, 28) for head in range(made[0].plan.kv_heads)
    )
    with applied(model, model.gossamer_heads.plan, cache="masked"):
        assert torch.equal(torch.stack(list(generate(model, IDS, 12)), 1), found)


def test_the_benchmark_of_models_runs_it(tmp_path):
    folder = save_family_sparse("llama", tmp_path / "sparse", dtype=torch.bfloat16)
    with_plan(folder)
    report = benchmodel.bench_models([str(folder)], prompt_tokens=20, new_tokens=6, rounds=1)
    assert [row["name"] for row in report["contenders"]] == ["ours, sparse, head plan"]
    assert report["wrong"] == []


@pytest.fixture(params=["dense", "sparse"])
def planned(request, tmp_path):
    """A checkpoint with a plan."""
    save = save_family if request.param == "dense" else save_family_sparse
    folder = save("llama", tmp_path / "model")
    with_plan(folder)
    return folder


def other_plan(plan: HeadPlan) -> HeadPlan:
    return replace(plan, heads=((HeadRule(0, 5, 0.0),) * plan.kv_heads,) * plan.layers)


def saved(model, folder: Path) -> HeadPlan | None:
    model.save_pretrained(folder)
    entry = json.loads((folder / "config.json").read_text()).get("gossamer", {}).get("heads")
    found = gossamer.load(folder)
    assert (entry is None) == (not hasattr(found, "gossamer_heads"))
    return None if entry is None else HeadPlan.from_json(entry)


def test_what_is_saved_is_the_plan_that_runs(planned, tmp_path):
    model = gossamer.load(planned)
    first = model.gossamer_heads.plan
    second = other_plan(first)
    apply(model, second)
    with applied(model, first):  # for a while only
        assert saved(model, tmp_path / "second") == second
    remove(model)
    assert not hasattr(model, "gossamer_heads")
    assert saved(model, tmp_path / "removed") is None
    without = gossamer.load(planned)
    remove(without)
    apply(without, second)
    assert saved(without, tmp_path / "again") == second


@pytest.mark.parametrize("save", [save_family, save_family_sparse])
def test_a_plan_for_a_model_that_had_none_is_saved(save, tmp_path):
    model = gossamer.load(save("llama", tmp_path / "model"))
    plan = plan_of(model.config)
    apply(model, plan)
    assert saved(model, tmp_path / "out") == plan
    with applied(remove(model), plan):
        assert saved(model, tmp_path / "unplanned") is None


def test_expanded_weights_keep_the_plan(tmp_path):
    folder = save_family_sparse("llama", tmp_path / "model")
    plan = with_plan(folder)
    model = gossamer.load(folder)
    model.dequantize()
    assert saved(model, tmp_path / "out") == plan


def test_attachments_that_are_not_wanted_are_not_saved(tmp_path):
    folder = save_family_sparse("llama", tmp_path / "model")
    with_plan(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["gossamer"]["activation"] = {"schema_version": 1}  # of a file that is not copied
    path.write_text(json.dumps(config))
    assert saved(gossamer.load(folder, attachments=False), tmp_path / "out") is None


@torch.no_grad()
def test_a_whole_model_is_pickled_and_copied(tmp_path):
    folder = save_family("llama", tmp_path / "model")
    with_plan(folder)
    model = gossamer.load(folder)
    wanted = model.generate(IDS, max_new_tokens=12, do_sample=False)
    torch.save(model, tmp_path / "whole.pt")
    for found in (torch.load(tmp_path / "whole.pt", weights_only=False), copy.deepcopy(model)):
        assert found._prepare_cache_for_generation.args == (found,)
        result = found.generate(IDS, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
        assert isinstance(result.past_key_values, RaggedCache)
        assert torch.equal(result.sequences, wanted)
    read = f"torch.load({str(tmp_path / 'whole.pt')!r}, weights_only=False)"
    code = f"import torch; print({read}(torch.tensor({IDS.tolist()})).logits.sum().item())"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(fresh.stdout) == pytest.approx(model(IDS).logits.sum().item(), rel=1e-4)
