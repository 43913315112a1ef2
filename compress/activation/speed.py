"""Which activation sparsity gives a wanted speed-up at decode, from the kernels' times on this machine.

Measured are the distinct shapes of the model's linear maps, dense and with some shares of the inputs skipped; times of
other shares lie on straight lines between. The speed-up is that of all linear maps of a token, the output matrix, which
stays dense, among them. Attention over the cache is not in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch

from ...errors import RecipeError
from ...kernels.bench.cases_channel import skipping
from ...kernels.bench.rounds import Contender, run_rounds, summary
from ...kernels.channel_gemv.dispatch import channel_gemv, transpose
from ...kernels.dense_gemv.dispatch import dense_gemv
from ..blocks import StreamedModel

SHARES = (0.0, 0.3, 0.5, 0.7, 0.9)
ROUNDS = 15
_DENSE = "dense"

Shape = tuple[int, int]
Table = Mapping[Shape, Mapping[str, float]]


def sparsity_for(model: StreamedModel, speedup: float, log: Callable[[str], None]) -> float:
    """The sparsity at which the linear maps of a token take 1 / `speedup` of their dense time.

    RecipeError, with what is reachable, when no sparsity does.
    """
    shapes = Counter(p.shape for i in range(model.num_blocks) for p in model.prunables(i) if p.kind != "expert")
    head = model.head()
    rest = [] if head is None else [head.shape]
    dtype = model.config.dtype if model.config.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    table = {shape: measured(shape, dtype) for shape in {*shapes, *rest}}
    reached = {share: expected(table, shapes, rest, share) for share in (k / 100 for k in range(91))}
    log("expected speed-up of the linear maps by activation sparsity: " + described(reached))
    for share, factor in reached.items():
        if factor >= speedup:
            return share
    best = max(reached, key=lambda share: reached[share])
    raise RecipeError(
        f"no activation sparsity makes this model's linear maps {speedup:g} times as fast here: {best:.0%} gives "
        f"{reached[best]:.2f} times",
        hint=f"ask for at most {int(reached[best] * 100) / 100:g}",
    )


def measured(shape: Shape, dtype: torch.dtype, rounds: int = ROUNDS) -> dict[str, float]:
    """Microseconds of one row times a random matrix: "dense", and by share of inputs skipped."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator).to(dtype)
    x = torch.randn(1, shape[1], generator=generator).to(dtype)
    weight_t = transpose(weight)
    contenders = [Contender(_DENSE, lambda: dense_gemv(x, weight))]
    for share in SHARES:
        limit = skipping(x, share)[0]
        contenders.append(Contender(repr(share), lambda limit=limit: channel_gemv(x, weight_t, limit)))
    with torch.inference_mode():
        return {name: summary(times).decile for name, times in run_rounds(contenders, rounds).items()}


def expected(table: Table, shapes: Mapping[Shape, int], rest: Sequence[Shape], share: float) -> float:
    """Speed-up when every linear map skips `share`; a map that is slower for it stays dense."""
    always = sum(table[shape][_DENSE] for shape in rest)
    dense = sparse = 0.0
    for shape, count in shapes.items():
        dense += count * table[shape][_DENSE]
        sparse += count * min(table[shape][_DENSE], _at(table[shape], share))
    return (always + dense) / (always + sparse)


def described(reached: Mapping[float, float]) -> str:
    """A few of the figures."""
    return ", ".join(f"{share:.0%} {reached[share]:.2f}x" for share in (0.3, 0.5, 0.7, 0.9))


def _at(times: Mapping[str, float], share: float) -> float:
    for low, high in zip(SHARES, SHARES[1:], strict=False):
        if share <= high:
            part = (share - low) / (high - low)
            return times[repr(low)] + part * (times[repr(high)] - times[repr(low)])
    return times[repr(SHARES[-1])]
