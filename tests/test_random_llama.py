"""The random model builder: transformers loads exactly the file's tensors, and depth does not change a block."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import random_llama
from random_llama import Shape

SMALL = Shape(layers=2, hidden=48, intermediate=80, heads=6, kv_heads=2, vocab=600, max_positions=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama.build(tmp_path_factory.mktemp("random") / "model", SMALL)


def test_transformers_finds_every_tensor(folder: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == SMALL.parameters
    stored = load_file(folder / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored[name]), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (folder / "heldout.txt").read_text(encoding="utf-8")[:200]
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id == 1
    assert int(ids.max()) < SMALL.vocab
    assert tokenizer.decode(ids[0, 1:]) == text
    assert torch.isfinite(model(ids[:, :64]).logits).all()


def test_weights_spread_as_asked_and_depend_on_seed_not_depth(folder: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    random_llama.write_weights(tmp_path / "deep.safetensors", replace(SMALL, layers=3), torch.bfloat16, 0)
    random_llama.write_weights(tmp_path / "other.safetensors", SMALL, torch.bfloat16, 1)
    deep, other = load_file(tmp_path / "deep.safetensors"), load_file(tmp_path / "other.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(stored[name], deep[name])
    assert not torch.equal(stored[name], other[name])
    assert not torch.equal(stored[name], stored[name.replace("1", "0")])
    assert stored[name].float().std().item() == pytest.approx(0.02, rel=0.05)
    assert (stored["model.norm.weight"] == 1).all()


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match="heads"):
        Shape(hidden=50, heads=6)
