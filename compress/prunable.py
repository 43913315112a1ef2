"""What can be pruned inside a block, found by structure: no table of model families.

Prunable: `nn.Linear`, GPT-2's `Conv1D` (stored [in, out]) and the matrices of fused 3-D expert parameters. Routers,
convolutions, embeddings and anything else with a weight of two or more dimensions is named, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from .hf_private import Conv1D

Kind = Literal["linear", "conv1d", "expert", "head"]
HEAD = -1  # Prunable.block of the output matrix
FUSED_NAMES = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Prunable:
    """One matrix. `name`: module path, of fused experts with ".<expert>". `shape`: (out, in). `block`: or HEAD."""

    name: str
    block: int
    shape: tuple[int, int]
    kind: Kind

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def parameter(self) -> str:
        """Name of the parameter that holds it (the whole stack for an expert)."""
        return self.name.rpartition(".")[0] if self.kind == "expert" else f"{self.name}.weight"

    @property
    def expert(self) -> int | None:
        """Index in the stack of a fused expert parameter."""
        return int(self.name.rpartition(".")[2]) if self.kind == "expert" else None


def is_fused_experts(module: nn.Module) -> bool:
    """True for experts as 3-D parameters behind transformers' experts interface."""
    return all(hasattr(module, name) for name in ("is_transposed", "has_bias", "has_gate", "_apply_gate")) and any(
        isinstance(module._parameters.get(name), torch.Tensor) for name in FUSED_NAMES
    )


def find_prunables(block: nn.Module, path: str, index: int) -> tuple[list[Prunable], list[tuple[str, str]]]:
    """(prunables in module order, [(name, reason)] of all other >= 2-D weights). `path`: the block's name."""
    prunables: list[Prunable] = []
    rest: list[tuple[str, str]] = []
    refused = _routers(block) | _inside_attention(block)
    for name, module in block.named_modules():
        full = f"{path}.{name}" if name else path
        if name in refused:
            rest.append((full, refused[name]))
        elif is_fused_experts(module):
            prunables += _fused(module, full, index)
            rest += _leftovers(module, full, skip=FUSED_NAMES)
        elif isinstance(module, nn.Linear):
            prunables.append(Prunable(full, index, (module.out_features, module.in_features), "linear"))
        elif isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            prunables.append(Prunable(full, index, (outputs, inputs), "conv1d"))
        else:
            rest += _leftovers(module, full)
    return prunables, rest


def matrix_view(root: nn.Module, root_path: str, prunable: Prunable) -> torch.Tensor:
    """The [out, in] view into the parameter: writing to it writes to the model. `root_path`: name of `root`."""
    parameter = root.get_parameter(prunable.parameter.removeprefix(f"{root_path}.")).data
    return matrix_of(parameter, prunable, owner_of(root, root_path, prunable))


def matrix_of(stack: torch.Tensor, prunable: Prunable, owner: nn.Module) -> torch.Tensor:
    """The [out, in] view of `prunable` inside a tensor shaped like its parameter (weights or a mask)."""
    matrix = stack if prunable.expert is None else stack[prunable.expert]
    return matrix.t() if stored_transposed(prunable, owner) else matrix


def owner_of(root: nn.Module, root_path: str, prunable: Prunable) -> nn.Module:
    """The module that holds the prunable's parameter."""
    module = prunable.parameter.rpartition(".")[0]
    return root if module == root_path else root.get_submodule(module.removeprefix(f"{root_path}."))


def stored_transposed(prunable: Prunable, owner: nn.Module) -> bool:
    """True where the parameter stores [in, out]."""
    return prunable.kind == "conv1d" or (prunable.kind == "expert" and bool(owner.is_transposed))


def _fused(module: nn.Module, full: str, index: int) -> list[Prunable]:
    found = []
    for name in FUSED_NAMES:
        stack = module._parameters.get(name)
        if stack is None or stack.dim() != 3:
            continue
        experts, rows, cols = stack.shape
        shape = (cols, rows) if module.is_transposed else (rows, cols)
        found += [Prunable(f"{full}.{name}.{e}", index, shape, "expert") for e in range(experts)]
    return found


def _leftovers(module: nn.Module, full: str, skip: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    kind = type(module).__name__
    reason = f"{kind} is not a linear map known here (nn.Linear, Conv1D, fused experts)"
    if isinstance(module, nn.Embedding):
        reason = "an embedding is looked up, not multiplied"
    elif isinstance(module, nn.modules.conv._ConvNd):
        reason = f"{kind} is a convolution"
    elif "router" in kind.lower() or "gate" in kind.lower():
        reason = f"{kind} is a router"
    return [
        (
            f"{full}.{name}",
            "a 3-D stack outside transformers' experts interface" if _is_stack(parameter, kind) else reason,
        )
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2 and name not in skip and not name.endswith("bias")
    ]


def _is_stack(parameter: torch.Tensor, kind: str) -> bool:
    return parameter.dim() == 3 and "expert" in kind.lower()


def _routers(block: nn.Module) -> dict[str, str]:
    """Linears called router, and Linears beside experts that give one score per expert or one gate value."""
    found = {
        name: "a router"
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and "router" in f"{name}.{type(module).__name__}".lower()
    }
    for name, count in _expert_stacks(block):
        holder, _, own = name.rpartition(".")
        parent = block.get_submodule(holder) if holder else block
        for child_name, child in parent.named_children():
            linears = [(n, m) for n, m in child.named_modules() if isinstance(m, nn.Linear)]
            if child_name != own and len(linears) == 1 and linears[0][1].out_features in (count, 1):
                path = ".".join(part for part in (holder, child_name, linears[0][0]) if part)
                found.setdefault(path, "a linear router or gate of a mixture of experts")
    return found


def _expert_stacks(block: nn.Module) -> Iterator[tuple[str, int]]:
    """(path, number of experts) of modules called experts: lists, and stacks of 3-D parameters."""
    for name, module in block.named_modules():
        stacks = [p for p in module.parameters(recurse=False) if p.dim() == 3]
        if "expert" not in f"{name.rpartition('.')[2]}.{type(module).__name__}".lower():
            continue
        if stacks:
            yield name, stacks[0].shape[0]
        elif isinstance(module, nn.ModuleList):
            yield name, len(module)


def _inside_attention(block: nn.Module) -> dict[str, str]:
    """Linears whose weights torch's fused attention reads directly: their inputs cannot be seen."""
    found = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            for child, linear in module.named_modules():
                if isinstance(linear, nn.Linear):
                    found[f"{name}.{child}" if name else child] = "nn.MultiheadAttention uses it without calling it"
    return found
