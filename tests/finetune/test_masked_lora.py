"""Adapters on a loaded sparse model, packed or dense in memory: which layers they reach, and that zeros stay zeros."""

from __future__ import annotations

import pytest
import torch
from exports import save_family_sparse
from lora_models import TARGETS, logits, trained
from peft import LoraConfig, PeftModel, get_peft_model
from spiel_models import fill

import gossamer
from gossamer.errors import KernelError, ModelError, RecipeError
from gossamer.finetune.spiel.config import SpielConfig
from gossamer.finetune.spiel.layer import Linear, layers_of
from gossamer.kernels.modules.sparse_linear import SparseLinear


@pytest.fixture(scope="module", params=sorted(TARGETS))
def folder(request, tmp_path_factory):
    return save_family_sparse(request.param, tmp_path_factory.mktemp(request.param) / "sparse", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_family_sparse("llama", tmp_path_factory.mktemp("llama") / "sparse", dtype=torch.bfloat16)


def names_of(folder):
    return TARGETS["gpt2" if "gpt2" in str(folder) else "llama"]


def lora(model, **config):
    return trained(model, LoraConfig(r=4, **config))


def alive(model):
    """Pruned weights that are not zero."""
    return sum(int(model.get_parameter(n)[~m.to_bool()].count_nonzero()) for n, m in model.gossamer_masks.items())


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_a_merge_into_masked_dense_layers_keeps_the_zeros_or_is_refused(folder, options):
    model = gossamer.load(folder, dtype=torch.float32)
    assert not any(isinstance(m, SparseLinear) for m in model.modules())
    wrapped = lora(model, target_modules=names_of(folder), **options)
    before = logits(wrapped)
    for merge in (wrapped.merge_adapter, wrapped.merge_and_unload):
        with pytest.raises(KernelError, match="changes pruned weights"):
            merge()
        assert torch.equal(logits(wrapped), before)
    with pytest.warns(UserWarning, match="is dropped by the merge"), gossamer.merging("masked"):
        wrapped.merge_adapter()
    assert not torch.equal(logits(wrapped), before)
    wrapped.unmerge_adapter()
    assert torch.equal(logits(wrapped), before)
    with pytest.warns(UserWarning, match="is dropped"), gossamer.merging("masked"):
        assert alive(wrapped.merge_and_unload()) == 0


def test_dense_merge_into_masked_layers_is_peft_s_own(llama):
    wrapped = lora(gossamer.load(llama, dtype=torch.float32), target_modules=["q_proj"])
    before = logits(wrapped)
    with gossamer.merging("dense"):
        merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, rtol=1e-3, atol=1e-4)
    assert alive(merged) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "pissa_niter_4"])
def test_inits_that_change_the_weights_are_refused(llama, init, dtype):
    model = gossamer.load(llama, dtype=dtype)
    before = logits(model)
    with pytest.raises(RecipeError, match="init_lora_weights"):
        get_peft_model(model, LoraConfig(r=2, init_lora_weights=init, target_modules=["q_proj"]))
    assert torch.equal(logits(model), before)
    get_peft_model(model, LoraConfig(r=2, init_lora_weights="orthogonal", target_modules=["q_proj"]))


def test_all_linear_means_packed_layers_too(folder):
    dense = [n for n, m in get_peft_model(gossamer.load(folder, packed=False), SpielConfig()).named_modules()
             if isinstance(m, Linear)]  # fmt: skip
    config = SpielConfig(density=0.05)
    model = gossamer.load(folder, dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    wrapped = get_peft_model(model, config)
    assert [n for n, m in wrapped.named_modules() if isinstance(m, Linear)] == dense
    assert model.get_output_embeddings() is head
    packed = [layer for layer in layers_of(wrapped, "default") if isinstance(layer.get_base_layer(), SparseLinear)]
    assert packed
    with_lora = get_peft_model(
        gossamer.load(folder, dtype=torch.bfloat16), LoraConfig(r=1, target_modules="all-linear")
    )
    assert [n for n, m in with_lora.named_modules() if hasattr(m, "lora_A")] == dense
    with_lora.add_adapter("second", LoraConfig(r=1, target_modules="all-linear"))
    assert [n for n, m in with_lora.named_modules() if "second" in getattr(m, "lora_A", {})] == dense


@pytest.mark.parametrize("kind", ["spiel", "lora"])
def test_a_merge_that_fails_has_changed_nothing(llama, tmp_path, kind):
    """The first layers could be merged, a packed one behind them cannot."""
    model = gossamer.load(llama, dtype=torch.bfloat16)
    names = [n for n, m in model.named_modules() if isinstance(m, SparseLinear)]
    first = names[-1]
    model.model.layers[0].self_attn.q_proj = (
        gossamer.load(llama, packed=False, dtype=torch.bfloat16).model.layers[0].self_attn.q_proj
    )
    targets = ["model.layers.0.self_attn.q_proj", first]
    if kind == "spiel":
        wrapped = get_peft_model(model, SpielConfig(target_modules=targets, density=0.1, where="kept"))
        fill(wrapped)
    else:
        wrapped = lora(model, target_modules=targets)
    wrapped.eval()
    before = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "before")
    for merge in (wrapped.merge_adapter, wrapped.merge_and_unload):
        with pytest.raises((ModelError, KernelError)):
            merge()
        assert torch.equal(logits(wrapped), before)
    assert not any(m.merged for m in wrapped.modules() if hasattr(m, "merged_adapters"))
    wrapped.save_pretrained(tmp_path / "after")
    files = [(tmp_path / one / "adapter_model.safetensors").read_bytes() for one in ("before", "after")]
    assert files[0] == files[1]


def test_a_seft_merge_through_peft_is_saved_with_its_new_masks(llama, tmp_path):
    model = gossamer.load(llama, packed=False)
    before = {name: mask.to_bool() for name, mask in model.gossamer_masks.items()}
    wrapped = get_peft_model(model, SpielConfig(density=0.1, where="seft"))
    fill(wrapped, scale=1.0)
    merged = wrapped.merge_and_unload()
    wanted = logits(merged)
    assert alive(merged) == 0
    assert any(not torch.equal(mask.to_bool(), before[name]) for name, mask in merged.gossamer_masks.items())
    merged.save_pretrained(tmp_path / "out")
    again = gossamer.load(tmp_path / "out", packed=False)
    assert torch.equal(logits(again), wanted)
    for name, mask in merged.gossamer_masks.items():
        assert torch.equal(again.gossamer_masks[name].to_bool(), mask.to_bool())
        assert again.gossamer_masks[name].zeros == int((~before[name]).sum())


def test_lora_is_loaded_onto_masked_layers(llama, tmp_path):
    wrapped = lora(gossamer.load(llama, dtype=torch.float32), target_modules=["q_proj"])
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(gossamer.load(llama, dtype=torch.float32), tmp_path).eval()
    assert torch.equal(logits(again), logits(wrapped))
    with pytest.raises(KernelError, match="changes pruned weights"):
        again.merge_adapter()
