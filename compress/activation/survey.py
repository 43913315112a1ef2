"""Error curves of all sites in the dense model; for methods that weigh errors by the loss, its gradient as well.

Forward: every block's input is stored. Then, where gradients are needed, from the last block to the first: the block
runs again with gradients, which gives those at its sites and at its own input. The loss is that of tokens drawn from
the model's own prediction at sparse positions, so that mean squares of gradients are the Fisher information.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...activation_sparsity.curve import Curve
from ...activation_sparsity.method import BlockData, Site
from .. import distributed
from ..hidden import HiddenStore
from ..timing import Clock
from .gather import gather, sampled, site_gradients

if TYPE_CHECKING:
    from .calibrate import Calibration


def survey(run: Calibration) -> dict[str, Curve]:
    """Curves by the leader of each site."""
    if "gradient" in run.method.needs:
        return _with_gradients(run)
    curves: dict[str, Curve] = {}
    hidden = run.walk.embedded()
    run.progress.stage("activation survey", run.model.num_blocks)
    clock = Clock(run.model.num_blocks)
    try:
        for index in range(run.model.num_blocks):
            block = run.walk.block(index)
            data = gather(run.walk, index, block, run.found[index], hidden, run.method.needs, run.usable)
            curves |= run.method.survey(data)
            run.walk.advance(index, block, hidden, None)
            run.progress.windows("survey", index + 1, run.model.num_blocks, clock.tick()[1], "blocks")
    finally:
        hidden.close()
    return curves


def _with_gradients(run: Calibration) -> dict[str, Curve]:
    model, walk = run.model, run.walk
    rows = sampled(run.usable, walk.start)
    share = run.memory_bytes // (2 * model.num_blocks + 2)
    inputs = [
        HiddenStore(run.scratch / f"input-{index}-{distributed.rank()}", share) for index in range(model.num_blocks)
    ]
    followed = distributed.followed(len(walk.windows))
    hidden = walk.embedded()
    gradient = HiddenStore(run.scratch / f"gradient-{distributed.rank()}", share)
    curves: dict[str, Curve] = {}
    clock = Clock(2 * model.num_blocks)
    try:
        for index in range(model.num_blocks):
            for window in followed:
                inputs[index].put(window, hidden.get(window))
            walk.advance(index, walk.block(index), hidden, None)
            run.progress.windows("survey", index + 1, 2 * model.num_blocks, clock.tick()[1], "blocks")
        with model.outer():
            for window in followed:
                loss = _sampled_loss(walk.start, window)
                gradient.put(window, model.output_gradient(hidden.get(window), walk.args, window, loss))
        for index in reversed(range(model.num_blocks)):
            block = walk.block(index)
            xs: dict[str, list[Tensor]] = {}
            gs: dict[str, list[Tensor]] = {}
            for window in distributed.turns(len(walk.windows)):
                seen = None
                if window is not None:
                    below, found, x = site_gradients(
                        model,
                        index,
                        block,
                        run.found[index],
                        inputs[index].get(window),
                        gradient.get(window),
                        walk,
                        window,
                    )
                    gradient.put(window, below)
                    seen = {f"g {name}": value[rows[window]] for name, value in found.items()}
                    seen |= {f"x {name}": value[rows[window]].float() for name, value in x.items()}
                for shown in distributed.in_turn(seen, model.device):
                    for key, value in shown.items():
                        (gs if key[0] == "g" else xs).setdefault(key[2:], []).append(value)
            inputs[index].close()
            found = {name: torch.cat(parts) for name, parts in gs.items()}
            distributed.on_main(
                lambda found=found, index=index: save_file(
                    {name: value.to(torch.bfloat16) for name, value in found.items()},
                    run.keep / f"gradient-{index:05d}.safetensors",
                )
            )
            sites = [
                Site(
                    {p.name: model.weight(block, p).float() for p in site},
                    torch.cat(xs[site[0].name]),
                    found[site[0].name].to(torch.bfloat16).float(),
                )
                for site in run.found[index].sites
            ]
            curves |= run.method.survey(BlockData(index, sites, dict(run.found[index].mlps)))
            run.progress.windows(
                "survey", 2 * model.num_blocks - index, 2 * model.num_blocks, clock.tick()[1], "blocks"
            )
    finally:
        for store in [*inputs, hidden, gradient]:
            store.close()
    return curves


def _sampled_loss(start: int, window: int):  # type: ignore[no-untyped-def]
    """Summed cross-entropy of tokens drawn from the prediction at positions from `start` on; seeded by the window."""

    def loss(logits: Tensor) -> Tensor:
        log_p = logits[start:].log_softmax(-1)
        generator = torch.Generator().manual_seed(window)
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
        return -log_p.gather(1, drawn).sum()

    return loss
