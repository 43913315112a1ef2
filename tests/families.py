"""Tiny random models of every supported family, built from transformers' own config classes, and what can be pruned.

`prunable` lists are written by hand: module names inside block 0 with their (out, in) shapes. Shapes are awkward on
purpose (nothing square that need not be), so that a transposition cannot pass unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

VOCAB = 97
Shapes = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Family:
    """`config`: () -> config. `path`: name of the blocks. `prunable`: names in block 0. `steps`: expected grouping."""

    config: Callable[[], Any]
    path: str
    prunable: Shapes
    steps: list[list[list[str]]]
    unprunable: list[str] = field(default_factory=list)
    transposed: bool = False


def _llama_like(kind: str, **extra: Any) -> Callable[[], Any]:
    def config() -> Any:
        values = {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        } | extra
        return getattr(transformers, kind)(**values)

    return config


def _attention(out: int, kv: int, width: int = 48) -> Shapes:
    return {
        "self_attn.q_proj": (out, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, out),
    }


MLP: Shapes = {"mlp.gate_proj": (80, 48), "mlp.up_proj": (80, 48), "mlp.down_proj": (48, 80)}
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
ATTENTION_STEPS = [[QKV], [["self_attn.o_proj"]]]
LLAMA_STEPS = [*ATTENTION_STEPS, [["mlp.gate_proj", "mlp.up_proj"]], [["mlp.down_proj"]]]


def _experts(path: str, count: int, gate_up: tuple[int, int], down: tuple[int, int]) -> Shapes:
    return {f"{path}.gate_up_proj.{e}": gate_up for e in range(count)} | {
        f"{path}.down_proj.{e}": down for e in range(count)
    }


def _expert_steps(path: str, count: int) -> list[list[list[str]]]:
    return [[[f"{path}.{name}.{e}"] for e in range(count)] for name in ("gate_up_proj", "down_proj")]


GEMMA = {"head_dim": 16, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"] * 2}

FAMILIES: dict[str, Family] = {
    "llama": Family(_llama_like("LlamaConfig"), "model.layers", _attention(48, 24) | MLP, LLAMA_STEPS),
    "mistral": Family(
        _llama_like("MistralConfig", sliding_window=9, head_dim=16),
        "model.layers",
        _attention(64, 32) | MLP,
        LLAMA_STEPS,
    ),
    "qwen2": Family(
        _llama_like("Qwen2Config", use_sliding_window=True, sliding_window=8, max_window_layers=1),
        "model.layers",
        _attention(48, 24) | MLP,
        LLAMA_STEPS,
    ),
    "qwen3": Family(
        _llama_like("Qwen3Config", head_dim=16, tie_word_embeddings=True),
        "model.layers",
        _attention(64, 32) | MLP,
        LLAMA_STEPS,
    ),
    "gemma2": Family(
        _llama_like("Gemma2Config", num_hidden_layers=4, query_pre_attn_scalar=16, **GEMMA),
        "model.layers",
        _attention(64, 32) | MLP,
        LLAMA_STEPS,
    ),
    "gemma3": Family(
        _llama_like("Gemma3TextConfig", num_hidden_layers=4, query_pre_attn_scalar=16, **GEMMA),
        "model.layers",
        _attention(64, 32) | MLP,
        LLAMA_STEPS,
    ),
    "phi": Family(
        _llama_like("PhiConfig", num_key_value_heads=4),
        "model.layers",
        {
            "self_attn.q_proj": (48, 48),
            "self_attn.k_proj": (48, 48),
            "self_attn.v_proj": (48, 48),
            "self_attn.dense": (48, 48),
            "mlp.fc1": (80, 48),
            "mlp.fc2": (48, 80),
        },
        [[[*QKV, "mlp.fc1"]], [["self_attn.dense"]], [["mlp.fc2"]]],
    ),
    "phi3": Family(
        _llama_like("Phi3Config"),
        "model.layers",
        {
            "self_attn.o_proj": (48, 48),
            "self_attn.qkv_proj": (96, 48),
            "mlp.gate_up_proj": (160, 48),
            "mlp.down_proj": (48, 80),
        },
        [[["self_attn.qkv_proj"]], [["self_attn.o_proj"]], [["mlp.gate_up_proj"]], [["mlp.down_proj"]]],
    ),
    "gpt2": Family(
        lambda: transformers.GPT2Config(
            vocab_size=VOCAB,
            n_embd=48,
            n_layer=3,
            n_head=4,
            n_positions=128,
            n_inner=80,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "transformer.h",
        {"attn.c_attn": (144, 48), "attn.c_proj": (48, 48), "mlp.c_fc": (80, 48), "mlp.c_proj": (48, 80)},
        [[["attn.c_attn"]], [["attn.c_proj"]], [["mlp.c_fc"]], [["mlp.c_proj"]]],
        transposed=True,
    ),
    "opt": Family(
        lambda: transformers.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=48,
            ffn_dim=80,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=40,
        ),
        "model.decoder.layers",
        {
            "self_attn.k_proj": (48, 48),
            "self_attn.v_proj": (48, 48),
            "self_attn.q_proj": (48, 48),
            "self_attn.out_proj": (48, 48),
            "fc1": (80, 48),
            "fc2": (48, 80),
        },
        [[QKV], [["self_attn.out_proj"]], [["fc1"]], [["fc2"]]],
    ),
    "gpt_neox": Family(
        _llama_like("GPTNeoXConfig"),
        "gpt_neox.layers",
        {
            "attention.query_key_value": (144, 48),
            "attention.dense": (48, 48),
            "mlp.dense_h_to_4h": (80, 48),
            "mlp.dense_4h_to_h": (48, 80),
        },
        [[["attention.query_key_value"]], [["attention.dense"]], [["mlp.dense_h_to_4h"]], [["mlp.dense_4h_to_h"]]],
    ),
    "falcon": Family(
        lambda: transformers.FalconConfig(
            vocab_size=VOCAB, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, ffn_hidden_size=80
        ),
        "transformer.h",
        {
            "self_attention.query_key_value": (72, 48),
            "self_attention.dense": (48, 48),
            "mlp.dense_h_to_4h": (80, 48),
            "mlp.dense_4h_to_h": (48, 80),
        },
        [
            [["self_attention.query_key_value", "mlp.dense_h_to_4h"]],
            [["self_attention.dense"]],
            [["mlp.dense_4h_to_h"]],
        ],
    ),
    "bloom": Family(
        lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=48, n_layer=3, n_head=4),
        "transformer.h",
        {
            "self_attention.query_key_value": (144, 48),
            "self_attention.dense": (48, 48),
            "mlp.dense_h_to_4h": (192, 48),
            "mlp.dense_4h_to_h": (48, 192),
        },
        [
            [["self_attention.query_key_value"]],
            [["self_attention.dense"]],
            [["mlp.dense_h_to_4h"]],
            [["mlp.dense_4h_to_h"]],
        ],
    ),
    "mixtral": Family(
        _llama_like("MixtralConfig", num_local_experts=5, num_experts_per_tok=2, sliding_window=None),
        "model.layers",
        _attention(48, 24) | _experts("mlp.experts", 5, (160, 48), (48, 80)),
        [*ATTENTION_STEPS, *_expert_steps("mlp.experts", 5)],
        unprunable=["mlp.gate.weight"],
    ),
    "qwen3_moe": Family(
        _llama_like(
            "Qwen3MoeConfig",
            head_dim=16,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=40,
            decoder_sparse_step=1,
            mlp_only_layers=[1],
        ),
        "model.layers",
        _attention(64, 32) | _experts("mlp.experts", 6, (80, 48), (48, 40)),
        [*ATTENTION_STEPS, *_expert_steps("mlp.experts", 6)],
        unprunable=["mlp.gate.weight"],
    ),
    "gpt_oss": Family(
        _llama_like(
            "GptOssConfig",
            num_hidden_layers=4,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=7,
            intermediate_size=40,
        ),
        "model.layers",
        _attention(64, 32) | _experts("mlp.experts", 4, (80, 48), (48, 40)),
        [*ATTENTION_STEPS, *_expert_steps("mlp.experts", 4)],
        unprunable=["mlp.router.weight"],
        transposed=True,
    ),
}


def save_family(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **save: Any) -> Path:
    """A random model of the family in `folder`, by transformers' own save_pretrained; no parameter is zero or one."""
    config = FAMILIES[name].config()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    model.to(dtype).save_pretrained(folder, **save)
    return folder


class FolderTensors:
    """keys, meta and read over the safetensors files of a folder; counts the keys read."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._where = {}
        self.reads: list[str] = []
        for file in sorted(folder.glob("*.safetensors")):
            handle = safe_open(file, "pt")
            self._where.update(dict.fromkeys(handle.keys(), handle))

    def keys(self) -> list[str]:
        return list(self._where)

    def meta(self, key: str) -> torch.Tensor:
        return self._where[key].get_tensor(key).to("meta")

    def read(self, key: str) -> torch.Tensor:
        self.reads.append(key)
        return self._where[key].get_tensor(key).clone()
