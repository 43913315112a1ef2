"""Groups of processes on the small random model, folders of int8 values; pictures are rendered by their own tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pictures import leave_unrendered

if TYPE_CHECKING:
    from groups import Group
    from processes import Launcher

leave_unrendered()


@pytest.fixture
def group(launcher: Launcher, tiny: Path) -> Group:
    """Runs `compress` on the small random model in as many processes as wanted."""
    from groups import Group

    return Group(launcher, tiny)


@pytest.fixture(scope="session")
def whole(launcher: Launcher, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of one process' undisturbed run of the default method."""
    from groups import Group

    return Group(launcher, tiny).finished(1, tmp_path_factory.mktemp("whole") / "one")


@pytest.fixture(scope="session", params=[("llama", "bfloat16"), ("gpt2", "float32"), ("mixtral", "float16")])
def int8_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sparse folder with float values, the same with int8 values); every second matrix is not pruned. Read-only."""
    return _save_pair(tmp_path_factory, *request.param)


@pytest.fixture(scope="session")
def int8_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """`int8_pair` of a Llama alone. Read-only."""
    return _save_pair(tmp_path_factory, "llama", "bfloat16")


def _save_pair(tmp_path_factory: pytest.TempPathFactory, name: str, dtype: str) -> tuple[Path, Path]:
    import torch
    from int8_folders import save_pair

    return save_pair(tmp_path_factory.mktemp(name), name, getattr(torch, dtype))
