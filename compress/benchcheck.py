"""Whether a contender of a speed benchmark computes what it should: its kernels against torch's dense products."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..kernels.modules.neuron_subset import NeuronSubsetMLP
from ..kernels.modules.sparse_linear import dense_products
from ..kernels.modules.thresholds import ThresholdLinear
from .heads import new_cache

TOLERANCE = 0.04  # relative error in 16-bit arithmetic, both against the product with dense weights


def relative_error(model: Any, setting: Callable[[], AbstractContextManager[object]], ids: Tensor) -> float:
    """||found - wanted|| / ||wanted|| of the last logits, wanted by torch's products with dense weights; inf for nan.

    Where inputs below a threshold are skipped: the largest such error of a single layer on the input it got. There two
    right results part from each other as soon as an input that lies at its threshold is rounded differently, and block
    by block further (0.44 at the end of 22 random ones), so the logits prove nothing.
    """
    with torch.no_grad():
        layers = _skipping(model)
        if layers:
            with setting():
                return _largest(model, layers, ids)
        with setting():
            found = _last_logits(model, ids)
        with dense_products():
            return _between(found, _last_logits(model, ids))


def _skipping(model: Any) -> list[ThresholdLinear]:
    """The layers that skip inputs by themselves; that of an MLP of core neurons is told which, by the MLP."""
    told = {module.down for module in model.modules() if isinstance(module, NeuronSubsetMLP)}
    return [module for module in model.modules() if isinstance(module, ThresholdLinear) and module not in told]


def _largest(model: Any, layers: list[ThresholdLinear], ids: Tensor) -> float:
    errors: list[float] = []

    def compare(layer: ThresholdLinear, args: tuple[Tensor], y: Tensor) -> None:
        x = args[0]
        if layer.skips(x):
            with dense_products():
                errors.append(_between(y, layer.sparse(x.contiguous())))

    handles = [layer.register_forward_hook(compare) for layer in layers]
    try:
        _last_logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return max(errors, default=float("inf"))  # a model that never skipped proves nothing


def _between(found: Tensor, wanted: Tensor) -> float:
    size = wanted.float().norm()
    error = ((found.float() - wanted.float()).norm() / size.clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def _last_logits(model: Any, ids: Tensor) -> Tensor:
    """After a pass over all but the last token and one over that: both kinds of product take part."""
    out = model(input_ids=ids[:, :-1], past_key_values=new_cache(model, ids.shape[1]), use_cache=True)
    return model(input_ids=ids[:, -1:], past_key_values=out.past_key_values, use_cache=True).logits[:, -1].float()
