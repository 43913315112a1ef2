"""A small model with sparse deltas, and its batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.finetune.spiel.optimizer import SpielOptimizer

QUICK = {"interval": 4, "window": 2, "share": 0.5}


class Net(nn.Module):
    """Two linear layers of awkward shapes and a head. Called like a transformers model."""

    def __init__(self, seed: int = 0, width: int = 13, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(width, 17, dtype=dtype)
        self.second = nn.Linear(17, 11, bias=False, dtype=dtype)
        self.head = nn.Linear(11, 5, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def adapted(net: nn.Module | None = None, **config: Any) -> Any:
    """`Net` (or `net`) with a sparse adapter on its two layers."""
    from peft import get_peft_model

    import gossamer  # noqa: F401
    from gossamer.finetune.spiel.config import SpielConfig

    values: dict[str, Any] = {"target_modules": ["first", "second"], "num_weights": 60}
    return get_peft_model(net or Net(), SpielConfig(**(values | config)))


class Squares:
    """Summed gradient of a linear layer's weight, and squares of its rows and columns in each backward pass."""

    def __init__(self, linear: nn.Linear) -> None:
        out, cols = linear.weight.shape
        self.gradient, self.rows, self.cols = torch.zeros(out, cols), torch.zeros(out), torch.zeros(cols)

    def backward(self, linear: nn.Linear, loss: Tensor) -> None:
        """`loss` of a model with `linear`, which gets its gradient."""
        linear.weight.grad = None
        loss.backward()
        assert linear.weight.grad is not None
        self.gradient += linear.weight.grad
        self.rows += linear.weight.grad.square().sum(1)
        self.cols += linear.weight.grad.square().sum(0)

    def add(self, other: Squares, scale: float = 1.0) -> None:
        """Another one's, whose gradients count `scale` times."""
        self.gradient += scale * other.gradient
        self.rows += scale**2 * other.rows
        self.cols += scale**2 * other.cols

    def scores(self) -> Tensor:
        """|G_ij| / sqrt(row norm * column norm), flat."""
        return (self.gradient.abs() / torch.outer(self.rows, self.cols).pow(0.25)).reshape(-1)


def batch(number: int, rows: int = 6, width: int = 13) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(number)
    return torch.randn(rows, width, generator=source), torch.randint(5, (rows,), generator=source)


def loss_of(model: nn.Module, number: int) -> Tensor:
    x, y = batch(number)
    return nn.functional.cross_entropy(model(x), y)


def fill(model: Any, adapter: str = "default", scale: float = 0.1) -> None:
    """Random values in every delta."""
    from gossamer.finetune.spiel.layer import layers_of

    source = torch.Generator().manual_seed(5)
    for layer in layers_of(model, adapter):
        values = layer.spiel_values[adapter]
        values.data.copy_(torch.randn(len(values), generator=source) * scale)


def optimizer_of(model, total=40, lr=0.02, **options):
    return SpielOptimizer(model, lr, total, **options)


def train(model, optimizer, first, last, micro=1, clip=None):
    for step in range(first, last):
        optimizer.zero_grad()
        for i in range(micro):
            (loss_of(model, step * micro + i) / micro).backward()
        if clip:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
