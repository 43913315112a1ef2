"""All contenders of one shape. Each family has a file of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory import empty_weight
from .case import Case
from .cases_bitmask import bitmask_cases
from .cases_channel import channel_cases
from .cases_dense import dense_cases
from .cases_dual import dual_cases
from .cases_int8 import int8_cases
from .cases_mlp import mlp_cases

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def cases(rows: int, cols: int, dtype: torch.dtype) -> list[Case]:
    """One random weight [rows, cols] in every form, and one row of x. The same numbers every time."""
    generator = torch.Generator().manual_seed(0)
    weight = random_weight(rows, cols, dtype, generator)
    x = torch.randn(1, cols, generator=generator).to(dtype)
    return [
        *dense_cases(x, weight),
        *bitmask_cases(x, weight, generator),
        *int8_cases(x, weight, generator),
        *channel_cases(x, weight),
        *dual_cases(x, weight, generator),
        *mlp_cases(x, weight, generator),
    ]


def random_weight(rows: int, cols: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal numbers, in memory like that of a loaded model."""
    return empty_weight(rows, cols, dtype=dtype).copy_(torch.randn(rows, cols, generator=generator))
