"""Biases and norms only: what PERP (Zimmer et al., arXiv 2312.15230) trains when hardly anything may be trained.

0.01 to 0.05 % of the parameters of a language model, none of which pruning touches: no mask can be violated.
"""

from __future__ import annotations

from torch import nn


def bias_and_norm_names(model: nn.Module) -> list[str]:
    """Parameters called "bias", and all those of normalisation layers (RMSNorm, LayerNorm and their kin)."""
    found = []
    for path, module in model.named_modules():
        norm = "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False):
            if norm or name == "bias":
                found.append(f"{path}.{name}" if path else name)
    return found


def train_only(model: nn.Module, names: list[str]) -> None:
    """Gradients for these parameters and no others."""
    wanted = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
