"""The contract between activation policies' makers and the driver: what calibration saw of a block in, entries out.

A method sees one decoder block at a time and no model. It names what it `needs`; the driver measures it at sparse
positions of the calibration windows (not in the prompt, so never at the first token) and hands it over as data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .base import CoreGuide, CoreNeurons, GateThreshold, LinearPolicy, MLPParts
from .curve import Curve

Linears = Mapping[str, LinearPolicy]
MLPs = Mapping[str, GateThreshold | CoreNeurons]


@dataclass(frozen=True)
class Site:
    """Matrices with one input.

    Attributes:
        weights: name -> float32 [out, in], in call order; the first names the site.
        x: float32 [tokens, in]: their input.
        gradient: float32 [tokens, in], dLoss / dx at the same tokens, for methods that need "gradient".
    """

    weights: Mapping[str, Tensor]
    x: Tensor
    gradient: Tensor | None = None

    @property
    def leader(self) -> str:
        """Name of the first matrix."""
        return next(iter(self.weights))

    @property
    def width(self) -> int:
        """Input channels."""
        return self.x.shape[1]

    @property
    def rows(self) -> int:
        """Outputs of all matrices."""
        return sum(len(weight) for weight in self.weights.values())

    @property
    def size(self) -> int:
        """Weights of all matrices."""
        return self.rows * self.width


@dataclass(frozen=True)
class BlockData:
    """One decoder block as calibration saw it.

    Attributes:
        index: its number.
        sites: inputs, empty unless "inputs" is needed.
        mlps: module path -> parts.
        gates: module path -> float32 [tokens, neurons], the gate before its activation ("gates").
        prompts: module path -> the input of down over the dense prompt of every window, [tokens, neurons] ("prompts").
        norms: module path -> float32 [neurons], ||W_down[:, i]||.
        error: squared error of the block's output under some entries, relative to the dense block's ("error").
    """

    index: int
    sites: Sequence[Site]
    mlps: Mapping[str, MLPParts]
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    prompts: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    error: Callable[[Linears, MLPs], float] | None = None


@dataclass(frozen=True)
class Fitted:
    """Entries of one block; `extra`: tensors that `conclude` wants to see again (also after a restart)."""

    linears: Linears = field(default_factory=dict)
    mlps: MLPs = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)


class Evaluate(Protocol):
    """Mean loss of the whole model on calibration windows under the blocks' entries."""

    def __call__(self, blocks: Sequence[Fitted], *, base: bool = False) -> float:
        """`base`: most of what follows differs from these entries in a few blocks, which can then be cheaper."""
        ...


Log = Callable[[str], None]


@dataclass(frozen=True)
class Extent:
    """What there is to skip. Weights of all linear maps of the blocks; of MLPs' gates; of MLPs' up and down."""

    whole: int
    gates: int
    others: int
    sites: int


class Method(ABC):
    """What makes a policy. Subclasses override what they need.

    Attributes:
        name: its key in the registry.
        needs: of "inputs", "gates", "prompts", "error", "gradient".
        surveys: whether budgets are shared out over the whole model by error curves (`survey`, then `share`).
        follows: fitted on what the sparse blocks below give, not on the dense model's activations.
    """

    name = ""
    needs: frozenset[str] = frozenset()
    surveys = False
    follows = False

    @property
    def watched(self) -> float:
        """Share of the decoded tokens that skip nothing."""
        return 0.0

    def reachable(self, extent: Extent) -> float:
        """The highest sparsity of all linear maps that this method can reach."""
        return extent.sites / extent.whole if extent.whole else 0.0

    def survey(self, block: BlockData) -> dict[str, Curve]:
        """Error curves of the block's sites in the dense model, by leader."""
        return {}

    def share(
        self, curves: Mapping[str, Curve], target: float, extent: Extent, evaluate: Evaluate, log: Log
    ) -> dict[str, float]:
        """Sparsity of every site, so that all linear maps together have `target`; right after the survey."""
        return {}

    @abstractmethod
    def fit(self, block: BlockData, budgets: Mapping[str, float], target: float, extent: Extent) -> Fitted:
        """Entries of the block. `budgets`: from `share`; `target`: of all linear maps of the model."""

    def restored(self, index: int, fitted: Fitted) -> None:
        """A restart found block `index` fitted, in the order of the fits: what `fit` would remember of it."""
        return

    def conclude(self, blocks: Sequence[Fitted], evaluate: Evaluate, log: Log) -> tuple[list[Fitted], CoreGuide | None]:
        """A last look at all blocks together: their final entries, and how core neurons are chosen."""
        return list(blocks), None


def column_norms(weights: Mapping[str, Tensor]) -> Tensor:
    """float32 [in]: sqrt(sum over the matrices of ||W[:, j]||^2)."""
    return torch.stack([weight.float().square().sum(0) for weight in weights.values()]).sum(0).sqrt()
