"""Real text that every Python installation carries: the standard library's own documentation.

Documents are the docstrings of the library's modules, classes and functions (read from the source files, nothing is
imported) and the language reference that `help()` shows. A paragraph that occurred before is dropped, so that the same
sentence is never both trained on and held out. The result depends on the Python version alone.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError
from .textdata import SEPARATOR

HELD_OUT_PARTS = 16  # one document in so many is held out

_SHORTEST = 60  # characters; below, a docstring is a label rather than text
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "distutils"}


def collect_documents(folder: Path | None = None) -> list[str]:
    """Deduplicated documents in a fixed order. `folder`: where the `.py` files are; default: the standard library.

    Raises DataError when there are none (an installation without sources).
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    seen: set[bytes] = set()
    documents = [text for document in _raw_documents(folder) if len(text := _unseen(document, seen)) >= _SHORTEST]
    if not documents:
        raise DataError(
            f"{folder} holds no documentation to train the demo model on",
            hint="use a Python installation that carries the standard library's source files",
        )
    return documents


def split_documents(documents: list[str]) -> tuple[str, str]:
    """(training text, held-out text): the digest of a document decides where it goes, whatever else is there."""
    parts: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        digest = hashlib.sha256(document.encode()).digest()
        parts[digest[0] % HELD_OUT_PARTS == 0].append(document)
    return SEPARATOR.join(parts[0]) + "\n", SEPARATOR.join(parts[1]) + "\n"


def _raw_documents(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        where = path.relative_to(folder)
        if _LEFT_OUT.intersection(where.parts):
            continue
        tree = _parse(path)
        if tree is None:
            continue
        if where.as_posix() == "pydoc_data/topics.py":
            yield from _topics(tree)
        for node in _statements(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ast.get_docstring(node) or ""


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """The module and its statements in the order of `ast.walk`, without expressions: those are most of the nodes."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        children = ast.iter_child_nodes(node)
        waiting.extend(n for n in children if isinstance(n, (ast.stmt, ast.ExceptHandler, ast.match_case)))
        yield node


def _parse(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escape sequences in other people's files
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # templates and encodings that are not ours to judge
        return None


def _topics(tree: ast.Module) -> Iterator[str]:
    """The reference texts of `pydoc_data.topics.topics`, a dictionary of plain strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            values = [value.value for value in node.values if isinstance(value, ast.Constant)]
            yield from sorted(value for value in values if isinstance(value, str))


def _unseen(document: str, seen: set[bytes]) -> str:
    """The document without paragraphs that were seen before (spaces aside)."""
    kept = []
    for paragraph in document.expandtabs().split("\n\n"):
        words = " ".join(paragraph.split())
        digest = hashlib.sha256(words.encode("utf-8", "surrogatepass")).digest()
        if words and digest not in seen:
            seen.add(digest)
            kept.append("\n".join(line.rstrip() for line in paragraph.strip("\n").split("\n")))
    return "\n\n".join(kept)
