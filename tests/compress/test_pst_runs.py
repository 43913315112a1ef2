"""PST through the finetune stage: exact counts, earlier masks, resume, and what is refused before a weight is read."""

from __future__ import annotations

import pytest
import torch
from families import save_family
from tiny import report, save_texts, save_words, tensors

from gossamer.compress.recipe import EvaluateStage, ExportStage, PruneStage, Recipe
from gossamer.compress.run import compress
from gossamer.compress.stage_recipes.finetune import FinetuneStage
from gossamer.errors import RecipeError


@pytest.fixture
def model(tiny):
    return tiny


def pst(folder, **options) -> FinetuneStage:
    own = {"method": "pst", "data": str(folder / "calibration.txt"), "steps": 6, "batch": 4, "seqlen": 32, "rank": 2}
    return FinetuneStage(**(own | {"score_rank": 2, "learning_rate": 3e-3} | options))


def run(model, out, *stages, form="dense"):
    compress(model, out, Recipe(stages=[*stages, ExportStage(format=form)]))
    return {key: tensor for key, tensor in tensors(out).items() if "_proj" in key}


def test_counts_are_exact_and_the_loss_is_reported(model, tmp_path):
    out = run(model, tmp_path / "out", pst(model, sparsity=0.7))
    dense = {key: tensor for key, tensor in tensors(model).items() if "_proj" in key}
    assert out.keys() == dense.keys()
    for key, tensor in out.items():
        assert int((tensor == 0).sum()) == round(0.7 * tensor.numel()), key
        assert not torch.equal(tensor[tensor != 0], dense[key][tensor != 0])
    stage = report(tmp_path / "out")["stages"][0]
    assert stage["method"] == "pst"
    assert stage["zeros"] == sum(int((tensor == 0).sum()) for tensor in out.values())
    beside = [tensor for key, tensor in tensors(model).items() if "norm" in key or key == "lm_head.weight"]
    factors = (2 + 2 + 1) * sum(sum(tensor.shape) for tensor in out.values())
    assert stage["trained"] == factors + sum(tensor.numel() for tensor in beside)


def test_groups_hold_and_an_earlier_mask_only_shrinks(model, tmp_path):
    one = PruneStage(method="magnitude", sparsity=0.3)
    early = run(model, tmp_path / "one", one)
    late = run(model, tmp_path / "two", one, pst(model, pattern="1:4"))
    for key, tensor in late.items():
        assert int(((tensor != 0).view(tensor.shape[0], -1, 4).sum(-1) > 1).sum()) == 0, key
        assert not bool(((early[key] == 0) & (tensor != 0)).any()), key


def test_a_prune_after_it_and_the_sparse_form(model, tmp_path):
    stages = [pst(model, sparsity=0.5), PruneStage(method="magnitude", sparsity=0.6, scope="matrix")]
    evaluate = EvaluateStage(data=str(model / "heldout.txt"), seqlen=32, windows=2)
    compress(model, tmp_path / "out", Recipe(stages=[*stages, evaluate]))
    assert report(tmp_path / "out")["sparsity"]["prunable"] == pytest.approx(0.6, abs=1e-3)


def test_transposed_matrices(tmp_path):
    folder = save_family("gpt2", tmp_path / "gpt2")
    save_words(folder, 64)
    save_texts(folder)
    compress(
        folder, tmp_path / "out", Recipe(stages=[pst(folder, sparsity=0.5, seqlen=16), ExportStage(format="dense")])
    )
    for key, tensor in tensors(tmp_path / "out").items():
        if key.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
            assert int((tensor == 0).sum()) == round(0.5 * tensor.numel()), key


def test_what_does_not_fit_is_found_first(model, tmp_path):
    with pytest.raises(RecipeError, match="not a multiple of 7"):
        run(model, tmp_path / "out", pst(model, pattern="1:7"))
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(ValueError, match="not both"):
        pst(model, pattern="1:4", sparsity=0.5)
