"""Recovery after pruning under the mask as it is: MaskLoRA, biases and norms, or everything that was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import TrainingError
from . import masklora
from .biasnorm import bias_and_norm_names, train_only
from .methods import Attached, Method


class Full(Method):
    """Every parameter is trained, the pruned entries excepted."""

    learning_rate = 3e-4

    def share(self, parameters: int, shapes: Sequence[tuple[int, int]], options: Mapping[str, Any]) -> float:
        return 1.0

    def attach(
        self, model: Any, masks: Mapping[str, Tensor], targets: Sequence[str], options: Mapping[str, Any], seed: int
    ) -> Attached:
        model.requires_grad_(True)
        return Attached(masks, lambda: {"trained": _trained(model)})


class BiasNorm(Method):
    """Biases and norms alone; no weight that can be pruned moves."""

    learning_rate = 3e-3

    def share(self, parameters: int, shapes: Sequence[tuple[int, int]], options: Mapping[str, Any]) -> float:
        return 0.001

    def attach(
        self, model: Any, masks: Mapping[str, Tensor], targets: Sequence[str], options: Mapping[str, Any], seed: int
    ) -> Attached:
        names = bias_and_norm_names(model)
        if not names:
            raise TrainingError("the model has neither biases nor norms to train", hint="use --method masklora or full")
        train_only(model, names)
        return Attached(masks, lambda: {"trained": _trained(model)})


class MaskLoRA(Method):
    """A low-rank update under the mask of every prunable matrix, and unless `extras` is off biases and norms too."""

    reads = frozenset({"rank", "alpha", "extras"})
    learning_rate = 3e-3

    def share(self, parameters: int, shapes: Sequence[tuple[int, int]], options: Mapping[str, Any]) -> float:
        return min(1.0, options["rank"] * sum(rows + cols for rows, cols in shapes) / parameters + 0.001)

    def attach(
        self, model: Any, masks: Mapping[str, Tensor], targets: Sequence[str], options: Mapping[str, Any], seed: int
    ) -> Attached:
        train_only(model, bias_and_norm_names(model) if options["extras"] else [])
        wrapped = masklora.wrap(model, targets, masks, rank=options["rank"], alpha=options["alpha"], seed=seed)
        inside = {f"{path}.weight" for path in wrapped}
        skipped = [name for name in targets if name not in inside]
        now = {_inner(name) if name in inside else name: mask for name, mask in masks.items()}

        def finish() -> dict[str, Any]:
            trained = _trained(model)
            masklora.unwrap(model, wrapped)
            return {"trained": trained, "adapted": len(wrapped)}

        notes = [f"{len(skipped)} fused expert parameters have no low-rank update and stay as they are"]
        return Attached(now, finish, notes=notes if skipped else [])


def _inner(name: str) -> str:
    return f"{name.removesuffix('weight')}base.weight"


def _trained(model: Any) -> int:
    """Number of trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
