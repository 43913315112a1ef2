"""Decoding at long context with a head plan: attention and cache, whole tokens, memory.

    python benchmarks/random_llama.py BIG --max-positions 32768
    python benchmarks/head_plan_decode.py BIG                                        # 22 layers, 8k and 32k: minutes
    python benchmarks/head_plan_decode.py BIG --parts token --lengths 8192 --threads 1   # a piece of it
    python benchmarks/head_plan_decode.py BIG --parts memory

Caches are filled with random keys and values: what they hold does not change the work. The plan keeps a quarter of all
tokens, unevenly: of every four KV heads two keep 1/16, one 1/8 and one 3/4. Contenders take turns in one process.

- attention: one token through cache update and attention of all layers. Dense: a static cache and
  scaled_dot_product_attention over the tokens in it, with enable_gqa; and with the heads of a group folded into
  queries, which is what transformers does for one token.
- token: one decode step of the model in our runtime, against bytes / bandwidth: weights and the plan's keys and values,
  at the rate at which dense_gemv reads a matrix larger than the caches that lies, as the model's weights do, in large
  pages, taken in turns with the tokens. `of it`: where a token's time goes: all products of the model by themselves,
  cache and attention by themselves, and the rest, which is Python and small operations.
- memory: growth of the process's anonymous memory while the model decodes with a cache that grows from 1024 tokens on,
  and bytes of the cache, against the plan.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import StaticCache

import gossamer
from gossamer.attention.function import HeadsOfLayer, head_attention
from gossamer.attention.mask import HeadMask
from gossamer.attention.plan import HeadPlan, HeadRule
from gossamer.attention.ragged import RaggedCache, RaggedLayer
from gossamer.attention.store import Store
from gossamer.compress.heads import apply, remove
from gossamer.compress.memory import release
from gossamer.kernels.dense_gemv.dispatch import dense_gemv
from gossamer.kernels.memory import empty_weight

PARTS = ["attention", "memory", "token"]
SINK = 64
SHARES = (64, 64, 128, 768)  # of 1024 tokens, by KV head


def plan_for(config: Any, layers: int) -> HeadPlan:
    rules = [HeadRule(SINK, 0, share / 1024) for share in SHARES]
    heads = tuple(
        tuple(rules[(head + layer) % 4] for head in range(config.num_key_value_heads)) for layer in range(layers)
    )
    return HeadPlan(
        config.model_type, config.num_attention_heads, config.head_dim, 64, (8192, 32768), None, heads
    )  # fmt: skip


def filled(plan: HeadPlan, length: int, room: int, dtype: torch.dtype) -> RaggedCache:
    """A cache that has seen `length` random tokens."""
    cache = RaggedCache(plan, reserve=length + room)
    layout = cache.shared.layout((length,), torch.device("cpu"))
    like = torch.empty(1, 1, plan.head_dim, dtype=dtype)
    for layer in cache.layers:
        layer.lazy_initialization(like, like)
        layer.store = Store(layer.index, plan.heads[layer.index], plan.block, layout, like)
        fill(layer, length)
    return cache


def fill(layer: RaggedLayer, length: int) -> None:
    layer.store.keys.normal_()
    layer.store.values.normal_()
    layer.store.counts, layer.seen = (length,), length


def static(config: Any, layers: int, length: int, room: int, dtype: torch.dtype) -> StaticCache:
    cache = StaticCache(config=config, max_cache_len=length + room)
    some = torch.randn(1, config.num_key_value_heads, length, config.head_dim).to(dtype)
    for layer in range(layers):
        cache.update(some, some, layer)
    return cache


def attention_contenders(
    config: Any, plan: HeadPlan, length: int, room: int, dtype: torch.dtype
) -> dict[str, Callable[[], Any]]:
    layers, kv = plan.layers, config.num_key_value_heads
    query = torch.randn(1, config.num_attention_heads, 1, config.head_dim).to(dtype)
    new = torch.randn(1, kv, 1, config.head_dim).to(dtype)
    ragged, dense = filled(plan, length, room, dtype), static(config, layers, length, 2 * room, dtype)
    modules = [SimpleNamespace(gossamer_heads=HeadsOfLayer(plan, layer)) for layer in range(layers)]

    def ours() -> None:
        mask = HeadMask(1, 1, ragged.get_seq_length() + 1, ragged.get_seq_length(), 0, torch.device("cpu"))
        for layer, module in enumerate(modules):
            key, value = ragged.update(new, new, layer)
            head_attention(module, query, key, value, mask, 0.125)  # type: ignore[arg-type]

    def gqa() -> None:
        for layer in range(layers):
            key, value = dense.update(new, new, layer)
            end = int(dense.get_seq_length(layer))
            scaled_dot_product_attention(query, key[:, :, :end], value[:, :, :end], enable_gqa=True)

    def folded() -> None:
        for layer in range(layers):
            key, value = dense.update(new, new, layer)
            end = int(dense.get_seq_length(layer))
            scaled_dot_product_attention(query.view(1, kv, -1, config.head_dim), key[:, :, :end], value[:, :, :end])

    return {"ours": ours, "dense, enable_gqa": gqa, "dense, folded": folded}


def in_turns(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Best decile of seconds per call."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(contenders), len(contenders)):
            start = time.perf_counter()
            contenders[name]()
            times[name].append(time.perf_counter() - start)
    return {name: sorted(found)[len(found) // 10] for name, found in times.items()}


def token_times(model: Any, plan: HeadPlan, length: int, tokens: int, rounds: int) -> dict[str, float]:
    """Best decile of seconds per decode step of the whole model, of its products, and per byte of a large matrix."""
    config, token = model.config, torch.tensor([[7]])
    times: dict[str, list[float]] = {"ours": [], "dense": [], "products": [], "attention": [], "per byte": []}
    large = [empty_weight(4096, 8192, dtype=torch.bfloat16).normal_() for _ in range(2)]
    row = torch.randn(1, 8192).bfloat16()
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = [torch.randn(1, layer.in_features).to(model.dtype) for layer in layers]

    def step(cache: Any) -> Callable[[], Any]:
        return lambda: model(input_ids=token, past_key_values=cache, use_cache=True)

    for _ in range(rounds):
        remove(model)
        cache = static(config, plan.layers, length, tokens + 8, model.dtype)
        times["dense"] += timed(step(cache), tokens)
        apply(model, plan)
        times["ours"] += timed(step(filled(plan, length, tokens + 8, model.dtype)), tokens)
        alone = attention_contenders(config, plan, length, tokens + 8, model.dtype)["ours"]
        times["attention"] += timed(alone, tokens)
        times["products"] += timed(
            lambda: [dense_gemv(x, layer.weight) for x, layer in zip(inputs, layers, strict=True)], tokens
        )
        read = timed(lambda: [dense_gemv(row, matrix) for matrix in large], tokens)
        times["per byte"] += [seconds / sum(matrix.nbytes for matrix in large) for seconds in read]
        del cache, alone
    return {name: sorted(found)[len(found) // 10] for name, found in times.items()}


def timed(call: Callable[[], Any], times: int) -> list[float]:
    """Seconds of each of several calls, after two that do not count."""
    taken = []
    for _ in range(times + 2):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken[2:]


def weight_bytes(model: Any) -> int:
    """What a step reads: everything but the embedding table."""
    table = model.get_input_embeddings().weight
    return sum(parameter.nbytes for parameter in model.parameters() if parameter is not table)


def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


def growth(model: Any, plan: HeadPlan, lengths: list[int]) -> list[dict[str, Any]]:
    """Anonymous memory while the model decodes and its cache grows from 1024 tokens on, and its tensors' bytes.

    Every 1024 tokens the cache is laid out anew as in decoding, filled, and two tokens are decoded.
    """
    size, token = model.dtype.itemsize, torch.tensor([[7]])
    apply(model, plan)
    cache, rows, before = filled(plan, 1022, -1022, model.dtype), [], 0
    for length in range(1024, max(lengths) + 1, 1024):
        layout = cache.shared.layout((length,), torch.device("cpu"))
        for layer in cache.layers:
            layer.store.make_room(layout)
            fill(layer, length - 2)
        for _ in range(2):
            model(input_ids=token, past_key_values=cache, use_cache=True)
        if length == 1024:
            release()
            before = anonymous()
        elif length in lengths:
            held = sum(
                t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.store.keys, layer.store.values)
            )
            wanted = plan.kv_bytes(length, element_size=size)
            more, grown = wanted - plan.kv_bytes(1024, element_size=size), anonymous() - before
            rows.append({
                "tokens": length, "cache_bytes": held, "plan_bytes": wanted, "bytes_off": held / wanted - 1,
                "dense_bytes": plan.dense_kv_bytes(length, element_size=size), "plan_growth": more,
                "rss_growth": grown, "growth_off": grown / more - 1,
            })  # fmt: skip
    return rows


def attention_row(shape: Any, plan: HeadPlan, length: int, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    times = in_turns(attention_contenders(shape, plan, length, rounds + 8, dtype), rounds)
    return {
        "tokens": length, **{f"{name}, ms": 1e3 * seconds for name, seconds in times.items()},
        "over enable_gqa": times["dense, enable_gqa"] / times["ours"],
        "over folded": times["dense, folded"] / times["ours"], "GB/s": plan.kv_bytes(length) / times["ours"] / 1e9,
    }  # fmt: skip


def token_row(model: Any, plan: HeadPlan, length: int, tokens: int, rounds: int) -> dict[str, Any]:
    times = token_times(model, plan, length, tokens, rounds)
    predicted = (weight_bytes(model) + plan.kv_bytes(length)) * times["per byte"]
    parts = {name: 1e3 * times[name] for name in ("products", "attention")}
    return {
        "tokens": length, "ours, ms": 1e3 * times["ours"], "dense, ms": 1e3 * times["dense"],
        "GB/s": 1e-9 / times["per byte"], "predicted, ms": 1e3 * predicted, "of predicted": predicted / times["ours"],
        "over dense": times["dense"] / times["ours"],
        "of it, ms": parts | {"rest": 1e3 * times["ours"] - sum(parts.values())},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--layers", type=int, help="only the first layers")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    config = json.loads((options.model / "config.json").read_text())
    layers = options.layers or config["num_hidden_layers"]
    model = gossamer.load(options.model, num_hidden_layers=layers) if options.parts != ["attention"] else None
    shape = model.config if model is not None else gossamer_config(options.model, layers)
    plan = plan_for(shape, layers)
    report: dict[str, Any] = {
        "layers": layers, "threads": torch.get_num_threads(),
        "density": {length: plan.density(length) for length in options.lengths},
    }  # fmt: skip
    with torch.no_grad():
        if "memory" in options.parts:
            report["memory"] = growth(model, plan, options.lengths)
        if "attention" in options.parts:
            report["attention"] = [
                attention_row(shape, plan, length, options.rounds, torch.bfloat16) for length in options.lengths
            ]
        if "token" in options.parts:
            turns = max(1, options.rounds // 5)
            report["token"] = [token_row(model, plan, length, options.tokens, turns) for length in options.lengths]
    print(json.dumps(report, indent=2))


def gossamer_config(folder: Path, layers: int) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = layers
    return config


if __name__ == "__main__":
    main()
