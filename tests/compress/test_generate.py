"""The decode loop as a generator: several at once, and what it leaves to the loop that takes its tokens."""

from __future__ import annotations

import torch
from families import FAMILIES
from transformers import AutoModelForCausalLM

from gossamer.compress.generate import generate


def model_of(name: str, seed: int):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(FAMILIES[name].config(), dtype=torch.float32).eval()


def test_texts_in_turns_are_the_texts_alone_and_gradients_stay_on():
    models = [model_of("llama", 0), model_of("llama", 1), model_of("gpt2", 2)]
    ids = torch.arange(3, 9)[None]
    alone = [[token.tolist() for token in generate(model, ids, n)] for n, model in enumerate(models, 4)]
    texts = [generate(model, ids, n) for n, model in enumerate(models, 4)]
    found = [[] for _ in texts]
    for _ in range(7):
        for text, said in zip(texts, found, strict=True):
            for token in text:
                assert torch.is_grad_enabled()
                assert not token.requires_grad
                said.append(token.tolist())
                break
    assert torch.is_grad_enabled()
    assert found == alone


def test_a_text_that_is_left_unfinished_leaves_gradients_on():
    text = generate(model_of("llama", 0), torch.arange(3, 9)[None], 9)
    next(text)
    assert torch.is_grad_enabled()
