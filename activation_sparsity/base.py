"""The contract between activation policies and what runs them: a policy is data, keyed by the names of linear maps.

A linear map y = W x + b with an entry computes, for every sparse token (`reference.sparse_linear` is the definition):

    x' = x - center                             in float32, rounded to x's dtype; x' = x without center
    m_j = not |x'_j| <= threshold_j             W[:, j] is read only where m_j
    y = W (x' * m) + (b + shift) + left (right (x' * (1 - m)))

An MLP with an entry computes some of its neurons: those whose activated gate is large (`GateThreshold`), or the core
neurons of the sequence (`CoreNeurons`). Maps without an entry are dense. Dense tokens (the prompt, and the first token
of a sequence always) use the map as it was: W x + b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

VERSION = 1
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True)
class LinearPolicy:
    """What one linear map [out, in] skips.

    Attributes:
        threshold: float32 [in]; negative: the channel always counts, infinite: only NaN does.
        center: float32 [in], taken off x before the test; the product W center is part of `shift`. None = zero.
        shift: float32 [out], added to the bias of sparse tokens. None = zero.
        left: float32 [out, rank] of the low-rank residual; None = none.
        right: float32 [rank, in] of the same.
    """

    threshold: Tensor
    center: Tensor | None = None
    shift: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rank of the residual, 0 without one."""
        return 0 if self.left is None else self.left.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by attribute name."""
        every = {name: getattr(self, name) for name in ("threshold", "center", "shift", "left", "right")}
        return {name: tensor for name, tensor in every.items() if tensor is not None}


@dataclass(frozen=True)
class MLPParts:
    """Names of an MLP's linear maps. `gate` None: down(act(up x)); gate == up: one map [2 neurons, in], gate first."""

    gate: str | None
    up: str
    down: str
    activation: str
    neurons: int

    @property
    def fused(self) -> bool:
        """Whether gate and up are the two halves of one map."""
        return self.gate == self.up


@dataclass(frozen=True)
class GateThreshold:
    """Neuron i counts unless |act(gate x)_i| <= threshold_i: the gate is computed whole, up and down in part."""

    parts: MLPParts
    threshold: Tensor  # float32 [neurons]


@dataclass(frozen=True)
class CoreNeurons:
    """`keep` neurons per sequence, chosen from its prompt (`cores.py`).

    `norms`: float32 [neurons], ||W_down[:, i]||. `clusters`: int32 [clusters, keep], rising: the neurons of each
    cluster of sentences, when the policy is guided by similarity.
    """

    parts: MLPParts
    keep: int
    norms: Tensor
    clusters: Tensor | None = None


@dataclass(frozen=True)
class CoreGuide:
    """How core neurons are chosen, one for the whole model.

    Attributes:
        alpha: share of a token's neurons that vote ("stability").
        signature: key in `Policy.mlps` of the MLP by whose neurons the cluster is found ("similarity"), else None.
        size: neurons in a signature.
        centroids: float32 [clusters, neurons], mean multi-hot signatures.
        refresh: decode tokens between two looks at drift; 0 = the set of the prompt stays.
        drift: a new set is taken when the tokens' own set has a Jaccard similarity below this with the old one.
    """

    alpha: float
    signature: str | None = None
    size: int = 0
    centroids: Tensor | None = None
    refresh: int = 0
    drift: float = 0.5

    @property
    def mode(self) -> str:
        """ "stability" or "similarity"."""
        return "stability" if self.signature is None else "similarity"


@dataclass(frozen=True)
class Policy:
    """An activation policy of one model.

    Attributes:
        method: its key in the registry.
        shapes: name -> (out, in) of every linear map of the decoder blocks, with entry or without.
        linears: name -> what the map skips.
        mlps: module path of an MLP -> which neurons are computed. Its maps have no entry in `linears`.
        sites: name -> name of the first map that gets the same input (its own where it is the first). Maps of one site
            with equal thresholds and centers may share one mask.
        guide: how core neurons are chosen; None unless `mlps` holds CoreNeurons.
        facts: anything to report, JSON-able: target, realised sparsity, calibration.
    """

    method: str
    shapes: Mapping[str, tuple[int, int]]
    linears: Mapping[str, LinearPolicy] = field(default_factory=dict)
    mlps: Mapping[str, GateThreshold | CoreNeurons] = field(default_factory=dict)
    sites: Mapping[str, str] = field(default_factory=dict)
    guide: CoreGuide | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def check_model(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """CheckpointError unless `shapes`, name -> (out, in), are the linear maps that this policy was made for."""
        for name, shape in self.shapes.items():
            found = shapes.get(name)
            if found is None or tuple(found) != tuple(shape):
                has = "has no such matrix" if found is None else f"has {list(found)} there"
                raise CheckpointError(
                    f"the activation policy was made for another model: it knows {name} {list(shape)}, "
                    f"this model {has}",
                    hint="calibrate anew with gossamer compress MODEL --activation auto",
                )


def finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN; thresholds may be infinite."""
    return not bool(torch.isnan(tensor).any())
