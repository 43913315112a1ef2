"""What calibration sees of one block at sparse positions: a sample of every site's inputs, gradients, gates, prompts.

Every rank runs its own windows; samples are shown to all of them in the order of the windows, so that each makes the
same policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ...activation_sparsity.method import BlockData, Site
from ...errors import DataError
from .. import distributed
from ..blocks import StreamedModel
from ..hidden import HiddenStore
from ..prunable import owner_of
from .sites import BlockSites
from .walk import Walk

SAMPLE = 4096  # tokens per site, spread evenly over all sparse positions


def gather(
    walk: Walk,
    index: int,
    block: nn.Module,
    found: BlockSites,
    hidden: HiddenStore,
    needs: frozenset[str],
    usable: Tensor,
    gradients: Mapping[str, Tensor] | None = None,
) -> BlockData:
    """Run every window through the block and keep what `needs` names; `usable` [n, L]: tokens that are no padding."""
    model = walk.model
    if "prompts" in needs and walk.start < 2:
        raise DataError(
            "a prompt of one token has none that votes for core neurons", hint="give a larger --seqlen, or prompt"
        )
    rows = sampled(usable, walk.start)
    wanted = {site[0].name for site in found.sites if "inputs" in needs}
    downs = {parts.down: path for path, parts in found.mlps if "prompts" in needs}
    gates = {str(parts.gate): path for path, parts in found.mlps if "gates" in needs and parts.gate is not None}
    by_name = {p.name: p for p in model.prunables(index)}
    leaders = {member.name: site[0].name for site in found.sites for member in site}
    watched = [by_name[name] for name in dict.fromkeys([*wanted, *(leaders[name] for name in downs)])]
    samples: dict[str, list[Tensor]] = {}
    for window in distributed.turns(len(walk.windows)):
        seen: dict[str, Tensor] | None = None
        if window is not None:
            seen = {}
            with ExitStack() as stack:
                for name, path in gates.items():
                    hook = _keep(f"gate {path}", seen)
                    module = owner_of(block, model.block_names[index], by_name[name])
                    stack.callback(module.register_forward_hook(hook).remove)
                if watched:
                    stack.enter_context(model.observe(block, watched, _noting(seen)))
                if watched or gates:
                    model.run_block(index, block, hidden.get(window), walk.args, window)
            seen = _cut(seen, rows[window], wanted, downs, leaders, walk.start, usable[window])
        for shown in distributed.in_turn(seen, model.device):
            for name, tensor in shown.items():
                samples.setdefault(name, []).append(tensor)
    prompts = {path: samples.pop(f"prompt {path}") for path in downs.values()}
    joined = {name: torch.cat(parts) for name, parts in samples.items()}
    sites = []
    for site in found.sites:
        if site[0].name in joined:
            weights = {member.name: model.weight(block, member).float() for member in site}
            gradient = None if gradients is None else gradients[site[0].name].float()
            sites.append(Site(weights, joined[site[0].name], gradient))
    fused = {path: parts.fused for path, parts in found.mlps}
    return BlockData(
        index,
        sites,
        dict(found.mlps),
        {p: g.chunk(2, dim=1)[0] if fused[p] else g for p in gates.values() for g in [joined[f"gate {p}"]]},
        prompts,
        {path: model.weight(block, by_name[parts.down]).float().norm(dim=0) for path, parts in found.mlps},
    )


def sampled(usable: Tensor, start: int) -> list[Tensor]:
    """Positions of every window that are sampled: int64, from `start` on, no padding; about SAMPLE in all."""
    each = [torch.nonzero(row[start:]).flatten() + start for row in usable]
    step = max(1, sum(len(positions) for positions in each) // SAMPLE)
    return [positions[::step] for positions in each]


def site_gradients(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    found: BlockSites,
    hidden: Tensor,
    gradient: Tensor,
    walk: Walk,
    window: int,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """(gradient at the block's input, gradient at every site's input, that input) for one window, [tokens, in].

    Only the way through the site's own matrices counts, not another use of the same tensor.
    """
    total: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    copies: list[tuple[str, Tensor]] = []
    with ExitStack() as stack:
        for site in found.sites:
            for member in site:
                module = owner_of(block, model.block_names[index], member)
                hook = _copying(site[0].name, copies, inputs)
                stack.callback(module.register_forward_pre_hook(hook).remove)
        below = model.block_gradient(index, block, hidden, gradient, walk.args, window)
    for name, copy in copies:
        if copy.grad is not None:
            grad = copy.grad.reshape(-1, copy.shape[-1]).float()
            total[name] = total[name] + grad if name in total else grad
    return below, total, inputs


def _copying(name: str, copies: list[tuple[str, Tensor]], inputs: dict[str, Tensor]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        copy = args[0].clone()
        copy.retain_grad()
        copies.append((name, copy))
        inputs[name] = args[0].detach().reshape(-1, copy.shape[-1])
        return (copy, *args[1:])

    return hook


def _noting(seen: dict[str, Tensor]) -> Any:
    def see(prunable: Any, x: Tensor) -> None:
        seen[prunable.name] = x.float()

    return see


def _keep(name: str, into: dict[str, Tensor]) -> Any:
    def hook(_: nn.Module, __: object, output: Tensor) -> None:
        into[name] = output.detach().reshape(-1, output.shape[-1]).float()

    return hook


def _cut(
    seen: Mapping[str, Tensor],
    rows: Tensor,
    wanted: set[str],
    downs: Mapping[str, str],
    leaders: Mapping[str, str],
    start: int,
    usable: Tensor,
) -> dict[str, Tensor]:
    """The sampled rows of inputs and gates; of downs' inputs the prompt, without its first token and padding."""
    cut = {name: x[rows] for name, x in seen.items() if name in wanted or name.startswith("gate ")}
    prompt = torch.nonzero(usable[1:start]).flatten() + 1
    return cut | {f"prompt {path}": seen[leaders[name]][prompt] for name, path in downs.items()}


def check_usable(usable: Tensor, start: int, name: str) -> Sequence[int]:
    """Usable sparse tokens of every window. DataError when there is none."""
    counts = usable[:, start:].sum(1).tolist()
    if not sum(counts):
        raise DataError(
            f"{name} gives no token to calibrate on: {tuple(usable.shape)} tokens, all of them prompt or padding",
            hint="give a longer text, or a larger --seqlen",
        )
    return counts
