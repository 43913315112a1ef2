"""Tables that benchmarks write into pages of docs/, between two marks."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def put(page: Path, begin: str, end: str, made: str) -> None:
    """Replace what stands between the marks of `page` by `made`; exits where the marks are missing."""
    text = page.read_text(encoding="utf-8")
    inside = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
    if not inside.search(text):
        sys.exit(f"{page} has no {begin} ... {end}")
    page.write_text(inside.sub(lambda _: f"{begin}\n\n{made}\n{end}", text), encoding="utf-8")
    print(f"wrote {page}")
