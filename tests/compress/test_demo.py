"""The demo model and the text it is trained on."""

from __future__ import annotations

import json
import math

import pytest
import torch

from gossamer.compress import demo as demo_module
from gossamer.compress.data import load_text, token_ids
from gossamer.compress.demo import make_demo
from gossamer.compress.demo_text import collect_documents, split_documents
from gossamer.compress.overlap import check_overlap
from gossamer.errors import DataError, RecipeError, ResourceError


@pytest.fixture
def library(tmp_path):
    """A library of two files with docstrings, repeated paragraphs and things to leave out."""
    folder = tmp_path / "library"
    (folder / "pydoc_data").mkdir(parents=True)
    (folder / "test").mkdir()
    first, second, third = (
        f"{word} paragraph, long enough to be kept as a text of its own, whatever else." for word in "ABC"
    )
    (folder / "a.py").write_text(f'"""{first}\n\n{second}"""\ndef f():\n    """Short."""\n')
    (folder / "b.py").write_text(
        f'class K:\n    """{second}\n\n    {third}"""\n    async def g(self):\n        """{first}"""\n'
    )
    (folder / "pydoc_data" / "topics.py").write_text(
        "topics = {'z': 'Z " + "z" * 80 + "', 'a': 'A " + "a" * 80 + "'}\n"
    )
    (folder / "test" / "c.py").write_text(f'"""{"Left out " * 20}"""')
    (folder / "broken.py").write_text("def (")
    return folder


def test_documents_are_in_order_and_no_paragraph_comes_twice(library):
    documents = collect_documents(library)
    assert [document[:1] for document in documents] == ["A", "C", "A", "Z"]
    assert documents[0].count("paragraph") == 2
    assert documents[1].count("paragraph") == 1
    assert documents == collect_documents(library)


def test_python_without_sources(tmp_path):
    with pytest.raises(DataError, match="holds no documentation"):
        collect_documents(tmp_path)


def test_split_depends_on_the_document_alone():
    documents = [f"document number {i}" for i in range(400)]
    training, held_out = (set(text.strip().split("\n\n")) for text in split_documents(documents))
    assert training | held_out == set(documents)
    assert not training & held_out
    assert 10 <= len(held_out) <= 45
    fewer = set(split_documents(documents[::2])[1].strip().split("\n\n"))
    assert fewer == held_out & set(documents[::2])


def test_library_text_is_large_and_halves_do_not_overlap(demo):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo)
    calibration = load_text(str(demo / "calibration.txt"), "calibration")
    held_out = load_text(str(demo / "heldout.txt"), "evaluation")
    assert len(calibration.text) > 1_000_000
    assert len(held_out.text) > 50_000
    ids, seen = token_ids(tokenizer, held_out), token_ids(tokenizer, calibration)
    assert check_overlap(held_out, ids, calibration, seen) <= 0.01
    assert int(ids[0]) == tokenizer.bos_token_id
    assert int((ids == tokenizer.bos_token_id).sum()) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == held_out.text


def test_folder_is_an_ordinary_model_that_has_learnt_something(demo):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert {path.name for path in demo.iterdir()} >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "calibration.txt",
        "heldout.txt",
    }  # fmt: skip
    assert json.loads((demo / "config.json").read_text())["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(demo)
    ids = tokenizer((demo / "heldout.txt").read_text(encoding="utf-8"), verbose=False)["input_ids"][:1280]
    windows = torch.tensor(ids).reshape(-1, 128)
    with torch.no_grad():
        loss = float(model(input_ids=windows, labels=windows).loss)
    assert loss < 0.85 * math.log(len(tokenizer))
    assert model.generate(windows[:1, :4], max_new_tokens=5, do_sample=False).shape == (1, 9)


@pytest.fixture
def little_text(monkeypatch):
    """Some of the documents only: what is tested with it does not depend on how many there are."""
    documents = [f"Document {i} says: " + " ".join(str(i * k % 97) for k in range(60)) for i in range(200)]
    monkeypatch.setattr(demo_module, "collect_documents", lambda: documents)


@pytest.mark.usefixtures("little_text")
def test_same_seed_same_model_and_own_random_numbers(tmp_path):
    from safetensors.torch import load_file

    state = torch.get_rng_state()
    seen: list[tuple[int, int]] = []
    results = [
        make_demo(
            tmp_path / str(i), seed=seed, steps=3, size="tiny", progress=lambda step, of, loss: seen.append((step, of))
        )
        for i, seed in enumerate((5, 5, 6))
    ]
    assert torch.equal(state, torch.get_rng_state())
    assert seen == [(1, 3), (2, 3), (3, 3)] * 3
    first, again, other = (load_file(result.folder / "model.safetensors") for result in results)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    assert results[0].perplexity == results[1].perplexity
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.usefixtures("little_text")
def test_time_limit_ends_training(tmp_path):
    result = make_demo(tmp_path / "model", steps=10_000_000, size="tiny", time_limit_s=2.0)
    assert 0 < result.steps < 10_000_000
    assert math.isfinite(result.perplexity)


@pytest.mark.usefixtures("little_text")
def test_without_muon_it_still_trains(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    assert math.isfinite(make_demo(tmp_path / "model", steps=2, size="tiny").perplexity)


@pytest.mark.usefixtures("little_text")
def test_refusals(tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(RecipeError, match="taken exists and is not empty"):
        make_demo(tmp_path / "taken", size="tiny", steps=1)
    with pytest.raises(RecipeError, match="at least 1"):
        make_demo(tmp_path / "new", size="tiny", steps=0)
    monkeypatch.setattr(demo_module.os, "replace", lambda *names: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(ResourceError, match="No space left"):
        make_demo(tmp_path / "new", size="tiny", steps=1)
    assert not (tmp_path / "new").exists()
