"""The private names of transformers that Gossamer stands on, in one table, checked when this module is imported.

A transformers release that renames one of them ends in a ModelError naming what is missing and which releases were
tested, instead of an AttributeError in the middle of a run.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging as hf_logging

from ..errors import ModelError

_ONE_THREAD = "HF_DEACTIVATE_ASYNC_LOAD"
# What reading a config.json may end in; the last one where its values contradict each other.
CONFIG_ERRORS = (OSError, ValueError, KeyError, TypeError, StrictDataclassError)
TESTED_VERSIONS = ("5.23.0",)

# what we use -> where it lives; "Class.member" is looked up inside the class.
PRIVATE_NAMES = {
    "convert_and_load_state_dict_in_model": "transformers.core_model_loading",
    "revert_weight_conversion": "transformers.core_model_loading",
    "rename_source_key": "transformers.core_model_loading",
    "dot_natural_key": "transformers.core_model_loading",
    "WeightConverter": "transformers.core_model_loading",
    "WeightRenaming": "transformers.core_model_loading",
    "get_model_conversion_mapping": "transformers.conversion_mapping",
    "LoadStateDictConfig": "transformers.modeling_utils",
    "PreTrainedModel._get_dtype_plan": "transformers.modeling_utils",
    "PreTrainedModel.get_expanded_tied_weights_keys": "transformers.modeling_utils",
    "GradientCheckpointingLayer": "transformers.modeling_layers",
    "ALL_EXPERTS_FUNCTIONS": "transformers.integrations.moe",
    "Conv1D": "transformers.pytorch_utils",
}


def resolve_names(table: dict[str, str]) -> dict[str, Any]:
    """Import every `name -> module` of the table; ModelError naming all that are missing."""
    found: dict[str, Any] = {}
    missing: list[str] = []
    for name, module in table.items():
        try:
            value: Any = importlib.import_module(module)
            for part in name.split("."):
                value = getattr(value, part)
        except (ImportError, AttributeError):
            missing.append(f"{module}.{name}")
        else:
            found[name] = value
    if missing:
        raise ModelError(
            f"transformers {transformers.__version__} lacks {', '.join(missing)}, needed to stream models",
            hint=f"install a tested release: transformers {', '.join(TESTED_VERSIONS)}",
        )
    return found


_found = resolve_names(PRIVATE_NAMES)
convert_and_load_state_dict_in_model = _found["convert_and_load_state_dict_in_model"]
revert_weight_conversion = _found["revert_weight_conversion"]
rename_source_key = _found["rename_source_key"]
dot_natural_key = _found["dot_natural_key"]
WeightConverter = _found["WeightConverter"]
WeightRenaming = _found["WeightRenaming"]
get_model_conversion_mapping = _found["get_model_conversion_mapping"]
LoadStateDictConfig = _found["LoadStateDictConfig"]
GradientCheckpointingLayer = _found["GradientCheckpointingLayer"]
ALL_EXPERTS_FUNCTIONS = _found["ALL_EXPERTS_FUNCTIONS"]
Conv1D = _found["Conv1D"]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """transformers' loader without its "Loading weights" bar (one per block would bury ours) and in this thread only:
    its worker threads would each keep a heap of their own, a tenth of a 1.1B model's resident memory."""
    bars = hf_logging.is_progress_bar_enabled()
    threads = os.environ.get(_ONE_THREAD)
    os.environ[_ONE_THREAD] = "1"
    if bars:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            hf_logging.enable_progress_bar()
        if threads is None:
            del os.environ[_ONE_THREAD]
        else:
            os.environ[_ONE_THREAD] = threads
