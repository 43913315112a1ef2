"""The report as a page and a picture: grouping by kind and block, escaping, nothing drawn from nothing."""

from __future__ import annotations

import base64
import re

import pytest
from matplotlib.figure import Figure
from pictures import RENDER

from gossamer.compress.page import PICTURE, page_text, write_picture
from gossamer.compress.pictures import layer_series, layers_png
from gossamer.compress.report import Report
from gossamer.compress.trainingfigures import training_png

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _rendered(monkeypatch):
    """Here, pictures are drawn to the last pixel."""
    monkeypatch.setattr(Figure, "savefig", RENDER)


def row(name: str, error: float | None = 0.25, sparsity: float = 0.5, stage: int = 0) -> dict:
    return {
        "name": name, "shape": [8, 4], "pattern": "0.5", "method": "wanda", "zeros": 16, "sparsity": sparsity,
        "tokens": 99, "error_before": error, "error_after": error, "seconds": 0.1, "stage": stage,
    }  # fmt: skip


def report(rows: list[dict], **extra) -> Report:
    data = {
        "output": "<out>", "model": "a&b", "command": "gossamer compress 'a&b' -o '<out>'", "evaluation": None,
        "calibration": None, "layers": rows, "skipped": [{"name": "router", "reason": "3 < 4"}], "notes": ["x < y"],
        "sparsity": {"before": 0.0, "prunable": 0.5, "all_before": 0.0, "all": 0.4},
        "bytes": {"before": 1000, "after": 600, "prunable_before": 800, "prunable_after": 400},
        "environment": {"torch": "2"}, "time_s": 1.0, "peak_memory_bytes": 10**6,
    }  # fmt: skip
    return Report(data | extra)


def test_rows_are_grouped_by_kind_and_block_and_experts_averaged():
    rows = [
        row("model.layers.0.mlp.up_proj", 0.1),
        row("model.layers.11.mlp.up_proj", 0.3),
        row("model.layers.0.mlp.experts.down_proj.0", 0.2),
        row("model.layers.0.mlp.experts.down_proj.1", 0.4),
        row("model.layers.2.self_attn.q_proj", None),
        row("lm_head", 0.9),
    ]
    found = layer_series(rows, "error_after")
    assert found["mlp.up_proj"] == {0: 0.1, 11: 0.3}
    assert found.keys() == {"mlp.up_proj", "mlp.experts.down_proj"}
    assert abs(found["mlp.experts.down_proj"][0] - 0.3) < 1e-12


def test_the_last_stage_counts():
    rows = [row("h.0.fc", 0.1, 0.3), row("h.0.fc", 0.2, 0.6, stage=2)]
    assert layer_series(rows, "sparsity") == {"fc": {0: 0.6}}


def test_pictures_of_anything():
    assert layers_png([]) is None
    assert layers_png([row("lm_head")]) is None
    for rows in (
        [row("h.0.fc"), row("h.1.fc")],
        [row("h.0.fc", None)],
        [row("h.0.fc", 0.0)],
        [row(f"h.{b}.kind{k}") for b in range(3) for k in range(11)],
    ):
        picture = layers_png(rows)
        assert picture is not None
        assert picture.startswith(PNG)
        assert len(picture) > 10_000


def test_a_picture_of_training():
    history = [{"step": step, "loss": 3.0 - step, "sparsity": 0.25 * step} for step in range(3)]
    runs = [{"stage": 0, "name": name, "history": history} for name in ("phase-1", "phase-2-candidate-1")]
    picture = training_png(runs)
    assert picture is not None
    assert picture.startswith(PNG)
    assert len(picture) > 10_000
    assert training_png([runs[0] | {"history": []}]) is None


def test_the_page_is_whole_and_escapes_what_it_is_given():
    picture = layers_png([row("h.0.fc")])
    text = page_text(report([row("h.0.fc"), row("h.1.fc", None)]), "stages: <none>\n", picture)
    body = text.split("</style>")[1]
    assert "<out>" not in body
    assert "&lt;out&gt;" in body
    assert "a&amp;b" in body
    assert "stages: &lt;none&gt;" in body
    assert "x &lt; y" in body
    assert "3 &lt; 4" in body
    assert "2.500e-01" in body
    embedded = re.search(r'base64,([^"]+)"', body)
    assert embedded is not None
    assert base64.b64decode(embedded[1]) == picture
    assert body.count("<table>") == body.count("</table>") == 4
    assert "http" not in text


def test_a_page_without_matrices_has_no_picture():
    assert "<img" not in page_text(report([]), "", None)


def test_a_picture_of_the_source_model_is_not_left_behind(tmp_path):
    (tmp_path / "gossamer").mkdir()
    (tmp_path / PICTURE).write_bytes(b"old")
    write_picture(tmp_path, None)
    assert not (tmp_path / PICTURE).exists()
    write_picture(tmp_path, b"new")
    assert (tmp_path / PICTURE).read_bytes() == b"new"
