"""Decoding at long context with a head plan: attention and cache, whole tokens, memory.

    python benchmarks/random_llama.py BIG --max-positions 32768
    python benchmarks/head_plan_decode.py BIG                          # 22 layers, 8k and 32k tokens: minutes
    python benchmarks/head_plan_decode.py BIG --layers 2 --lengths 8192 --attention-only

Caches are filled with random keys and values: what they hold does not change the work. The plan keeps a quarter of all
tokens, unevenly: of every four KV heads two keep 1/16, one 1/8 and one 3/4. Contenders take turns in one process.

- attention: one token through cache update and attention of all layers. Dense: a static cache and
  scaled_dot_product_attention over the tokens in it, with enable_gqa; and with the heads of a group folded into
  queries, which is what transformers does for one token.
- token: one decode step of the model in our runtime, against bytes / bandwidth: weights and the plan's keys and values,
  at the rate at which dense_gemv reads a matrix larger than the caches.
- memory: bytes of the cache against the plan, and growth of anonymous resident memory from 1024 tokens on.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
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
    """Best decile of seconds per decode step of the whole model."""
    config, times = model.config, {"ours": [], "dense": []}
    token = torch.tensor([[7]])
    for _ in range(rounds):
        for name in times:
            if name == "ours":
                apply(model, plan)
                cache: Any = filled(plan, length, tokens + 8, model.dtype)
            else:
                remove(model)
                cache = static(config, plan.layers, length, tokens + 8, model.dtype)
            with torch.no_grad():
                for step in range(tokens + 2):
                    start = time.perf_counter()
                    model(input_ids=token, past_key_values=cache, use_cache=True)
                    if step >= 2:
                        times[name].append(time.perf_counter() - start)
            del cache
    return {name: sorted(found)[len(found) // 10] for name, found in times.items()}


def bandwidth() -> float:
    """Bytes per second that dense_gemv reads of matrices far larger than the caches, median of many."""
    matrices = [torch.randn(4096, 8192).bfloat16() for _ in range(4)]
    x = torch.randn(1, 8192).bfloat16()
    rates = []
    for turn in range(24):
        start = time.perf_counter()
        dense_gemv(x, matrices[turn % 4])
        rates.append(matrices[0].nbytes / (time.perf_counter() - start))
    return statistics.quantiles(rates[4:], n=10)[-1]


def weight_bytes(model: Any) -> int:
    """What a step reads: everything but the embedding table."""
    table = model.get_input_embeddings().weight
    return sum(parameter.nbytes for parameter in model.parameters() if parameter is not table)


def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


def growth(plan: HeadPlan, lengths: list[int], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Anonymous memory as one cache grows from 1024 tokens, laid out anew as in decoding, and its tensors' bytes."""
    cache, rows = filled(plan, 1024, -1024, dtype), []
    release()
    before, bytes_before = anonymous(), plan.kv_bytes(1024, element_size=dtype.itemsize)
    for length in range(2048, max(lengths) + 1, 1024):
        for layer in cache.layers:
            layer.store.make_room(cache.shared.layout((length,), torch.device("cpu")))
            fill(layer, length)
        if length in lengths:
            held = sum(
                t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.store.keys, layer.store.values)
            )
            wanted = plan.kv_bytes(length, element_size=dtype.itemsize)
            rows.append({
                "tokens": length, "cache_bytes": held, "plan_bytes": wanted, "bytes_off": held / wanted - 1,
                "dense_bytes": plan.dense_kv_bytes(length, element_size=dtype.itemsize),
                "rss_growth": anonymous() - before, "growth_off": (anonymous() - before) / (wanted - bytes_before) - 1,
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--layers", type=int, help="only the first layers")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--attention-only", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    config = json.loads((options.model / "config.json").read_text())
    layers = options.layers or config["num_hidden_layers"]
    model = gossamer.load(options.model, num_hidden_layers=layers) if not options.attention_only else None
    shape = model.config if model is not None else gossamer_config(options.model, layers)
    plan, dtype = plan_for(shape, layers), torch.bfloat16
    report: dict[str, Any] = {"layers": layers, "threads": torch.get_num_threads(), "density": {}, "attention": []}
    with torch.no_grad():
        for length in options.lengths:
            report["density"][length] = plan.density(length)
            times = in_turns(attention_contenders(shape, plan, length, options.rounds + 8, dtype), options.rounds)
            row = {"tokens": length} | {f"{name}, ms": 1e3 * seconds for name, seconds in times.items()}
            row["over enable_gqa"] = times["dense, enable_gqa"] / times["ours"]
            row["over folded"] = times["dense, folded"] / times["ours"]
            row["GB/s"] = plan.kv_bytes(length) / times["ours"] / 1e9
            report["attention"].append(row)
        report["memory"] = growth(plan, options.lengths, dtype)
        if model is not None:
            report["bandwidth_gb_per_s"] = bandwidth() / 1e9
            report["token"] = []
            for length in options.lengths:
                times = token_times(model, plan, length, options.tokens, max(1, options.rounds // 5))
                read = weight_bytes(model) + plan.kv_bytes(length)
                predicted = read / report["bandwidth_gb_per_s"] / 1e9
                report["token"].append({
                    "tokens": length, "ours, ms": 1e3 * times["ours"], "dense, ms": 1e3 * times["dense"],
                    "predicted, ms": 1e3 * predicted, "of predicted": predicted / times["ours"],
                    "over dense": times["dense"] / times["ours"],
                })  # fmt: skip
    print(json.dumps(report, indent=2))


def gossamer_config(folder: Path, layers: int) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = layers
    return config


if __name__ == "__main__":
    main()
