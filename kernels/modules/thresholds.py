"""What linear layers share that skip small inputs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...errors import KernelError
from ..arguments import MAX_ROWS
from .sparse_linear import SparseLinear


class ThresholdLinear(SparseLinear):
    """A SparseLinear with a buffer `threshold`, float32 [in], which stays float32 when the module is cast.

    For 1 to 8 rows without gradient inputs with |x_i| <= threshold_i count as zero and are not read; others skip none.
    Not computed together with other layers: each has its own thresholds.
    """

    threshold: Tensor
    few_rows = MAX_ROWS

    def hold_threshold(self, threshold: Tensor) -> None:
        """To be called once, by the constructor."""
        if threshold.shape != (self.in_features,):
            raise KernelError(
                f"the threshold has shape {list(threshold.shape)}, the matrix has {self.in_features} columns"
            )
        self.register_buffer("threshold", threshold.detach().float().contiguous(), persistent=False)

    def seen(self, x: Tensor) -> Tensor:
        return x.masked_fill(x.float().abs() <= self.threshold, 0.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        exact = self.threshold
        super()._apply(fn, recurse)
        self.threshold = exact.to(self.threshold.device)
        return self
