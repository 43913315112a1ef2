"""Plain peft LoRA on a loaded sparse checkpoint: nothing is decompressed, and a merge is exact or refused."""

from __future__ import annotations

import pytest
import torch
from exports import save_family_sparse
from lora_models import IDS, TARGETS, logits, trained
from peft import LoraConfig, PeftModel, get_peft_model

import gossamer
from gossamer.compress.generate import generate
from gossamer.errors import KernelError, RecipeError
from gossamer.kernels.modules.bitmask_linear import BitmaskLinear
from gossamer.kernels.modules.sparse_linear import SparseLinear


@pytest.fixture(params=sorted(TARGETS))
def loaded(request, tmp_path):
    folder = save_family_sparse(request.param, tmp_path / "sparse", dtype=torch.bfloat16)
    model = gossamer.load(folder)
    names = [
        n
        for n, m in model.named_modules()
        if isinstance(m, BitmaskLinear) and n.split(".")[-1] in TARGETS[request.param]
    ]
    assert names
    return folder, model, LoraConfig(r=4, target_modules=TARGETS[request.param])


def bits_of(model):
    return [m.bits().clone() for m in model.modules() if isinstance(m, SparseLinear)]


def test_nothing_is_decompressed_while_wrapping_and_decoding(loaded, monkeypatch):
    _, model, config = loaded
    expanded = []
    for name in ("expand", "dense_weight"):
        usual = getattr(BitmaskLinear, name)
        monkeypatch.setattr(BitmaskLinear, name, lambda self, *a, usual=usual: expanded.append(self) or usual(self, *a))
    wrapped = trained(model, config)
    with torch.no_grad():
        for step in range(10):
            wrapped(input_ids=IDS[:, :1] + step)
    assert not expanded
    assert sum(isinstance(m.base_layer, BitmaskLinear) for m in wrapped.modules() if hasattr(m, "lora_A")) >= 2


def test_gradients_equal_those_on_the_dense_model(loaded):
    folder, model, config = loaded
    dense = gossamer.load(folder, packed=False)
    grads = []
    for one in (model, dense):
        wrapped = trained(one, config)
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad.float() for n, p in wrapped.named_parameters() if "lora_" in n})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=0.05, atol=1e-3 * float(grads[1][name].abs().max() + 1))


def test_a_merge_is_refused_unless_it_is_said_how(loaded):
    _, model, config = loaded
    before, bits = logits(model), bits_of(model)
    wrapped = trained(model, config)
    with pytest.raises(KernelError, match="changes pruned weights"):
        wrapped.merge_adapter()
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), before)
    with pytest.warns(UserWarning, match="is dropped by the merge"), gossamer.merging("masked"):
        wrapped.merge_adapter()
    assert all(map(torch.equal, bits_of(model), bits))
    assert not torch.equal(logits(wrapped), before)
    wrapped.unmerge_adapter()
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), before)
    with pytest.raises(RecipeError, match="refuse, masked, dense"), gossamer.merging("some"):
        pass


def test_dense_merge_has_the_adapters_effect(loaded):
    _, model, config = loaded
    plain = logits(model)
    wrapped = trained(model, config)
    wanted = logits(wrapped)
    with gossamer.merging("dense"):
        merged = wrapped.merge_and_unload()
    assert float((wanted - plain).abs().max()) > 10 * float((logits(merged) - wanted).abs().max())
    assert not any(hasattr(m, "lora_A") for m in merged.modules())


def test_a_masked_delta_reaches_the_packed_values(tmp_path):
    """Where every changed weight is kept, nothing is refused: an untouched mask has no pruned weight."""
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    layer = BitmaskLinear.from_dense(
        torch.randn(48, 64, dtype=torch.bfloat16), torch.ones(48, 64, dtype=torch.bool), torch.zeros(48)
    )
    holder = torch.nn.ModuleDict({"lin": layer})
    wrapped = trained(holder, LoraConfig(r=2, target_modules=["lin"]))
    lora = wrapped.base_model.model["lin"]
    before, weight = layer.packed.clone(), layer.dense_weight()
    wanted = weight.float() + lora.scaling["default"] * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    lora.merge(safe_merge=True)
    assert torch.equal(layer.dense_weight(), wanted.detach().bfloat16())
    with torch.no_grad():
        assert torch.equal(lora(x), layer(x))
    lora.unmerge()
    assert torch.equal(layer.packed, before)


def test_saved_and_loaded_as_any_adapter(loaded, tmp_path):
    folder, model, config = loaded
    wrapped = trained(model, config)
    wanted = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(gossamer.load(folder), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), wanted)
    assert len(list(generate(gossamer.load(folder), IDS, 2))) == 2


def test_variants_are_refused(loaded):
    _, model, config = loaded
    config.use_dora = True
    with pytest.raises(RecipeError, match="not possible on a sparse layer"):
        get_peft_model(model, config)
