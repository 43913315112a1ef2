"""An MLP told by its numbers, where rounding leaves two activations possible."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.compress.activation import sites
from gossamer.compress.prunable import Prunable


@pytest.mark.parametrize(("named", "found"), [(None, "gelu"), ("gelu_tanh", "gelu_tanh"), ("relu", "gelu")])
def test_rounding_does_not_decide_between_gelu_and_its_approximation(named: str | None, found: str) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(50, 16, generator=generator) for _ in range(2))
    maps = [Prunable(f"mlp.{name}", 0, (16, 8), "linear") for name in ("gate", "up")]
    down = [Prunable("mlp.down", 0, (8, 16), "linear")]
    inputs = {"mlp.gate": torch.zeros(50, 8), "mlp.down": nn.functional.gelu(gate) * up}
    given = {"mlp.gate": gate, "mlp.up": up, "mlp.down": torch.zeros(50, 8)}
    _, parts = sites._mlp(down, [maps, down], inputs, given, named)
    assert (parts.gate, parts.up, parts.activation) == ("mlp.gate", "mlp.up", found)
