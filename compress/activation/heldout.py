"""What an activation policy does on held-out text: perplexity and realised sparsity, beside the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ...activation_sparsity.base import Policy
from ..blocks import StreamedModel
from ..progress import Progress
from .walk import PROMPT, Walk, increase

METHOD = "the first quarter of every window is a dense prompt, only the rest is scored, every scored position sparse"


def heldout(
    dense: StreamedModel,
    model: StreamedModel,
    policy: Policy,
    windows: Tensor,
    *,
    memory_bytes: int,
    scratch: Path,
    progress: Progress,
    prompt: float = PROMPT,
) -> dict[str, Any]:
    """`before`: the dense model at the scored positions; `after`: `model` under `policy` (JSON-able).

    `increase` is paired per window, with its standard error; `sparsity` the share of the linear weights that scored
    tokens did not read, exactly counted; `matrices` the same by matrix.
    """
    found = {}
    for name, which, run in (("before", dense, None), ("after", model, policy)):
        walk = Walk(which, windows, memory_bytes=memory_bytes, scratch=scratch, prompt=prompt, progress=progress)
        try:
            found[name] = walk.run(run, f"decode {name}")
        finally:
            walk.close()
    before, after = found["before"], found["after"]
    rise, error = increase(after.losses, before.losses)
    return {
        "method": METHOD,
        "prompt": prompt,
        "scored_tokens": len(windows) * (windows.shape[1] - max(1, int(windows.shape[1] * prompt)) - 1),
        "before": before.score.as_dict(),
        "after": after.score.as_dict(),
        "increase": rise,
        "standard_error": error,
        "sparsity": after.reads.sparsity,
        "matrices": {name: round(value, 5) for name, value in after.reads.by_matrix().items()},
    }
