"""A small model that looks values up by key, trained on the spot: what a head plan forgets shows at once.

A sequence is a start token, then entries among filler, then questions. An entry is one token that stands for a key and
its value; every key is there at most once, anywhere. A question is a key that was there, and the token after it is the
answer: the value of that key's entry. Only answers count. Contexts of up to 1024 tokens, learned from short to long.

One token per entry, because pairs of tokens ask for two steps (a head that looks at the token before, one that uses
what it found) and small models learn the first one late or never. A token of an entry begins as the sum of a vector of
its key and one of its value, and a question as that of its key: what is left to learn is the looking up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEYS, VALUES, FILLERS = 128, 16, 32
QUESTION = KEYS * VALUES  # the first question; entries come before
ANSWER = QUESTION + KEYS
FILLER = ANSWER + VALUES
START = FILLER + FILLERS
LONGEST = 1024
SHARE = 0.125  # of a sequence that is questions, where accuracy is measured
ENOUGH = 0.98  # accuracy at which a longer context begins
STAGES = (32, 64, 128, 256, 512, 1024)
TOKENS = 4096  # of one step, at least


def sequences(count: int, length: int, generator: torch.Generator, share: float = SHARE) -> tuple[Tensor, Tensor]:
    """(ids [count, length], counted [count, length]): True on the answers. A quarter is entries, `share` questions."""
    entries = min(KEYS, (length - 1) // 4)
    asked = min(max(int(length * share), 1), entries)
    before = length - 2 * asked  # the start, entries and filler
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :entries]
    values = torch.randint(VALUES, (count, entries), generator=generator)
    places = 1 + torch.rand(count, before - 1, generator=generator).argsort(1)[:, :entries]
    again = torch.rand(count, entries, generator=generator).argsort(1)[:, :asked]
    ids = torch.randint(FILLER, FILLER + FILLERS, (count, length), generator=generator)
    ids[:, 0] = START
    ids.scatter_(1, places, keys * VALUES + values)
    ids[:, before::2] = QUESTION + keys.gather(1, again)
    ids[:, before + 1 :: 2] = ANSWER + values.gather(1, again)
    counted = torch.zeros(count, length, dtype=torch.bool)
    counted[:, before + 1 :: 2] = True
    return ids, counted


def new_model(seed: int = 0) -> Any:
    """An untrained Llama: 2 layers of 8 query and 4 KV heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=START + 1, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=LONGEST, tie_word_embeddings=False,
        bos_token_id=START, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        table = model.model.embed_tokens.weight.normal_()
        of_key, of_value = torch.randn(KEYS, 1, table.shape[1]), torch.randn(VALUES, table.shape[1])
        table[:QUESTION] = ((of_key + of_value) / 2**0.5).flatten(0, 1)
        table[QUESTION:ANSWER] = of_key[:, 0]
    return model


@torch.no_grad()
def accuracy(model: Any, length: int, count: int, seed: int) -> float:
    """Share of the answers that are the most probable token."""
    right = total = 0
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids, counted = sequences(1, length, generator)
        said = model(ids.to(model.device), use_cache=False).logits[0, :-1].argmax(-1).cpu()
        hit = (said == ids[0, 1:])[counted[0, 1:]]
        right, total = right + int(hit.sum()), total + len(hit)
    return right / total


def train(seconds: float, longest: int = LONGEST, seed: int = 0, say: Callable[[str], None] = print) -> Any:
    """Train until contexts of `longest` tokens are learned or the time is up; the model, in eval mode."""
    model = new_model(seed).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    started = time.monotonic()
    step = 0
    for length in [n for n in STAGES if n <= longest]:
        recent = 0.0
        while recent <= ENOUGH and time.monotonic() - started < seconds:
            ids, counted = sequences(max(TOKENS // length, 4), length, generator, 0.25)
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min((step + 1) / 100, 1.0)
            hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1][counted[:, 1:]]
            logits, wanted = model.lm_head(hidden), ids[:, 1:][counted[:, 1:]]
            loss = torch.nn.functional.cross_entropy(logits, wanted)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            recent = 0.95 * recent + 0.05 * float((logits.argmax(-1) == wanted).float().mean())
            if step % 100 == 0 or recent > ENOUGH:
                passed = time.monotonic() - started
                say(f"step {step}, {passed:.0f} s, context {length}: loss {loss.item():.3f}, accuracy {recent:.3f}")
    return model.eval()


def cached(folder: Path, seconds: float, longest: int = LONGEST, seed: int = 0) -> Any:
    """The trained model, from `folder` if it is there."""
    from transformers import LlamaForCausalLM

    if not (folder / "config.json").exists():
        train(seconds, longest, seed).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval()
