"""The model without its weights: built from config.json alone, parameters on the meta device, buffers real.

Buffers that no checkpoint stores (rotary frequencies, embedding scales, causal masks) are computed by the model's own
constructor and `_init_weights`, in the dtype that `from_pretrained(dtype=...)` would use: only parameters go to meta.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from ..errors import ModelError
from .hf_private import CONFIG_ERRORS, GradientCheckpointingLayer, quiet_loading

# Checkpoints whose source hands out dense tensors although config.json speaks of a quantisation.
_DENSE_FOR_US = frozenset({"gossamer", "compressed-tensors"})


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """config.json as transformers reads it, without our own quantization_config.

    ModelError for a missing or unreadable file, an encoder-decoder model, and a quantised checkpoint.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json", hint="give the folder of a HuggingFace model")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (*CONFIG_ERRORS, json.JSONDecodeError) as error:
        raise ModelError(
            f"{folder}/config.json cannot be used: {_first_line(error)}",
            hint="give the folder of a language model; one with code of its own needs --trust-remote-code",
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{config.model_type} is an encoder-decoder model; Gossamer compresses decoder-only language models"
        )
    _drop_quantization(config)
    text = config.get_text_config()
    for part in {id(config): config, id(text): text}.values():
        # Blocks are replaced by stubs while arguments are recorded: no router logits to compute a loss from.
        if getattr(part, "output_router_logits", False):
            part.output_router_logits = False
    return config


def checkpoint_dtype(config: Any, source: Any) -> torch.dtype:
    """config.json's dtype, else that of the first float tensor."""
    named = getattr(config, "dtype", None)
    if isinstance(named, str):
        named = getattr(torch, named, None)
    if isinstance(named, torch.dtype):
        return named
    dtypes = (source.meta(key).dtype for key in [*source.keys()])
    found = next((dtype for dtype in dtypes if dtype.is_floating_point), None)
    if found is None:
        raise ModelError("the checkpoint holds no float tensor")
    return found


def build_skeleton(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False, untie: bool = False) -> Any:
    """The causal language model of `config` in eval mode, parameters on meta, buffers on the CPU.

    `untie` builds it with its own output matrix although the checkpoint shares the embedding.
    """
    if untie:
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
    try:
        with init_empty_weights(include_buffers=False), quiet_loading(), _NothingDrawn():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError, AttributeError, KeyError, TypeError) as error:
        raise ModelError(
            f"no causal language model can be built from config.json ({config.model_type}): {_first_line(error)}",
            hint="decoder-only models of transformers; own code needs --trust-remote-code",
        ) from error
    model.requires_grad_(False)
    return model.eval()


class _NothingDrawn(TorchFunctionMode):
    """No random numbers for meta tensors: constructors ask for them parameter by parameter, 2 ms each for nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):  # of tensors, and of torch.nn.init
            filled = args[0] if args else kwargs.get("tensor")
            if isinstance(filled, Tensor) and filled.is_meta:
                return filled
        return func(*args, **kwargs)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(path, list) of the decoder blocks.

    Outermost ModuleLists whose members are all GradientCheckpointingLayer; without any, every outermost ModuleList.
    Of several (a vision tower beside the decoder) the one with the most parameters.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    layers = [(n, m) for n, m in lists if all(isinstance(b, GradientCheckpointingLayer) for b in m)]
    for candidates in (layers, lists):
        names = [name for name, _ in candidates]
        outermost = [(n, m) for n, m in candidates if not any(n.startswith(f"{other}.") for other in names)]
        if outermost:
            return max(outermost, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    raise ModelError(
        f"{type(model).__name__} has no list of blocks: looked for a ModuleList of GradientCheckpointingLayer, "
        "then for any ModuleList"
    )


def share_equal_buffers(blocks: nn.ModuleList) -> None:
    """Equal buffers of different blocks (GPT-J's causal masks) become one tensor, so depth costs no memory."""
    first: dict[tuple[str, torch.Size], torch.Tensor] = {}
    for block in blocks:
        for name, module in block.named_modules():
            for key, buffer in module._buffers.items():
                if buffer is None:
                    continue
                kept = first.setdefault((f"{name}.{key}", buffer.shape), buffer)
                if kept is not buffer and kept.dtype == buffer.dtype and torch.equal(kept, buffer):
                    module._buffers[key] = kept


def _drop_quantization(config: Any) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    get = quantization.get if isinstance(quantization, dict) else lambda key: getattr(quantization, key, None)
    method = str(get("quant_method"))
    if method not in _DENSE_FOR_US:
        raise ModelError(
            f"the checkpoint is quantised ({method}); Gossamer needs float weights",
            hint="give the original model, or dequantise it first",
        )
    del config.quantization_config


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
