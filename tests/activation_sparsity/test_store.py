"""Policies as tensors and back, and which ones are refused; the registry of methods."""

from __future__ import annotations

import json
import math

import pytest
import torch
from sites import core

from gossamer.activation_sparsity.base import CoreGuide, GateThreshold, LinearPolicy, MLPParts, Policy
from gossamer.activation_sparsity.method import Fitted
from gossamer.activation_sparsity.registry import METHODS, SUMMARIES, get_policy_method
from gossamer.activation_sparsity.store import from_tensors, to_tensors
from gossamer.errors import CheckpointError, RecipeError


def stored() -> Policy:
    shapes = {
        "q": (40, 24),
        "mlp.gate": (6, 24),
        "mlp.up": (6, 24),
        "mlp.down": (24, 6),
        "cats.fc": (12, 24),
        "d": (24, 6),
    }
    linear = LinearPolicy(
        torch.full((24,), math.inf), torch.zeros(24), torch.ones(40), torch.ones(40, 2), torch.ones(2, 24)
    )
    guide = CoreGuide(0.4, "mlp", 2, torch.eye(6)[:3], 8, 0.25)
    clusters = torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.int32)
    cats = GateThreshold(MLPParts("cats.fc", "cats.fc", "d", "gelu_tanh", 6), torch.ones(6))
    return Policy(
        "auto", shapes, {"q": linear}, {"mlp": core(2, clusters), "cats": cats}, {"q": "q"}, guide, {"target": 0.5}
    )


def test_a_policy_comes_back_as_it_was() -> None:
    tensors, record = to_tensors(stored())
    again = from_tensors(tensors, json.loads(json.dumps(record)))
    more, same = to_tensors(again)
    assert same == record
    assert more.keys() == tensors.keys()
    assert all(torch.equal(more[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t, r: t.pop("q.threshold"), "q.threshold"),
        (lambda t, r: t.update({"q.shift": torch.zeros(3)}), "q.shift"),
        (lambda t, r: t.update({"q.center": torch.full((24,), math.nan)}), "not finite"),
        (lambda t, r: t.update({"q.threshold": torch.full((24,), math.nan)}), "not finite"),
        (lambda t, r: t.update({"more": torch.zeros(3)}), "more"),
        (lambda t, r: t["mlp.clusters"].fill_(99), "core neurons"),
        (lambda t, r: r.update(version=2), "version 2"),
        (lambda t, r: r["linears"].update(q=["center"]), "cannot consist"),
        (lambda t, r: r["mlps"]["mlp"].update(keep=7), "keeps 7"),
        (lambda t, r: r["mlps"]["mlp"]["parts"].update(activation="exec"), "exec"),
        (lambda t, r: r["mlps"]["mlp"]["parts"].update(neurons=5), "5 neurons"),
        (lambda t, r: r.pop("shapes"), "malformed"),
        (lambda t, r: r.update(linears=[1]), "malformed"),
        (lambda t, r: r["guide"].update(signature="elsewhere"), "elsewhere"),
        (lambda t, r: r["sites"].update(nothing="q"), "nothing"),
    ],
)
def test_a_damaged_policy_is_refused(damage, words: str) -> None:
    tensors, record = to_tensors(stored())
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    record = json.loads(json.dumps(record))
    damage(tensors, record)
    with pytest.raises(CheckpointError, match=words):
        from_tensors(tensors, record)


def test_a_policy_of_another_model_is_refused() -> None:
    policy = stored()
    policy.check_model(policy.shapes)
    with pytest.raises(CheckpointError, match="another model"):
        policy.check_model({**policy.shapes, "q": (40, 25)})
    with pytest.raises(CheckpointError, match="no such matrix"):
        policy.check_model({"other": (1, 1)})


def test_the_registry() -> None:
    assert METHODS.keys() == SUMMARIES.keys()
    for name in METHODS:
        assert get_policy_method(name).name == name
    with pytest.raises(RecipeError, match="did you mean rsparse"):
        get_policy_method("r-sparse")
    assert Fitted().linears == {}
