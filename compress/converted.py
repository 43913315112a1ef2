"""Report, model card and page of a run after `gossamer convert`: other files, loaded in another way.

Figures of the run itself (perplexity, layers, time) stay. A card that somebody has edited is left alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .card import card_text
from .checkpoint import atomic_write_text
from .format import INT8
from .page import PICTURE, write_page
from .report import SCHEMA, Report

FORMATS = ("sparse", "dense", "both")


def refresh_report(
    folder: Path, name: str, form: str, payload: dict[str, int], packed: int, *, rounded: bool = False
) -> bool:
    """Rewrite what `folder` says about its weight files; False where there is no report of ours that can be read.

    `name`: what the folder will be called; `payload`: tensor bytes of each weight file; `packed`: bytes of the
    matrices with a mask in the sparse form; `rounded`: the conversion rounded weights to int8 values.
    """
    recipe = _text(folder / "recipe.yaml")
    try:
        old = json.loads(_text(folder / "report.json"))
        if old["schema"] != SCHEMA or "gossamer" not in old:
            return False
        cards = {card_text(Report(old), recipe, name) for name in FORMATS}
        new = Report(_updated(old, folder, name, form, payload, packed, rounded))
        card = card_text(new, recipe, form)
    except (ValueError, KeyError, TypeError):
        return False  # another program's report.json, or one that was edited
    new.save(folder)
    if _text(folder / "README.md") in cards:
        atomic_write_text(folder / "README.md", card)
    if (folder / "report.html").exists():
        picture = folder / PICTURE
        write_page(folder, new, recipe, picture.read_bytes() if picture.is_file() else None)
    return True


def _updated(
    old: dict[str, Any], folder: Path, name: str, form: str, payload: dict[str, int], packed: int, rounded: bool
) -> dict[str, Any]:
    after = sum(payload.values())
    size = old["bytes"] | {
        "after": after,
        "ratio": after / old["bytes"]["before"],
        "prunable_after": packed,
        "prunable_ratio": packed / old["bytes"]["prunable_before"] if old["bytes"]["prunable_before"] else 1.0,
        "files": {file: (folder / file).stat().st_size for file in payload},
        "payload": payload,
    }
    said = "converted to the "
    notes = [note for note in old["notes"] if not note.startswith((said, "only transformers reads"))]
    notes.append(f"{said}{form} form by gossamer convert; sizes are those of the converted files")
    if not rounded:
        return old | {"output": name, "bytes": size, "notes": notes}
    notes.append("weights were rounded by gossamer convert, after the perplexity above was measured: gossamer eval")
    return old | {"output": name, "bytes": size, "notes": notes, "values": INT8}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
