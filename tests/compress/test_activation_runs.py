"""Models that run an activation policy: against its definition, in batches, on every base, counted, and copied."""

from __future__ import annotations

import copy

import pytest
import torch
from activation_cases import (
    core_policy,
    decode,
    family_with,
    gate_policy,
    give,
    hooked,
    ids,
    linear_policy,
    plain_model,
    shapes_of,
)  # fmt: skip
from exports import dense_twin, save_family_sparse
from families import save_family

import gossamer
from gossamer.activation_sparsity.base import LinearPolicy, Policy
from gossamer.compress.activation.report import realised
from gossamer.errors import CheckpointError
from gossamer.kernels.modules.channel_linear import ChannelSparseLinear
from gossamer.kernels.modules.counting import counting
from gossamer.kernels.modules.dual_linear import DualSparseLinear
from gossamer.kernels.modules.sparse_linear import dense_products

LINEAR = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "phi", "opt", "gpt2"]


def close(a, b, tolerance=2e-4):
    assert torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance), (a.float() - b.float()).abs().max()


@pytest.mark.parametrize("family", LINEAR)
def test_decoded_tokens_are_what_the_policy_defines(tmp_path, family):
    policy = linear_policy(family, 0.5)
    folder = family_with(family, tmp_path / "m", policy)
    model, given = gossamer.load(folder), ids(1, 14)
    assert sorted(model.gossamer_activation.channels) == sorted(shapes_of(family))
    assert not model.gossamer_activation.fallback
    found = decode(model, given, 9)
    close(found, decode(hooked(plain_model(folder), policy), given, 9))
    assert not torch.allclose(found, decode(plain_model(folder), given, 9), atol=1e-2)
    with dense_products():
        close(found, decode(model, given, 9))
    close(found, decode(gossamer.load(folder, backend="reference"), given, 9))


def test_a_prompt_is_dense_whatever_its_length(tmp_path):
    folder = family_with("llama", tmp_path / "m", linear_policy("llama", 0.5))
    model, plain = gossamer.load(folder), plain_model(folder)
    for length in (1, 5, 8, 30):
        given = ids(1, length, seed=length)
        with torch.no_grad():
            close(model(given, use_cache=True).logits, plain(given).logits, 1e-5)
            close(model(given, use_cache=False).logits, plain(given).logits, 1e-5)


def test_nothing_skipped_is_bit_equal_to_dense(tmp_path):
    shapes = shapes_of("llama")
    every = {name: LinearPolicy(torch.full((shape[1],), -1.0)) for name, shape in shapes.items()}
    folder = family_with("llama", tmp_path / "m", Policy("threshold", shapes, every), dtype=torch.bfloat16)
    sparse, dense = gossamer.load(folder), gossamer.load(folder, attachments=False)
    given = ids(1, 12)
    with torch.no_grad():
        assert torch.equal(sparse(given).logits, dense(given).logits)
    found, wanted = decode(sparse, given, 6), decode(dense, given, 6)
    assert ((found - wanted).abs() <= 0.02 + 0.02 * wanted.abs()).all()  # sums in another order, rounded once


@pytest.mark.parametrize("kind", ["linear", "core", "gate"])
def test_a_sequence_decodes_alike_alone_and_in_a_batch(tmp_path, kind):
    made = {"linear": linear_policy, "core": core_policy, "gate": gate_policy}[kind]("llama")
    folder = family_with("llama", tmp_path / "m", made)
    model, given = gossamer.load(folder), ids(4, 15)
    together = decode(model, given, 9)
    for i in range(4):
        close(decode(model, given[i : i + 1], 9), together[i : i + 1], 1e-5)
    many = decode(model, given.repeat(3, 1), 9)  # 12 rows: beyond the kernels, so dense
    close(many[:4], decode(plain_model(folder), given, 9), 1e-4)


def test_groups_with_one_input_are_one_call(tmp_path, monkeypatch):
    from gossamer.kernels.modules import thresholds

    calls, real = [], thresholds.active_gemv

    def counted(x, threshold, weights, biases, center=None):
        calls.append(len(weights))
        return real(x, threshold, weights, biases, center)

    monkeypatch.setattr(thresholds, "active_gemv", counted)
    for family, wanted in (("llama", [3, 1, 2, 1] * 3), ("opt", [3, 1, 1, 1] * 3), ("phi", [4, 1, 1] * 3)):
        model = gossamer.load(family_with(family, tmp_path / family, linear_policy(family)))
        calls.clear()
        decode(model, ids(1, 7), 6)
        assert calls == wanted, family


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_over_pruned_weights(tmp_path, family):
    policy = linear_policy(family, 0.5)
    folder = give(save_family_sparse(family, tmp_path / "m", dtype=torch.bfloat16), policy)
    model, given = gossamer.load(folder), ids(1, 12)
    assert sorted(model.gossamer_activation.dual) == sorted(shapes_of(family))
    assert model.gossamer_masks
    dense = dense_twin(folder, tmp_path / "dense")
    wanted = decode(hooked(plain_model(dense, torch.bfloat16), policy), given, 9)
    found = decode(model, given, 9)
    assert ((found - wanted).norm() / wanted.norm()) < 0.2  # rounding decides whether an input is just above


def test_counted_is_what_was_skipped(tmp_path):
    """Exact: the share of inputs above their thresholds, seen by hooks of our own."""
    policy = linear_policy("llama", 0.5)
    model, given = gossamer.load(family_with("llama", tmp_path / "m", policy)), ids(1, 12)
    seen = {}
    for name, one in policy.linears.items():

        def before(layer, args, name=name, one=one):
            x = args[0]
            if x.shape[1] == 1:
                mask = ~((x.float() - one.center).to(x.dtype).abs() <= one.threshold)
                seen.setdefault(name, []).append(int(mask.sum()))

        model.get_submodule(name).register_forward_pre_hook(before)
    with counting() as counted:
        decode(model, given, 9)
    result = realised(model, counted)
    assert result["steps"] == 3
    size = sum(out * width for out, width in policy.shapes.values())
    read = 0
    for name, (out, width) in policy.shapes.items():
        rows = [n * out + 2 * (out + width) for n in seen[name]]
        assert result["layers"][name] == pytest.approx(1 - sum(rows) / (3 * out * width))
        read += sum(rows)
    assert result["skipped"] == pytest.approx(1 - read / (3 * size))


def test_a_copy_and_a_cast_run_the_policy_too(tmp_path):
    policy = linear_policy("llama", 0.5)
    model, given = gossamer.load(family_with("llama", tmp_path / "m", policy)), ids(1, 12)
    wanted = decode(model, given, 9)
    twin = copy.deepcopy(model)
    assert torch.equal(decode(twin, given, 9), wanted)
    half = twin.to(torch.bfloat16)
    name = next(iter(policy.linears))
    assert torch.equal(half.get_submodule(name).threshold, policy.linears[name].threshold)
    found = decode(half, given, 9)
    assert torch.cosine_similarity(found.float().flatten(), wanted.flatten(), 0) > 0.8  # rounding decides


def test_unpacked_models_zero_inputs_by_hooks(tmp_path):
    policy = linear_policy("llama", 0.5)
    folder = family_with("llama", tmp_path / "m", policy)
    left = gossamer.load(folder, packed=False)
    assert not left.gossamer_activation.channels
    assert len(left.gossamer_activation.fallback) == len(policy.linears)
    assert not any(isinstance(module, ChannelSparseLinear | DualSparseLinear) for module in left.modules())
    given = ids(1, 14)
    close(decode(left, given, 9), decode(gossamer.load(folder), given, 9))


def test_int8_values_keep_their_kernel(tmp_path):
    from gossamer.compress.convert import convert

    policy = linear_policy("llama", 0.5)
    folder = save_family_sparse("llama", tmp_path / "m", dtype=torch.bfloat16)
    convert(folder, tmp_path / "int8", "sparse", values="int8")
    model = gossamer.load(give(tmp_path / "int8", policy))
    assert len(model.gossamer_activation.fallback) == len(policy.linears)
    assert "Int8BitmaskLinear" in next(iter(model.gossamer_activation.fallback.values()))
    given = ids(1, 12)
    dense = dense_twin(folder, tmp_path / "dense")
    found, wanted = decode(model, given, 9), decode(hooked(plain_model(dense, torch.bfloat16), policy), given, 9)
    assert ((found - wanted).norm() / wanted.norm()) < 0.2


def test_another_model_is_refused(tmp_path):
    give(save_family("mistral", tmp_path / "m"), linear_policy("llama"))
    with pytest.raises(CheckpointError, match="another model: it knows model.layers.0.self_attn.[kq]_proj"):
        gossamer.load(tmp_path / "m")
    give(save_family("gpt2", tmp_path / "g"), core_policy("llama"))
    with pytest.raises(CheckpointError, match="another model"):
        gossamer.load(tmp_path / "g")
