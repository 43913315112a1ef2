"""`gossamer.load`: a model folder or hub id in any form that Gossamer writes or reads, as a model ready to run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..errors import CheckpointError, GossamerError, ModelError
from .attached import ModelMasks
from .attachments import apply_attachments, attaching
from .hf_private import CONFIG_ERRORS
from .keymap import KeyMap
from .memory import release
from .modelfolder import SPARSE, SPARSE_INDEX, find_weights, read_config, resolve_folder
from .quantizer import METHOD, GossamerConfig, source_masks
from .runtime import Placed, RuntimeOptions, adopt, check_backend, runtime
from .saving import attach
from .source import FolderSource


def load(
    path_or_id: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    packed: bool = True,
    prefill: str = "streamed",
    backend: str = "auto",
    attachments: bool = True,
    **options: Any,
) -> Any:
    """A causal language model in eval mode, with its masks as `model.gossamer_masks` (parameter name -> mask).

    Reads sparse folders, dense ones with masks beside them, and ordinary HuggingFace folders, which have no masks; of a
    folder with both, the sparse weights. `dtype`: "auto" is the checkpoint's.

    Sparse matrices stay `packed` in memory where a kernel runs them (bfloat16 and float16), and are expanded while they
    are loaded otherwise or with packed=False, for training. `prefill`: "streamed" expands one layer at a time for
    inputs of many tokens, "cached" keeps what was expanded: faster, and as much memory again as the dense model.
    `backend`: what multiplies them, "cpu", "triton", "reference" (plain torch) or "auto". `model.gossamer_runtime` says
    what was done.

    `attachments`: whether an activation policy or head plan of the checkpoint is applied; without, it runs dense.

    `options` go to `AutoModelForCausalLM.from_pretrained`. ModelError for what is no such model, CheckpointError for
    damaged, missing or misshapen tensors: a parameter is never left at random.
    """
    how = RuntimeOptions(packed, prefill, backend)
    folder = resolve_folder(path_or_id, revision=revision, token=token)
    config = read_config(folder)
    sparse = (folder / SPARSE).is_file() or (folder / SPARSE_INDEX).is_file()
    weights = find_weights(folder, "sparse" if sparse else "dense")
    source = FolderSource(folder, weights)
    method = _method(config)
    _check_method(source, method, sparse)
    options |= {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
    if sparse:
        options["variant"] = "sparse"
    with runtime(how), attaching(attachments):
        model, info = _from_pretrained(folder, options)
    _check_info(folder, info, source)
    if not hasattr(model, "gossamer_masks"):
        _attach_dense(model, source)
    if not hasattr(model, "gossamer_runtime"):
        model.gossamer_runtime = Placed(how)
        if packed:
            adopt(model)
    with attaching(attachments):
        apply_attachments(model, folder)
    check_backend(model, backend)
    release()  # what loading needed: masks, staging, pieces of the file
    return model.eval()


def _attach_dense(model: Any, source: FolderSource) -> None:
    """The masks that lie beside dense weights; none for a model that was quantised on the way."""
    model.gossamer_masks = ModelMasks({})
    if source.records() and not getattr(model, "is_quantized", False):
        with torch.device("cpu"):
            keys = KeyMap(model, source, model.dtype, torch.device("cpu"))
            attach(model, keys, source_masks(source), "dense")


def _method(config: dict[str, Any]) -> str | None:
    said = config.get("quantization_config")
    return said.get("quant_method") if isinstance(said, dict) else None


def _check_method(source: FolderSource, method: str | None, sparse: bool) -> None:
    """What transformers would load with a warning at most, and with random weights."""
    if sparse and method != METHOD:
        raise CheckpointError(
            f"{source.folder} has sparse weights, but config.json does not say so",
            hint=f'it needs "quantization_config": {json.dumps(GossamerConfig().to_dict())}',
        )
    packed = not sparse and any(source.values(key) is not None for key in list(source.records())[:1])
    if packed and method != METHOD:
        raise ModelError(
            f"{source.folder} has matrices in the old bitmask layout, which transformers cannot load",
            hint="gossamer convert IN OUT --to sparse",
        )


def _from_pretrained(folder: Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """transformers' loader; its own complaints about the folder as ModelError, those about shapes are left to us."""
    arguments = options | {"output_loading_info": True, "ignore_mismatched_sizes": True}
    read: Any = AutoModelForCausalLM.from_pretrained
    try:
        return read(folder, **arguments)
    except GossamerError:
        raise
    except (*CONFIG_ERRORS, ImportError) as error:
        raise ModelError(
            f"{folder} cannot be loaded: {(str(error).strip().splitlines() or [type(error).__name__])[0]}",
            hint="models with their own code need trust_remote_code=True",
        ) from error
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # transformers could not convert some tensors; it has listed them on stderr
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{folder} cannot be loaded: {reason}", hint="the checkpoint is incomplete, or not of this config.json"
        ) from error


def _check_info(folder: Path, info: dict[str, Any], source: FolderSource) -> None:
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, found, wanted = mismatched[0]
        raise CheckpointError(
            f"{folder}: {name} has shape {list(found)}, config.json asks for {list(wanted)}",
            hint="config.json and weights belong to different models",
        )
    without_place = sorted(source.records().keys() & set(info["unexpected_keys"]))
    if without_place:
        raise CheckpointError(
            f"{folder} has a mask of {without_place[0]}, which the model of its config.json does not have",
            hint="config.json and weights belong to different models",
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} has no tensor for {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""),
            hint="the checkpoint is incomplete: copy or write it again",
        )
