"""The two halves of a decoder block, prepared for compiled code: addresses of modules and tensors that were checked."""

from __future__ import annotations

from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

from ..attention.alike import alike
from ..attention.block import shortened
from ..attention.filled import Place, Rows
from ..kernels.arguments import CODES, check_weight
from ..kernels.modules.channel_linear import ChannelSparseLinear
from ..kernels.modules.dense_linear import DenseLinear
from ..kernels.modules.neuron_subset import NeuronSubsetMLP
from ..kernels.modules.stage import Stage, stage
from ..kernels.modules.step import current_step
from ..kernels.modules.watch import Watch
from ..kernels.neuron_mlp.cpu import ACTIVATIONS
from ..kernels.tier import current
from ..kernels.window_attention.dispatch import MAX_GROUP
from .norms import adopted

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.SiLU: "silu", SiLUActivation: "silu", nn.ReLU: "relu", GELUTanh: "gelu_tanh", GELUActivation: "gelu",
}  # fmt: skip

_CONSTANTS = ("scaling", "variance_epsilon", "training")  # attributes of modules that decide what is computed


class _Part:
    """`compiled`: what to call, None where this half is not of a known kind. `watch`: for how long that holds."""

    compiled: Any = None
    skips = False

    def __init__(self, block: Any, dtype: torch.dtype, modules: list[Any]) -> None:
        self.dtype, self.code = dtype, CODES[dtype]
        self.watch = Watch([module for module in [block, *modules] if isinstance(module, nn.Module)], _CONSTANTS)
        self.tier = current()
        self.held: list[Any] = []

    def norm(self, module: Any) -> int:
        """The address of a norm's weight, 0 where it is none that csrc/norm.cpp computes."""
        weight = getattr(module, "weight", None)
        if not adopted(module) or weight is None or weight.dtype is not self.dtype:
            return 0
        return weight.data_ptr() if weight.is_cpu and weight.dim() == 1 and weight.is_contiguous() else 0

    def current(self) -> bool:
        """Whether the compiled code is still that which runs."""
        return current() is self.tier

    def ready(self) -> bool:
        """Whether it runs, and tokens skip now what the half's kernels skip."""
        return self.current() and not (self.skips and current_step().dense)


class AttentionPart(_Part):
    """x + o_proj(attention(norm(x))) of one token, stored and read where a cache says."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        norm, attention = block.input_layernorm, block.self_attn
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        layers: list[Any] = [getattr(attention, name, None) for name in names]
        super().__init__(block, dtype, [norm, attention, *layers])
        if not self.watch.plain() or self.tier is None or not shortened(attention):
            return
        weight = self.norm(norm)
        if not weight:
            return
        self.index, self.width, self.hidden = attention.layer_idx, attention.head_dim, norm.weight.shape[-1]
        query, key = (getattr(layer, "out_features", 0) for layer in layers[:2])
        self.kv_heads, group = key // self.width, query // max(key, 1)
        heads = query // self.width
        if heads != group * self.kv_heads or not 1 <= group <= MAX_GROUP or self.width % 2:
            return
        inputs = stage(layers[:3], self.hidden, [query, key, key], dtype)
        output = stage(layers[3:], query, [self.hidden], dtype)
        if inputs is None or output is None:
            return
        self.skips, self.held = inputs.skips or output.skips, [inputs, output]
        sizes = self.hidden, heads, self.kv_heads, self.width
        self.like = dtype, *sizes
        self.compiled = self.tier.module.AttentionHalf(
            self.code, weight, norm.variance_epsilon, sizes, attention.scaling, inputs.words, output.words
        )

    def turns(self, rotation: Any, x: Tensor) -> bool:
        """Whether cosines and sines are of the kind that is computed with, and x of this block."""
        cos, sin = rotation
        return (
            self.ready()
            and x.shape[2] == self.hidden
            and cos.dtype is self.dtype
            and sin.dtype is self.dtype
            and cos.shape == sin.shape
            and cos.dim() == 3
            and cos.shape[0] in (1, x.shape[0])
            and cos.shape[1] == 1
            and cos.shape[2] == self.width
            and cos.is_contiguous()
            and sin.is_contiguous()
            and cos.is_cpu
        )

    def fits(self, place: Place, batch: int) -> bool:
        """Whether a cache's memory is what the half stores into."""
        return (
            self.stores(place.rows)
            and place.slots.shape == (batch, self.kv_heads)
            and place.slots.is_contiguous()
            and place.ranges.shape == (batch, self.kv_heads, 4)
            and place.ranges.is_contiguous()
        )

    def stores(self, rows: Rows) -> bool:
        """Whether keys and values go into these rows; looked at once."""
        if rows.fits == self.like:
            return True
        keys, values = rows.keys, rows.values
        if not (keys.dtype is self.dtype and keys.is_cpu and keys.shape[1] == self.width and keys.is_contiguous()):
            return False
        if not (values.dtype is self.dtype and values.shape == keys.shape and values.is_contiguous()):
            return False
        rows.fits = self.like
        return True

    def run(self, x: Tensor, rotation: Any, place: Place) -> Tensor | None:
        """None, and nothing stored, where slots or ranges lie outside the cache."""
        assert self.tier is not None
        y = torch.empty_like(x)
        done = self.compiled.run(
            self.tier.address, x.data_ptr(), x.shape[0], turned(rotation), held(place), y.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return y if done else None


def turned(rotation: Any) -> tuple[int, int, int]:
    """Cosines and sines as compiled code takes them."""
    cos, sin = rotation
    return cos.data_ptr(), sin.data_ptr(), cos.shape[0]


def held(place: Place) -> tuple[int, int, int, int, int]:
    """A place as compiled code takes it."""
    return *place.rows.places, place.slots.data_ptr(), place.ranges.data_ptr()


class FeedPart(_Part):
    """x + mlp(norm(x)) of one token: all neurons, or those that the step of the model names for all its sequences."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        norm, mlp = block.post_attention_layernorm, block.mlp
        layers: list[Any] = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        acting: Any = getattr(mlp, "act_fn", None)
        super().__init__(block, dtype, [norm, mlp, *layers, acting])
        self.subset: str | None = None
        weight = self.norm(norm)
        if not self.watch.plain() or self.tier is None or not weight or None in layers:
            return
        self.hidden = norm.weight.shape[-1]
        if type(mlp) is NeuronSubsetMLP:
            self._of_neurons(mlp, norm, weight)
        elif _known(mlp) and _plain_activation(acting):
            neurons = layers[2].in_features
            first = stage(layers[:2], self.hidden, [neurons, neurons], dtype)
            second = stage(layers[2:], neurons, [self.hidden], dtype)
            if first is not None and second is not None:
                activation = _ACTIVATIONS[type(acting)]
                self._compile(norm, weight, neurons, activation, (first, second), (0, 0, 0))

    def _of_neurons(self, mlp: NeuronSubsetMLP, norm: Any, weight: int) -> None:
        gate, up = mlp._modules[mlp.gate_name], mlp._modules[mlp.up_name]
        down = mlp.down
        if mlp.reference or mlp.threshold is not None or type(gate) is not DenseLinear or type(up) is not DenseLinear:
            return
        shape = (mlp.neurons, self.hidden)
        weights = (gate.weight, up.weight, down.packed)
        if gate is up or type(down) is not ChannelSparseLinear or any(one.shape != shape for one in weights):
            return
        for one in weights:
            check_weight(one, "weight")
            if one.dtype is not self.dtype or not one.is_cpu:
                return
        self.subset = mlp.name
        places = (gate.weight.data_ptr(), up.weight.data_ptr(), down.packed.data_ptr())
        self._compile(norm, weight, mlp.neurons, mlp.activation, None, places)

    def _compile(
        self, norm: Any, weight: int, neurons: int, activation: str, stages: tuple[Stage, Stage] | None, subset: Any
    ) -> None:
        assert self.tier is not None
        self.held = list(stages or ())
        self.skips = any(one.skips for one in stages or ())
        first, second = ([], []) if stages is None else (stages[0].words, stages[1].words)
        self.compiled = self.tier.module.FeedHalf(
            self.code, weight, norm.variance_epsilon, self.hidden, neurons, ACTIVATIONS[activation], first, second,
            subset,
        )  # fmt: skip

    def neurons(self, batch: int) -> tuple[int, int] | None:
        """Address and number of those that are computed, 0 and 0 for all; None: the MLP itself has to see to it."""
        if self.subset is None:
            return 0, 0
        chosen = _chosen(self.subset, batch)
        return None if chosen is None else (chosen.data_ptr(), chosen.numel())

    def run(self, x: Tensor) -> Tensor | None:
        """None where the MLP itself has to see to it."""
        active = self.neurons(x.shape[0]) if self.ready() and x.shape[2] == self.hidden else None
        if active is None:
            return None
        assert self.tier is not None
        y = torch.empty_like(x)
        done = self.compiled.run(
            self.tier.address, x.data_ptr(), x.shape[0], *active, y.data_ptr(), torch.get_num_threads()
        )
        return y if done else None


def _chosen(mlp: str, batch: int) -> Tensor | None:
    """The neurons of all sequences, where they are the same and known."""
    step = current_step()
    if step.dense or step.watched or step.neurons is None:
        return None
    chosen = step.neurons.chosen(mlp, batch)
    if not chosen or chosen[0] is None or any(one is not chosen[0] for one in chosen):
        return None
    first = chosen[0]
    fits = first.dtype is torch.int32 and first.is_cpu and first.is_contiguous() and first.numel() > 0
    return first if fits else None


def _plain_activation(acting: Any) -> bool:
    own = getattr(acting, "__dict__", {})
    return type(acting) in _ACTIVATIONS and "forward" not in own and getattr(acting, "approximate", "none") == "none"


def _known(mlp: Any) -> bool:
    """Whether an MLP computes down_proj(act_fn(gate_proj(x)) * up_proj(x))."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    names = {"down_proj", "act_fn", "gate_proj", "up_proj"}
    forward = type(mlp).forward
    return (
        "forward" not in mlp.__dict__
        and alike(forward, LlamaMLP.forward)
        and set(unwrap(forward).__code__.co_names) == names
    )
