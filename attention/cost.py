"""What a plan costs in a decode: FLOPs, bytes, and Kinetics' eFLOPs, with its sparse formula's sign corrected.

Kinetics (arXiv 2506.05333) counts T generated tokens after a prompt of L: compute 2 P T and 4 per key, query head and
channel; memory 4 bytes per key, KV head and channel (two values of two bytes); eFLOPs = compute + I memory, with I the
machine's FLOPs per byte. With a budget of B keys a token sees min(L + t, B), which sums to

    K = B T - 0.5 max(0, B - L)^2          for T >= B - L

(the published code adds the square). Here every head has a budget of its own that may grow with the length, so the keys
are summed as they are, token by token; the closed form is kept for comparison.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from .plan import HeadPlan

INTENSITY = 562.5  # FLOPs per byte of a B200 in bfloat16: Kinetics' I


@dataclass(frozen=True)
class DecodeCost:
    """Of `tokens` generated after `prompt`. Bytes are those of keys and values read; weights are left out."""

    prompt: int
    tokens: int
    flops: float
    attention_flops: float
    kv_bytes_read: float
    eflops: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def decode_cost(
    plan: HeadPlan | None,
    *,
    layers: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    parameters: int,
    prompt: int,
    tokens: int,
    element_size: int = 2,
    intensity: float = INTENSITY,
) -> DecodeCost:
    """FLOPs, bytes and eFLOPs of one trial; plan None is the dense model."""
    lengths = torch.arange(prompt + 1, prompt + tokens + 1)
    if plan is None:
        keys = layers * kv_heads * int(lengths.sum())
    else:
        keys = sum(int(plan.kept_at(layer, lengths).sum()) for layer in range(layers))
    attention = 4.0 * keys * (query_heads // kv_heads) * head_dim
    read = 2.0 * element_size * keys * head_dim
    flops = 2.0 * parameters * tokens + attention
    return DecodeCost(prompt, tokens, flops, attention, read, flops + intensity * read)


def budgeted_keys(prompt: int, tokens: int, budget: int) -> float:
    """sum over t = 1..T of min(L + t, B) in Kinetics' closed form (continuous in t), sign corrected; any T."""
    growing = min(max(budget - prompt, 0), tokens)
    return prompt * growing + growing**2 / 2 + budget * (tokens - growing)
