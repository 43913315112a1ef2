"""The machine layout of a matrix for dual sparsity in plain torch: this file and README.md define it.

One uint8 tensor: header (8 integers), offsets, stream, 64 bytes of zeros. The stream is panels of 512 outputs; in each,
the input channels one after the other, in blocks of 64 outputs: a mask of 8 bytes, then the kept values, 2 bytes each.
The arguments are taken as checked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..bitmask import reference as bitmask
from ..bitmask_gemv.layout import Fault, read_header

__all__ = ["CODES", "DTYPES", "Fault", "check", "pack", "read_header", "unpack"]

BLOCK, PANEL = 64, 512
MASK_WORDS = BLOCK // 16  # the mask of a block, in units of 2 bytes
TAIL = 64
MAGIC = int.from_bytes(b"Gsmdual1", "little")
MAX_LENGTH = 1 << 31
DTYPES = {1: torch.bfloat16, 2: torch.float16}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shape:
    """What follows from rows (outputs) and columns (channels): blocks, panels, sizes in bytes."""

    rows: int
    cols: int

    @property
    def blocks(self) -> int:
        """Blocks of a channel in all panels."""
        return -(-self.rows // BLOCK)

    @property
    def panels(self) -> list[int]:
        """Blocks of a channel in each panel."""
        step = PANEL // BLOCK
        return [min(step, self.blocks - first) for first in range(0, self.blocks, step)]

    @property
    def offsets(self) -> int:
        return len(self.panels) * self.cols + 1

    @property
    def stream(self) -> int:
        """First byte of the stream."""
        return -(-(64 + 4 * self.offsets) // 64) * 64

    def size(self, nnz: int) -> int:
        return self.stream + 2 * (MASK_WORDS * self.blocks * self.cols + nnz) + TAIL

    def fits(self, nnz: int) -> bool:
        """Whether offsets of 32 bits reach the end."""
        return MASK_WORDS * self.blocks * self.cols + nnz < MAX_LENGTH


def pack(bits: Tensor, values: Tensor, cols: int) -> Tensor:
    """From row bits uint8 [rows, ceil(cols / 8)] and values [nnz] to the packed tensor uint8 [size]."""
    shape, nnz = Shape(bits.shape[0], cols), values.numel()
    mask = bitmask.unpack_bits(bits, cols)
    weight = torch.zeros(mask.shape, dtype=torch.int16).masked_scatter_(mask, values.view(torch.int16))
    masks, weights = _to_blocks(mask, shape), _to_blocks(weight, shape)
    counts = masks.sum(1)
    lengths = counts + MASK_WORDS
    starts = lengths.cumsum(0) - lengths
    stream = torch.zeros(MASK_WORDS * len(counts) + nnz, dtype=torch.int16)
    stream[starts[:, None] + torch.arange(MASK_WORDS)] = bitmask.pack_bits(masks).view(torch.int16)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    stream[torch.arange(nnz) + MASK_WORDS * (owner + 1)] = weights[masks]
    firsts = [part[::count] for part, count in zip(_by_panel(starts, shape), shape.panels, strict=True)]
    offsets = torch.cat([*firsts, torch.tensor([len(stream)])]).int()
    packed = torch.zeros(shape.size(nnz), dtype=torch.uint8)
    header = [MAGIC, shape.rows, cols, CODES[values.dtype], nnz, PANEL, shape.stream, len(packed)]
    packed[:64] = torch.tensor(header).view(torch.uint8)
    packed[64 : 64 + 4 * len(offsets)] = offsets.view(torch.uint8)
    packed[shape.stream : len(packed) - TAIL] = stream.view(torch.uint8)
    return packed


def unpack(packed: Tensor) -> tuple[Tensor, Tensor, int]:
    """Row bits, values and columns of a packed tensor without fault: the inverse of `pack`."""
    header = read_header(packed)
    shape = Shape(header["rows"], header["cols"])
    masks, is_value = _walk(packed, shape)
    stream = packed[shape.stream : len(packed) - TAIL].view(torch.int16)
    blocks = torch.zeros(masks.shape, dtype=torch.int16).masked_scatter_(masks, stream[is_value])
    mask = _from_blocks(masks, shape)
    values = _from_blocks(blocks, shape)[mask].view(DTYPES[header["dtype"]])
    return bitmask.pack_bits(mask), values, shape.cols


def check(packed: Tensor) -> None:
    """Raises Fault unless the uint8 tensor [size] is what `pack` makes of some matrix."""
    if len(packed) < 64:
        raise Fault("it is shorter than its header")
    header = read_header(packed)
    _check_header(header, len(packed))
    shape = Shape(header["rows"], header["cols"])
    masks, _ = _walk(packed, shape)
    if (masks & ~_to_blocks(torch.ones(shape.rows, shape.cols, dtype=torch.bool), shape)).any():
        raise Fault("bits are set outside the matrix")
    if int(masks.sum()) != header["nnz"]:
        raise Fault("the number of values is another one")


def _check_header(header: dict[str, int], size: int) -> None:
    if header["magic"] != MAGIC:
        raise Fault("it is not a matrix packed for dual sparsity")
    if not (0 <= header["rows"] < MAX_LENGTH and 0 <= header["cols"] < MAX_LENGTH):
        raise Fault("rows or columns are out of range")
    if header["dtype"] not in DTYPES:
        raise Fault("the values are neither bfloat16 nor float16")
    shape = Shape(header["rows"], header["cols"])
    if header["panel_cols"] != PANEL or header["stream"] != shape.stream:
        raise Fault("the layout is another one")
    if not 0 <= header["nnz"] <= shape.rows * shape.cols or not shape.fits(header["nnz"]):
        raise Fault("the number of values is out of range")
    if not header["size"] == size == shape.size(header["nnz"]):
        raise Fault("its length does not fit its shape")


def _walk(packed: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Masks [blocks, 64] in the order of the stream, and which of its 2-byte words are values.

    A block begins where the one before it ends, so the channels of a panel advance side by side, block after block.
    """
    offsets = packed[64 : 64 + 4 * shape.offsets].view(torch.int32).long()
    stream = packed[shape.stream : len(packed) - TAIL].view(torch.int16)
    if offsets[0] != 0 or offsets[-1] != len(stream) or (offsets.diff() < 0).any():
        raise Fault("the offsets are out of order")
    is_value = torch.ones(len(stream), dtype=torch.bool)
    found = [torch.zeros(0, BLOCK, dtype=torch.bool)]
    for panel, blocks in enumerate(shape.panels):
        first = panel * shape.cols
        at, end = offsets[first : first + shape.cols], offsets[first + 1 : first + shape.cols + 1]
        masks = []
        for _ in range(blocks):
            if (end - at < MASK_WORDS).any():
                raise Fault("a block reaches beyond its end")
            words = at[:, None] + torch.arange(MASK_WORDS)
            masks.append(bitmask.unpack_bits(stream[words].view(torch.uint8), BLOCK))
            is_value[words] = False
            at = at + MASK_WORDS + masks[-1].sum(1)
        if not torch.equal(at, end):
            raise Fault("a block has more bits than values, or fewer")
        found.append(torch.stack(masks, 1).view(-1, BLOCK))
    return torch.cat(found), is_value


def _to_blocks(matrix: Tensor, shape: Shape) -> Tensor:
    """[rows, cols] to [blocks, 64] in the order of the stream, zeros outside the matrix."""
    padded = torch.zeros(shape.cols, shape.blocks * BLOCK, dtype=matrix.dtype)
    padded[:, : shape.rows] = matrix.t()
    parts = [part.reshape(-1, BLOCK) for part in padded.view(shape.cols, shape.blocks, BLOCK).split(shape.panels, 1)]
    return torch.cat([matrix.new_zeros(0, BLOCK), *parts])


def _from_blocks(blocks: Tensor, shape: Shape) -> Tensor:
    """The inverse of `_to_blocks`: [rows, cols]."""
    counts = zip(_by_panel(blocks, shape), shape.panels, strict=True)
    parts = [part.view(shape.cols, count * BLOCK) for part, count in counts]
    if not parts:
        return blocks.new_zeros(shape.rows, shape.cols)
    return torch.cat(parts, 1)[:, : shape.rows].t().contiguous()


def _by_panel(blocks: Tensor, shape: Shape) -> list[Tensor]:
    return list(blocks.split([count * shape.cols for count in shape.panels])) if shape.panels else []
