"""Plans of other methods under the same budget: what a plan of ours must beat, and what others have published.

`uniform` is StreamingLLM at equal bytes, `masformer` a few full layers among local ones, `duo` full heads among
streaming ones (by DuoAttention's gates or a training-free score), `moa` a published plan of query heads collapsed to KV
heads. Each returns rules [layer][KV head].
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, ModelError, RecipeError
from .plan import FULL, SLOPES, HeadRule
from .programs import Array
from .solver import TIME_LIMIT_S, Problem, solve

Rules = tuple[tuple[HeadRule, ...], ...]


def uniform(layers: int, kv_heads: int, density: float, sink: int) -> Rules:
    """Every head keeps `density` of the past: `sink` first tokens and the most recent ones."""
    rule = HeadRule(sink, 0, math.floor(density * SLOPES) / SLOPES)
    return ((rule,) * kv_heads,) * layers


def masformer(tied: Problem, rules: Sequence[HeadRule], kv_heads: int, time_limit: float = TIME_LIMIT_S) -> Rules:
    """A few layers full and all others under one local rule: the local rule and the layers with the least loss.

    `tied`: the problem with one rule per layer, whose last axis are `rules`, FULL among them. Local rules that were not
    tried in `time_limit` seconds are left out. RecipeError when none leaves room for a single choice.
    """
    ends = time.monotonic() + time_limit
    full = rules.index(FULL)
    best: tuple[float, list[HeadRule]] | None = None
    for local in range(len(rules)):
        if local == full:
            continue
        left = max(ends - time.monotonic(), 0.0)
        if best is not None and not left:
            break
        pair = [full, local]
        part = Problem(tied.losses[:, :, pair], tied.costs[:, :, pair], tied.budgets)
        solution = solve(part, 1 / np.maximum(tied.losses.max(2).sum(1), 1e-300), time_limit=left)
        if solution is not None and (best is None or solution.objective < best[0]):
            best = solution.objective, [rules[pair[k]] for k in solution.choice]
    if best is None:
        raise RecipeError("no local rule leaves every layer within the budget", hint="ask for a larger density")
    return tuple((rule,) * kv_heads for rule in best[1])


def duo(
    scores: Array, density: float, lengths: Sequence[int], least: int, streaming: HeadRule, name: str = "the scores"
) -> Rules:
    """The heads with the highest scores [layers, KV heads] are full, the others streaming: as many as fit everywhere.

    RecipeError when streaming everywhere is already too much.
    """
    allowed = scores.size
    for length in lengths:
        small = streaming.kept(length, least)
        room = density * length * scores.size - small * scores.size
        if room < 0:
            raise RecipeError(
                f"no plan of {name} reaches density {density:g} at length {length}: streaming heads keep "
                f"{small / length:.3g}",
                hint="ask for a larger density or a shorter streaming window",
            )
        if small < length:
            allowed = min(allowed, int(room / (length - small) + 1e-9))
    order = np.argsort(-scores, axis=None, kind="stable")
    full = np.zeros(scores.size, dtype=bool)
    full[order[:allowed]] = True
    return tuple(tuple(FULL if f else streaming for f in row) for row in full.reshape(scores.shape))


def read_duo(path: Path, layers: int, kv_heads: int) -> tuple[Array, tuple[int, int]]:
    """(gates [layers, KV heads], (sink, recent)) of a DuoAttention pattern: a folder or its full_attention_heads.tsv.

    The windows are those of the config.json beside it, 64 and 256 (the published deployment) where it names none.
    DataError for what cannot be read, ModelError for other shapes.
    """
    table = path / "full_attention_heads.tsv" if path.is_dir() else path
    try:
        gates = np.loadtxt(table, delimiter="\t", ndmin=2, dtype=np.float64)
        beside = table.with_name("config.json")
        config = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
        windows = int(config.get("sink_size", 64)), int(config.get("recent_size", 256))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no DuoAttention pattern: {error}", hint="give the folder with full_attention_heads.tsv"
        ) from error
    _check_shape(gates, (layers, kv_heads), path, "KV heads")
    if not np.isfinite(gates).all():
        raise DataError(f"{table} holds values that are not finite")
    return gates, windows


def read_moa(path: Path, layers: int, query_heads: int, kv_heads: int, lengths: Sequence[int], sink: int) -> Rules:
    """A plan file of MoA (JSON with `alphas` and `betas` per query head), collapsed to KV heads.

    A KV head must keep what any of its query heads sees: the line through the largest spans at the shortest and the
    longest length, which no member exceeds in between. Where all keep the same, it is theirs. The sinks lie inside the
    span, as in MoA's cache. DataError for what cannot be read, ModelError for other shapes.
    """
    try:
        values: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        alphas, betas = (np.array(values[name], dtype=np.float64) for name in ("alphas", "betas"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no MoA plan: {error}", hint="it is a JSON file with `alphas` and `betas`"
        ) from error
    for array in (alphas, betas):
        _check_shape(array, (layers, query_heads), path, "query heads")
    if not (np.isfinite(alphas).all() and np.isfinite(betas).all()):
        raise DataError(f"{path} holds values that are not finite")
    group = query_heads // kv_heads
    alphas, betas = (x.reshape(layers, kv_heads, group) for x in (alphas, betas))
    return tuple(
        tuple(_cover(alphas[i, h], betas[i, h], lengths, sink) for h in range(kv_heads)) for i in range(layers)
    )


def _cover(alphas: Array, betas: Array, lengths: Sequence[int], sink: int) -> HeadRule:
    short, long = lengths[0], lengths[-1]
    if short == long:
        return HeadRule(sink, math.ceil((alphas + betas * short).max()), 0.0)
    low, high = ((alphas + betas * n).max() for n in (short, long))
    slope = min(max(math.ceil((high - low) / (long - short) * SLOPES - 1e-9), 0), SLOPES)
    return HeadRule(sink, math.ceil(max(low - slope * short / SLOPES, high - slope * long / SLOPES)), slope / SLOPES)


def _check_shape(array: Array, shape: tuple[int, int], path: Path, what: str) -> None:
    if array.shape != shape:
        raise ModelError(
            f"{path} is for {' x '.join(map(str, array.shape))} layers and {what}, the model has "
            f"{shape[0]} x {shape[1]}",
            hint="the plan belongs to another model",
        )
