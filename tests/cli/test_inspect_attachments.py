"""gossamer inspect says what a checkpoint has beside its weights."""

from __future__ import annotations

import json
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
