"""The plan of `--dry-run` as a document, as table rows and as closing lines."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..compress.plan import Plan, StagePlan


def plan_document(plan: Plan) -> dict[str, Any]:
    """What will be done, as plain data."""
    from ..compress.format import INT8

    return {
        "model": plan.model,
        "device": plan.device,
        "recipe": plan.recipe.model_dump(mode="json"),
        "bytes_before": plan.source.nbytes(),
        "overlap": plan.overlap,
        "values": INT8 if plan.recipe.export.values == "int8" else "same",
        "estimate": None if plan.estimate is None else asdict(plan.estimate),
        "stages": [{"name": stage.name, "text": stage.digest, "said": stage.said} for stage in plan.stages],
        "matrices": [row for stage in plan.changes for row in _rows(stage)],
        "skipped": [{"name": name, "reason": reason} for stage in plan.changes for name, reason in stage.skipped],
    }


def plan_rows(document: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """One row per matrix to prune."""
    return [
        (row["name"], "x".join(map(str, row["shape"])), row["pattern"], f"{row['zeros']:,}")
        for row in document["matrices"]
    ]


def plan_lines(document: dict[str, Any]) -> list[str]:
    """Totals and what is left out."""
    from ..compress.report import human_bytes, percent

    zeros = sum(row["zeros"] for row in document["matrices"])
    size = sum(row["shape"][0] * row["shape"][1] for row in document["matrices"])
    matrices = f"{len(document['matrices'])} matrices, {zeros:,} of {size:,} weights will be zero"
    lines = [
        f"{matrices} ({percent(zeros / size)})" if size else "no matrix is pruned",
        f"model: {human_bytes(document['bytes_before'])} of weights, device {document['device']}",
        *_needs(document),
        "stages: " + ", ".join(stage["name"] for stage in document["stages"]),
        *(f"{stage['name']}: {stage['said']}" for stage in document["stages"] if stage["said"]),
    ]
    return lines + [f"not pruned: {entry['name']} ({entry['reason']})" for entry in document["skipped"]]


def _needs(document: dict[str, Any]) -> list[str]:
    from ..compress.report import human_bytes

    estimate = document["estimate"]
    if estimate is None:
        return []
    forms = ", ".join(f"{human_bytes(size)} {form}" for form, size in estimate["payload"].items())
    lines = [
        f"output: {forms}" + (f"; values: {document['values']} (lossy)" if document["values"] != "same" else ""),
        f"disk while it runs: {human_bytes(estimate['disk'])}, of {human_bytes(estimate['free'])} that are free",
    ]
    if estimate["peak"] is not None:
        lines.append(f"peak memory: about {human_bytes(estimate['peak']['bytes'])}, at {estimate['peak']['cause']}")
    return lines


def _rows(stage: StagePlan) -> list[dict[str, Any]]:
    return [
        {
            "stage": stage.name,
            "name": job.name,
            "shape": list(job.prunable.shape),
            "pattern": str(job.pattern),
            "zeros": job.zeros,
        }
        for job in stage.jobs
    ]
