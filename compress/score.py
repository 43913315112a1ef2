"""Perplexity of one model on its own: what `gossamer eval` runs."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ModelError
from . import distributed, memory
from .attachments import entries
from .blocks import StreamedModel
from .evaluate import score
from .plan import evaluation_dtype, sequence_length
from .progress import Progress
from .recipe import EvaluateStage, Machine, PruneStage, Recipe
from .report import environment
from .run import resolve_device
from .source import open_source
from .text import Texts


def evaluate_model(
    model: str | Path,
    stage: EvaluateStage,
    machine: Machine | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity of `model` (dense or sparse checkpoint) with its protocol, block by block from disk."""
    machine = machine or Machine()
    device = resolve_device(machine.device)
    distributed.start(device)
    dtype = evaluation_dtype(machine)
    with memory.PeakMemory() as peak, distributed.one_run():
        with distributed.agreed():
            source = open_source(str(model), revision=revision, token=token)
            streamed = StreamedModel.open(
                source, source.folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code
            )
            seqlen = sequence_length(stage.seqlen, streamed.max_positions, "--seqlen")
            texts = Texts(source.folder, Recipe(stages=(PruneStage(),)), streamed)
            windows, protocol, digest = texts.evaluation(stage.data, seqlen, stage.windows, dtype)
        with memory.frozen_heap():
            result = score(
                streamed,
                windows,
                memory_bytes=machine.max_memory_bytes // 2,
                progress=(progress if distributed.is_main() else None) or Progress(),
                label="evaluate",
                scratch=None,
            )
    if not math.isfinite(result.cross_entropy):
        raise ModelError("the model's loss is not finite", hint="try --dtype float32, or check the checkpoint")
    policy = entries(source.config).get("activation")
    return {
        "model": str(model),
        **result.as_dict(),
        **({} if policy is None else {"policy_left_out": policy.get("method", "activation")}),
        "protocol": asdict(protocol),
        "digest": digest,
        "peak_memory_bytes": peak.peak,
        "environment": environment(),
    }
