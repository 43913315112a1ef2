"""What training leaves beside the weights: every logged line of every run, and a picture of loss and sparsity."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import atomic_write_text
from .pictures import COLOURS

if TYPE_CHECKING:
    from .stages.base import StageReport

PICTURE = "gossamer/training.png"
METRICS = "gossamer/metrics.jsonl"
Runs = Sequence[Mapping[str, Any]]


def training_runs(reports: Iterable[StageReport]) -> list[dict[str, Any]]:
    """The runs of all stages, in order: what `training.metrics_entry` gave, and the index of the stage."""
    return [{"stage": report.index, **run} for report in reports for run in report.result.get("training", ())]


def without_history(runs: Runs) -> list[dict[str, Any]]:
    """The figures of every run alone, for report.json."""
    return [{key: value for key, value in run.items() if key != "history"} for run in runs]


def write_training(folder: Path, runs: Runs) -> bytes | None:
    """Write metrics.jsonl and the picture; the picture. Without runs, what came with the source model is removed."""
    picture = training_png(runs)
    for name in (PICTURE, METRICS):
        (folder / name).unlink(missing_ok=True)
    if picture is None:
        return None
    (folder / PICTURE).parent.mkdir(exist_ok=True)
    (folder / PICTURE).write_bytes(picture)
    lines = [{"stage": run["stage"], "run": run["name"], **line} for run in runs for line in run["history"]]
    atomic_write_text(folder / METRICS, "".join(json.dumps(line) + "\n" for line in lines))
    return picture


def training_png(runs: Runs) -> bytes | None:
    """PNG of loss and sparsity over the steps, run after run; None when nothing was logged.

    Runs that start from one parent (candidates of a soup) are drawn beside each other: of one phase, by their name.
    """
    drawn = [run for run in runs if run["history"]]
    if not drawn:
        return None
    from matplotlib.figure import Figure  # not pyplot: no display, no state of the user's own plots

    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=110)
    loss, sparsity = figure.subplots(1, 2)
    for index, (run, start) in enumerate(zip(drawn, _starts(drawn), strict=True)):
        steps = [start + line["step"] for line in run["history"]]
        colour = COLOURS[index % len(COLOURS)]
        loss.plot(steps, [line["loss"] for line in run["history"]], color=colour, linewidth=1.2, label=_label(run))
        zeros = [100 * line.get("sparsity", math.nan) for line in run["history"]]
        sparsity.plot(steps, zeros, color=colour, linewidth=1.2)
    for axes, title in ((loss, "training loss, nats per token"), (sparsity, "zeros of masked matrices, %")):
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    sparsity.set_ylim(0, 100)
    if 1 < len(drawn) <= 2 * len(COLOURS):
        figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _starts(runs: Runs) -> list[int]:
    """The step at which each run begins: where its phase does, phases one after another."""
    starts: list[int] = []
    end, phase = 0, None
    for run in runs:
        own = (run["stage"], run["name"].partition("-candidate")[0])
        if own != phase:
            start, phase = end, own
        starts.append(start)
        end = max(end, start + run["history"][-1]["step"])
    return starts


def _label(run: Mapping[str, Any]) -> str:
    return f"stage {run['stage']} {run['name'].replace('-', ' ')}".strip()
