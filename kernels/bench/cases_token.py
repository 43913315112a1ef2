"""What a token needs besides products with weights: a norm and attention over the keys, against torch's ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory import empty_weight
from ..rms_norm.dispatch import rms_norm
from ..window_attention.dispatch import window_attention
from .case import Checked

HIDDEN, HEADS, KV_HEADS, WIDTH = 4096, 32, 8, 128  # of Llama 3 8B
LENGTHS = (128, 1024, 8192)
EPSILON = 1e-5
_STEPS = 4  # of the dtype's rounding: probabilities may be rounded before they multiply, and the result


@dataclass
class TokenCase(Checked):
    """`truth` in float64, in the shape of the result; `size`: what a rounding is relative to, at every place."""

    truth: Tensor
    size: Tensor

    def fault(self) -> str:
        with self.setting():
            y = self.call()
        if y.shape != self.truth.shape:
            return f"shape {list(y.shape)}"
        excess = (y.double() - self.truth).abs() / (_STEPS * torch.finfo(y.dtype).eps * self.size)
        worst = excess.nan_to_num(float("inf"), posinf=float("inf")).max().item()
        return "" if worst <= 1.0 else f"{worst:.1f} times the allowed error"


def norm_cases(hidden: int, dtype: torch.dtype) -> list[TokenCase]:
    """Llama's norm of one token of `hidden` numbers."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((1, hidden), (hidden,)))

    def written_out() -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)).to(dtype)

    truth = weight.double() * x.double() / (x.double().square().mean(-1, keepdim=True) + EPSILON).sqrt()
    ways: dict[str, Callable[[], Tensor]] = {
        "torch, as Llama writes it": written_out,
        "torch rms_norm": lambda: F.rms_norm(x, (hidden,), weight, EPSILON),
        "rms_norm": lambda: rms_norm(x, weight, EPSILON),
    }
    return _cases(ways, 3 * x.nbytes, truth, truth.abs())


def attention_cases(length: int, dtype: torch.dtype) -> list[TokenCase]:
    """One query of HEADS heads over `length` keys of KV_HEADS heads, WIDTH wide."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, HEADS, 1, WIDTH, generator=generator).to(dtype)
    rows = KV_HEADS * length
    keys, values = (
        empty_weight(rows, WIDTH, dtype=dtype).copy_(torch.randn(rows, WIDTH, generator=generator)) for _ in range(2)
    )
    key, value = (part.view(1, KV_HEADS, length, WIDTH) for part in (keys, values))
    ranges = torch.zeros(1, KV_HEADS, 4, dtype=torch.int64)
    ranges[0, :, 0], ranges[0, :, 1] = torch.arange(KV_HEADS) * length, length
    flat, folded = query.view(1, HEADS, WIDTH), query.view(1, KV_HEADS, HEADS // KV_HEADS, WIDTH)
    scores = folded[0].double() @ key[0].double().mT * WIDTH**-0.5
    parts = torch.softmax(scores, -1)
    ways: dict[str, Callable[[], Tensor]] = {
        "torch, enable_gqa": lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True).view_as(flat),
        "torch, a group as one head": lambda: F.scaled_dot_product_attention(folded, key, value).view_as(flat),
        "window_attention": lambda: window_attention(flat, keys, values, ranges, WIDTH**-0.5),
    }
    truth, size = (parts @ part for part in (value[0].double(), value[0].double().abs()))
    return _cases(ways, keys.nbytes + values.nbytes, truth.view_as(flat), size.view_as(flat))


def _cases(ways: dict[str, Callable[[], Tensor]], read: int, truth: Tensor, size: Tensor) -> list[TokenCase]:
    return [TokenCase(name, call, read, truth, size, dense=name.startswith("torch")) for name, call in ways.items()]


def small_cases(dtype: torch.dtype) -> list[TokenCase]:
    """All of them on hardly any data: what brings their code into the cache."""
    return [*norm_cases(64, dtype), *attention_cases(4, dtype)]


def token_cases(dtype: torch.dtype) -> dict[str, list[TokenCase]]:
    """By the title of their table."""
    found = {f"norm of {HIDDEN}": norm_cases(HIDDEN, dtype)}
    for length in LENGTHS:
        title = f"one query of {HEADS} heads, {length} keys of {KV_HEADS} heads of {WIDTH}"
        found[title] = attention_cases(length, dtype)
    return found
