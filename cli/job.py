"""What every command does that runs a recipe on a model: run it and show the report, or show its plan."""

from __future__ import annotations

from typing import Any


def run_job(job: dict[str, Any], command: str, as_json: bool, quiet: bool) -> None:
    """Run `job` (arguments of `compress.run.compress`) with progress on stderr and its report on stdout."""
    from .console import hush_libraries, show_json, show_lines, show_table, watch

    hush_libraries(quiet)
    from ..compress import distributed
    from ..compress.run import compress as run

    with watch(quiet) as progress:
        report = run(**job, progress=progress, command=command)
    if not distributed.is_main():
        return
    if as_json:
        show_json(report.data)
        return
    show_table(str(job["out"]), ("", "before", "after"), report.rows())
    show_lines(report.footer())


def show_plan(job: dict[str, Any], as_json: bool) -> None:
    """What `job` would do, on stdout."""
    from ..compress.run import plan
    from .console import show_json, show_lines, show_table
    from .planview import plan_document, plan_lines, plan_rows

    document = plan_document(plan(**job))
    if as_json:
        show_json(document)
        return
    show_table("Plan (nothing was written)", ("matrix", "shape", "pattern", "zeros"), plan_rows(document))
    show_lines(plan_lines(document))
