"""The machine layout of a bitmask matrix in plain torch: this file and README.md define it.

One uint8 tensor: header (8 integers), offsets, stream, 64 bytes of zeros. The stream is tiles of 4 rows x 128 columns:
64 bytes of masks, then the kept values of its rows, 2 bytes each. A matrix of int8 values has a float16 scale per row
behind the masks of each tile, and its values are stored with 128 added. Offsets count values, of 2 bytes or 1.
The arguments are taken as checked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..bitmask import reference as bitmask

ROWS, COLS = 4, 128
MASK_BYTES, SCALE_BYTES = ROWS * COLS // 8, 2 * ROWS
MAX_PANEL = 4096
TAIL = 64
MAGIC = int.from_bytes(b"Gsmtile1", "little")
MAX_LENGTH = 1 << 31
DTYPES = {1: torch.bfloat16, 2: torch.float16, 3: torch.int8}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shape:
    """What follows from rows, columns and the kind of values: panels of columns, tiles, sizes in bytes."""

    rows: int
    cols: int
    scaled: bool = False

    @property
    def unit(self) -> torch.dtype:
        """An integer as wide as a value."""
        return torch.uint8 if self.scaled else torch.int16

    @property
    def head(self) -> int:
        """Units of a tile before its values."""
        return MASK_BYTES + SCALE_BYTES if self.scaled else MASK_BYTES // 2

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
        return self.stream + self.unit.itemsize * (self.head * sum(self.panels) * self.row_tiles + nnz) + TAIL


class Fault(Exception):
    """What is wrong with a tensor that should be packed; `dispatch` makes a KernelError of it."""


def pack(bits: Tensor, values: Tensor, cols: int, scales: Tensor | None = None) -> Tensor:
    """From row bits uint8 [rows, ceil(cols / 8)] and values [nnz] to the packed tensor uint8 [size].

    int8 values come with scales float16 [rows, ceil(cols / 128)].
    """
    shape = Shape(bits.shape[0], cols, scales is not None)
    stored = values.view(shape.unit) if scales is None else values.view(torch.uint8) ^ 0x80
    mask = bitmask.unpack_bits(bits, cols)
    weight = torch.zeros(mask.shape, dtype=shape.unit).masked_scatter_(mask, stored)
    masks, weights = _to_tiles(mask, shape), _to_tiles(weight, shape)
    counts, nnz = masks.sum(1), values.numel()
    lengths = counts + shape.head
    starts = lengths.cumsum(0) - lengths
    stream = torch.zeros(shape.head * len(counts) + nnz, dtype=shape.unit)
    heads = bitmask.pack_bits(masks)
    if scales is not None:
        heads = torch.cat([heads, _to_tiles(scales.view(torch.int16), shape, 1).view(torch.uint8)], 1)
    stream[starts[:, None] + torch.arange(shape.head)] = heads.view(shape.unit)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    stream[torch.arange(nnz) + shape.head * (owner + 1)] = weights[masks]
    firsts = [part[::count] for part, count in zip(_by_panel(starts, shape), shape.panels, strict=True)]
    offsets = torch.cat([*firsts, torch.tensor([len(stream)])])
    return _join(shape, CODES[values.dtype], nnz, offsets, stream)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor, int]:
    """Row bits, values and columns of a packed tensor without fault: the inverse of `pack`."""
    header = read_header(packed)
    shape = _shape_of(header)
    masks, _, is_value = _walk(packed, shape)
    mask = _from_tiles(masks, shape)
    stream = packed[shape.stream : len(packed) - TAIL].view(shape.unit)
    tiles = torch.zeros(masks.shape, dtype=shape.unit).masked_scatter_(masks, stream[is_value])
    values = _from_tiles(tiles, shape)[mask]
    plain = values ^ 0x80 if shape.scaled else values
    return bitmask.pack_bits(mask), plain.view(DTYPES[header["dtype"]]), shape.cols


def unpack_scales(packed: Tensor) -> Tensor:
    """Scales float16 [rows, ceil(cols / 128)] of a packed tensor of int8 values without fault."""
    shape = _shape_of(read_header(packed))
    return _from_tiles(_walk(packed, shape)[1], shape, 1).view(torch.float16)


def read_header(packed: Tensor) -> dict[str, int]:
    """The eight integers of the header by name. `packed` has at least 64 bytes."""
    names = ("magic", "rows", "cols", "dtype", "nnz", "panel_cols", "stream", "size")
    return dict(zip(names, packed[:64].view(torch.int64).tolist(), strict=True))


def _shape_of(header: dict[str, int]) -> Shape:
    return Shape(header["rows"], header["cols"], DTYPES[header["dtype"]] is torch.int8)


def check(packed: Tensor) -> None:
    """Raises Fault unless the uint8 tensor [size] is what `pack` makes of some matrix."""
    if len(packed) < 64:
        raise Fault("it is shorter than its header")
    header = read_header(packed)
    _check_header(header, len(packed))
    shape = _shape_of(header)
    masks, scales, _ = _walk(packed, shape)
    if (masks & ~_to_tiles(torch.ones(shape.rows, shape.cols, dtype=torch.bool), shape)).any():
        raise Fault("bits are set outside the matrix")
    if shape.scaled:
        inside = _to_tiles(torch.ones(shape.rows, -(-shape.cols // COLS), dtype=torch.bool), shape, 1)
        if (scales.bool() & ~inside).any():
            raise Fault("scales are set outside the matrix")
        if ((scales < 0) | (scales >= 0x7C00)).any():
            raise Fault("a scale is negative or not finite")
    if int(masks.sum()) != header["nnz"]:
        raise Fault("the number of values is another one")


def _check_header(header: dict[str, int], size: int) -> None:
    if header["magic"] != MAGIC:
        raise Fault("it is not a packed matrix")
    if not (0 <= header["rows"] < MAX_LENGTH and 0 <= header["cols"] < MAX_LENGTH):
        raise Fault("rows or columns are out of range")
    if header["dtype"] not in DTYPES:
        raise Fault("the values are neither bfloat16, float16 nor int8")
    shape = _shape_of(header)
    if header["panel_cols"] != shape.panel_cols or header["stream"] != shape.stream:
        raise Fault("the layout is another one")
    if not 0 <= header["nnz"] <= shape.rows * shape.cols:
        raise Fault("the number of values is out of range")
    if not header["size"] == size == shape.size(header["nnz"]):
        raise Fault("its length does not fit its shape")


def _walk(packed: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Masks [tiles, 512] in the order of the stream, scales [tiles, 4 or 0] as int16, and which units are values.

    A tile begins where the one before it ends, so the row tiles of a panel advance side by side, tile after tile.
    """
    offsets = packed[64 : 64 + 8 * shape.offsets].view(torch.int64)
    stream = packed[shape.stream : len(packed) - TAIL].view(shape.unit)
    if offsets[0] != 0 or offsets[-1] != len(stream) or (offsets.diff() < 0).any():
        raise Fault("the offsets are out of order")
    is_value = torch.ones(len(stream), dtype=torch.bool)
    found = [torch.zeros(0, ROWS * COLS, dtype=torch.bool)]
    scales = [torch.zeros(0, ROWS if shape.scaled else 0, dtype=torch.int16)]
    for panel, tiles in enumerate(shape.panels):
        first = panel * shape.row_tiles
        at, end = offsets[first : first + shape.row_tiles], offsets[first + 1 : first + shape.row_tiles + 1]
        masks, factors = [], []
        for _ in range(tiles):
            if (end - at < shape.head).any():
                raise Fault("a tile reaches beyond its end")
            units = at[:, None] + torch.arange(shape.head)
            head = stream[units].view(torch.uint8)
            masks.append(bitmask.unpack_bits(head[:, :MASK_BYTES], ROWS * COLS))
            factors.append(head[:, MASK_BYTES:].contiguous().view(torch.int16))
            is_value[units] = False
            at = at + shape.head + masks[-1].sum(1)
        if not torch.equal(at, end):
            raise Fault("a tile has more bits than values, or fewer")
        found.append(torch.stack(masks, 1).view(-1, ROWS * COLS))
        scales.append(torch.stack(factors, 1).flatten(0, 1))
    return torch.cat(found), torch.cat(scales), is_value


def _to_tiles(matrix: Tensor, shape: Shape, width: int = COLS) -> Tensor:
    """[rows, cols] to [tiles, 4 * width] in the order of the stream, zeros outside; a tile is `width` columns wide."""
    across = sum(shape.panels)
    padded = torch.zeros(shape.row_tiles * ROWS, across * width, dtype=matrix.dtype)
    padded[: shape.rows, : matrix.shape[1]] = matrix
    tiles = padded.view(shape.row_tiles, ROWS, across, width).transpose(1, 2)
    parts = [part.reshape(-1, ROWS * width) for part in tiles.split(shape.panels, 1)]
    return torch.cat([matrix.new_zeros(0, ROWS * width), *parts])


def _from_tiles(tiles: Tensor, shape: Shape, width: int = COLS) -> Tensor:
    """The inverse of `_to_tiles`: [rows, cols], or [rows, ceil(cols / 128)] of tiles that are 1 wide."""
    cols = shape.cols if width == COLS else sum(shape.panels)
    counts = zip(_by_panel(tiles, shape), shape.panels, strict=True)
    parts = [part.view(shape.row_tiles, count, ROWS, width) for part, count in counts]
    if not parts:
        return tiles.new_zeros(shape.rows, cols)
    padded = torch.cat(parts, 1).transpose(1, 2).reshape(shape.row_tiles * ROWS, sum(shape.panels) * width)
    return padded[: shape.rows, :cols].contiguous()


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
