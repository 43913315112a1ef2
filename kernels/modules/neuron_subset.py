"""The gated MLP of a decoder layer, of which few rows compute some neurons only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...errors import KernelError
from ..arguments import CODES, MAX_ROWS
from ..channel_gemv.reference import active
from ..dense_gemv.dispatch import dense_gemv
from ..neuron_mlp.dispatch import ACTIVATIONS, neuron_mlp
from .channel_linear import ChannelSparseLinear
from .counting import counts
from .siblings import wants_gradient
from .sparse_linear import dense_only
from .step import Step, current_step


class NeuronSubsetMLP(nn.Module):
    """down(act(gate(x)) * up(x)) with the model's own layers, in a subset of neurons for 1 to 8 sparse rows.

    Which neurons: with `threshold` (float32 [neurons]) those with |act(gate(x))| above it, row by row; without, those
    of the row's sequence, which the step of the model knows (step.py). More rows, rows with a gradient, dense steps and
    sequences of which nothing is known compute all. Rows of one sequence, and of sequences with equal neurons, are one
    call, and no row's result depends on another row.

    `gate`, `up`: layers of torch [neurons, hidden], or one `gate_up` of both, without bias, float32, bfloat16 or
    float16. `down` becomes a layer that holds W^T. The names of the layers stay those of the model, and so does
    `state_dict()`.
    """

    threshold: Tensor | None
    reference = False  # every product in plain torch

    def __init__(
        self,
        layers: dict[str, nn.Module],
        gate: str,
        up: str,
        down: str,
        activation: str,
        *,
        name: str = "",
        threshold: Tensor | None = None,
    ) -> None:
        """layers: by the model's names, among them `gate`, `up` (the same for a fused one) and `down`. `name`: ours."""
        super().__init__()
        if activation not in ACTIVATIONS:
            raise KernelError(f"activation is {activation!r}, allowed: {', '.join(ACTIVATIONS)}")
        for key, layer in layers.items():
            self.add_module(key, layer)
        self.gate_name, self.up_name, self.down_name = gate, up, down
        self.activation, self.name = activation, name
        old = layers[down]
        assert isinstance(old, nn.Linear)
        if isinstance(old, ChannelSparseLinear) or old.bias is not None:
            raise KernelError(f"{down} must be a dense layer without bias")
        every = torch.full((old.in_features,), -1.0)
        self.add_module(down, ChannelSparseLinear.from_dense(old.weight, every))
        if threshold is not None and threshold.shape != (self.neurons,):
            raise KernelError(f"the threshold has shape {list(threshold.shape)}, the MLP has {self.neurons} neurons")
        place = old.weight.device
        self.register_buffer("threshold", None if threshold is None else threshold.float().to(place), persistent=False)

    @staticmethod
    def fits(gate: nn.Module, up: nn.Module, down: nn.Module) -> str | None:
        """Why these layers cannot be run so, or None."""
        for layer in (gate, up, down):
            if not isinstance(layer, nn.Linear) or layer.weight.dtype not in CODES or layer.weight.is_meta:
                return f"{type(layer).__name__} holds no dense weight of 16 or 32 bits"
            if layer.bias is not None:
                return "its layers have a bias"
        return None

    @property
    def down(self) -> ChannelSparseLinear:
        found = self._modules[self.down_name]
        assert isinstance(found, ChannelSparseLinear)
        return found

    @property
    def neurons(self) -> int:
        return self.down.in_features

    def weights(self) -> tuple[Tensor, Tensor]:
        """gate and up, [neurons, hidden] each."""
        gate, up = self._modules[self.gate_name], self._modules[self.up_name]
        assert isinstance(gate, nn.Linear)
        assert isinstance(up, nn.Linear)
        if gate is up:
            return gate.weight[: self.neurons], gate.weight[self.neurons :]
        return gate.weight, up.weight

    def forward(self, x: Tensor) -> Tensor:
        step = current_step()
        few = 1 <= x.shape[:-1].numel() <= MAX_ROWS and x.dim() in (2, 3)
        if not few or step.dense or wants_gradient(x) or torch.compiler.is_compiling():
            return self._whole(x, step)
        if step.watched:
            self._count_whole()
            return self._whole(x, step)
        if self.threshold is not None:
            return self._by_gate(x)
        batch = x.shape[0]
        chosen = None if step.neurons is None else step.neurons.chosen(self.name, batch)
        if chosen is None or all(one is None for one in chosen):
            self._count_whole()
            return self._whole(x, step)
        return self._of_sequences(x, chosen)

    def _whole(self, x: Tensor, step: Step) -> Tensor:
        act, gate, up = ACTIVATIONS[self.activation], self._modules[self.gate_name], self._modules[self.up_name]
        assert gate is not None
        assert up is not None
        if gate is up:
            first, second = gate(x).chunk(2, dim=-1)
            inner = act(first) * second
        else:
            inner = act(gate(x)) * up(x)
        if step.neurons is not None and (step.dense or step.watched):
            step.neurons.observe(self.name, inner)
        return self.down(inner)

    def _by_gate(self, x: Tensor) -> Tensor:
        gate, _ = self.weights()
        rows = x.reshape(-1, x.shape[-1])
        gates = nn.functional.linear(rows, gate) if dense_only() or self.reference else dense_gemv(rows, gate)
        assert self.threshold is not None
        wanted = active(ACTIVATIONS[self.activation](gates), self.threshold)
        results = []
        for row, mask in zip(rows, wanted, strict=True):
            chosen = mask.nonzero().squeeze(1).int()
            results.append(self._product(row[None], chosen))
            self._count(chosen, gate=self.neurons)
        return torch.cat(results).view(x.shape)

    def _of_sequences(self, x: Tensor, chosen: list[Tensor | None]) -> Tensor:
        groups: dict[int, list[int]] = {}
        for index, one in enumerate(chosen):
            groups.setdefault(id(one), []).append(index)
        if len(groups) == 1:
            return self._of_one(x, chosen[0])
        y = torch.empty_like(x)
        for members in groups.values():
            y[members] = self._of_one(x[members], chosen[members[0]])
        return y

    def _of_one(self, x: Tensor, chosen: Tensor | None) -> Tensor:
        if chosen is None:
            self._count_whole()
            return self._whole(x, current_step())
        self._count(chosen, gate=chosen.numel())
        return self._product(x, chosen)

    def _product(self, x: Tensor, chosen: Tensor) -> Tensor:
        gate, up = self.weights()
        if dense_only() or self.reference:
            index = chosen.long()
            wide, act = x.float(), ACTIVATIONS[self.activation]
            inner = act(wide @ gate[index].float().t()) * (wide @ up[index].float().t())
            return (inner @ self.down.packed[index].float()).to(x.dtype)
        return neuron_mlp(x.contiguous(), gate, up, self.down.packed, chosen, self.activation)

    def _count_whole(self) -> None:
        """All of gate and up; `down`, a layer of its own then, counts itself."""
        self._note([(self.gate_name, self.neurons), (self.up_name, self.neurons)])

    def _count(self, chosen: Tensor, gate: int) -> None:
        n = chosen.numel()
        self._note([(self.gate_name, gate), (self.up_name, n), (self.down_name, n)])

    def _note(self, read: Sequence[tuple[str, int]]) -> None:
        """Of each layer, by name, so many neurons were read. A fused layer has two halves."""
        counted = counts()
        if counted is None:
            return
        width, size = self.down.out_features, self.neurons
        for name, n in read:
            counted.of(self._modules[name]).add(n, width, size * width)

    def extra_repr(self) -> str:
        return f"neurons={self.neurons}, activation={self.activation}"
