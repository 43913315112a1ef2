"""Norms of loaded models: which get the kernel, when it runs, and that they say what they said."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import save_family
from torch import nn
from transformers import AutoModelForCausalLM

import gossamer
from gossamer.compress import norms
from gossamer.kernels.tier import current

pytestmark = pytest.mark.skipif(current() is None, reason="the compiled kernels are not there")


def count(model):
    return sum(getattr(m.__dict__.get("forward"), "func", None) is norms._forward for m in model.modules())


@pytest.mark.parametrize(("family", "wanted"), [("llama", 2), ("qwen3", 4), ("gemma2", 0), ("gpt2", 0)])
def test_which_models_have_it(family, wanted, tmp_path):
    """Per block, and one more at the end; Gemma rounds elsewhere, GPT-2 has other norms."""
    model = gossamer.load(save_family(family, tmp_path / "m"))
    layers = model.config.num_hidden_layers
    assert count(model) == (wanted * layers + 1 if wanted else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_numbers(dtype, tmp_path, monkeypatch):
    folder = save_family("llama", tmp_path / "m")
    usual = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model = copy.deepcopy(usual)
    norms.adopt_norms(model)
    calls: list[int] = []
    kernel = norms.rms_norm
    monkeypatch.setattr(norms, "rms_norm", lambda *words: calls.append(1) or kernel(*words))
    ids = torch.randint(2, 60, (1, 9))
    with torch.no_grad():
        found, wanted = model(ids).logits.float(), usual(ids).logits.float()
    scale = wanted.abs().max()
    assert float((found - wanted).abs().max()) <= scale * (1e-5 if dtype is torch.float32 else 2e-2)
    assert len(calls) == count(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert count(copied) == count(model)
        assert all(m.forward.args == (m,) for m in copied.modules() if type(m).__name__ == "LlamaRMSNorm")
    model(ids).logits.sum().backward()  # with gradients as ever
    assert len(calls) == count(model)
    assert all(m.weight.grad is not None for m in model.modules() if type(m).__name__ == "LlamaRMSNorm")
    model.save_pretrained(tmp_path / "saved")
    assert count(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")) == 0


def test_large_and_strange_inputs_go_the_usual_way(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(64)
    usual = copy.deepcopy(norm)
    norms.adopt_norms(nn.Sequential(norm))
    monkeypatch.setattr(norms, "rms_norm", None)  # must not be asked
    with torch.no_grad():
        for x in (torch.randn(1025, 64), torch.randn(3, 64).half(), torch.randn(64, 4).t(), torch.randn(0, 64)):
            assert torch.equal(norm(x), usual(x))


def test_a_forward_of_somebody_else_stays():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(8)
    norm.forward = lambda x: x + 1
    norms.adopt_norms(nn.Sequential(norm))
    assert torch.equal(norm(torch.zeros(8)), torch.ones(8))
