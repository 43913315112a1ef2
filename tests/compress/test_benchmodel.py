"""Models against each other: every contender is checked, a wrong one has no speed, ratios refer to dense ones."""

from __future__ import annotations

import json

import pytest
import torch
from exports import dense_twin, save_family_sparse
from typer.testing import CliRunner

from gossamer.cli.main import app
from gossamer.compress import benchmodel
from gossamer.compress.benchmodel import bench_models, markdown
from gossamer.kernels.modules.dense_linear import DenseLinear


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    sparse = save_family_sparse("llama", root / "sparse", dtype=torch.bfloat16)
    return [str(dense_twin(sparse, root / "dense")), str(sparse)]


def test_every_contender_has_its_row(folders):
    report = bench_models(folders, prompt_tokens=5, new_tokens=6, rounds=2)
    rows = {row["name"]: row for row in report["contenders"]}
    assert list(rows) == [
        "transformers bfloat16", "transformers bfloat16, no oneDNN", "transformers float16", "ours, dense",
        "ours, sparse",
    ]  # fmt: skip
    sparse, dense = rows["ours, sparse"], rows["ours, dense"]
    assert sparse["sparse"]
    assert sparse["weight_bytes"] < dense["weight_bytes"]
    assert 0 < sparse["bytes_per_token"] < dense["bytes_per_token"] < dense["weight_bytes"]
    fastest = min(row["decile_ms"] for row in rows.values() if not row["sparse"])
    for row in rows.values():
        assert row["relative_error"] <= benchmodel.TOLERANCE
        assert row["over_best_dense"] == pytest.approx(fastest / row["decile_ms"])
        assert row["gb_per_s"] == pytest.approx(row["bytes_per_token"] / row["decile_ms"] / 1e6)
    assert report["wrong"] == []
    assert len(markdown(report).splitlines()) == 4 + len(rows)


def test_every_way_gives_the_same_tokens(folders):
    ids = torch.arange(3, 9)[None]
    for contender in benchmodel._contenders(folders[0], benchmodel.Progress()):
        assert benchmodel._error(contender, ids) <= benchmodel.TOLERANCE
        ours = any(isinstance(module, DenseLinear) for module in contender.model.modules())
        assert ours == (contender.name == "ours, dense")


def test_a_wrong_result_has_no_speed(folders, monkeypatch):
    real = benchmodel._error
    monkeypatch.setattr(benchmodel, "_error", lambda one, ids: 1.0 if one.sparse else real(one, ids))
    report = bench_models(folders, prompt_tokens=5, new_tokens=4, rounds=1)
    row = report["contenders"][-1]
    assert row["decile_ms"] is row["over_best_dense"] is None
    assert report["wrong"] == ["ours, sparse"]
    assert "wrong result" in markdown(report)
    done = CliRunner().invoke(app, ["bench", "model", *folders, "--rounds", "1", "--new-tokens", "4", "-q"])
    assert done.exit_code == 1


def test_the_error_is_seen(folders, monkeypatch):
    from gossamer.kernels.modules import bitmask_linear

    contender = next(iter(benchmodel._contenders(folders[1], benchmodel.Progress())))
    ids = torch.arange(3, 9)[None]
    assert benchmodel._error(contender, ids) <= benchmodel.TOLERANCE
    real = bitmask_linear.together
    monkeypatch.setattr(bitmask_linear, "together", lambda x, weights: [1.5 * y for y in real(x, weights)])
    assert benchmodel._error(contender, ids) > benchmodel.TOLERANCE


def test_the_command_prints_json(folders):
    done = CliRunner().invoke(app, ["bench", "model", folders[1], "--rounds", "1", "--new-tokens", "4", "--json", "-q"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["contenders"][0]["over_best_dense"] is None
