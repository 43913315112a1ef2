"""Fixtures for all tests: no network, fixed seeds, the shared models when present, one small trained model."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOSSAMER_DISPATCH", "sparse")  # tests do not depend on what is fast here, and measure nothing

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))  # helper modules beside the tests, such as families.py

if TYPE_CHECKING:
    from processes import Launcher


def pytest_collection_finish() -> None:
    """What the imports left is never garbage: every collection, and a run of `compress` makes many, leaves it out."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Every test starts from the same random state; a test that needs other numbers seeds its own generator."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with `models/` and `data/` beside the checkout. Skips where absent: the repository holds no weights."""
    folder = ROOT.parent / "shared"
    if not (folder / "models").is_dir():
        pytest.skip(f"no models and texts beside the checkout ({folder})")
    return folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small trained Llama with tokenizer, calibration.txt and heldout.txt: `make_demo` with few steps.

    Read-only: tests write elsewhere. The workers of one run share it, and the first that wants it makes it.
    """
    from filelock import FileLock

    from gossamer.compress.demo import make_demo

    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    folder = place / "demo-model"
    with FileLock(place / "demo-model.lock"):
        if not (folder / "made").exists():
            make_demo(folder / "model", seed=0, steps=DEMO_STEPS, size="tiny")
            (folder / "made").touch()
    return folder / "model"


DEMO_STEPS = 40


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Runs `gossamer` commands in processes of their own, one thread each."""
    from processes import Launcher

    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 3-block Llama in float32 with tokenizer, calibration.txt and heldout.txt. Read-only."""
    from tiny import save_llama, save_texts

    folder = save_llama(tmp_path_factory.mktemp("tiny") / "model")
    save_texts(folder)
    return folder
