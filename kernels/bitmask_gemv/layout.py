"""The machine layout of a bitmask matrix in plain torch: this file and README.md define it.

One uint8 tensor: header (8 integers), offsets, stream, 64 bytes of zeros. The stream is tiles of 4 rows x 128 columns:
64 bytes of masks, then the kept values of its rows, 2 bytes each. The arguments are taken as checked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..bitmask import reference as bitmask

ROWS, COLS = 4, 128
MASK_WORDS = ROWS * COLS // 16  # masks of a tile, in units of 2 bytes
MAX_PANEL = 4096
TAIL = 64
MAGIC = int.from_bytes(b"Gsmtile1", "little")
MAX_LENGTH = 1 << 31
DTYPES = {1: torch.bfloat16, 2: torch.float16}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shape:
    """What follows from rows and columns: panels of columns, tiles, sizes in bytes."""

    rows: int
    cols: int

    @property
    def row_tiles(self) -> int:
        return -(-self.rows // ROWS)

    @property
    def panel_cols(self) -> int:
        """Columns of every panel but the last: equal shares of at most 4096, rounded up to whole tiles."""
        panels = -(-self.cols // MAX_PANEL)
        share = -(-self.cols // panels) if panels else COLS
        return -(-share // COLS) * COLS

    @property
    def panels(self) -> list[int]:
        """Tiles along the columns of each panel."""
        widths = range(0, self.cols, self.panel_cols)
        return [-(-min(self.panel_cols, self.cols - first) // COLS) for first in widths]

    @property
    def offsets(self) -> int:
        return len(self.panels) * self.row_tiles + 1

    @property
    def stream(self) -> int:
        """First byte of the stream."""
        return -(-(64 + 8 * self.offsets) // 64) * 64

    def size(self, nnz: int) -> int:
        return self.stream + 2 * (MASK_WORDS * sum(self.panels) * self.row_tiles + nnz) + TAIL


class Fault(Exception):
    """What is wrong with a tensor that should be packed; `dispatch` makes a KernelError of it."""


def pack(bits: Tensor, values: Tensor, cols: int) -> Tensor:
    """From row bits uint8 [rows, ceil(cols / 8)] and values [nnz] to the packed tensor uint8 [size]."""
    shape = Shape(bits.shape[0], cols)
    mask = bitmask.unpack_bits(bits, cols)
    weight = torch.zeros(mask.shape, dtype=torch.int16).masked_scatter_(mask, values.view(torch.int16))
    masks, weights = _to_tiles(mask, shape), _to_tiles(weight, shape)
    counts, nnz = masks.sum(1), values.numel()
    lengths = counts + MASK_WORDS
    starts = lengths.cumsum(0) - lengths
    stream = torch.zeros(MASK_WORDS * len(counts) + nnz, dtype=torch.int16)
    stream[starts[:, None] + torch.arange(MASK_WORDS)] = bitmask.pack_bits(masks).view(torch.int16)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    stream[torch.arange(nnz) + MASK_WORDS * (owner + 1)] = weights[masks]
    firsts = [part[::count] for part, count in zip(_by_panel(starts, shape), shape.panels, strict=True)]
    offsets = torch.cat([*firsts, torch.tensor([len(stream)])])
    return _join(shape, CODES[values.dtype], nnz, offsets, stream)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor, int]:
    """Row bits, values and columns of a packed tensor without fault: the inverse of `pack`."""
    header = read_header(packed)
    shape = Shape(header["rows"], header["cols"])
    masks, is_value = _walk(packed, shape)
    mask = _from_tiles(masks, shape)
    stream = packed[shape.stream : len(packed) - TAIL].view(torch.int16)
    tiles = torch.zeros(masks.shape, dtype=torch.int16).masked_scatter_(masks, stream[is_value])
    values = _from_tiles(tiles, shape)[mask].view(DTYPES[header["dtype"]])
    return bitmask.pack_bits(mask), values, shape.cols


def read_header(packed: Tensor) -> dict[str, int]:
    """The eight integers of the header by name. `packed` has at least 64 bytes."""
    names = ("magic", "rows", "cols", "dtype", "nnz", "panel_cols", "stream", "size")
    return dict(zip(names, packed[:64].view(torch.int64).tolist(), strict=True))


def check(packed: Tensor) -> None:
    """Raises Fault unless the uint8 tensor [size] is what `pack` makes of some matrix."""
    if len(packed) < 64:
        raise Fault("it is shorter than its header")
    header = read_header(packed)
    _check_header(header, len(packed))
    shape = Shape(header["rows"], header["cols"])
    masks, _ = _walk(packed, shape)
    if (masks & ~_to_tiles(torch.ones(shape.rows, shape.cols, dtype=torch.bool), shape)).any():
        raise Fault("bits are set outside the matrix")
    if int(masks.sum()) != header["nnz"]:
        raise Fault("the number of values is another one")


def _check_header(header: dict[str, int], size: int) -> None:
    if header["magic"] != MAGIC:
        raise Fault("it is not a packed matrix")
    if not (0 <= header["rows"] < MAX_LENGTH and 0 <= header["cols"] < MAX_LENGTH):
        raise Fault("rows or columns are out of range")
    if header["dtype"] not in DTYPES:
        raise Fault("the values are neither bfloat16 nor float16")
    shape = Shape(header["rows"], header["cols"])
    if header["panel_cols"] != shape.panel_cols or header["stream"] != shape.stream:
        raise Fault("the layout is another one")
    if not 0 <= header["nnz"] <= shape.rows * shape.cols:
        raise Fault("the number of values is out of range")
    if not header["size"] == size == shape.size(header["nnz"]):
        raise Fault("its length does not fit its shape")


def _walk(packed: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Masks [tiles, 512] in the order of the stream, and which of its 2-byte words are values.

    A tile begins where the one before it ends, so the row tiles of a panel advance side by side, tile after tile.
    """
    offsets = packed[64 : 64 + 8 * shape.offsets].view(torch.int64)
    stream = packed[shape.stream : len(packed) - TAIL].view(torch.int16)
    if offsets[0] != 0 or offsets[-1] != len(stream) or (offsets.diff() < 0).any():
        raise Fault("the offsets are out of order")
    is_value = torch.ones(len(stream), dtype=torch.bool)
    found = [torch.zeros(0, ROWS * COLS, dtype=torch.bool)]
    for panel, tiles in enumerate(shape.panels):
        first = panel * shape.row_tiles
        at, end = offsets[first : first + shape.row_tiles], offsets[first + 1 : first + shape.row_tiles + 1]
        masks = []
        for _ in range(tiles):
            if (end - at < MASK_WORDS).any():
                raise Fault("a tile reaches beyond its end")
            words = at[:, None] + torch.arange(MASK_WORDS)
            masks.append(bitmask.unpack_bits(stream[words].view(torch.uint8), ROWS * COLS))
            is_value[words] = False
            at = at + MASK_WORDS + masks[-1].sum(1)
        if not torch.equal(at, end):
            raise Fault("a tile has more bits than values, or fewer")
        found.append(torch.stack(masks, 1).view(-1, ROWS * COLS))
    return torch.cat(found), is_value


def _to_tiles(matrix: Tensor, shape: Shape) -> Tensor:
    """[rows, cols] to [tiles, 512] in the order of the stream, zeros outside the matrix."""
    across = sum(shape.panels)
    padded = torch.zeros(shape.row_tiles * ROWS, across * COLS, dtype=matrix.dtype)
    padded[: shape.rows, : shape.cols] = matrix
    tiles = padded.view(shape.row_tiles, ROWS, across, COLS).transpose(1, 2)
    parts = [part.reshape(-1, ROWS * COLS) for part in tiles.split(shape.panels, 1)]
    return torch.cat([matrix.new_zeros(0, ROWS * COLS), *parts])


def _from_tiles(tiles: Tensor, shape: Shape) -> Tensor:
    """The inverse of `_to_tiles`: [rows, cols]."""
    counts = zip(_by_panel(tiles, shape), shape.panels, strict=True)
    parts = [part.view(shape.row_tiles, count, ROWS, COLS) for part, count in counts]
    if not parts:
        return tiles.new_zeros(shape.rows, shape.cols)
    padded = torch.cat(parts, 1).transpose(1, 2).reshape(shape.row_tiles * ROWS, sum(shape.panels) * COLS)
    return padded[: shape.rows, : shape.cols].contiguous()


def _by_panel(tiles: Tensor, shape: Shape) -> list[Tensor]:
    return list(tiles.split([count * shape.row_tiles for count in shape.panels])) if shape.panels else []


def _join(shape: Shape, dtype: int, nnz: int, offsets: Tensor, stream: Tensor) -> Tensor:
    size = shape.size(nnz)
    packed = torch.zeros(size, dtype=torch.uint8)
    header = [MAGIC, shape.rows, shape.cols, dtype, nnz, shape.panel_cols, shape.stream, size]
    packed[:64] = torch.tensor(header).view(torch.uint8)
    packed[64 : 64 + 8 * len(offsets)] = offsets.view(torch.uint8)
    packed[shape.stream : size - TAIL] = stream.view(torch.uint8)
    return packed
