"""StreamedModel.observe: which inputs are seen, once per group, how a pass ends early, experts one by one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from families import save_family
from streamed import captured, open_model
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_family("llama", tmp_path_factory.mktemp("llama"))


def test_observed_inputs_are_those_of_the_loaded_model(llama):
    model = open_model(llama)
    args, hidden = captured(model)
    reference = AutoModelForCausalLM.from_pretrained(llama)
    truth: dict[str, torch.Tensor] = {}
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        module = reference.get_submodule(f"model.layers.0.{name}")
        module.register_forward_pre_hook(lambda m, a, n=name: truth.__setitem__(f"model.layers.0.{n}", a[0][0].clone()))
    with torch.no_grad():
        reference(input_ids=args.windows[1:2])
    block, seen = model.load_block(0), {}
    wanted = [p for p in model.prunables(0) if p.name in truth]
    assert len(wanted) == 2
    truth_names = set(truth)
    with model.observe(block, wanted, lambda p, x: seen.__setitem__(p.name, x.clone())):
        model.run_block(0, block, hidden[1], args, 1)
    assert set(seen) == truth_names
    assert all(torch.equal(seen[name], truth[name]) for name in truth_names)


def test_of_a_group_only_the_first_is_called(llama):
    model = open_model(llama)
    args, hidden = captured(model)
    block, seen = model.load_block(0), Counter()
    steps = model.input_steps(0, block, hidden[0], args)
    with model.observe(block, steps[0] + steps[2], lambda p, x: seen.update([p.name])):
        for w in range(2):
            model.run_block(0, block, hidden[w], args, w)
    assert seen == {"model.layers.0.self_attn.q_proj": 2, "model.layers.0.mlp.gate_proj": 2}


def test_stop_ends_the_pass_early(llama):
    model = open_model(llama)
    args, hidden = captured(model)
    block = model.load_block(0)
    ran = Counter()
    for name in ("self_attn.o_proj", "mlp.gate_proj"):
        block.get_submodule(name).register_forward_hook(lambda m, a, o, n=name: ran.update([n]))
    prunable = next(p for p in model.prunables(0) if p.name.endswith("o_proj"))
    with model.observe(block, [prunable], lambda p, x: None, stop=True):
        for w in range(2):
            assert model.run_block(0, block, hidden[w], args, w, allow_stop=True) is None
        model.run_block(0, block, hidden[0], args, 0)
        pytest.fail("without allow_stop the context ends here")
    assert not ran
    assert model.run_block(0, block, hidden[0], args, 0, allow_stop=True) is not None
    assert ran == {"self_attn.o_proj": 1, "mlp.gate_proj": 1}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_are_seen_one_by_one(family, tmp_path):
    """Inputs per expert equal a selection by the router's own choice; the block's output equals the default's."""
    model = open_model(save_family(family, tmp_path))
    args, hidden = captured(model, 1)
    block = model.load_block(0)
    routed: list[tuple[torch.Tensor, torch.Tensor]] = []
    experts = block.get_submodule("mlp.experts")
    handle = experts.register_forward_pre_hook(lambda m, a: routed.append((a[0].clone(), a[1].clone())))
    default = model.run_block(0, block, hidden[0], args, 0)
    handle.remove()
    x, chosen = routed[0]
    seen: dict[str, torch.Tensor] = {}
    wanted = [p for p in model.prunables(0) if p.kind == "expert"]
    with model.observe(block, wanted, lambda p, rows: seen.__setitem__(p.name, rows.clone())):
        observed = model.run_block(0, block, hidden[0], args, 0)
    torch.testing.assert_close(observed, default, rtol=1e-5, atol=1e-6)
    count = experts.num_experts
    assert len(seen) == 2 * count
    for e in range(count):
        mine = x[(chosen == e).any(dim=1)]
        assert torch.equal(seen[f"model.layers.0.mlp.experts.gate_up_proj.{e}"], mine)
        weight = experts.gate_up_proj[e] if experts.is_transposed else experts.gate_up_proj[e].T
        bias = experts.gate_up_proj_bias[e] if experts.has_bias else 0.0
        inner = experts._apply_gate(mine @ weight + bias)
        torch.testing.assert_close(seen[f"model.layers.0.mlp.experts.down_proj.{e}"], inner)
    assert torch.equal(model.run_block(0, block, hidden[0], args, 0), default), "the default is back"


def test_an_expert_without_tokens_is_called_with_no_rows(tmp_path):
    model = open_model(save_family("mixtral", tmp_path))
    args, hidden = captured(model, 1)
    block = model.load_block(0)
    with torch.no_grad():  # a constant input makes every token choose the same two experts
        hidden[0][:] = hidden[0][:, :1]
    counts: dict[str, int] = {}
    wanted = [p for p in model.prunables(0) if "gate_up_proj" in p.name]
    with model.observe(block, wanted, lambda p, x: counts.__setitem__(p.name, len(x)), stop=True):
        model.run_block(0, block, hidden[0].repeat(1, 1, 1)[:, :20], args, 0, allow_stop=True)
    assert len(counts) == 5
    assert sum(counts.values()) == 40
    assert 0 in counts.values()
