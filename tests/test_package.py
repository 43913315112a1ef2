"""What is shipped: the folders of the checkout are the sub-packages of the wheel, nothing more and nothing less."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_SHIPPED = {"tests", "benchmarks", "docs", "build"}


def table() -> dict[str, str]:
    """`wheel.packages` of pyproject.toml: import path -> folder. Read by hand: tomllib is younger than Python 3.10."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[tool.scikit-build.wheel.packages]")[2].partition("\n[")[0]
    return dict(re.findall(r'^"([^"]+)" = "([^"]+)"$', section, flags=re.MULTILINE))


def package_folders() -> set[str]:
    return {path.parent.name for path in ROOT.glob("*/__init__.py")} - NOT_SHIPPED


def test_every_package_folder_is_in_the_table():
    assert set(table().values()) == package_folders()


def test_the_path_on_disk_is_the_path_in_the_import():
    for path, folder in table().items():
        assert path == ("gossamer" if folder == "gossamer" else f"gossamer/{folder}")


def test_folders_below_a_package_are_packages():
    for folder in package_folders():
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.relative_to(ROOT)} would not be importable"


def test_version_is_told_once():
    import gossamer

    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.+)"$', project, flags=re.MULTILINE).group(1) == gossamer.__version__


def test_the_checkout_does_not_hide_the_installed_package():
    """In the root of the checkout, the folder gossamer/ comes first on the path and holds no sub-packages."""
    code = "import gossamer.pruning.registry, gossamer.cli.main; print(gossamer.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_dependencies_are_bounded():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    runtime = project.partition("\ndependencies = [")[2].partition("]\n")[0]
    named = re.findall(r'"([^"]+)"', runtime)
    assert len(named) >= 10
    assert all(">=" in name and "<" in name for name in named)


def test_readme_names_every_file():
    """The tree in the README has one line per file: a file without a line, or a line without a file, is found here."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.partition("<!-- tree -->")[2].partition("<!-- /tree -->")[0]
    named: set[str] = set()
    folders: list[str] = []
    for line in tree.splitlines():
        if not (match := re.match(r"^( *)([\w.-]+/?)(?:\s{2,}|$)", line)):
            continue
        depth = len(match[1]) // 2
        folders = [*folders[:depth], match[2].rstrip("/")]
        if not match[2].endswith("/"):
            named.add("/".join(folders))
    shipped = {
        str(path.relative_to(ROOT))
        for folder in package_folders()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".hpp") and path.name != "__init__.py"
    }
    shipped.add("gossamer/__init__.py")
    assert shipped - named == set(), "not in the README's tree"
    assert {name for name in named if not (ROOT / name).exists()} == set(), "in the README's tree only"


@pytest.mark.slow
def test_wheel_holds_exactly_the_folders(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    names = zipfile.ZipFile(next(tmp_path.glob("gossamer-*.whl"))).namelist()
    found = {name for name in names if name.endswith((".py", ".typed")) and ".dist-info" not in name}
    wanted = {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for package, folder in table().items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".typed") and "__pycache__" not in path.parts
    }
    assert found == wanted
    assert any(re.fullmatch(r"gossamer/kernels/_C\..*so|gossamer/kernels/_C.*\.pyd", name) for name in names)
    assert {name.split("/")[0] for name in names} <= {
        "gossamer",
        *(n.split("/")[0] for n in names if ".dist-info" in n),
    }
