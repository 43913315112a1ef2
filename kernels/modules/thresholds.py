"""What linear layers share that skip small inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import KernelError
from ..active.dispatch import active_gemv
from ..active.prepared import Prepared
from ..arguments import MAX_ROWS
from ..channel_gemv.reference import active
from .counting import counts
from .siblings import Siblings, wants_gradient
from .sparse_linear import SparseLinear, checked, dense_only
from .step import current_step

_VECTORS = ("threshold", "center", "shift", "left", "right")


class ThresholdLinear(SparseLinear):
    """A SparseLinear whose few rows skip inputs; with center, shift and a low-rank rest where `hold` gave them.

    A sparse row is y = W (x' m) + left (right (x' - x' m)) + b + shift, x' = x - center rounded to x's dtype, m = not
    |x'| <= threshold; W is not read where no row has m. Rows are sparse when they are 1 to 8, without gradient, and the
    step of the model (step.py) is not dense; all others are W x + b. Rows of more than 8 are therefore dense: correct,
    and as slow as without skipping.

    threshold and center float32 [in], shift float32 [out], left float32 [out, r], right float32 [r, in] stay float32
    when the module is cast. Layers that `share` their active inputs are computed in one call.
    """

    threshold: Tensor
    center: Tensor | None
    shift: Tensor | None
    left: Tensor | None
    right: Tensor | None
    few_rows = MAX_ROWS

    def hold_threshold(self, threshold: Tensor) -> None:
        """To be called once, by the constructor."""
        self.alone = True
        self._start: tuple[Any, Tensor | None] | None = None
        self._prepared: Prepared | None = None
        for name in _VECTORS:
            self.register_buffer(name, None, persistent=False)
        self._put("threshold", threshold, (self.in_features,))

    def hold(
        self,
        center: Tensor | None = None,
        shift: Tensor | None = None,
        left: Tensor | None = None,
        right: Tensor | None = None,
    ) -> None:
        """What sparse rows have beside the threshold. KernelError for what does not fit the matrix."""
        if (left is None) != (right is None):
            raise KernelError("left and right of a low-rank rest come together")
        rank = 0 if left is None else left.shape[-1]
        shapes = {
            "center": (self.in_features,), "shift": (self.out_features,),
            "left": (self.out_features, rank), "right": (rank, self.in_features),
        }  # fmt: skip
        for name, tensor in (("center", center), ("shift", shift), ("left", left), ("right", right)):
            self._put(name, tensor, shapes[name])
        self._start = None

    def _put(self, name: str, tensor: Tensor | None, wanted: tuple[int, ...]) -> None:
        if tensor is None:
            setattr(self, name, None)
            return
        if tensor.shape != wanted:
            matrix = f"the matrix has {self.in_features} columns and {self.out_features} rows"
            raise KernelError(f"the {name} has shape {list(tensor.shape)}, {matrix}")
        setattr(self, name, tensor.detach().float().contiguous())

    @staticmethod
    def share(layers: list[ThresholdLinear]) -> bool:
        """Compute `layers`, called one after the other with the same x, together; False if they skip differently."""
        first = layers[0]
        for other in layers[1:]:
            same = torch.equal(first.threshold, other.threshold) and first.packed.device == other.packed.device
            if not same or not _equal(first.center, other.center) or first.dtype is not other.dtype:
                return False
        group = Siblings(first, layers)
        for layer in layers:
            layer.siblings, layer.alone = group, False
        return True

    def forward(self, x: Tensor) -> Tensor:
        group = self.siblings
        if group is not None and not torch.compiler.is_compiling():
            found = group.take(self, x)  # only ever of the same x that a sibling has checked
            if found is not None:
                return found
        x = checked(x, self.in_features, self.dtype)
        if self.skips(x):
            return self.sparse(x.contiguous())
        y = self._dense_product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def skips(self, x: Tensor) -> bool:
        """Whether the rows of x are sparse ones."""
        return 1 <= x.shape[:-1].numel() <= MAX_ROWS and not wants_gradient(x) and not current_step().dense

    def sparse(self, x: Tensor) -> Tensor:
        """y of sparse rows, by the kernel or, where torch is asked for, by its definition."""
        if torch.compiler.is_compiling() or dense_only() or self.reference:
            return self._plain(x)
        group = self.siblings
        if group is None or x.is_inference():
            return _together(x, [self])[0]
        return group.compute(self, x, _together)

    def start(self) -> Tensor | None:
        """Where the kernel's sums begin: shift and bias, in the layer's dtype; None without shift."""
        if self._buffers["shift"] is None:
            return None
        if torch.compiler.is_compiling():
            return self._sum_of_biases()
        version = (self.shift, self.bias, 0 if self.bias is None else self.bias._version, self.dtype)
        if self._start is None or any(a is not b for a, b in zip(self._start[0], version, strict=True)):
            self._start = version, self._sum_of_biases()
        return self._start[1]

    def _product_of(self, x: Tensor, layers: list[ThresholdLinear]) -> tuple[list[Tensor], int | Tensor]:
        """`active_gemv` of `layers`, whose first one this is, checked where the tensors are not those of before."""
        starts = [layer.start() for layer in layers]
        own = self._buffers
        tensors = [own["threshold"], own["center"], *[layer._buffers["packed"] for layer in layers], *starts]
        done = None if self._prepared is None else self._prepared.run(x, tensors)
        if done is not None:
            return done
        weights = [layer.packed for layer in layers]
        self._prepared = Prepared.of(x, self.threshold, weights, starts, self.center)
        return active_gemv(x, self.threshold, weights, starts, self.center)

    def _sum_of_biases(self) -> Tensor:
        assert self.shift is not None
        return (self.shift if self.bias is None else self.bias.detach().float() + self.shift).to(self.dtype)

    def finished(self, y: Tensor, x: Tensor) -> Tensor:
        """y of the kernel with what the kernel does not know; x as it came."""
        vectors = self._buffers
        if vectors["left"] is None and self._parameters["bias"] is None:
            return y
        if self.left is not None and self.right is not None:
            inputs = self.centered(x)
            dropped = torch.where(active(inputs, self.threshold), inputs.new_zeros(()), inputs).float()
            y = y + functional.linear(functional.linear(dropped, self.right), self.left).to(y.dtype)
        return y if self.bias is None or self.shift is not None else y + self.bias.to(y.dtype)

    def centered(self, x: Tensor) -> Tensor:
        """x', in the dtype of x."""
        return x if self.center is None else (x.float() - self.center).to(x.dtype)

    def _plain(self, x: Tensor) -> Tensor:
        """Without the count and the company of other layers: compiled code, or torch with the dense view."""
        inputs = self.centered(x)
        if torch.compiler.is_compiling() and not self.reference:
            y = self.gemv(inputs)
        else:
            kept = inputs.masked_fill(~active(inputs, self.threshold), 0.0)
            start = self.start()
            wide = kept.float() @ self._expanded().float().t()
            y = (wide if start is None else wide + start.float()).to(x.dtype)
            counted = counts()
            if counted is not None:
                count = int(active(inputs, self.threshold).view(-1, self.in_features).any(0).count_nonzero())
                self.count(counted.of(self), count)
        return self.finished(y, x)

    def count(self, tally: Any, read: int | Tensor) -> None:
        """Note a call that read `read` inputs."""
        rank = 0 if self.left is None else self.left.shape[1]
        extra = rank * (self.in_features + self.out_features)
        tally.add(read, self.out_features, self.out_features * self.in_features, extra)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        exact = {name: getattr(self, name) for name in _VECTORS}
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            moved = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(moved.device))
        self._start = None
        return self


def _together(x: Tensor, layers: list[ThresholdLinear]) -> list[Tensor]:
    first = layers[0]
    results, read = first._product_of(x, layers)
    counted = counts()
    if counted is not None:
        for layer in layers:
            layer.count(counted.of(layer), read)
    return [layer.finished(y, x) for layer, y in zip(layers, results, strict=True)]


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
