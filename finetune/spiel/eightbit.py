"""Adam's moments in 8 bits: dynamic codes of bitsandbytes, a float32 scale per 256 entries.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022. Of the second moment the root is kept: it needs
half of the range, so that fewer small ones become 0 beside large ones.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...errors import TrainingError

BLOCK = 256


def encode(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes uint8 [K] and scales float32 [ceil(K / 256)] of float32 values [K]; without `signed` none may be negative.

    TrainingError when bitsandbytes is not installed.
    """
    table = _codes(signed, values.device)
    from bitsandbytes.functional import quantize_blockwise

    codes, state = quantize_blockwise(values, code=table, blocksize=BLOCK)
    return codes, state.absmax


def decode(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The float32 values [K] that codes stand for."""
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(codes, absmax=scales, code=_codes(signed, codes.device), blocksize=BLOCK)


@lru_cache(maxsize=16)
def _codes(signed: bool, device: torch.device) -> Tensor:
    """What the 256 codes stand for, in parts of the scale."""
    try:
        from bitsandbytes.functional import create_dynamic_map
    except ImportError as error:
        raise TrainingError(
            "moments in 8 bits need the package bitsandbytes", hint="pip install bitsandbytes, or use adamw"
        ) from error
    return create_dynamic_map(signed=signed).to(device)
