"""The methods of `gossamer finetune`. Import-free table: a method is one class as below and one line here."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ..pruning.pattern import Pattern
    from .tokens import TokenRows

_TABLE = {
    "masklora": "recovery:MaskLoRA",
    "bias-norm": "recovery:BiasNorm",
    "full": "recovery:Full",
    "spiel-ag": "spiel.method:SpielAG",
    "spiel-ma": "spiel.method:SpielMA",
    "static": "spiel.method:Static",
    "lora": "spiel.method:Lora",
    "pst": "pst_method:Pst",
    "dst": "dst:Dst",
}
DEFAULT_METHOD = "masklora"


@dataclass
class Attached:
    """A model made ready for training.

    Attributes:
        masks: parameter name -> bool mask that training keeps, under the names that the model has now.
        finish: makes an ordinary model of it again, in place, and returns figures for the report.
        callbacks, make_optimizer: as in `training.TrainingConfig`. A callback with a method `take_guard` is given
            the MaskGuard, the optimizer and the step when training begins: a method that moves masks needs them.
        kept: masks of the ordinary model afterwards, where the method moved them; None: as before.
        prepare: called with the training rows before training, on every start.
        save: writes the adapter that was trained into a folder and returns the names of its files; before `finish`.
        patterns: parameter name -> what its mask promises afterwards, where that is new.
        merged: where matrices are quantised, instead of an ordinary model: (parameter name, the matrix of float32 that
            takes its place, its mask if that has moved), both in the parameter's shape, one after the other. The model
            is taken apart on the way; `kept` and `finish` are asked afterwards.
    """

    masks: Mapping[str, Tensor]
    finish: Callable[[], dict[str, Any]]
    callbacks: tuple[Any, ...] = ()
    make_optimizer: Callable[[Any], Any] | None = None
    kept: Callable[[], Mapping[str, Tensor]] | None = None
    notes: list[str] = field(default_factory=list)
    prepare: Callable[[TokenRows], None] | None = None
    save: Callable[[Path], list[str]] | None = None
    patterns: Mapping[str, str] = field(default_factory=dict)
    merged: Callable[[], Iterator[tuple[str, Tensor, Tensor | None]]] | None = None


class Method(ABC):
    """One way of fine-tuning.

    Attributes:
        reads: fields of the finetune stage that mean something to it, beyond those of every training stage; giving
            another one is a mistake.
        learning_rate: the peak when the user gives none.
        needs_masks: whether a model without any mask is a mistake.
        optimizers: those that it can train with; None: all.
        beside: whether what it trains lies beside the weights, so that these may be quantised.
    """

    reads: frozenset[str] = frozenset()
    learning_rate = 1e-3
    needs_masks = False
    optimizers: frozenset[str] | None = None
    beside = False

    @abstractmethod
    def share(self, parameters: int, shapes: Sequence[tuple[int, int]], options: Mapping[str, Any]) -> float:
        """Share of all parameters that get a gradient, for the estimate of memory. `shapes`: of the targets."""

    def prunes(self, options: Mapping[str, Any]) -> Pattern | None:
        """The pattern to which it prunes every linear layer of the blocks; None: it keeps the masks that there are."""
        return None

    @abstractmethod
    def attach(
        self, model: Any, masks: Mapping[str, Tensor], targets: Sequence[str], options: Mapping[str, Any], seed: int
    ) -> Attached:
        """Choose what is trained; modules may be replaced.

        Args:
            model: dense in memory, in float32, pruned entries 0; with linear layers of bitsandbytes if `beside`.
            masks: of the matrices that have one, in the shape of the parameter, on its device.
            targets: parameter names of all prunable matrices, masked or not.
            options: the fields of the stage.
            seed: for whatever is drawn.
        """


def method_names() -> tuple[str, ...]:
    """All methods, in the order of the table."""
    return tuple(_TABLE)


def get_method(name: str) -> Method:
    """RecipeError for a name that is not in the table."""
    if name not in _TABLE:
        raise RecipeError(f"fine-tuning method {name!r} is unknown; allowed: {', '.join(_TABLE)}")
    module, _, kind = _TABLE[name].partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), kind)()
