"""Which layers an adapter is put on: all linear ones, packed ones included, and names that are none."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...errors import RecipeError
from ...kernels.modules.sparse_linear import SparseLinear

EVERY_LINEAR = "all-linear"


def include_packed(config: Any, model: nn.Module) -> None:
    """Where `config` asks for all linear layers, their names as peft finds them and those of packed layers.

    The output embedding is left out, as peft does. Nothing happens on a model without packed layers.
    """
    targets = config.target_modules
    if not isinstance(targets, str) or targets.lower() != EVERY_LINEAR:
        return
    adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    packed = {
        name
        for name, module in model.named_modules()
        if isinstance(module, SparseLinear) and module is not head and not name.startswith(adapted)
    }
    if packed:
        from peft.tuners.tuners_utils import _maybe_include_all_linear_layers  # private, so only where it is needed

        usual: Any = _maybe_include_all_linear_layers(config, model)
        config.target_modules = usual.target_modules | packed


def check_targets(config: Any, model: nn.Module) -> None:
    """RecipeError for a target name that fits no module; peft only complains when none of them does."""
    if not isinstance(config.target_modules, (set, list, tuple)):
        return
    modules = dict(model.named_modules())
    unknown = sorted(t for t in config.target_modules if not any(n == t or n.endswith(f".{t}") for n in modules))
    if unknown:
        kinds = (nn.Linear, SparseLinear)
        linear = sorted({name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, kinds)})
        raise RecipeError(
            f"target module {', '.join(repr(t) for t in unknown)} is not in the model",
            hint=f"its linear layers are called {', '.join(linear)}" if linear else None,
        )
