"""A policy as named tensors and one JSON-able record, and back. A reader trusts nothing.

Tensor names: NAME.threshold, .center, .shift, .left, .right of linear maps; NAME.gate, NAME.norms, NAME.clusters of
MLPs; centroids of the guide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .base import ACTIVATIONS, VERSION, CoreGuide, CoreNeurons, GateThreshold, LinearPolicy, MLPParts, Policy, finite

CENTROIDS = "centroids"


def to_tensors(policy: Policy) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, record); `from_tensors` gives back an equal policy."""
    tensors: dict[str, Tensor] = {}
    for name, linear in policy.linears.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in linear.tensors().items()}
    mlps: dict[str, dict[str, Any]] = {}
    for name, mlp in policy.mlps.items():
        mlps[name] = {"parts": asdict(mlp.parts)}
        if isinstance(mlp, GateThreshold):
            tensors[f"{name}.gate"] = mlp.threshold
            continue
        mlps[name]["keep"] = mlp.keep
        tensors[f"{name}.norms"] = mlp.norms
        if mlp.clusters is not None:
            tensors[f"{name}.clusters"] = mlp.clusters
    guide = None
    if policy.guide is not None:
        guide = {
            key: getattr(policy.guide, key) for key in ("alpha", "signature", "size", "refresh", "drift")
        }  # without the tensor
        if policy.guide.centroids is not None:
            tensors[CENTROIDS] = policy.guide.centroids
    record = {
        "version": policy.version,
        "method": policy.method,
        "shapes": {name: list(shape) for name, shape in policy.shapes.items()},
        "linears": {name: sorted(linear.tensors()) for name, linear in policy.linears.items()},
        "mlps": mlps,
        "sites": dict(policy.sites),
        "guide": guide,
        "facts": dict(policy.facts),
    }
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, record


def from_tensors(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Policy:
    """The policy of `to_tensors`. CheckpointError for anything malformed, naming the entry."""
    if not isinstance(record, Mapping) or record.get("version") != VERSION:
        version = record.get("version") if isinstance(record, Mapping) else None
        raise CheckpointError(
            f"the activation policy has version {version!r}, this Gossamer reads {VERSION}",
            hint="calibrate anew, or use the Gossamer that wrote it",
        )
    try:
        return _Reader(tensors, record).policy()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the activation policy is malformed: {type(error).__name__} {error}") from error


class _Reader:
    def __init__(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        self.left = dict(tensors)
        self.record = record
        self.shapes = {str(name): (int(shape[0]), int(shape[1])) for name, shape in record["shapes"].items()}

    def policy(self) -> Policy:
        guide = self._guide(self.record["guide"])
        linears = {name: self._linear(name, parts) for name, parts in self.record["linears"].items()}
        mlps = {name: self._mlp(name, entry, guide) for name, entry in self.record["mlps"].items()}
        sites = {str(name): str(leader) for name, leader in self.record["sites"].items()}
        for name in [*sites, *sites.values()]:
            self._shape(name)
        if self.left:
            raise CheckpointError(f"the activation policy holds a tensor that it does not name: {min(self.left)}")
        if guide is not None and guide.signature is not None and guide.signature not in mlps:
            raise CheckpointError(f"the activation policy finds clusters at {guide.signature}, which has no entry")
        return Policy(
            str(self.record["method"]), self.shapes, linears, mlps, sites, guide, dict(self.record["facts"]), VERSION
        )

    def _linear(self, name: str, parts: list[str]) -> LinearPolicy:
        out, width = self._shape(name)
        rank = self.left[f"{name}.left"].shape[-1] if "left" in parts else 0
        shapes = {
            "threshold": (width,),
            "center": (width,),
            "shift": (out,),
            "left": (out, rank),
            "right": (rank, width),
        }
        if "threshold" not in parts or ("left" in parts) != ("right" in parts) or not set(parts) <= shapes.keys():
            raise CheckpointError(f"the activation policy of {name} cannot consist of {', '.join(map(str, parts))}")
        found = {part: self._take(f"{name}.{part}", shapes[part]) for part in parts}
        return LinearPolicy(**found)

    def _mlp(self, name: str, entry: Mapping[str, Any], guide: CoreGuide | None) -> GateThreshold | CoreNeurons:
        parts = MLPParts(**entry["parts"])
        self._check_parts(name, parts)
        if "keep" not in entry:
            return GateThreshold(parts, self._take(f"{name}.gate", (parts.neurons,)))
        keep = entry["keep"]
        if guide is None or type(keep) is not int or not 0 < keep <= parts.neurons:
            raise CheckpointError(f"the activation policy keeps {keep!r} of the {parts.neurons} neurons of {name}")
        clusters = None
        if guide.centroids is not None:
            clusters = self._take(f"{name}.clusters", (len(guide.centroids), keep), torch.int32)
            rising = bool((clusters.diff(dim=1) > 0).all())
            if not rising or int(clusters.min()) < 0 or int(clusters.max()) >= parts.neurons:
                raise CheckpointError(f"the core neurons of {name} must rise from 0 to {parts.neurons - 1}")
        return CoreNeurons(parts, keep, self._take(f"{name}.norms", (parts.neurons,)), clusters)

    def _check_parts(self, name: str, parts: MLPParts) -> None:
        neurons, up, down = parts.neurons, self._shape(parts.up), self._shape(parts.down)
        rows = 2 * neurons if parts.fused else neurons
        gate = rows if parts.gate is None else self._shape(parts.gate)[0]
        if type(neurons) is not int or up[0] != rows or gate != rows or down[1] != neurons:
            raise CheckpointError(f"the activation policy gives {name} {neurons!r} neurons, its matrices have others")
        if parts.activation not in ACTIVATIONS:
            raise CheckpointError(
                f"the activation policy gives {name} the activation {parts.activation!r}; "
                f"allowed: {', '.join(ACTIVATIONS)}"
            )

    def _guide(self, entry: Mapping[str, Any] | None) -> CoreGuide | None:
        if entry is None:
            return None
        centroids = None
        if entry["signature"] is not None:
            found = self.left.get(CENTROIDS)
            if found is None or found.dim() != 2 or not len(found):
                raise CheckpointError("the activation policy is guided by similarity but has no centroids")
            centroids = self._take(CENTROIDS, tuple(found.shape))
        guide = CoreGuide(**entry, centroids=centroids)
        if not 0 < guide.alpha <= 1 or guide.refresh < 0 or guide.size < 0:
            raise CheckpointError(f"the activation policy has alpha {guide.alpha}, refresh {guide.refresh}")
        return guide

    def _shape(self, name: str) -> tuple[int, int]:
        if name not in self.shapes:
            raise CheckpointError(f"the activation policy names {name}, but not its shape")
        return self.shapes[name]

    def _take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        tensor = self.left.pop(name, None)
        if tensor is None:
            raise CheckpointError(f"the activation policy lacks the tensor {name}")
        if tuple(tensor.shape) != shape or tensor.dtype is not dtype:
            raise CheckpointError(
                f"the activation policy's tensor {name} is {tensor.dtype} {list(tensor.shape)}, "
                f"it must be {dtype} {list(shape)}"
            )
        infinite = name.endswith((".threshold", ".gate"))
        if dtype is torch.float32 and not (finite(tensor) if infinite else bool(torch.isfinite(tensor).all())):
            raise CheckpointError(f"the activation policy's tensor {name} is not finite")
        return tensor
