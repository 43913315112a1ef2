"""Loss scales, clipping and skipped updates do not change where sparse deltas go."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from spiel_models import Net, adapted, loss_of
from torch import nn

from gossamer.finetune.spiel.layer import layers_of
from gossamer.finetune.spiel.optimizer import SpielOptimizer

WINDOW = 5


def trained(scales, *, slots, skipped=(), zeros=False, policy="ag", micro=2):
    """(model, optimizer) after one update per scale; an update in `skipped` overflows and never happens."""
    model = adapted(policy=policy, slots=slots, interval=20, window=WINDOW, share=0.5)
    optimizer = SpielOptimizer(model, 0.01, 100)
    values = [p for p in model.parameters() if p.requires_grad]
    for step, (scale, unscale) in enumerate(scales):
        for i in range(micro):
            loss = loss_of(model, micro * step + i) * scale / micro
            (loss * float("inf") if step in skipped and i == 1 else loss).backward()
        if step not in skipped:
            with torch.no_grad():
                for value in values:
                    value.grad *= unscale
            optimizer.step()
        optimizer.zero_grad(set_to_none=not zeros)
    return model, optimizer


def places(model):
    return [layer.flat("default") for layer in layers_of(model, "default")]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("slots", [1, 2, 1000])
@pytest.mark.parametrize("policy", ["ag", "ma"])
def test_a_loss_scale_does_not_change_the_choice(policy, slots):
    plain, start = trained([(1, 1)] * WINDOW, slots=slots, policy=policy)[0], places(adapted(policy=policy))
    assert not same(places(plain), start)
    scaled, optimizer = trained([(65536, 1 / 65536)] * WINDOW, slots=slots, policy=policy)
    assert same(places(scaled), places(plain))
    assert optimizer.param_groups[0]["scale"] == pytest.approx(1 / 65536, rel=1e-5)


@pytest.mark.parametrize("slots", [1, 2])
def test_clipping_does_not_change_the_choice(slots):
    """Every update clipped to a quarter: Adam's values are the same, and so are sums but for a factor."""
    plain = trained([(1, 1)] * WINDOW, slots=slots)[0]
    clipped = trained([(1, 0.25)] * WINDOW, slots=slots)[0]
    assert same(places(clipped), places(plain))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("policy", ["ag", "ma"])
@pytest.mark.parametrize("which", [0, 2])
def test_an_update_that_overflows_never_happened(policy, zeros, which):
    """As under a GradScaler, which leaves the optimizer out and lowers its scale."""
    high, low = (1024, 1 / 1024), (512, 1 / 512)
    scales = [high] * (which + 1) + [low] * (WINDOW - which)
    model, optimizer = trained(scales, slots=1000, skipped=(which,), zeros=zeros, policy=policy)
    assert optimizer.param_groups[0]["updates"] == WINDOW
    assert all(bool(layer.spiel_values["default"].isfinite().all()) for layer in layers_of(model, "default"))
    moments = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    assert all(bool(t.isfinite().all()) for t in moments)
    without = adapted(policy=policy, slots=1000, interval=20, window=WINDOW, share=0.5)
    other = SpielOptimizer(without, 0.01, 100)
    for step in [s for s in range(WINDOW + 1) if s != which]:
        other.zero_grad()
        for i in range(2):
            (loss_of(without, 2 * step + i) / 2).backward()
        other.step()
    assert same(places(model), places(without))


def test_a_gradient_that_is_not_finite_is_not_remembered():
    """Without a scaler the update happens; what it saw of other positions does not count."""
    model = adapted(policy="ag", slots=1000, interval=20, window=WINDOW, share=0.5)
    optimizer = SpielOptimizer(model, 0.01, 100)
    (loss_of(model, 0) * float("nan")).backward()
    optimizer.step()
    watch = layers_of(model, "default")[0].watches["default"]
    assert all(bool(t.isfinite().all()) for t in watch.tensors.values())


class Twice(Net):
    """Calls one of its layers twice."""

    def __init__(self):
        super().__init__()
        self.middle = nn.Linear(self.second.in_features, self.second.in_features)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.middle(torch.tanh(self.middle(x))))
        return self.head(torch.tanh(self.second(x)))


@pytest.mark.parametrize("micro", [1, 3])
def test_a_layer_that_is_called_twice_counts_twice(micro):
    torch.manual_seed(0)
    net = Twice()
    twin = Twice()
    twin.load_state_dict(net.state_dict())
    model = adapted(net, policy="ag", slots=1000, interval=20, window=2, share=0.5, target_modules=["middle"])
    SpielOptimizer(model, 0.01, 100)
    for i in range(micro):
        (loss_of(model, i) / micro).backward()
        (loss_of(twin, i) / micro).backward()
    watch = layers_of(model, "default")[0].watches["default"]
    want = twin.middle.weight.grad.reshape(-1)[watch.tensors["position"]]
    torch.testing.assert_close(watch.tensors["now"], want)


def test_a_share_too_small_for_a_layer_moves_nothing_there():
    model = adapted(policy="ma", interval=4, window=2, share=0.5)
    optimizer = SpielOptimizer(model, 0.01, 9)
    optimizer.schedule = replace(optimizer.schedule, share=1e-9, first=1e-9)  # less than one entry of a layer
    before = places(model)
    for step in range(9):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    assert same(places(model), before)
    assert [record["replaced"] for record in optimizer.history] == [0] * len(optimizer.history)
    assert optimizer.history
