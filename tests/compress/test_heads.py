"""A head plan in a checkpoint: applied by every way of loading, saved, run by our loop, with packed weights."""

from __future__ import annotations

import json
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
from gossamer.compress.heads import applied, apply
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
        with pytest.raises(CheckpointError, match=message):
            gossamer.load(folder)
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
