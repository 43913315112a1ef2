"""A benchmark's proof of right results where inputs are skipped: single layers, each on what it got."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from activation_cases import core_policy, family_with, ids, linear_policy

import gossamer
from gossamer.compress.benchcheck import TOLERANCE, relative_error
from gossamer.kernels.modules import thresholds
from gossamer.kernels.modules.neuron_subset import NeuronSubsetMLP


@pytest.fixture
def model(tmp_path):
    return gossamer.load(family_with("llama", tmp_path / "m", linear_policy("llama", 0.5)))


def error(model, ids):
    return relative_error(model, nullcontext, ids)


def test_layers_that_skip_are_right(model):
    assert error(model, ids(1, 9)) < 1e-4


@pytest.mark.parametrize("wrong", ["all", "last", "nan"])
def test_one_wrong_product_is_seen(model, monkeypatch, wrong):
    real = thresholds.active_gemv

    def broken(x, threshold, weights, biases, center=None):
        outputs, read = real(x, threshold, weights, biases, center)
        outputs[-1] *= {"all": 1.5, "last": 1.0, "nan": float("nan")}[wrong]
        if wrong == "last":
            outputs[-1][..., -1] += 100
        return outputs, read

    monkeypatch.setattr(thresholds, "active_gemv", broken)
    assert error(model, ids(1, 9)) > TOLERANCE


@pytest.mark.parametrize("weights", [1.0, float("nan")])
def test_core_neurons_are_proved_by_the_logits(tmp_path, weights):
    """Their layer skips what its MLP says, and nothing by itself: it must not be asked."""
    model = gossamer.load(family_with("llama", tmp_path / "m", core_policy("llama")))
    found = error(model, ids(1, 9))
    assert found < TOLERANCE
    for module in model.modules():
        if isinstance(module, NeuronSubsetMLP):
            module.register_forward_hook(lambda _, __, y: y * weights)
    assert (error(model, ids(1, 9)) > TOLERANCE) == (weights != 1.0)
