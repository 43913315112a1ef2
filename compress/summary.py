"""From a finished run to its report: figures are counted again in the written files, never taken from the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import __version__
from . import distributed
from .card import write_card
from .census import Census, census
from .export import Exported
from .format import INT8
from .modelfolder import find_weights
from .page import write_page, write_picture
from .pictures import layers_png
from .plan import Plan
from .report import SCHEMA, Report, environment
from .source import FolderSource
from .stages.base import Context, StageReport
from .trainingfigures import training_runs, without_history, write_training


def build_report(
    context: Context,
    reports: list[StageReport],
    files: Exported,
    *,
    seconds: float,
    peak: Callable[[], int],
    command: str | None,
    out: Path,
) -> Report:
    """Assemble the report; write report.json, report.html, recipe.yaml, model card and picture beside the weights."""
    plan = context.plan
    prunable = prunable_keys(plan)
    before = census(plan.source, prunable)
    form = "sparse" if "sparse" in plan.recipe.export.forms else "dense"
    after = census(FolderSource(files.folder, find_weights(files.folder, form)), prunable)
    report = Report(
        {
            "schema": SCHEMA,
            "gossamer": __version__,
            "model": plan.model,
            "output": out.name,
            "command": command,
            "recipe": plan.recipe.model_dump(mode="json"),
            "machine": plan.machine.model_dump(mode="json") | {"device": plan.device},
            "evaluation": _last_evaluation(reports),
            "evaluations": [report.as_dict() for report in reports if report.kind == "evaluate"],
            "calibration": _calibration(plan),
            "overlap": {"share": plan.overlap, "allowed": plan.recipe.allow_overlap},
            "bytes": _bytes(before, after, files),
            "values": INT8 if plan.recipe.export.values == "int8" else "same",
            "sparsity": _sparsity(before, after),
            "stages": [_stage_entry(report) for report in reports],
            "layers": [row | {"stage": r.index} for r in reports for row in r.result.get("layers", ())],
            "reconstruction": [row | {"stage": r.index} for r in reports for row in r.result.get("rebuilt", ())],
            "training": without_history(training_runs(reports)),
            "skipped": [{"name": n, "reason": why} for stage in plan.changes for n, why in stage.skipped],
            "masks": files.mask_digest,
            "notes": _notes(context),
            "time_s": round(seconds, 3),
            "peak_memory_bytes": peak(),
            "environment": environment(),
        }
    )
    if distributed.is_main():
        context.progress.working("write the report")
        picture = layers_png(report["layers"])
        report.save(files.folder)
        write_picture(files.folder, picture)
        write_card(files.folder, report, plan)
        trained = write_training(files.folder, training_runs(reports))
        write_page(files.folder, report, plan.recipe.to_yaml(), picture, trained)
    return report


def prunable_keys(plan: Plan) -> set[str]:
    """Checkpoint tensors that hold prunable matrices: all in the decoder blocks, the head only when it was pruned."""
    model = plan.skeleton
    keys = {key for i in range(model.num_blocks) for p in model.prunables(i) for key in model.source_keys(p)}
    return keys | {key for stage in plan.changes for job in stage.jobs for key in job.keys}


def _stage_entry(report: StageReport) -> dict[str, Any]:
    """A stage in the report: what is told elsewhere (rows per matrix, evaluations) is left out."""
    own = {} if report.kind == "evaluate" else report.result
    figures = {key: value for key, value in own.items() if key not in ("layers", "rebuilt", "training")}
    return {"stage": report.kind, "index": report.index, "seconds": round(report.seconds, 3), **figures}


def _last_evaluation(reports: list[StageReport]) -> dict[str, Any] | None:
    found = [report.result for report in reports if report.kind == "evaluate"]
    return found[-1] if found else None


def _calibration(plan: Plan) -> dict[str, Any] | None:
    stages = [stage for stage in plan.stages if stage.windows is not None and stage.calibration is not None]
    if not stages:
        return None
    stage = stages[-1]
    source = stage.calibration
    assert stage.windows is not None
    assert source is not None
    nsamples, seqlen = stage.windows.shape
    return {
        **asdict(source),
        "nsamples": nsamples,
        "seqlen": seqlen,
        "seed": plan.recipe.seed,
        "description": f"{source.dataset} ({source.text}), {nsamples} windows of {seqlen} tokens, "
        f"seed {plan.recipe.seed}",
    }


def _bytes(before: Census, after: Census, files: Exported) -> dict[str, Any]:
    return {
        "before": before.dense_bytes,
        "after": sum(files.payload.values()),
        "ratio": sum(files.payload.values()) / before.dense_bytes,
        "prunable_before": after.masked_dense_bytes,
        "prunable_after": after.masked_stored_bytes,
        "prunable_ratio": after.masked_stored_bytes / after.masked_dense_bytes if after.masked_dense_bytes else 1.0,
        "files": files.sizes,
        "payload": files.payload,
    }


def _sparsity(before: Census, after: Census) -> dict[str, Any]:
    return {
        "prunable": after.prunable_sparsity,
        "all": after.sparsity,
        "before": before.prunable_sparsity,
        "all_before": before.sparsity,
        "zeros": after.prunable_zeros,
        "prunable_parameters": after.prunable_parameters,
        "parameters": after.parameters,
    }


def _notes(context: Context) -> list[str]:
    plan = context.plan
    notes = list(context.progress.notes)
    if plan.overlap is not None and plan.recipe.allow_overlap and plan.overlap > 0:
        notes.append(
            f"calibration and evaluation text overlap ({100 * plan.overlap:.1f} % of the windows); allowed by option"
        )
    if plan.recipe.export.format == "both":
        notes.append(
            "only transformers reads this folder's dense file without complaint: config.json names the sparse format"
        )
    return notes
