"""The head plan: how much of the past each KV head keeps. The contract between planning and execution.

A rule is (sink, alpha, beta). A query that is the n-th token of its sequence (n counts real tokens, itself included,
from 1) sees

    kept(n) = min(n, max(sink + block, floor(alpha + beta n)))

keys: the first `sink` tokens of the sequence and the last kept(n) - sink ones, itself included; all n of them where
kept(n) = n. The sinks are inside the span: they add nothing to a rule's bytes unless sink + block exceeds the span.

kept depends on the query's own position alone: prefill in one piece, prefill in chunks, several turns and decoding one
token at a time are the same computation. With beta <= 1, kept(n + 1) <= kept(n) + 1: a key that has left the window
never returns, so that a ring buffer that drops it loses nothing. For this to hold exactly, alpha is an integer and beta
a multiple of 1/1024, and all arithmetic is that of integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, GossamerError, ModelError, RecipeError

SCHEMA_VERSION = 1
SLOPES = 1024  # beta is a whole number of 1/1024
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class HeadRule:
    """What one KV head keeps.

    Attributes:
        sink: tokens at the start of the sequence that are never dropped; >= 0.
        alpha: integer part of the span, in tokens; may be negative.
        beta: tokens of span per token of length, a multiple of 1/1024 in [0, 1]; other values are rounded.
    """

    sink: int
    alpha: int
    beta: float

    def __post_init__(self) -> None:
        if not 0 <= self.sink <= LARGEST or int(self.sink) != self.sink:
            raise RecipeError(f"a head rule's sink must be a whole number of tokens >= 0, got {self.sink!r}")
        if not -LARGEST <= self.alpha <= LARGEST or int(self.alpha) != self.alpha:
            raise RecipeError(f"a head rule's alpha must be a whole number of tokens, got {self.alpha!r}")
        if not 0 <= self.beta <= 1:
            raise RecipeError(
                f"a head rule's beta must be in [0, 1], got {self.beta!r}",
                hint="with beta above 1 the window would need keys that it has dropped",
            )
        object.__setattr__(self, "sink", int(self.sink))
        object.__setattr__(self, "alpha", int(self.alpha))
        object.__setattr__(self, "beta", round(self.beta * SLOPES) / SLOPES)

    @property
    def slope(self) -> int:
        """beta in 1/1024."""
        return round(self.beta * SLOPES)

    def span(self, length: int) -> int:
        """floor(alpha + beta * length), before clamping."""
        return self.alpha + self.slope * length // SLOPES

    def kept(self, length: int, block: int) -> int:
        """Keys that the `length`-th token sees; 0 for length 0."""
        return min(length, max(self.sink + block, self.span(length)))


FULL = HeadRule(sink=0, alpha=0, beta=1.0)


@dataclass(frozen=True)
class HeadPlan:
    """One rule per layer and KV head, and the shapes it was made for.

    Attributes:
        model_type: `config.model_type` of the model.
        query_heads, head_dim: of one layer; query head h belongs to KV head h // (query_heads / kv_heads).
        block: the least that a head keeps beside its sinks.
        lengths: the lengths the budget was stated at, ascending.
        positions: `max_position_embeddings`; None where the model states none.
        heads: [layer][KV head]; every layer has as many.
        made: how it came about (method, solver, calibration, validation, seed): JSON values, carried along unread.
    """

    model_type: str
    query_heads: int
    head_dim: int
    block: int
    lengths: tuple[int, ...]
    positions: int | None
    heads: tuple[tuple[HeadRule, ...], ...]
    made: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)

    def __post_init__(self) -> None:
        if not self.heads or not self.heads[0]:
            raise RecipeError("a head plan needs at least one layer with one KV head")
        counts = {len(layer) for layer in self.heads}
        if len(counts) > 1:
            raise RecipeError(f"every layer of a head plan needs as many KV heads; it has layers of {sorted(counts)}")
        if min(self.query_heads, self.head_dim, self.block) < 1:
            raise RecipeError(
                "query_heads, head_dim and block of a head plan must be at least 1, "
                f"got {self.query_heads}, {self.head_dim} and {self.block}"
            )
        if self.query_heads % self.kv_heads:
            raise RecipeError(f"{self.query_heads} query heads cannot share {self.kv_heads} KV heads evenly")
        if not self.lengths or min(self.lengths) < 1 or list(self.lengths) != sorted(set(self.lengths)):
            raise RecipeError(f"the lengths of a head plan must be ascending and >= 1, got {list(self.lengths)}")
        if self.positions is not None and self.lengths[-1] > self.positions:
            raise RecipeError(
                f"length {self.lengths[-1]} is beyond the model's {self.positions} positions",
                hint=f"name lengths up to {self.positions}",
            )

    @property
    def layers(self) -> int:
        return len(self.heads)

    @property
    def kv_heads(self) -> int:
        return len(self.heads[0])

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads

    def kept(self, layer: int, head: int, length: int) -> int:
        """Keys that KV head `head` of layer `layer` holds once `length` tokens have been seen."""
        return self.heads[layer][head].kept(length, self.block)

    def kept_at(self, layer: int, lengths: Tensor) -> Tensor:
        """`kept` of every KV head of a layer at int64 lengths [...]: int64 [kv_heads, ...] on their device."""
        rules, dims = self.heads[layer], (-1,) + (1,) * lengths.dim()
        sink, alpha, slope = (
            torch.tensor(values, dtype=torch.int64, device=lengths.device).view(dims)
            for values in zip(*((rule.sink, rule.alpha, rule.slope) for rule in rules), strict=True)
        )
        span = alpha + torch.div(slope * lengths, SLOPES, rounding_mode="floor")
        return torch.minimum(lengths, torch.maximum(span, sink + self.block))

    def visible(self, layer: int, queries: Tensor, keys: Tensor) -> Tensor:
        """The mask that defines the truth: which keys each query sees.

        Args:
            queries: int64 [..., q], 0-based positions counted from the first real token of the sequence.
            keys: int64 [..., k], likewise; a negative position is padding and is never seen.

        Returns:
            bool [..., kv_heads, q, k], True = seen.
        """
        kept = self.kept_at(layer, queries + 1).movedim(0, -2).unsqueeze(-1)
        sink = torch.tensor([rule.sink for rule in self.heads[layer]], device=keys.device).view(-1, 1, 1)
        i, j = queries[..., None, :, None], keys[..., None, None, :]
        # Where everything is kept, the window reaches back to the sinks: no case of its own.
        return (j >= 0) & (j <= i) & ((j < sink) | (j > i - (kept - sink)))

    def tokens(self, length: int) -> int:
        """Sum of `kept` over all layers and KV heads."""
        return sum(rule.kept(length, self.block) for layer in self.heads for rule in layer)

    def density(self, length: int) -> float:
        """Kept tokens over those of a dense cache, sinks included."""
        return self.tokens(length) / (self.layers * self.kv_heads * length)

    def kv_bytes(self, length: int, batch: int = 1, element_size: int = 2) -> int:
        """Bytes of keys and values of `batch` sequences of `length` tokens."""
        return 2 * batch * self.head_dim * element_size * self.tokens(length)

    def dense_kv_bytes(self, length: int, batch: int = 1, element_size: int = 2) -> int:
        return 2 * batch * self.head_dim * element_size * self.layers * self.kv_heads * length

    def check_model(
        self, model_type: str, layers: int, query_heads: int, kv_heads: int, head_dim: int, name: str = "the model"
    ) -> None:
        """ModelError, naming every difference, unless the plan was made for this model type and these shapes."""
        ours = (self.model_type, self.layers, self.query_heads, self.kv_heads, self.head_dim)
        theirs = (model_type, layers, query_heads, kv_heads, head_dim)
        labels = ("model type", "layers", "query heads", "KV heads", "head dimension")
        differences = [
            f"{label} {mine} (the model: {other})"
            for label, mine, other in zip(labels, ours, theirs, strict=True)
            if mine != other
        ]
        if differences:
            raise ModelError(
                f"the head plan does not belong to {name}: it was made for {', '.join(differences)}",
                hint="make one for this model with `gossamer plan-heads`",
            )

    def to_json(self) -> dict[str, Any]:
        """JSON values for config.json; `density` is for readers and is computed again when read."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model_type": self.model_type,
            "layers": self.layers,
            "query_heads": self.query_heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "block": self.block,
            "lengths": list(self.lengths),
            "positions": self.positions,
            "density": {str(length): round(self.density(length), 6) for length in self.lengths},
            "sink": [[rule.sink for rule in layer] for layer in self.heads],
            "alpha": [[rule.alpha for rule in layer] for layer in self.heads],
            "beta": [[rule.beta for rule in layer] for layer in self.heads],
            "made": dict(self.made),
        }

    @classmethod
    def from_json(cls, values: Any) -> HeadPlan:
        """What `to_json` gave. CheckpointError for anything else, naming the field."""
        if not isinstance(values, dict) or values.get("schema_version") != SCHEMA_VERSION:
            found = values.get("schema_version") if isinstance(values, dict) else type(values).__name__
            raise CheckpointError(
                f"the head plan has schema version {found!r}; this version of Gossamer reads {SCHEMA_VERSION}"
            )
        numbers = {name: _whole(values, name) for name in ("layers", "query_heads", "kv_heads", "head_dim", "block")}
        shape = (numbers["layers"], numbers["kv_heads"])
        sink, alpha, beta = (_matrix(values, name, shape) for name in ("sink", "alpha", "beta"))
        lengths, model_type, made = values.get("lengths"), values.get("model_type"), values.get("made", {})
        if not isinstance(lengths, list) or not all(type(length) is int for length in lengths):
            raise CheckpointError(f"field lengths of the head plan must be a list of whole numbers, got {lengths!r}")
        if not isinstance(model_type, str) or not isinstance(made, dict):
            raise CheckpointError("fields model_type and made of the head plan must be a string and an object")
        positions = None if values.get("positions") is None else _whole(values, "positions")
        try:
            heads = tuple(
                tuple(HeadRule(*rule) for rule in zip(*rows, strict=True))
                for rows in zip(sink, alpha, beta, strict=True)
            )
            return cls(
                model_type, numbers["query_heads"], numbers["head_dim"], numbers["block"], tuple(lengths), positions,
                heads, made,
            )  # fmt: skip
        except GossamerError as error:
            raise CheckpointError(f"the head plan is malformed: {error.message}", hint=error.hint) from error


def _whole(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise CheckpointError(f"field {name} of the head plan must be a whole number >= 1, got {value!r}")
    return value


def _matrix(values: Mapping[str, Any], name: str, shape: tuple[int, int]) -> Sequence[Sequence[Any]]:
    rows = values.get(name)
    if (
        not isinstance(rows, list)
        or len(rows) != shape[0]
        or not all(isinstance(row, list) and len(row) == shape[1] for row in rows)
    ):
        raise CheckpointError(f"field {name} of the head plan must be {shape[0]} lists of {shape[1]} numbers")
    kinds = (int, float) if name == "beta" else (int,)
    if not all(type(value) in kinds for row in rows for value in row):
        raise CheckpointError(f"field {name} of the head plan holds something that is no number")
    return rows
