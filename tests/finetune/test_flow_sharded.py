"""N:M flow under FSDP2 in two gloo processes: the masks of one process, and its weights but for rounding."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from processes import Launcher

sys.path.insert(0, str(Path(__file__).resolve().parent))

import sharded_flow

TOLERANCE = 1e-5  # gradients are summed in another order


@pytest.mark.parametrize(
    ("kind", "tail", "whole_again"),
    [("sr-ste", 0.3, True), pytest.param("mdgf-linear", 0.0, False, marks=pytest.mark.slow)],
)
def test_two_processes_equal_one(launcher: Launcher, tmp_path: Path, kind: str, tail: float, whole_again: bool) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import sharded_flow; "
    code += f"sharded_flow.child({str(tmp_path)!r}, {kind!r}, {tail}, {whole_again})"
    for rank in launcher.start_group(2, "--version", before=code):
        done = rank.wait()
        assert done.returncode == 0, done.stderr
    masks, weights = sharded_flow.train(kind, tail)
    both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert both[0] == both[1]
    assert {name: both[0][name] for name in masks} == masks
    sharded = torch.load(tmp_path / "0.pt")
    assert sharded.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(sharded[name], weight, rtol=TOLERANCE, atol=TOLERANCE)
        assert torch.equal(sharded[name] == 0, weight == 0), name
