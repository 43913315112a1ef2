"""An adapter's tensors as its file has them: sorted CSR, narrow columns, one count per row.

    <layer>.spiel_values    float32 or bfloat16 [K], row by row
    <layer>.spiel_columns   uint16 [K], ascending within a row (int32 for more than 65536 inputs)
    <layer>.spiel_counts    uint16 [out], entries of each row (int32 for more than 65535 inputs)

That is 4.1 bytes per entry in bfloat16 for a 2048 x 2048 matrix at density 0.01.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import CheckpointError
from .positions import check

VALUES, COLUMNS, COUNTS = "spiel_values", "spiel_columns", "spiel_counts"
ROWPTR = "spiel_rowptr"  # in memory instead of COUNTS
_NARROW = 1 << 16


def encode(values: Tensor, rowptr: Tensor, columns: Tensor, cols: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is stored of one layer, by the names above."""
    return {
        VALUES: values.detach().to(dtype),
        COLUMNS: columns.to(torch.uint16 if cols <= _NARROW else torch.int32),
        COUNTS: rowptr.diff().to(torch.uint16 if cols < _NARROW else torch.int32),
    }


def decode(stored: dict[str, Tensor], rows: int, cols: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """(values float32, rowptr, columns) of one layer [rows, cols].

    Raises:
        CheckpointError: a tensor is missing, has another type, or they do not fit each other or the layer.
    """
    missing = [key for key in (VALUES, COLUMNS, COUNTS) if key not in stored]
    if missing:
        raise CheckpointError(
            f"the adapter has no {', '.join(missing)} for {name}",
            hint="it was made for another model, or for other target modules",
        )
    values, columns, counts = stored[VALUES], stored[COLUMNS], stored[COUNTS]
    kinds = (values.is_floating_point(), not columns.is_floating_point(), not counts.is_floating_point())
    if not all(kinds) or any(tensor.dim() != 1 for tensor in (values, columns, counts)):
        raise CheckpointError(f"{name}: tensors of an adapter are vectors of floats, columns and counts")
    if len(values) != len(columns):
        raise CheckpointError(f"{name}: {len(values)} values for {len(columns)} columns", hint="the file is damaged")
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"{name}: values are not finite", hint="the training that wrote it has diverged")
    wide = counts.to(torch.int64)
    if len(wide) and not 0 <= int(wide.min()) <= int(wide.max()) <= cols:
        raise CheckpointError(f"{name}: a row of {int(wide.max())} entries in a layer with {cols} inputs")
    rowptr = torch.cat([wide.new_zeros(1), wide.cumsum(0)]).to(torch.int32)
    columns = columns.to(torch.int32)
    check(rowptr, columns, rows, cols, name)
    return values.to(torch.float32), rowptr, columns
