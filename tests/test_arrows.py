"""The folders import downwards only, and the light modules stay light."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# folder -> folders it may import from; everyone may import errors and __version__
ALLOWED = {
    "gossamer": {"cli", "compress", "pruning", "activation_sparsity", "attention", "finetune", "kernels"},
    "cli": {"compress", "pruning", "activation_sparsity"},
    "compress": {"pruning", "activation_sparsity", "attention", "finetune", "kernels"},
    "pruning": {"kernels"},
    "activation_sparsity": {"kernels"},
    "attention": {"kernels"},
    "finetune": {"pruning", "kernels"},
    "kernels": set(),
}
WITHOUT_TRANSFORMERS = {"pruning", "activation_sparsity", "kernels"}
IMPORT_FREE = ["gossamer/errors.py", *(f"{name}/__init__.py" for name in ALLOWED if name != "gossamer")]
HEAVY = {"torch", "transformers", "accelerate", "datasets", "peft", "numpy", "pydantic", "safetensors"}


def files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def imports(path: Path, *, top_only: bool = False) -> set[str]:
    """Absolute dotted names of what a file imports, with the package's own name for relative ones."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = ["gossamer", *parts][:-1] if parts[0] != "gossamer" else list(parts)[:-1]
    found = set()
    for node in _run_at_import(tree) if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def _run_at_import(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run when the module is imported: not those of functions and type checking blocks."""
    statements: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        statements.append(node)
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            statements += [child for child in ast.walk(node) if isinstance(child, ast.stmt)]
    return statements


def own_folders(names: set[str]) -> set[str]:
    return {parts[1] for name in names if (parts := name.split("."))[0] == "gossamer" and len(parts) > 1} & set(ALLOWED)


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_follow_the_arrows(folder):
    for path in files(folder):
        extra = own_folders(imports(path)) - ALLOWED[folder] - {folder}
        assert not extra, f"{path.relative_to(ROOT)} imports {', '.join(sorted(extra))}"


def test_cli_takes_only_names_from_pruning():
    taken = {name for path in files("cli") for name in imports(path) if name.startswith("gossamer.pruning")}
    assert all(name.startswith("gossamer.pruning.registry.") for name in taken)


@pytest.mark.parametrize("folder", sorted(WITHOUT_TRANSFORMERS))
def test_leaves_know_tensors_only(folder):
    for path in files(folder):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"transformers", "peft", "datasets", "accelerate", "safetensors"}, path.relative_to(ROOT)


@pytest.mark.parametrize("path", IMPORT_FREE)
def test_import_free_modules(path):
    allowed = {"__future__.annotations", "typing.TYPE_CHECKING"}
    assert imports(ROOT / path, top_only=True) <= allowed


def test_commands_import_nothing_heavy_before_they_run():
    for path in files("cli"):
        assert not {name.split(".")[0] for name in imports(path, top_only=True)} & HEAVY, path.name
        own = {name for name in imports(path, top_only=True) if name.startswith("gossamer.compress")}
        assert own <= {"gossamer.compress.progress.BlockDone", "gossamer.compress.progress.Progress"}, path.name


def test_library_code_does_not_print():
    for folder in ALLOWED:
        for path in files(folder):
            calls = [
                node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
            ]
            names = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
            assert not names & {"print", "breakpoint", "exec", "eval"}, path.relative_to(ROOT)


def test_the_check_sees_a_wrong_arrow(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "pruning").mkdir()
    (tmp_path / "pruning" / "bad.py").write_text("def f():\n    from ..compress.run import compress\n")
    assert own_folders(imports(tmp_path / "pruning" / "bad.py")) == {"compress"}
    assert imports(tmp_path / "pruning" / "bad.py", top_only=True) == set()
