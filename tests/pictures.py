"""Pictures that are composed, but not rendered: drawing the letters of one takes a third of a small model's run.

`tests/compress/test_page.py` and `tests/cli/test_end_to_end.py` render theirs.
"""

from __future__ import annotations

import base64
from typing import Any

from matplotlib.figure import Figure

# One grey pixel.
BLANK = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg==")
RENDER = Figure.savefig


def _save(self: Figure, file: Any, **options: Any) -> None:
    file.write(BLANK)


def leave_unrendered() -> None:
    """For the rest of this process."""
    Figure.savefig = _save  # type: ignore[method-assign]
