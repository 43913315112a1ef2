"""After gossamer convert, the report and the card speak of the files that are there; what was measured stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from families import save_family

from gossamer.compress.convert import convert
from gossamer.compress.recipe import ExportStage, PruneStage, Recipe
from gossamer.compress.run import compress


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    save_family("llama", folder / "model")
    compress(folder / "model", folder / "sparse", Recipe(stages=[PruneStage(method="magnitude"), ExportStage()]))
    return folder / "sparse"


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_dense(sparse, tmp_path):
    convert(sparse, tmp_path / "dense", "dense")
    old, new = report(sparse), report(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    assert new["output"] == "dense"
    assert new["bytes"]["files"] == {"model.safetensors": file.stat().st_size}
    assert new["bytes"]["after"] == new["bytes"]["before"] > old["bytes"]["after"]
    assert new["bytes"]["ratio"] == 1
    changed = {key for key in new if new[key] != old[key]}
    assert changed == {"output", "bytes", "notes"}
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "This is an ordinary checkpoint with zeros in it" in card
    assert "variant" not in card
    assert "# dense" in card
    assert "converted to the dense form" in (tmp_path / "dense" / "report.html").read_text()


def test_there_and_back(sparse, tmp_path):
    convert(sparse, tmp_path / "dense", "dense")
    convert(tmp_path / "dense", tmp_path / "sparse", "sparse")
    old, new = report(sparse), report(tmp_path / "sparse")
    assert new["bytes"] == old["bytes"]
    assert [note for note in new["notes"] if note not in old["notes"]] == [
        "converted to the sparse form by gossamer convert; sizes are those of the converted files"
    ]
    card = (tmp_path / "sparse" / "README.md").read_text()
    assert 'variant="sparse"' in card
    assert "ordinary checkpoint" not in card


def test_an_edited_card_is_left_alone(sparse, tmp_path):
    edited = Path(shutil.copytree(sparse, tmp_path / "edited"))
    card = edited / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    convert(edited, tmp_path / "dense", "dense")
    assert (tmp_path / "dense" / "README.md").read_text() == card.read_text()
    assert report(tmp_path / "dense")["output"] == "dense"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1, "gossamer": "0"}', '{"schema": 99}'])
def test_a_report_that_is_not_ours_stays_as_it_is(sparse, tmp_path, text):
    other = Path(shutil.copytree(sparse, tmp_path / "other"))
    (other / "report.json").write_text(text)
    convert(other, tmp_path / "dense", "dense")
    assert (tmp_path / "dense" / "report.json").read_text() == text
    assert (tmp_path / "dense" / "README.md").read_text() == (sparse / "README.md").read_text()
