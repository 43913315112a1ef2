"""Stages that prune while they train, small, and what they wrote."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny import tensors

from gossamer.compress.recipe import (
    ExportStage,
    GradualStage,
    ImpStage,
    RandomStage,
    Recipe,
    SoupStage,
    build,
)
from gossamer.compress.run import compress

KINDS = {"imp": ImpStage, "soup": SoupStage, "gradual": GradualStage, "random": RandomStage}
OWN = {"imp": {}, "soup": {"candidates": 2}, "gradual": {"every": 2}, "random": {"tries": 2}}
SIZE = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)  # weights of the blocks of `tiny`


def stage(kind: str, tiny: Path, **options):
    """8 steps of 4 rows of 32 tokens."""
    common = {"data": str(tiny / "calibration.txt"), "seqlen": 32, "steps": 8, "batch": 4, "log_every": 1}
    return build(KINDS[kind], **(common | OWN[kind] | options))


def run(model: Path, out: Path, *stages, seed: int = 0):
    """The written dense tensors and the report."""
    compress(model, out, Recipe(stages=[*stages, ExportStage(format="dense")], seed=seed))
    return tensors(out), json.loads((out / "report.json").read_text())


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "gossamer" / "metrics.jsonl").read_text().splitlines()]


def matrices(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in found.items() if "_proj" in key}


def zeros(found: dict[str, torch.Tensor]) -> int:
    return sum(int((tensor == 0).sum()) for tensor in matrices(found).values())
