"""gossamer inspect says what a checkpoint has beside its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from activation_cases import family_with, linear_policy
from typer.testing import CliRunner

from gossamer.cli.main import app


def test_policies_and_head_plans_are_shown(tmp_path: Path) -> None:
    folder = family_with("llama", tmp_path / "m", linear_policy("llama", 0.5))
    config = json.loads((folder / "config.json").read_text())
    plan = {"density": {"128": 0.5, "256": 0.375}, "block": 16, "made": {"name": "gossamer (group)"}}
    config["gossamer"]["heads"] = plan
    (folder / "config.json").write_text(json.dumps(config))
    shown = CliRunner().invoke(app, ["inspect", str(folder)])
    assert shown.exit_code == 0, shown.output
    assert "head plan gossamer (group): KV bytes 50.00 % at 128, 37.50 % at 256 tokens" in shown.output
    assert "21 matrices, 0 MLPs" in shown.output
    found = json.loads(CliRunner().invoke(app, ["inspect", str(folder), "--json"]).output)
    assert found["heads"] == {"method": "gossamer (group)", "density": plan["density"], "block": 16}
    assert found["activation"]["maps"] == 21


def test_eval_says_that_it_leaves_a_policy_out(tmp_path: Path, tiny: Path) -> None:
    """On prompts nothing is skipped; of a model without a policy nothing is said."""
    folder = shutil.copytree(tiny, tmp_path / "m")
    words = ["--data", str(tiny / "heldout.txt"), "--seqlen", "16", "--windows", "2"]
    plain = CliRunner().invoke(app, ["eval", str(folder), *words])
    assert plain.exit_code == 0, plain.output
    assert "policy" not in plain.output
    config = json.loads((folder / "config.json").read_text())
    config["gossamer"] = {"format_version": 1, "activation": {"method": "threshold", "file": "gossamer/activation"}}
    (folder / "config.json").write_text(json.dumps(config))
    shown = CliRunner().invoke(app, ["eval", str(folder), *words])
    assert shown.exit_code == 0, shown.output
    assert "without its activation policy (threshold)" in shown.output
    assert shown.output.splitlines()[0] == plain.output.splitlines()[0]
