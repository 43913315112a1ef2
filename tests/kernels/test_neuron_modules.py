"""A gated MLP on chosen neurons against its three dense layers."""

from __future__ import annotations

import copy

import pytest
import torch
from gemv_cases import integers
from torch import Tensor, nn

from gossamer.errors import KernelError
from gossamer.kernels.modules.counting import counting
from gossamer.kernels.modules.neuron_subset import NeuronSubsetMLP
from gossamer.kernels.modules.step import Step, stepping
from gossamer.kernels.neuron_mlp.dispatch import neuron_mlp

HIDDEN, NEURONS = 24, 90
CHOSEN = torch.arange(0, NEURONS, 3, dtype=torch.int32)


def x_of(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 3) -> Tensor:
    return integers(*shape, dtype=dtype, seed=seed)


class Known:
    """Neurons of two sequences, and what was observed."""

    def __init__(self, *chosen: Tensor | None) -> None:
        self.sets, self.seen = list(chosen), []

    def observe(self, mlp: str, inner: Tensor) -> None:
        self.seen.append((mlp, inner))

    def chosen(self, mlp: str, batch: int) -> list[Tensor | None] | None:
        return self.sets if batch == len(self.sets) else None


def mlp(dtype: torch.dtype = torch.bfloat16, **options) -> tuple[NeuronSubsetMLP, list[Tensor]]:
    """With the dense gate, up and down it was made of."""
    signs = [integers(NEURONS, HIDDEN, dtype=dtype, seed=seed, zeros=0.5).sign() for seed in (1, 2, 3)]
    weights = [signs[0], signs[1], signs[2].t().contiguous()]
    made = {}
    for name, weight in zip(("gate_proj", "up_proj", "down_proj"), weights, strict=True):
        made[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype).requires_grad_(False)
        made[name].weight.copy_(weight)
    return NeuronSubsetMLP(made, "gate_proj", "up_proj", "down_proj", "silu", name="mlp", **options), weights


def dense_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    linear = nn.functional.linear
    return linear(nn.functional.silu(linear(x, gate)) * linear(x, up), down)


def kernel(x: Tensor, weights: list[Tensor], chosen: Tensor) -> Tensor:
    return neuron_mlp(x, weights[0], weights[1], weights[2].t().contiguous(), chosen)


def test_rows_take_the_neurons_of_their_sequence():
    module, weights = mlp()
    x, one, other = x_of(2, 3, HIDDEN), CHOSEN, CHOSEN[::2].contiguous()
    with stepping(Step(False, neurons=Known(one, other))):
        y = module(x)
        assert torch.equal(y[0], kernel(x[0], weights, one))
        assert torch.equal(y[1], kernel(x[1], weights, other))
        assert torch.equal(module(x[:1]), dense_mlp(x[:1], *weights))  # a batch that is not the prompts'
        many = x_of(2, 5, HIDDEN)
        assert torch.equal(module(many), dense_mlp(many, *weights))
    with stepping(Step(False, neurons=Known(one, None))):
        assert torch.equal(module(x)[1], dense_mlp(x[1], *weights))
    assert torch.equal(module(x), dense_mlp(x, *weights))
    for step in (Step(True, neurons=Known(one, one)), Step(False, True, Known(one, one))):
        with stepping(step):
            assert torch.equal(module(x), dense_mlp(x, *weights))
        name, inner = step.neurons.seen[0]
        assert (name, inner.shape) == ("mlp", (2, 3, NEURONS))


def test_neurons_by_their_gate():
    limit = torch.rand(NEURONS, generator=torch.Generator().manual_seed(5)) * 2
    module, weights = mlp(torch.float32, threshold=limit)
    x = x_of(3, HIDDEN, dtype=torch.float32)
    for row, y in zip(x, module(x), strict=True):
        chosen = (nn.functional.silu(weights[0] @ row).abs() > limit).nonzero().squeeze(1).int()
        assert 0 < len(chosen) < NEURONS
        assert torch.equal(y, kernel(row[None], weights, chosen)[0])
    with counting() as counted:
        module(x[:1])
    assert counted.of(module.gate_proj).skipped == 0
    assert 0 < counted.of(module.up_proj).skipped == counted.of(module.down).skipped < 1


@pytest.mark.parametrize("step", [Step(False, True, Known(CHOSEN)), Step(False, neurons=Known(None)), Step(False)])
def test_a_step_that_computes_all_neurons_counts_each_layer_once(step):
    module, _ = mlp()
    with counting() as counted, stepping(step):
        module(x_of(1, 1, HIDDEN))
    for layer in (module.gate_proj, module.up_proj, module.down):
        tally = counted.of(layer)
        assert tally.skipped == 0
        assert tally.every == tally.read == NEURONS * HIDDEN


def test_a_gradient_takes_all_neurons():
    module, weights = mlp(torch.float32)
    gradients = []
    with stepping(Step(False, neurons=Known(CHOSEN, CHOSEN))):
        for call in (module, lambda x: dense_mlp(x, *weights)):
            x = x_of(2, HIDDEN, dtype=torch.float32).requires_grad_(True)
            call(x).sum().backward()
            gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_mlp_states_are_the_three_layers():
    module, weights = mlp()
    names = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    state = module.state_dict()
    assert list(state) == names
    assert all(torch.equal(state[name], weight) for name, weight in zip(names, weights, strict=True))
    other = copy.deepcopy(module)
    other.load_state_dict({name: -weight for name, weight in zip(names, weights, strict=True)})
    x = x_of(1, 1, HIDDEN)
    with stepping(Step(False, neurons=Known(CHOSEN))):
        assert torch.equal(other(x), kernel(x, [-weight for weight in weights], CHOSEN))
        assert torch.equal(module.half()(x.half()), kernel(x.half(), [weight.half() for weight in weights], CHOSEN))


def test_layers_that_do_not_fit_say_why():
    linear = nn.Linear(4, 4)
    assert "bias" in (NeuronSubsetMLP.fits(linear, linear, linear) or "")
    odd = nn.Linear(4, 4, bias=False, dtype=torch.float64)
    assert "Linear" in (NeuronSubsetMLP.fits(odd, odd, odd) or "")
    with pytest.raises(KernelError, match="allowed: silu"):
        NeuronSubsetMLP({}, "a", "b", "c", "swish")
    with pytest.raises(KernelError, match="threshold has shape"):
        mlp(threshold=torch.zeros(3))
