"""Which matrices of a block an activation policy may use: found by running the block once, no table of families.

A site is a group of matrices with one input that sees every token of the window once; experts, which see some tokens,
stay dense. An MLP is found by its numbers: matrices a and b with the same input, and a later one whose input is
act(a x) * (b x) (or act(b x) * (a x), or the same with a and b fused in one matrix, or act(a x)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...activation_sparsity.base import MLPParts
from ...activation_sparsity.reference import ACT
from ..blocks import BlockArgs, Prunable, StreamedModel
from ..prunable import owner_of

TOLERANCE = 0.02  # of the input's norm; bfloat16 rounding stays far below

_NAMES = {
    "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh",
}  # fmt: skip


@dataclass(frozen=True)
class BlockSites:
    """`sites`: groups in call order. `mlps`: (module path, parts). `dense`: matrices no policy can touch."""

    sites: list[list[Prunable]]
    mlps: list[tuple[str, MLPParts]]
    dense: list[Prunable]

    @property
    def maps(self) -> list[Prunable]:
        """Every matrix of the sites."""
        return [member for site in self.sites for member in site]


def find_sites(
    model: StreamedModel, index: int, block: nn.Module, hidden: Tensor, args: BlockArgs, window: int = 0
) -> BlockSites:
    """The sites and MLPs of block `index`; `hidden` [1, L, d] is its input in that window."""
    groups = model.input_groups(index, block, hidden, args, window)
    seen: dict[str, list[Tensor]] = {}
    given: dict[str, Tensor] = {}
    path = model.block_names[index]
    leaders = [group[0] for group in groups if group[0].kind != "expert"]
    handles = []
    for prunable in (member for group in groups for member in group if member.kind != "expert"):
        module = owner_of(block, path, prunable)
        handles.append(module.register_forward_hook(_keep(prunable.name, given)))
    try:
        if leaders:
            with model.observe(block, leaders, lambda p, x: seen.setdefault(p.name, []).append(x.clone())):
                model.run_block(index, block, hidden, args, window)
    finally:
        for handle in handles:
            handle.remove()
    tokens = hidden.shape[1]
    sites = [g for g in groups if len(seen.get(g[0].name, [])) == 1 and len(seen[g[0].name][0]) == tokens]
    inputs = {g[0].name: seen[g[0].name][0].float() for g in sites}
    inside = {member.name for site in sites for member in site}
    dense = [p for p in model.prunables(index) if p.name not in inside]
    named = _named(model.config.get_text_config())
    mlps = [found for down in sites if (found := _mlp(down, sites, inputs, given, named)) is not None]
    return BlockSites(sites, mlps, dense)


def _keep(name: str, into: dict[str, Tensor]) -> Callable[..., None]:
    def hook(_: nn.Module, __: object, output: Tensor) -> None:
        into[name] = output.detach().reshape(-1, output.shape[-1]).float()

    return hook


def _named(config: object) -> str | None:
    """The activation that the configuration names, as MLPParts calls it."""
    said = (getattr(config, name, None) for name in ("hidden_activation", "hidden_act", "activation_function"))
    return _NAMES.get(next((str(name) for name in said if name is not None), ""))


def _mlp(
    down: Sequence[Prunable],
    sites: list[list[Prunable]],
    inputs: dict[str, Tensor],
    given: dict[str, Tensor],
    named: str | None,
) -> tuple[str, MLPParts] | None:
    """Of ways within the tolerance, one with the activation `named`: rounding hides gelu from its approximation."""
    inner = inputs[down[0].name]
    if len(down) > 1:
        return None
    neurons = inner.shape[1]
    ways = [way for site in sites if site is not down for way in _matches(site, neurons, inner, given)]
    near = [way for way in ways if way[0] <= TOLERANCE]
    if not near:
        return None
    _, gate, up, activation = min(near, key=lambda way: (way[3] != named, way[0]))
    return _common([up, down[0].name]), MLPParts(gate, up, down[0].name, activation, neurons)


def _matches(
    site: Sequence[Prunable], neurons: int, inner: Tensor, given: dict[str, Tensor]
) -> Iterator[tuple[float, str | None, str, str]]:
    """(distance relative to the norm of `inner`, gate, up, activation) of every way to make it from this site."""
    wide = [p.name for p in site if p.shape[0] == neurons]
    fused = [p.name for p in site if p.shape[0] == 2 * neurons]
    for activation, act in ACT.items():
        for up in wide:
            yield _distance(act(given[up]), inner), None, up, activation
            for gate in wide:
                if gate != up:
                    yield _distance(act(given[gate]) * given[up], inner), gate, up, activation
        for both in fused:
            gate_x, up_x = given[both].chunk(2, dim=1)
            yield _distance(act(gate_x) * up_x, inner), both, both, activation


def _distance(one: Tensor, other: Tensor) -> float:
    size = torch.linalg.vector_norm(other)
    return float(torch.linalg.vector_norm(one - other) / size) if size > 0 else float("inf")


def _common(names: list[str]) -> str:
    """The module path that all have in common."""
    parts = [name.split(".") for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)
