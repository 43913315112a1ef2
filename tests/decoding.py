"""Decoding token by token through the compiled ways of a block, and through its modules; who took which way."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from activation_cases import core_policy, give, linear_policy
from exports import save_family_sparse
from families import save_family

import gossamer
from gossamer.attention.filled import FilledCache
from gossamer.compress import blockstep
from gossamer.compress.convert import convert
from gossamer.compress.heads import new_cache

# In 16 bits the halves round where the modules do: only the exponential may differ, by its last bit.
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = list(CLOSE)


def counted_ways(monkeypatch):
    """How often each half was computed by compiled code, "attention" and "feed", and how often not.

    "whole": how often both in one call, which counts as both.
    """
    found = Counter()

    def counted(name, own, made):
        def call(*words):
            given = own(*words)
            found[name if made(given) else "modules"] += 1
            return given

        return call

    def whole(*words, own=blockstep._whole):
        given = own(*words)
        found.update(["attention", "feed", "whole"] if given is not None else [])
        return given

    monkeypatch.setattr(blockstep, "_attended", counted("attention", blockstep._attended, lambda it: it[0] is not None))
    monkeypatch.setattr(blockstep, "_fed", counted("feed", blockstep._fed, lambda it: it is not None))
    monkeypatch.setattr(blockstep, "_whole", whole)
    return found


def halves(found):
    """What was counted, but for how many calls it took."""
    return {name: found[name] for name in ("attention", "feed", "modules")}


def cache_of(model, batch=1):
    ragged = new_cache(model)
    return FilledCache(model.config.num_hidden_layers, 4) if ragged is None else ragged


def decode(model, batch=2, prompt=7, tokens=9, cache=None):
    """Logits of the tokens after a prompt, one by one."""
    given = torch.randint(3, 90, (batch, prompt + tokens), generator=torch.Generator().manual_seed(3))
    cache = cache_of(model) if cache is None else cache
    with torch.no_grad():
        model(input_ids=given[:, :prompt], past_key_values=cache, use_cache=True)
        steps = [
            model(input_ids=given[:, i : i + 1], past_key_values=cache, use_cache=True).logits[:, -1]
            for i in range(prompt, prompt + tokens)
        ]
    return torch.stack(steps, 1)


def by_modules(model, **words):
    usual = blockstep._one_token
    blockstep._one_token = lambda *args: False
    try:
        return decode(model, **words)
    finally:
        blockstep._one_token = usual


def loaded(kind, folder, dtype, family="llama"):
    """A model whose layers are all of one kind."""
    if kind == "dense":
        return gossamer.load(save_family(family, folder / "m"), dtype=dtype)
    if kind == "bitmask":
        return gossamer.load(save_family_sparse(family, folder / "m", dtype=dtype))
    if kind == "int8":
        convert(save_family_sparse(family, folder / "floats", dtype=dtype), folder / "m", to="sparse", values="int8")
        return gossamer.load(folder / "m")
    if kind == "neurons":
        return gossamer.load(give(save_family(family, folder / "m"), core_policy(family)), dtype=dtype)
    policy = linear_policy(family, 0.5)
    for name, entry in policy.linears.items():
        policy.linears[name] = replace(entry, left=None, right=None)
    if kind == "active":
        return gossamer.load(give(save_family(family, folder / "m"), policy), dtype=dtype)
    return gossamer.load(give(save_family_sparse(family, folder / "m", dtype=dtype), policy))  # "dual"
