"""The table of activation policies. Import-free: naming one costs nothing, `get_policy_method` imports its file."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

from ..errors import RecipeError

if TYPE_CHECKING:
    from .method import Method

DEFAULT = "auto"

METHODS: dict[str, str] = {
    "auto": "gossamer.activation_sparsity.auto:Auto",
    "cats": "gossamer.activation_sparsity.cats:Cats",
    "coreinfer": "gossamer.activation_sparsity.coreinfer:CoreInfer",
    "rsparse": "gossamer.activation_sparsity.rsparse:RSparse",
    "threshold": "gossamer.activation_sparsity.threshold:Threshold",
    "wina": "gossamer.activation_sparsity.wina:Wina",
}

SUMMARIES: dict[str, str] = {
    "auto": "our own: weight-aware thresholds around centres, constants folded into biases, budgets by equal error",
    "cats": "up and down rows where the activated gate is large; gated MLPs only (Lee et al. 2024)",
    "coreinfer": "core neurons of the sequence, chosen from its prompt (Wang et al. 2024)",
    "rsparse": "large inputs times column norms, the others through a low-rank matrix (Zhang et al. 2025)",
    "threshold": "inputs above a threshold per matrix, budgets by greedy search (TEAL, Liu et al. 2024)",
    "wina": "inputs times column norms above a threshold per matrix (Chen et al. 2025)",
}


def check_policy_method(name: str) -> None:
    """RecipeError with all names and the nearest spelling, unless the method exists. Imports nothing heavy."""
    if name not in METHODS:
        near = difflib.get_close_matches(name.lower(), METHODS, n=1)
        raise RecipeError(
            f"activation policy {name!r} is unknown; allowed: {', '.join(sorted(METHODS))}",
            hint=f"did you mean {near[0]}?" if near else "gossamer methods describes them",
        )


def get_policy_method(name: str) -> type[Method]:
    """The class of the named method. RecipeError for an unknown name."""
    check_policy_method(name)
    module, _, attribute = METHODS[name].partition(":")
    found: type[Method] = getattr(importlib.import_module(module), attribute)
    return found
