"""The whole job: plan, stages, export, verification, report, and one rename at the end.

Everything is written below `OUT.partial`; OUT appears only when its files were read back and found right. A run that
was killed leaves `OUT.partial` with its journal, and `resume` goes on after the last finished unit.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import RecipeError, ResourceError
from . import distributed, memory
from .blocks import StreamedModel
from .checkpoint import sync_tree
from .estimate import check_room, estimate, folder_bytes
from .export import FILES, export
from .failpoint import failpoint
from .finite import check_finite
from .journal import NAME as JOURNAL
from .journal import Journal, begun
from .plan import Plan, StagePlan, check_output, make_plan, partial_of, require_free
from .progress import Progress, Recorder
from .recipe import Machine, Recipe
from .report import Report, environment
from .source import open_source
from .stages.base import Context, StageReport
from .stages.registry import stage_kind
from .summary import build_report
from .writer import sync_folder


def plan(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    machine: Machine | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> Plan:
    """Find every mistake and list every job without reading a weight. Raises a GossamerError naming them all."""
    machine = machine or Machine()
    device = resolve_device(machine.device)
    distributed.start(device)
    with distributed.agreed():  # and nobody may find the partial folder that rank 0 is about to make
        _check_place(Path(out), model, overwrite=overwrite, resume=resume)
        source = open_source(str(model), revision=revision, token=token)
        skeleton = StreamedModel.open(source, source.folder, device=device, trust_remote_code=trust_remote_code)
        made = make_plan(
            str(model),
            recipe,
            machine,
            source=source,
            skeleton=skeleton,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        found = estimate(made, Path(out))
        check_room(found, Path(out), present=folder_bytes(partial_of(Path(out))) if resume else 0)
    return replace(made, estimate=found)


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    machine: Machine | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> Report:
    """Run `recipe` on `model` and write a verified checkpoint to `out`.

    `command` is what the model card quotes. Raises a GossamerError for everything a user can mend; OUT then does not
    exist, and `out.partial` holds what was finished.
    """
    out = Path(out).absolute()
    memory.bound_heap()
    with memory.PeakMemory() as peak, distributed.one_run():
        started = time.monotonic()
        job = plan(
            model, out, recipe, machine,
            revision=revision, token=token, trust_remote_code=trust_remote_code, resume=resume, overwrite=overwrite,
        )  # fmt: skip
        partial = partial_of(out)
        recorder = Recorder((progress if distributed.is_main() else None) or Progress())
        if not resume:
            distributed.on_main(lambda: check_finite(job.source, recorder))
        with memory.frozen_heap(), _storage_errors(partial):
            context = Context(job, partial, _journal(partial, job, resume, recorder), recorder)
            if distributed.on_main(
                lambda: context.journal.done("verify") is not None and not (partial / FILES).exists()
            ):
                return distributed.on_main(lambda: _finish_published(partial, out))
            if not overwrite:
                distributed.on_main(lambda: require_free(out))
            reports = [_stage(context, stage) for stage in job.stages]
            files = export(context)
            report = distributed.on_main(
                lambda: build_report(
                    context, reports, files,
                    seconds=time.monotonic() - started, peak=lambda: peak.peak, command=command, out=out,
                )
            )  # fmt: skip
            distributed.on_main(lambda: _publish(context, files.folder, out))
    return report


def resolve_device(device: str) -> str:
    """ "auto" is the first GPU when there is one. RecipeError for a device this machine does not have."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"--device {device} is not available: {str(error).splitlines()[0]}", hint="use --device cpu"
        ) from error
    return device


def _check_place(out: Path, model: str | Path, *, overwrite: bool, resume: bool) -> None:
    if Path(model).exists() and Path(model).resolve() == out.resolve():
        raise RecipeError(f"{out} is the model itself", hint="write to another folder")
    if Path(model).exists() and out.resolve() in Path(model).resolve().parents:
        raise RecipeError(f"{out} holds the model {model}", hint="write to another folder")
    check_output(out, overwrite=overwrite, resume=resume)
    parent = memory.existing_parent(out)
    if not parent.is_dir():
        raise ResourceError(f"{parent} is a file, no folder can be made in it", hint="choose another output folder")
    if not os.access(parent, os.W_OK):
        raise ResourceError(f"no permission to write in {parent}", hint="choose an output folder that you may write to")


def identity(job: Plan) -> dict[str, Any]:
    """What must be equal before a partial run may be continued."""
    facts: dict[str, Any] = {
        "version": __version__,
        "recipe": job.recipe.model_dump(mode="json"),
        "model": job.source.digest(),
        "device": job.device,
        "dtype": job.machine.dtype,
    }
    facts |= {key: value for key, value in environment().items() if key not in ("gossamer", "platform", "python")}
    for stage in job.stages:
        facts[f"text of stage {stage.index}"] = stage.digest
    return facts


def _journal(partial: Path, job: Plan, resume: bool, progress: Progress) -> Journal:
    """The run's journal. Rank 0 makes or mends it and is the only one to write; the others get a copy."""
    facts = identity(job)
    return distributed.on_main(lambda: _own_journal(partial, facts, resume, progress))


def _own_journal(partial: Path, facts: dict[str, Any], resume: bool, progress: Progress) -> Journal:
    if resume and begun(partial):
        return Journal.resume(partial, facts)
    if resume:
        why = "holds no finished work" if partial.exists() else "does not exist"
        progress.note(f"nothing to resume: {partial.name} {why}, starting afresh")
    if partial.exists():
        _remove(partial)
    return Journal.start(partial, facts)


def _stage(context: Context, stage: StagePlan) -> StageReport:
    """Run a stage, or take its report from the journal when it is finished."""
    done = context.journal.done(stage.name)
    if done is None:
        with memory.reused_heap() if stage.stage.repeats else nullcontext():
            report = stage_kind(stage.stage.stage).run(context, stage)
        context.finish(stage.name, asdict(report))
    else:
        report = StageReport(**done)
    if stage.stage.changes_weights:
        context.finished.append(context.work / stage.name)
    if stage.stage.attaches:
        context.attached.append(report)
    context.files += report.files
    return report


def _publish(context: Context, files: Path, out: Path) -> None:
    """Rename the verified folder to OUT and remove the rest of the partial run."""
    failpoint("publish")
    if out.exists() and files.exists():
        out.rename(context.partial / "replaced")
    if files.exists():
        sync_tree(files)
        files.rename(out)
        sync_folder(out.parent)
    failpoint("published")
    _remove(context.partial)


def _finish_published(partial: Path, out: Path) -> Report:
    """The run was killed after the rename: only the rest of the partial folder is left to remove."""
    report = Report(json.loads((out / "report.json").read_text(encoding="utf-8")))
    _remove(partial)
    return report


def _remove(partial: Path) -> None:
    """Remove a partial folder, its journal last: killed in between, it still says what is finished."""
    if not partial.is_dir():
        partial.unlink()
        return
    for path in partial.iterdir():
        if path.name != JOURNAL:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(partial)


@contextmanager
def _storage_errors(partial: Path) -> Iterator[None]:
    """Disk full and permission problems as ResourceError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise ResourceError(
                f"{error.filename or partial}: {error.strerror}",
                hint="free disk space or choose another folder, then repeat the command with --resume",
            ) from error
        raise
