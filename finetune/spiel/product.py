"""The products of a linear layer with a sparse delta S [out, in], forward and backward, by three back ends.

    csr      x S^T by a sparse product; the gradient of S by a sampled product: for CPUs at low density (kernels/csr)
    dense    x S^T with S written out as a dense matrix for the moment of the product: for any device, dtype and base
    weight   x (W + S)^T + b with a copy of the base weight W: one product fewer where W has the precision of S

None of them keeps a matrix between forward and backward: saved are x, the delta and references to W. Who watches
(growth of new entries) may ask for the dense gradient dW = gy^T x: every back end then forms it, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ...kernels.csr.dispatch import csr_linear, csr_sampled, densest
from .positions import ByColumn, to_flat

BACKENDS = ("csr", "dense", "weight")
BLOCK = 1 << 22  # entries of dW that exist at a time


class Watch(Protocol):
    """Sees the gradient dW of the whole matrix in backward passes, entries without a delta included.

    `matrix`, read in every pass: "needed", dW is formed for `see`; "welcome", `see` where it is formed anyway, else
    `outer`; "none", always `outer`.
    """

    @property
    def matrix(self) -> Literal["needed", "welcome", "none"]: ...

    def begin(self, first: int | None) -> None:
        """A backward pass of this layer starts. `first`: the number of the pass where the delta has no gradient yet.

        Then an update begins, and what earlier passes gave was either used or thrown away (a loss scale that
        overflowed skips the update). A layer that is called twice begins twice with the same number.
        """

    def see(self, first_row: int, block: Tensor) -> None:
        """Rows of dW, in the delta's dtype; may be overwritten."""

    def outer(self, gy: Tensor, x: Tensor) -> None:
        """The two factors of dW instead, [tokens, out] and [tokens, in]."""

    def end(self, gradient: Tensor) -> None:
        """The pass is over; `gradient` [K] is that of the delta's own entries."""


def choose(device: str, weight_dtype: torch.dtype | None, density: float) -> str:
    """The back end for a layer. `weight_dtype`: of a base whose plain weight may be copied, else None."""
    if density <= densest(device):
        return "csr"
    return "weight" if weight_dtype in (torch.float32, torch.float64) else "dense"


def delta_product(
    x: Tensor,
    values: Tensor,
    rowptr: Tensor,
    columns: Tensor,
    rows: int,
    backend: str,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    watch: Watch | None = None,
    by_column: ByColumn | None = None,
) -> Tensor:
    """x [..., in] times S^T, or with back end "weight" times (W + S)^T plus the bias; [..., out] in x's dtype.

    Args:
        values: [K], float32 or float64; gets its gradient in that dtype.
        rowptr, columns: the positions of S as in `positions`.
        rows: out.
        weight, bias: of the base, for back end "weight".
        watch: sees the gradient of the whole matrix.
        by_column: what keeps the order of the entries by columns from call to call, for back end "csr".
    """
    if backend not in BACKENDS:
        raise ValueError(f"back end {backend!r}; known: {', '.join(BACKENDS)}")
    if (backend == "weight") != (weight is not None):
        raise ValueError("a weight goes with back end 'weight', and only with it")
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = _DeltaProduct.apply(
        flat, values, rowptr, columns, weight, bias, rows, backend, watch, by_column or ByColumn()
    )
    return y.view(*x.shape[:-1], rows)


class _DeltaProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        rowptr: Tensor,
        columns: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rows: int,
        backend: str,
        watch: Watch | None,
        by_column: ByColumn,
    ) -> Tensor:
        ctx.save_for_backward(x, values, rowptr, columns, weight if x.requires_grad else None)
        ctx.rows, ctx.backend, ctx.watch, ctx.by_column = rows, backend, watch, by_column
        with torch.autocast(x.device.type, enabled=False):
            if backend == "csr":
                return csr_linear(x.to(values.dtype), rowptr, columns, values).to(x.dtype)
            matrix = _matrix(x, values, rowptr, columns, rows, weight)
            return functional.linear(x, matrix, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, values, rowptr, columns, weight = ctx.saved_tensors
        gx = gs = gb = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                gx = _input_gradient(ctx, gy, x, values, rowptr, columns, weight)
            if ctx.needs_input_grad[1]:
                gs = _delta_gradient(ctx, gy, x, values, rowptr, columns)
            if ctx.needs_input_grad[5]:
                gb = gy.sum(0)
        return gx, gs, None, None, None, gb, None, None, None, None


def _matrix(x: Tensor, values: Tensor, rowptr: Tensor, columns: Tensor, rows: int, weight: Tensor | None) -> Tensor:
    """S as a dense matrix in x's dtype, or W + S in W's."""
    cols = x.shape[1]
    if weight is None:
        made = torch.zeros(rows, cols, dtype=x.dtype, device=x.device)
        made.view(-1)[to_flat(rowptr, columns, cols)] = values.to(x.dtype)
        return made
    made = weight.clone(memory_format=torch.contiguous_format)
    place = to_flat(rowptr, columns, cols)
    made.view(-1)[place] = (made.view(-1)[place] + values).to(made.dtype)
    return made


def _input_gradient(
    ctx: Any, gy: Tensor, x: Tensor, values: Tensor, rowptr: Tensor, columns: Tensor, weight: Tensor | None
) -> Tensor:
    if ctx.backend == "csr":
        colptr, rows, order = ctx.by_column(rowptr, columns, x.shape[1])
        return csr_linear(gy.to(values.dtype), colptr, rows, values.index_select(0, order)).to(x.dtype)
    return gy @ _matrix(x, values, rowptr, columns, ctx.rows, weight)


def _delta_gradient(ctx: Any, gy: Tensor, x: Tensor, values: Tensor, rowptr: Tensor, columns: Tensor) -> Tensor:
    watch: Watch | None = ctx.watch
    if watch is not None:
        watch.begin(_pass_number() if values.grad is None or not bool(values.grad.any()) else None)
    formed = ctx.backend != "csr" or (watch is not None and watch.matrix == "needed")
    sees = watch is not None and formed and watch.matrix != "none"
    if ctx.backend == "csr":
        gy, x = gy.to(values.dtype), x.to(values.dtype)
    if watch is not None and not sees:
        watch.outer(gy, x)
    if not formed:
        gradient = csr_sampled(gy, x, rowptr, columns)
    else:
        gradient = torch.empty_like(values)
        for first, start, stop, block in _gradient_rows(gy, x, rowptr):
            block = block.to(values.dtype)
            place = to_flat(rowptr[first : first + len(block) + 1] - start, columns[start:stop], x.shape[1])
            gradient[start:stop] = block.reshape(-1)[place]
            if watch is not None and sees:
                watch.see(first, block)
    if watch is not None:
        watch.end(gradient)
    return gradient


def _pass_number() -> int:
    return torch._C._current_graph_task_id()  # torch has no public name for it


def _gradient_rows(gy: Tensor, x: Tensor, rowptr: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
    """(first row, first entry, last entry, rows of gy^T x), some rows at a time."""
    rows, height = gy.shape[1], max(1, BLOCK // max(1, x.shape[1]))
    edges = [*range(0, rows, height), rows]
    entries = rowptr[edges].tolist()
    for i in range(len(edges) - 1):
        yield edges[i], entries[i], entries[i + 1], gy[:, edges[i] : edges[i + 1]].t() @ x
