"""Registration with torch: operators appear as `torch.ops.gossamer.NAME`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("gossamer", "DEF")


def operator(schema: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Any:
    """Defines `schema` for every device; returns the callable overload.

    `run` gets real tensors and checks them; `fake` gives shape and dtype of the result, for torch.compile and export.
    There is no gradient: `run` raises where one would be needed (`arguments.check_rows`).
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gossamer::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.gossamer, name).default
