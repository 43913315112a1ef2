"""What holds on trained models only: the order of the methods, figures confirmed by other programs, bytes saved."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gossamer.compress.blocks import StreamedModel
from gossamer.compress.calibration import collect
from gossamer.compress.data import calibration_windows, load_text, token_ids
from gossamer.compress.hidden import HiddenStore
from gossamer.compress.recipe import EvaluateStage, ExportStage, PruneStage, Recipe
from gossamer.compress.run import compress
from gossamer.compress.source import open_source
from gossamer.compress.text import load_tokenizer
from gossamer.pruning.base import LayerStats, relative_error
from gossamer.pruning.pattern import parse_pattern
from gossamer.pruning.registry import get_method

NEEDS = frozenset({"norm", "gram", "holdout"})


class Measured:
    """The first blocks of a trained model with the statistics of the dense model's inputs."""

    def __init__(self, folder: Path, text: Path, scratch: Path, windows: int = 12, length: int = 128) -> None:
        source = open_source(folder)
        self.model = StreamedModel.open(source, folder)
        ids = token_ids(load_tokenizer(folder), load_text(str(text), "calibration"))
        self.ids = calibration_windows(ids, windows, length, seed=0)
        self.scratch = scratch

    def blocks(self, count: int):
        """(block, prunables, statistics) of the first blocks."""
        yield from self._blocks(self.ids, count)

    def _blocks(self, ids: torch.Tensor, count: int):
        hidden = HiddenStore(self.scratch / "hidden", 1 << 28)
        with self.model.outer():
            args = self.model.capture(ids, hidden.put)
        for index in range(count):
            block = self.model.load_block(index)
            groups = self.model.input_groups(index, block, hidden.get(0), args)
            stats = collect(self.model, index, block, None, groups, hidden, None, args, NEEDS, len(ids))
            yield block, [prunable for group in groups for prunable in group], stats
            for window in range(len(ids)):
                hidden.put(window, self.model.run_block(index, block, hidden.get(window), args, window))

    def without(self, window: int) -> dict[str, LayerStats]:
        """Statistics of block 0 without one of the windows."""
        ids = torch.cat([self.ids[:window], self.ids[window + 1 :]])
        return next(self._blocks(ids, 1))[2]


MODELS = {
    "stories260k": "data/tinystories/calibration.txt",
    "tiny-opt": "data/tinystories/calibration.txt",
    "capp-gpt2": None,
}


@pytest.fixture(scope="module")
def measured(shared, tmp_path_factory):
    made: dict[str, Measured] = {}

    def make(name: str) -> Measured:
        if name not in made:
            folder = shared / "models" / name
            scratch = tmp_path_factory.mktemp(name)
            text = MODELS[name]
            if text is None:  # symbols of its own: draw some of them
                symbols = sorted(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
                picks = torch.randint(len(symbols), (4000,), generator=torch.Generator().manual_seed(1)).tolist()
                (scratch / "text.txt").write_text(" ".join(symbols[i] for i in picks))
            made[name] = Measured(folder, scratch / "text.txt" if text is None else shared / text, scratch)
        return made[name]

    return make


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("name", list(MODELS))
def test_layer_error_ours_sparsegpt_magnitude(name, pattern, measured):
    """Every matrix of two blocks, all methods on the same statistics: ||(W - W') X|| in this order."""
    compared = 0
    machine = measured(name)
    for block, prunables, stats in machine.blocks(2):
        for prunable in prunables:
            weight, known = machine.model.weight(block, prunable), stats[prunable.name]
            errors = []
            for method in ("gossamer", "sparsegpt", "magnitude"):
                new, mask = get_method(method).prune(weight, known, parse_pattern(pattern, "row"))
                assert bool((new[~mask] == 0).all())
                errors.append(relative_error(weight, new, known))
            assert errors[0] <= errors[1] <= errors[2], (prunable.name, errors)
            compared += 1
    assert compared >= 8


def test_any_window_left_out_changes_every_gram(measured):
    machine = measured("stories260k")
    full = next(machine.blocks(1))[2]
    for window in range(len(machine.ids)):
        left = machine.without(window)
        assert left.keys() == full.keys()
        for name, stats in full.items():
            assert not torch.equal(left[name].gram, stats.gram), (window, name)
            assert left[name].tokens == stats.tokens - machine.ids.shape[1]


@pytest.mark.parametrize("method", ["sparsegpt", "gossamer"])
def test_perplexity_is_what_an_independent_program_measures(method, shared, tmp_path, monkeypatch, capsys):
    """`ppl.py` knows transformers alone: same protocol, same figure to 4 digits, same zeros."""
    text = shared / "data" / "tinystories"
    stage = PruneStage(method=method, calibration=str(text / "calibration.txt"), nsamples=8, seqlen=128)
    score = EvaluateStage(data=str(text / "evaluation.txt"), seqlen=256, windows=12)
    what = Recipe(stages=[stage, score, ExportStage(format="dense")])
    report = compress(shared / "models" / "stories260k", tmp_path / "out", what)
    capsys.readouterr()
    for folder, key in ((tmp_path / "out", "after"), (shared / "models" / "stories260k", "before")):
        monkeypatch.setattr(sys, "argv", ["ppl.py", str(folder), str(text / "evaluation.txt"), "256", "12"])
        runpy.run_path(str(shared / "tools" / "ppl.py"), run_name="__main__")
        found = json.loads(capsys.readouterr().out)
        assert f"{found['perplexity']:.4f}" == f"{report['evaluation'][key]['perplexity']:.4f}"
        assert found["windows"] == report["evaluation"]["protocol"]["windows"] == 12
        assert found["zeros"] == (report["sparsity"]["zeros"] if key == "after" else 0)


def test_the_sparse_file_saves_what_it_should(tmp_path):
    """Half of the weights of bf16 matrices of 256 x 256 and more: one bit per weight and two bytes per kept one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    stage = PruneStage(method="magnitude")
    report = compress(tmp_path / "model", tmp_path / "out", Recipe(stages=[stage, ExportStage(format="sparse")]))
    with safe_open(tmp_path / "out" / "model.sparse.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    shapes = {row["name"]: row["shape"] for row in report["layers"]}
    assert len(shapes) == 14
    for name, (rows, cols) in shapes.items():
        stored = sum(tensors[f"{name}.weight_{part}"].nbytes for part in ("bitmask", "values"))
        assert min(rows, cols) >= 256
        assert stored == rows * cols // 8 + rows * cols
        assert stored <= 0.57 * 2 * rows * cols
    assert report["bytes"]["prunable_ratio"] == pytest.approx(0.5625)
