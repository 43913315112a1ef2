"""Where the entries of a sparse delta lie: positions of a [rows, cols] matrix, sorted, as CSR or as flat numbers.

`rowptr` int32 [rows + 1] and `columns` int32 [K] are what a layer holds; flat position = row * cols + column, int64.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...pruning.mask import Mask


def to_csr(flat: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Ascending flat positions -> (rowptr, columns)."""
    edges = torch.arange(rows + 1, device=flat.device) * cols
    return torch.searchsorted(flat, edges).to(torch.int32), (flat % cols).to(torch.int32)


def to_flat(rowptr: Tensor, columns: Tensor, cols: int) -> Tensor:
    """(rowptr, columns) -> ascending flat positions, int64 [K]."""
    rows = torch.arange(len(rowptr) - 1, device=rowptr.device)
    return torch.repeat_interleave(rows * cols, rowptr.diff().long(), output_size=len(columns)) + columns


def merged(ascending: Tensor, more: Tensor) -> Tensor:
    """Indices that put torch.cat([ascending, more]) in ascending order; both ascend, and nothing is in both."""
    total, device = len(ascending) + len(more), more.device
    place = torch.searchsorted(ascending, more) + torch.arange(len(more), device=device)
    order = torch.empty(total, dtype=torch.int64, device=device)
    others = torch.ones(total, dtype=torch.bool, device=device)
    others[place] = False
    order[place] = torch.arange(len(ascending), total, device=device)
    order[others] = torch.arange(len(ascending), device=device)
    return order


class ByColumn:
    """Positions column by column, made when they are first asked for and again when they have changed."""

    def __init__(self) -> None:
        self._made_of: tuple[Tensor, int] | None = None

    def __call__(self, rowptr: Tensor, columns: Tensor, cols: int) -> tuple[Tensor, Tensor, Tensor]:
        """(colptr [cols + 1], rows [K], order [K]), int32: entry order[i] is the i-th, column by column."""
        if self._made_of is None or self._made_of[0] is not columns or self._made_of[1] != columns._version:
            self._made_of = columns, columns._version
            order = columns.argsort(stable=True)
            rows = torch.arange(len(rowptr) - 1, dtype=torch.int32, device=columns.device)
            rows = rows.repeat_interleave(rowptr.diff().long(), output_size=len(columns))
            edges = torch.arange(cols + 1, dtype=torch.int32, device=columns.device)
            colptr = torch.searchsorted(columns[order], edges).to(torch.int32)
            self._made = colptr, rows[order], order.to(torch.int32)
        return self._made


def check(rowptr: Tensor, columns: Tensor, rows: int, cols: int, name: str) -> None:
    """CheckpointError unless these are strictly ascending positions of a [rows, cols] matrix."""
    counts = rowptr.diff()
    if len(rowptr) != rows + 1 or int(rowptr[0]) != 0 or bool((counts < 0).any()) or int(rowptr[-1]) != len(columns):
        raise CheckpointError(
            f"{name}: row counts for {len(rowptr) - 1} rows and {int(rowptr[-1])} entries, "
            f"the layer has {rows} rows and the file {len(columns)} columns",
            hint="the adapter belongs to another model, or its file is damaged",
        )
    if len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < cols:
        raise CheckpointError(
            f"{name}: column {int(columns.max())} of a layer with {cols} inputs",
            hint="the adapter belongs to another model, or its file is damaged",
        )
    if bool((to_flat(rowptr, columns, cols).diff() <= 0).any()):
        raise CheckpointError(f"{name}: columns are not in ascending order", hint="the adapter's file is damaged")


def generator(seed: int, name: str) -> torch.Generator:
    """A generator of its own for every layer: what one layer draws does not depend on the others."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def draw(count: int, rows: int, cols: int, source: torch.Generator, allowed: Mask | None = None) -> Tensor:
    """`count` different positions, each set equally likely, ascending, int64, on the CPU.

    Memory is in proportion to `count` while that is small against the matrix. `count` must not exceed what is allowed.
    """
    size = rows * cols
    available = size if allowed is None else size - allowed.zeros
    if not 0 <= count <= available:
        raise ValueError(f"{count} positions of {available}")
    if 4 * count > available:
        every = torch.arange(size) if allowed is None else allowed.to_bool().reshape(-1).nonzero().flatten().cpu()
        return every[torch.randperm(len(every), generator=source)[:count]].sort().values
    found = torch.empty(0, dtype=torch.int64)
    share = available / size
    while len(found) < count:
        more = torch.randint(size, (int(1.1 * (count - len(found)) / share) + 16,), generator=source)
        found = torch.cat([found, more if allowed is None else more[is_kept(allowed, more)]]).unique()
    return found[torch.randperm(len(found), generator=source)[:count]].sort().values


def is_kept(mask: Mask, flat: Tensor) -> Tensor:
    """Whether the mask keeps each of these flat positions, bool; only their bytes of the mask are read."""
    row, column = flat // mask.cols, flat % mask.cols
    byte = mask.bits.to(flat.device)[row, column // 8]
    return ((byte >> (column % 8).to(torch.uint8)) & 1).bool()


def inverted(mask: Mask) -> Mask:
    """The mask that keeps exactly what `mask` drops."""
    return Mask.from_bool(~mask.to_bool(), mask.pattern)


def contains(ascending: Tensor, flat: Tensor) -> Tensor:
    """Whether each of `flat` is among the `ascending` positions, bool."""
    if not len(ascending):
        return torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    place = torch.searchsorted(ascending, flat).clamp(max=len(ascending) - 1)
    return ascending[place] == flat
