"""Tiny models and awkward head plans for the tests of their execution."""

from __future__ import annotations

import random
from typing import Any

import torch

from gossamer.attention.plan import HeadPlan, HeadRule

LAYERS, HEADS, KV_HEADS, WIDTH = 3, 6, 2, 8


def tiny(kind: str, **more: Any) -> Any:
    """A random causal model with grouped heads whose attention is peaked, so that a wrong mask changes tokens."""
    import transformers

    values = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": WIDTH,
        "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0,
        "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**(values | more))
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def plan_for(model: Any, seed: int = 0, block: int = 4, rules: list[HeadRule] | None = None) -> HeadPlan:
    """Random rules: fixed and growing windows, no sinks and many, one head that keeps all."""
    config, draw = model.config, random.Random(seed)
    pool = rules or [
        HeadRule(0, 7, 0.0), HeadRule(3, 12, 0.0), HeadRule(1, -8, 0.5), HeadRule(4, 6, 0.25), HeadRule(0, 0, 1.0),
        HeadRule(20, 5, 0.0), HeadRule(2, 3, 307 / 1024),
    ]  # fmt: skip
    heads = tuple(
        tuple(draw.choice(pool) for _ in range(config.num_key_value_heads)) for _ in range(config.num_hidden_layers)
    )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return HeadPlan(config.model_type, config.num_attention_heads, width, block, (64,), 512, heads)
