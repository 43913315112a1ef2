"""From the finished stages to a folder of verified checkpoint files, not yet published."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import distributed
from .checkpoint import assemble, atomic_write_text, replacing, verify
from .convert import copy_companions
from .format import METADATA_KEY, Summary, dense_config, sparse_config
from .modelfolder import MASKS
from .sizes import parse_bytes
from .stages.base import Context

FILES = "files"


@dataclass(frozen=True)
class Exported:
    """`folder`: the verified files. `payload`, `sizes`: tensor bytes and file bytes by file name."""

    folder: Path
    payload: dict[str, int]
    sizes: dict[str, int]
    mask_digest: str


def export(context: Context) -> Exported:
    """Assemble, verify and describe the checkpoint below the partial folder. Repeats what the journal does not hold."""
    folder = context.partial / FILES
    done = distributed.on_main(lambda: context.journal.done("verify") or _write(context, folder))
    return Exported(folder, done["payload"], done["sizes"], done["masks"])


def _write(context: Context, folder: Path) -> dict[str, Any]:
    recipe = context.plan.recipe
    forms = recipe.export.forms
    source = context.written()
    if context.journal.done("assemble") is None:
        shutil.rmtree(folder, ignore_errors=True)
        for form in forms:
            context.progress.working(f"write the {form} checkpoint")
            assemble(source, folder, form, parse_bytes(recipe.export.max_shard_size))
        context.journal.finish("assemble", {})
    payload: dict[str, int] = {}
    for form in forms:
        context.progress.working(f"verify the {form} checkpoint")
        checked = verify(folder, source, form)
        payload |= checked.payload
    config = _config(context, forms, checked.summary)
    attach_files(context, folder)
    atomic_write_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    copy_companions(context.plan.source.folder, folder)
    sizes = {name: (folder / name).stat().st_size for name in payload}
    result = {"payload": payload, "sizes": sizes, "masks": checked.summary.masks_sha256}
    context.journal.finish("verify", result)
    return result


def _config(context: Context, forms: tuple[str, ...], summary: Summary) -> dict[str, Any]:
    recipe = context.plan.recipe
    build = sparse_config if "sparse" in forms else dense_config
    config = build(context.plan.source.config, summary, recipe=recipe.sha256())
    if context.untied:
        config["tie_word_embeddings"] = False
    for report, stage in zip(context.attached, _attaching(context), strict=True):
        if report.entry is not None:
            config.setdefault(METADATA_KEY, {"format_version": summary.version})[stage] = report.entry
    return config


def _attaching(context: Context) -> list[str]:
    return [stage.stage.attaches for stage in context.plan.stages if stage.stage.attaches]


def attach_files(context: Context, folder: Path) -> None:
    """What stages wrote to lie beside the weights: into OUT/gossamer/, whole or not at all."""
    for name in context.files:
        source = context.work / name
        target = (folder / MASKS).parent / Path(*Path(name).parts[2:])  # below attached/<stage>/
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target, source.stat().st_size) as file, open(source, "rb") as data:
            shutil.copyfileobj(data, file)
