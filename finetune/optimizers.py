"""Optimizers by name. Weight decay is for matrices: biases and norms are few and decay only hurts them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import RecipeError, TrainingError

if TYPE_CHECKING:
    from .training import TrainingConfig


def _adamw(groups: Any, config: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)


def _sgd(groups: Any, config: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)


def _adamw_8bit(groups: Any, config: TrainingConfig) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise TrainingError(
            "optimizer adamw-8bit needs the package bitsandbytes", hint="pip install bitsandbytes, or use adamw"
        ) from error
    return AdamW8bit(groups, lr=config.learning_rate, betas=config.betas)


OPTIMIZERS: dict[str, Callable[[Any, TrainingConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "adamw-8bit": _adamw_8bit,
}


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer of the parameters that require a gradient.

    Raises:
        RecipeError: an unknown name.
        TrainingError: nothing to train.
    """
    if config.make_optimizer is not None:
        return config.make_optimizer(model)
    if config.optimizer not in OPTIMIZERS:
        raise RecipeError(f"optimizer {config.optimizer!r} is unknown; allowed: {', '.join(OPTIMIZERS)}")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise TrainingError("no parameter requires a gradient: there is nothing to train")
    return OPTIMIZERS[config.optimizer](_groups(parameters, config.weight_decay), config)


def _groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.dim() > 1 else others).append(parameter)
    groups = [(matrices, weight_decay), (others, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]
