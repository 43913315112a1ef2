"""An activation policy as a file beside the weights, gossamer/activation.safetensors, and its entry in config.json."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...activation_sparsity.base import Policy
from ...activation_sparsity.store import from_tensors, to_tensors
from ...errors import CheckpointError
from ..attachments import entries
from ..safefile import SafeFile
from ..writer import output, replacing, write_file

NAME = "activation"  # of the entry below our key in config.json
FILE = "gossamer/activation.safetensors"
RECORD = "policy"  # of the metadata
VERSION = 1


def write_policy(path: Path, policy: Policy) -> dict[str, Any]:
    """Write the file, whole or not at all, and return its entry for config.json. Deterministic."""
    tensors, record = to_tensors(policy)
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    write_file(path, [output(name, tensor) for name, tensor in tensors.items()], {"format": "pt", RECORD: text})
    return {"format_version": VERSION, "file": FILE, "method": policy.method, "sha256": sha256(path)}


def read_policy(folder: Path, entry: Any) -> Policy:
    """The policy that `entry`, of the folder's config.json, speaks of. CheckpointError for what does not fit."""
    if not isinstance(entry, dict) or entry.get("format_version") != VERSION:
        found = entry.get("format_version") if isinstance(entry, dict) else entry
        raise CheckpointError(
            f"{folder}/config.json: the activation policy has format version {found!r}, this Gossamer reads {VERSION}",
            hint="use the Gossamer that wrote it, or calibrate anew",
        )
    if entry.get("file") != FILE:
        raise CheckpointError(
            f"{folder}/config.json: the activation policy is said to lie in {entry.get('file')!r}, not {FILE}"
        )
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing, and config.json speaks of it",
            hint="copy the folder gossamer/ too, or load without: gossamer.load(..., attachments=False)",
        )
    if sha256(path) != entry.get("sha256"):
        raise CheckpointError(
            f"{path} is not the file that config.json speaks of: its sha256 differs",
            hint="it is damaged, or belongs to another checkpoint: copy the folder again",
        )
    policy = read_file(path)
    if policy.method != entry.get("method"):
        raise CheckpointError(f"{path} holds a policy of {policy.method!r}, config.json says {entry.get('method')!r}")
    return policy


def described(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint's policy is, without its model: method, maps and MLPs with entries, rank, bytes, facts."""
    entry = entries(config).get(NAME)
    if entry is None:
        return None
    policy = read_policy(folder, entry)
    tensors, _ = to_tensors(policy)
    return {
        "method": policy.method,
        "maps": len(policy.linears),
        "mlps": len(policy.mlps),
        "rank": max((one.rank for one in policy.linears.values()), default=0),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "facts": dict(policy.facts),
    }


def copy_policy(source: Path, config: Mapping[str, Any], out: Path) -> None:
    """Take the policy of a checkpoint along to another form of it, checked on the way."""
    entry = entries(config).get(NAME)
    if entry is not None:
        read_policy(source, entry)
        (out / FILE).parent.mkdir(exist_ok=True)
        with replacing(out / FILE, (source / FILE).stat().st_size) as target, open(source / FILE, "rb") as data:
            shutil.copyfileobj(data, target)


def read_file(path: Path) -> Policy:
    """A policy by itself, checked for everything that can be checked without its model."""
    file = SafeFile(path)
    try:
        record = json.loads(file.metadata[RECORD])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has no policy in its metadata", hint="the file is damaged") from error
    return from_tensors({name: file.read(name) for name in file.entries}, record)


def sha256(path: Path) -> str:
    """Of a file, in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
