"""The machine layout of a matrix for dual sparsity in plain torch: this file and README.md define it.

One uint8 tensor: header (8 integers), offsets, stream, 64 bytes of zeros. The stream is the input channels one after
the other, each in blocks of 64 outputs: a mask of 8 bytes, then the kept values, 2 bytes each. The arguments are taken
as checked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..bitmask import reference as bitmask
from ..bitmask_gemv.layout import Fault, read_header

__all__ = ["CODES", "DTYPES", "Fault", "check", "pack", "read_header", "unpack"]

BLOCK, PANEL = 64, 256
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
        """Blocks of a channel."""
        return -(-self.rows // BLOCK)

    @property
    def panels(self) -> int:
        """Ranges of outputs whose begin is stored."""
        return -(-self.rows // PANEL)

    @property
    def stream(self) -> int:
        """First byte of the stream."""
        return -(-(64 + 4 * (self.panels + 1) * self.cols) // 64) * 64

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
    ends = (counts + MASK_WORDS).cumsum(0)
    starts = ends - counts - MASK_WORDS
    stream = torch.zeros(MASK_WORDS * len(counts) + nnz, dtype=torch.int16)
    stream[starts[:, None] + torch.arange(MASK_WORDS)] = bitmask.pack_bits(masks).view(torch.int16)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    stream[torch.arange(nnz) + MASK_WORDS * (owner + 1)] = weights[masks]
    offsets = torch.cat([_begins(starts, shape), _ends(ends, shape)]).int().flatten()
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
    """Masks [cols * blocks, 64] in the order of the stream, and which of its 2-byte words are values.

    A block begins where the one before it ends, so all channels advance side by side, block after block.
    """
    offsets = packed[64 : 64 + 4 * (shape.panels + 1) * shape.cols].view(torch.int32).long()
    offsets = offsets.view(shape.panels + 1, shape.cols)
    stream = packed[shape.stream : len(packed) - TAIL].view(torch.int16)
    order = torch.cat([offsets[:1].flatten(), offsets[-1:, -1:].flatten()])
    if shape.cols == 0:
        order = torch.zeros(1, dtype=torch.long)
    if order[0] != 0 or not torch.equal(order[1:], offsets[-1]) or order[-1] != len(stream):
        raise Fault("the offsets are out of order")
    is_value = torch.ones(len(stream), dtype=torch.bool)
    at, masks = offsets[0], []
    for block in range(shape.blocks):
        if block % (PANEL // BLOCK) == 0 and not torch.equal(at, offsets[block // (PANEL // BLOCK)]):
            raise Fault("the offsets are out of order")
        if (at < 0).any() or (at + MASK_WORDS > len(stream)).any():
            raise Fault("a block reaches beyond its end")
        words = at[:, None] + torch.arange(MASK_WORDS)
        masks.append(bitmask.unpack_bits(stream[words].view(torch.uint8), BLOCK))
        is_value[words] = False
        at = at + MASK_WORDS + masks[-1].sum(1)
    if not torch.equal(at, offsets[-1]):
        raise Fault("the offsets are out of order")
    return torch.stack(masks, 1).view(-1, BLOCK) if masks else torch.zeros(0, BLOCK, dtype=torch.bool), is_value


def _begins(starts: Tensor, shape: Shape) -> Tensor:
    """Where each panel of each channel begins, [panels, cols], from the begins of all blocks."""
    return starts.view(shape.cols, shape.blocks)[:, :: PANEL // BLOCK].t().reshape(shape.panels, shape.cols)


def _ends(ends: Tensor, shape: Shape) -> Tensor:
    """Where each channel ends, [1, cols]."""
    return ends.view(shape.cols, shape.blocks)[:, -1:].t() if shape.blocks else ends.new_zeros(1, shape.cols)


def _to_blocks(matrix: Tensor, shape: Shape) -> Tensor:
    """[rows, cols] to [cols * blocks, 64], zeros outside the matrix."""
    padded = torch.zeros(shape.cols, shape.blocks * BLOCK, dtype=matrix.dtype)
    padded[:, : shape.rows] = matrix.t()
    return padded.view(-1, BLOCK)


def _from_blocks(blocks: Tensor, shape: Shape) -> Tensor:
    """The inverse of `_to_blocks`: [rows, cols]."""
    return blocks.view(shape.cols, shape.blocks * BLOCK)[:, : shape.rows].t().contiguous()
