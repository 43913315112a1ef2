"""An activation policy applied to a loaded model: modules that skip, in place of those that do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...activation_sparsity.base import CoreNeurons, GateThreshold, LinearPolicy, MLPParts, Policy
from ...errors import CheckpointError
from ...kernels.arguments import CODES, MAX_ROWS
from ...kernels.bitmask_gemv import dispatch as bitmask
from ...kernels.channel_gemv.dispatch import transpose
from ...kernels.dual_gemv import dispatch as dual
from ...kernels.modules.bitmask_linear import BitmaskLinear
from ...kernels.modules.channel_linear import ChannelSparseLinear
from ...kernels.modules.dense_linear import DenseLinear
from ...kernels.modules.dual_linear import DualSparseLinear
from ...kernels.modules.masked import MaskedInputs, MaskedNeurons
from ...kernels.modules.neuron_subset import NeuronSubsetMLP
from ...kernels.modules.packed_stack import PackedStack
from ...kernels.modules.thresholds import ThresholdLinear
from ..skeleton import find_blocks
from .calls import watch_generate
from .hook import StepHook

MORE = "the module computes more than its three maps: neurons outside the set are zeroed, and every weight is read"
ROUNDING = 0.01  # of the output's norm, in bfloat16
FORMAT = "no kernel skips inputs of {kind}: they are zeroed, and every weight is read"


@dataclass
class AppliedPolicy:
    """What runs, for reports: `model.gossamer_activation`.

    `channels`, `dual`: names of maps that skip inputs of dense and of packed weights. `mlps`: those that compute some
    neurons. `fallback`: name -> why it reads everything although it computes what the policy says. `together`: groups
    of maps that are computed in one call.
    """

    policy: Policy
    channels: list[str] = field(default_factory=list)
    dual: list[str] = field(default_factory=list)
    mlps: list[str] = field(default_factory=list)
    fallback: dict[str, str] = field(default_factory=dict)
    together: list[list[str]] = field(default_factory=list)


def apply_policy(model: Any, policy: Policy, *, kernels: bool = True, prefill: str = "streamed") -> AppliedPolicy:
    """Make `model` run `policy` at decode. CheckpointError when it was made for another model.

    kernels=False leaves every module as it is and zeroes inputs by hooks: for training and for models on several
    devices. `prefill`: as of packed layers.
    """
    check_model(model, policy)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and not kernels)
    applied = AppliedPolicy(policy)
    spread = len({parameter.device for parameter in model.parameters()}) > 1
    why = "the model lies on several devices" if spread else None if kernels else "the modules were left as they are"
    for name, entry in policy.linears.items():
        _put_linear(model, name, entry, applied, why, prefill)
    for name, mlp in policy.mlps.items():
        _put_mlp(model, name, mlp, applied, why)
    _share(model, policy, applied)
    owner = find_blocks(model)[0].rpartition(".")[0]  # what is called with ids and cache: of OPT, not the base model
    StepHook(policy).attach(model.get_submodule(owner))
    watch_generate(model)
    model.gossamer_activation = applied
    return applied


def check_model(model: Any, policy: Policy) -> None:
    """CheckpointError unless the model has the linear maps that the policy knows, and no parts in place of others."""
    policy.check_model(model_shapes(model, policy.shapes))
    for name in policy.mlps:
        try:
            model.get_submodule(name)
        except AttributeError as error:
            raise CheckpointError(
                f"the activation policy was made for another model: it has no module {name}"
            ) from error


def model_shapes(model: Any, names: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) of those linear maps of `names` that the model has, experts of a stack included."""
    found: dict[str, tuple[int, int]] = {}
    for name in names:
        shape = _shape(model, name)
        if shape is not None:
            found[name] = shape
    return found


def _shape(model: Any, name: str) -> tuple[int, int] | None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return _expert_shape(model, name)
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)
    return None


def _expert_shape(model: Any, name: str) -> tuple[int, int] | None:
    stack_name, _, index = name.rpartition(".")
    owner_name, _, attribute = stack_name.rpartition(".")
    try:
        owner = model.get_submodule(owner_name)
    except AttributeError:
        return None
    stack = getattr(owner, attribute, None)
    if stack is None or not index.isdecimal():
        return None
    if isinstance(stack, PackedStack):
        member = stack.members[0]
        return member.out_features, member.in_features
    if not isinstance(stack, torch.Tensor) or stack.dim() != 3:
        return None
    rows, cols = stack.shape[1:]
    return (cols, rows) if getattr(owner, "is_transposed", False) else (rows, cols)


def _put_linear(
    model: Any, name: str, entry: LinearPolicy, applied: AppliedPolicy, why: str | None, prefill: str
) -> None:
    layer = model.get_submodule(name)
    after, reason = (None, why) if why is not None else _skipping(layer, entry, prefill)
    if after is None:
        MaskedInputs(**entry.tensors()).attach(layer)
        applied.fallback[name] = reason or ""
        return
    place = after.packed.device
    rest = {key: tensor.to(place) for key, tensor in entry.tensors().items() if key != "threshold"}
    after.hold(**rest)
    after.train(layer.training)
    _replace(model, name, after)
    (applied.dual if isinstance(after, DualSparseLinear) else applied.channels).append(name)


def _skipping(layer: nn.Module, entry: LinearPolicy, prefill: str) -> tuple[ThresholdLinear | None, str | None]:
    """The layer's successor, or why there is none."""
    threshold = entry.threshold
    if type(layer) in (nn.Linear, DenseLinear, Conv1D):
        weight = layer.weight.detach()  # type: ignore[union-attr, operator]
        if weight.dtype not in CODES or weight.is_meta:
            return None, FORMAT.format(kind=f"{str(weight.dtype).removeprefix('torch.')} weights")
        conv = isinstance(layer, Conv1D)
        weight_t = weight.contiguous() if conv else transpose(weight.cpu()).to(weight.device)
        moved = threshold.to(weight.device)
        return ChannelSparseLinear(weight_t, moved, layer.bias, transposed=conv), None  # type: ignore[arg-type]
    if type(layer) is BitmaskLinear:
        bits, values, cols = bitmask.unpack(layer.packed)
        packed = dual.pack(bits, values, cols).to(layer.packed.device)
        made = DualSparseLinear(
            packed, threshold.to(packed.device), layer.bias, transposed=layer.transposed, prefill=prefill
        )
        made.reference = layer.reference
        return made, None
    return None, FORMAT.format(kind=type(layer).__name__)


def _put_mlp(
    model: Any, name: str, entry: GateThreshold | CoreNeurons, applied: AppliedPolicy, why: str | None
) -> None:
    parts = entry.parts
    threshold = entry.threshold if isinstance(entry, GateThreshold) else None
    reason = why or _unfit(model, name, parts)
    if reason is None:
        layers = dict(model.get_submodule(name).named_children())
        own = {key: layer for key, layer in layers.items() if f"{name}.{key}" in (parts.gate, parts.up, parts.down)}
        gate, up, down = (str(part).removeprefix(f"{name}.") for part in (parts.gate, parts.up, parts.down))
        before = model.get_submodule(name)
        made = NeuronSubsetMLP(own, gate, up, down, parts.activation, name=name, threshold=threshold)
        if _alike(before, made):
            _replace(model, name, made.train(before.training))
            applied.mlps.append(name)
            return
        reason = MORE
    applied.fallback[name] = reason
    masked = MaskedNeurons(name, parts.activation, threshold=threshold, fused=parts.fused)
    masked.attach(None if parts.gate is None else model.get_submodule(parts.gate), model.get_submodule(parts.down))


def _alike(before: nn.Module, made: NeuronSubsetMLP) -> bool:
    """Whether the module computes what its three maps and the activation say, and nothing more (factors, norms)."""
    weight, _ = made.weights()
    x = torch.randn(1, MAX_ROWS + 1, weight.shape[1], generator=torch.Generator().manual_seed(0))
    x = x.to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            wanted, found = before(x), made(x)
        except TypeError:  # it asks for more than x
            return False
    if not isinstance(wanted, torch.Tensor) or wanted.shape != found.shape:
        return False
    return bool((wanted - found).float().norm() <= ROUNDING * wanted.float().norm())


def _unfit(model: Any, name: str, parts: MLPParts) -> str | None:
    """Why the kernel for subsets of neurons cannot run the MLP, or None. Packed layers are expanded for it."""
    if parts.gate is None:
        return "the kernel runs gated MLPs: neurons outside the set are zeroed, and every weight is read"
    for part in {parts.gate, parts.up, parts.down}:
        if part.rpartition(".")[0] != name:
            return f"{part} does not lie in {name} itself: neurons outside the set are zeroed, and every weight is read"
        layer = model.get_submodule(part)
        if type(layer) is BitmaskLinear:
            expanded = layer.expanded(Conv1D)
            if isinstance(expanded, nn.Linear):
                _replace(model, part, DenseLinear.adopt(expanded))
    layers = [model.get_submodule(part) for part in (parts.gate, parts.up, parts.down)]
    reason = NeuronSubsetMLP.fits(*layers)
    return None if reason is None else f"{reason}: neurons outside the set are zeroed, and every weight is read"


def _share(model: Any, policy: Policy, applied: AppliedPolicy) -> None:
    """Maps of one site that skip the same inputs are computed in one call, in the order of the model's calls."""
    sites: dict[str, list[str]] = {}
    for name in policy.shapes:
        sites.setdefault(policy.sites.get(name, name), []).append(name)
    for names in sites.values():
        layers = [model.get_submodule(name) for name in names if name in policy.linears]
        here = [layer for layer in layers if isinstance(layer, ThresholdLinear)]
        if len(here) > 1 and len(here) == len(names) and ThresholdLinear.share(here):
            applied.together.append(names)


def _replace(model: Any, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
