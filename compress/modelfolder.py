"""Finding a model: hub id or folder, its config.json, and which files hold its weights."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ..errors import CheckpointError, ModelError, ResourceError

DENSE = "model.safetensors"
SPARSE = "model.sparse.safetensors"
DENSE_INDEX = "model.safetensors.index.json"
SPARSE_INDEX = "model.safetensors.index.sparse.json"
MASKS = "gossamer/masks.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DOWNLOAD = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja", "*.py", "recipe.yaml", "README.md"]
_LEAVE = ["original/*", "consolidated*", "onnx/*"]


@dataclass(frozen=True)
class WeightFiles:
    """`weights`: files to read together. `index`: tensor -> file name. `masks`: masks of dense weights, if any."""

    weights: tuple[Path, ...]
    index: dict[str, str] = field(default_factory=dict)
    masks: Path | None = None


def resolve_folder(model: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of `model`; a hub id is downloaded. ModelError when there is no such thing."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{model} is a file", hint="give the folder that holds it, with its config.json")
    if not isinstance(model, str) or not _HUB_ID.fullmatch(model):
        raise ModelError(f"{model} does not exist", hint="give a model folder or a hub id such as name/model")
    return _download(model, revision, token)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dict. ModelError when it is missing, CheckpointError when it is not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json", hint="give the folder of a HuggingFace model")
    return _json_object(path)


def find_weights(folder: Path, kind: str | None = None) -> WeightFiles:
    """The weight files of a folder: dense before sparse, a single file before an index.

    `kind`: only "dense" or only "sparse". ModelError when there are none that can be read, with the reason.
    """
    if kind != "sparse":
        masks = folder / MASKS
        found = _single_or_index(folder, DENSE, DENSE_INDEX, masks if masks.is_file() else None)
        if found is not None:
            return found
    if kind != "dense":
        found = _single_or_index(folder, SPARSE, SPARSE_INDEX, None)
        if found is not None:
            return found
    raise _no_weights(folder, kind)


def _single_or_index(folder: Path, single: str, index: str, masks: Path | None) -> WeightFiles | None:
    if (folder / single).is_file():
        return WeightFiles((folder / single,), masks=masks)
    path = folder / index
    if not path.is_file():
        return None
    names = _json_object(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{path} has no weight_map", hint="the index is damaged")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{path} names {name!r}, which is no file beside it")
    files = sorted(set(names.values()))
    for name in files:
        if not (folder / name).is_file():
            raise CheckpointError(f"{path} names {name}, which does not exist", hint="download or copy all shards")
    return WeightFiles(tuple(folder / name for name in files), names, masks)


def _no_weights(folder: Path, kind: str | None) -> ModelError:
    present = {path.name for path in folder.iterdir()}
    wanted = SPARSE if kind == "sparse" else DENSE
    if "adapter_model.safetensors" in present:
        return ModelError(f"{folder} is an adapter, not a model", hint="merge it into its model first")
    shards = sorted(name for name in present if re.fullmatch(r"model.*-of-\d+\.safetensors", name))
    if shards:
        return ModelError(f"{folder} has {shards[0]} but no {DENSE_INDEX}", hint="download or copy the index too")
    others = sorted(name for name in present if name.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf")))
    if others:
        return ModelError(
            f"{folder} has no {wanted}, only {others[0]}",
            hint="only safetensors are read: load it with transformers and save it again with save_pretrained",
        )
    return ModelError(f"{folder} has no {wanted} and no index of shards", hint="give the folder of a HuggingFace model")


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise ResourceError(f"no permission to read {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is not JSON: {reason}", hint="the file is damaged") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object", hint="the file is damaged")
    return value


def _download(model: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The HTTPError of whichever library the hub's client is built on.
    transport = cast("type[Exception]", HfHubHTTPError.__bases__[0])
    try:
        folder = snapshot_download(
            model, revision=revision, token=token, allow_patterns=_DOWNLOAD, ignore_patterns=_LEAVE
        )
    except GatedRepoError as error:
        raise ModelError(f"{model} asks for its terms to be accepted", hint="do so on the hub, give --token") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{model} has no revision {revision!r}", hint="check --revision") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{model} is neither a folder nor a model on the hub",
            hint="check the spelling; private models need --token",
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{model} is not a folder here, not in the hub's cache, and the hub cannot be reached",
            hint="give the folder of a downloaded model",
        ) from error
    except (HFValidationError, HfHubHTTPError, transport, ConnectionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{model} cannot be downloaded: {reason}") from error
    return Path(folder)
