"""gossamer soup: independent checkpoints averaged under one mask, or refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny import save_llama, save_texts, tensors, words

import gossamer
from gossamer.compress.averaging import average_checkpoints
from gossamer.compress.recipe import ImpStage, PruneStage, Recipe
from gossamer.compress.run import compress
from gossamer.errors import CheckpointError, GossamerError, ModelError, RecipeError


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = save_llama(tmp_path_factory.mktemp("parent") / "model")
    save_texts(folder)
    return folder


@pytest.fixture(scope="module")
def candidates(parent, tmp_path_factory):
    """Three copies of one pruned parent, further trained apart: an imp stage that prunes nothing more."""
    root = tmp_path_factory.mktemp("candidates")
    pruned = root / "pruned"
    compress(parent, pruned, Recipe(stages=[PruneStage(method="magnitude", sparsity=0.5)]))
    found = []
    for seed in range(3):
        own = ImpStage(
            data=str(parent / "calibration.txt"),
            seqlen=32,
            steps=3,
            batch=4,
            phases=1,
            pattern="8:8",
            learning_rate=3e-3,
        )
        out = root / f"seed-{seed}"
        compress(pruned, out, Recipe(stages=[own], seed=seed))
        found.append(out)
    return found


def dense(folder) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in gossamer.load(folder, packed=False).named_parameters()}


@pytest.mark.parametrize("weights", [pytest.param(None, marks=pytest.mark.slow), [3, 1, 0]])
def test_the_average_by_hand(candidates, tmp_path, weights):
    report = average_checkpoints(candidates, tmp_path / "out", weights=weights)
    shares = [1 / 3] * 3 if weights is None else [0.75, 0.25, 0.0]
    assert report["weights"] == pytest.approx(shares)
    model = gossamer.load(tmp_path / "out", packed=False)
    own = {name: p.detach() for name, p in model.named_parameters()}
    parts = [dense(folder) for folder in candidates]
    assert len(model.gossamer_masks) == 21
    expected = gossamer.load(candidates[0], packed=False).gossamer_masks
    for name, tensor in own.items():
        mean = sum(share * part[name].double() for share, part in zip(shares, parts, strict=True))
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-8)
        if name in model.gossamer_masks:
            kept = model.gossamer_masks[name].to_bool()
            assert bool((tensor[~kept] == 0).all()), name
            assert torch.equal(kept, expected[name].to_bool())
    said = json.loads((tmp_path / "out" / "soup.json").read_text())
    assert said["masks_sha256"] == report["masks_sha256"]
    assert not (tmp_path / "out" / "report.json").exists()  # figures of one candidate
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "gossamer").exists()  # of the candidates it had metrics.jsonl alone
    assert not (tmp_path / "out.partial").exists()


def test_with_a_text_everything_is_compared(candidates, parent, tmp_path):
    report = average_checkpoints(candidates, tmp_path / "out", data=str(parent / "heldout.txt"), seqlen=32, windows=4)
    found = report["compared"]
    assert len(found["candidates"]) == 3
    assert found["best"]["loss"] == min(found["candidates"])
    assert found["soups"]["greedy"]["loss"] <= found["best"]["loss"]
    assert found["ensemble"] < max(found["candidates"])
    assert report["weights"] == found["soups"]["greedy"]["weights"]
    given = average_checkpoints(
        candidates, tmp_path / "two", weights=[1, 1, 1], data=str(parent / "heldout.txt"), seqlen=32, windows=4
    )
    assert given["compared"]["soups"]["given"]["loss"] == given["compared"]["soups"]["uniform"]["loss"]


def test_of_instructions_responses_are_compared(candidates, tmp_path):
    """Per row of packed examples the mean loss of its responses' tokens, each example by itself."""
    from transformers import AutoTokenizer

    from gossamer.compress.instructions import example_of

    records = [{"prompt": words(2, k), "completion": " " + words(1 + k % 2, 50 + k)} for k in range(7)]
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = average_checkpoints(candidates[:2], tmp_path / "out", data=str(path), seqlen=32, windows=2)["compared"]
    tokenizer = AutoTokenizer.from_pretrained(candidates[0])
    rows: list[list] = [[]]
    for example in (example_of(record, "", tokenizer) for record in records):
        if sum(len(one.ids) for one in [*rows[-1], example]) > 32:
            rows.append([])
        rows[-1].append(example)
    assert len(rows) > 2  # --windows leaves some out
    assert len(rows[0]) > 1
    for folder, loss in zip(candidates, found["candidates"], strict=False):
        model, means = gossamer.load(folder, packed=False, dtype=torch.float32), []
        for row in rows[:2]:
            losses = []
            for example in row:
                ids, labels = torch.tensor([example.ids]), torch.tensor(example.labels)
                log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
                losses += [-log_p[i, label] for i, label in enumerate(labels[1:].tolist()) if label >= 0]
            means.append(torch.stack(losses).mean())
        assert loss == pytest.approx(torch.stack(means).mean().item(), rel=1e-4)
    assert found["windows"] == 2


def test_a_dense_form_stays_dense(candidates, tmp_path):
    from gossamer.compress.convert import convert

    forms = []
    for index, folder in enumerate(candidates[:2]):
        convert(folder, tmp_path / f"dense-{index}", "dense")
        forms.append(tmp_path / f"dense-{index}")
    average_checkpoints(forms, tmp_path / "out")
    average_checkpoints(candidates[:2], tmp_path / "sparse")
    written, other = tensors(tmp_path / "out"), dense(tmp_path / "sparse")
    assert all(torch.equal(written[name], tensor) for name, tensor in other.items())
    assert (tmp_path / "out" / "gossamer" / "masks.safetensors").exists()


def test_different_candidates_are_refused_and_nothing_is_left(candidates, parent, tmp_path):
    one = candidates[0]
    other = tmp_path / "other-mask"
    compress(parent, other, Recipe(stages=[PruneStage(method="magnitude", sparsity=0.5, scope="matrix")]))
    shorter = save_llama(tmp_path / "short", num_hidden_layers=2)
    wider = save_llama(tmp_path / "wide", intermediate_size=96)
    tokens = tmp_path / "tokens"
    shutil.copytree(one, tokens)
    (tokens / "tokenizer.json").write_text((tokens / "tokenizer.json").read_text() + " ")
    half = tmp_path / "half"
    compress(save_llama(tmp_path / "h", dtype=torch.bfloat16), half, Recipe(stages=[PruneStage(method="magnitude")]))
    out = tmp_path / "out"
    cases: list[tuple[object, type[GossamerError], str]] = [
        (other, CheckpointError, r"_proj\.weight is masked differently in "),
        (parent, CheckpointError, "has a mask in .* only"),
        (shorter, ModelError, "num_hidden_layers is 3 and 2"),
        (wider, ModelError, "intermediate_size is 64 and 96"),
        (tokens, ModelError, r"different tokenizers \(tokenizer\.json\)"),
        (half, GossamerError, "float32.*bfloat16|dtype"),
    ]
    for second, kind, said in cases:
        with pytest.raises(kind, match=said):
            average_checkpoints([one, second], out)
    with pytest.raises(RecipeError, match="at least 2"):
        average_checkpoints([one], out)
    for weights in ([1.0], [0.0, 0.0], [1.0, -1.0], [1e308, 1e308], [float("nan"), 1.0]):
        with pytest.raises(RecipeError, match="weights"):
            average_checkpoints([one, candidates[1]], out, weights=weights)
    for margin in (float("nan"), -0.5, float("inf")):
        with pytest.raises(RecipeError, match="margin must be at least 0 and finite"):
            average_checkpoints([one, candidates[1]], out, margin=margin)
    for windows in (0, -1):
        with pytest.raises(RecipeError, match=f"windows must be at least 1, got {windows}"):
            average_checkpoints([one, candidates[1]], out, windows=windows)
    with pytest.raises(RecipeError, match="is one of the models"):
        average_checkpoints([one, candidates[1]], one, overwrite=True)
    assert not out.exists()
    assert not out.with_name("out.partial").exists()
