"""Back ends as fixtures, for tests of operations whose public names take plain tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gemv_cases import BACKENDS, backend

from gossamer.kernels import tier


@pytest.fixture(params=BACKENDS)
def on(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every back end, torch among them."""
    with backend(request.param):
        yield request.param


@pytest.fixture(params=[name for name in BACKENDS if name != "torch"])
def compiled(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every compiled tier: promises on bits and positions that torch's own operations do not make."""
    if not tier.available():
        pytest.skip("no compiled code here")
    with backend(request.param):
        yield request.param
