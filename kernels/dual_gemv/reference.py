"""The result of `dual_gemv` in plain torch: `channel_gemv` with the dense matrix, +0.0 where nothing is kept."""

from __future__ import annotations

from torch import Tensor

from ..bitmask import reference as bitmask
from ..channel_gemv import reference as channel
from .layout import unpack


def dual_gemv(x: Tensor, packed: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], zero where not active, times the packed matrix [out, in] transposed, plus bias; rounded once.

    Channels that no row needs are not read. In the others, pruned entries multiply as +0.0, so an active infinity in x
    makes NaN of every output that is pruned there.
    """
    bits, values, cols = unpack(packed.cpu())
    weight_t = bitmask.expand(values, bits, cols).t().to(x.device)
    return channel.channel_gemv(x, weight_t, threshold, bias)
