"""A small model that looks values up by key, trained on the spot: what a head plan forgets shows at once.

A sequence is a start token, pairs (key, value) with every key once, then some of the keys again in any order, each
followed by its value. Only those later values count. Contexts of up to 1024 tokens, learned from short to long.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEYS, VALUES = 512, 64
START = KEYS + VALUES
LONGEST = 1024
SHARE = 0.125  # of the pairs of a sequence that are asked for, where accuracy is measured
ENOUGH = 0.98  # accuracy at which a longer context begins
STAGES = (16, 32, 64, 128, 256, 512, 1024)
TOKENS = 4096  # of one step, at least


def sequences(count: int, length: int, generator: torch.Generator, share: float = SHARE) -> tuple[Tensor, Tensor]:
    """(ids [count, length], counted [count, length]): True on the values that are asked for. length: even."""
    pairs = (length - 2) // 2
    asked = min(max(int(pairs * share), 1), pairs // 2)
    first = pairs - asked
    ids = torch.full((count, length), START, dtype=torch.int64)
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :first]
    values = torch.randint(KEYS, KEYS + VALUES, (count, first), generator=generator)
    again = torch.rand(count, first, generator=generator).argsort(1)[:, :asked]
    every = torch.stack(
        [torch.cat([keys, keys.gather(1, again)], 1), torch.cat([values, values.gather(1, again)], 1)], 2
    )
    ids[:, 1 : 1 + 2 * pairs] = every.flatten(1)
    counted = torch.zeros(count, length, dtype=torch.bool)
    counted[:, 2 + 2 * first : 2 + 2 * pairs : 2] = True
    return ids, counted


def new_model(seed: int = 0) -> Any:
    """An untrained Llama: 2 layers of 8 query and 4 KV heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=KEYS + VALUES + 1, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=LONGEST, tie_word_embeddings=False,
        bos_token_id=START, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@torch.no_grad()
def accuracy(model: Any, length: int, count: int, seed: int) -> float:
    """Share of the asked values that are the most probable token."""
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
        while time.monotonic() - started < seconds:
            ids, counted = sequences(max(TOKENS // length, 8), length, generator, 0.5)
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min((step + 1) / 100, 1.0)
            logits = model(ids, use_cache=False).logits[:, :-1][counted[:, 1:]]
            wanted = ids[:, 1:][counted[:, 1:]]
            loss = torch.nn.functional.cross_entropy(logits, wanted)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            hit = float((logits.argmax(-1) == wanted).float().mean())
            recent = 0.95 * recent + 0.05 * hit
            if step % 100 == 0:
                say(f"step {step}, context {length}: loss {loss.item():.3f}, accuracy {recent:.3f}")
            if recent > ENOUGH:
                break
    return model.eval()


def cached(folder: Path, seconds: float, longest: int = LONGEST, seed: int = 0) -> Any:
    """The trained model, from `folder` if it is there."""
    from transformers import LlamaForCausalLM

    if not (folder / "config.json").exists():
        train(seconds, longest, seed).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval()
