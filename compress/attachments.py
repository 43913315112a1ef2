"""What a checkpoint may hold beside its weights (activation policies, head plans): applied when a model is loaded.

Each has an entry under our key in config.json, and files below gossamer/ if it needs any. A model that carries one is
an ordinary model: plain transformers loads a dense export without looking at it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

from .format import METADATA_KEY

_TABLE: dict[str, str] = {  # name of the entry -> "module:Class"
    "activation": "activation.attachment:ActivationAttachment",
    "heads": "heads:HeadsAttachment",
}


_WANTED: ContextVar[bool] = ContextVar("attachments wanted", default=True)


class Attachment(Protocol):
    """One kind of attachment."""

    def apply(self, model: Any, folder: Path, entry: dict[str, Any]) -> None:
        """Make `model`, loaded from `folder`, run with it. CheckpointError when it is damaged or of another model."""
        ...

    def save(self, model: Any, folder: Path) -> dict[str, Any]:
        """Write its files for a model that is saved to `folder`, and return the entry for config.json."""
        ...


def attachment(name: str) -> Attachment:
    """The attachment called `name` in config.json."""
    module, _, kind = _TABLE[name].partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), kind)()


def entries(config: Any) -> dict[str, dict[str, Any]]:
    """Entries of a config (a dict, or transformers' object) that this version knows, by name."""
    own = config.get(METADATA_KEY) if isinstance(config, dict) else getattr(config, METADATA_KEY, None)
    return {name: own[name] for name in _TABLE if name in own} if isinstance(own, dict) else {}


@contextmanager
def attaching(wanted: bool) -> Iterator[None]:
    """Inside, models are loaded with or without their attachments."""
    token = _WANTED.set(wanted)
    try:
        yield
    finally:
        _WANTED.reset(token)


def note(model: Any, name: str, entry: dict[str, Any]) -> None:
    """Says in `model.config` what `model` runs with from now on, so that it is saved, whichever way that is done."""
    own = getattr(model.config, METADATA_KEY, None)
    setattr(model.config, METADATA_KEY, (own if isinstance(own, dict) else {"format_version": 1}) | {name: entry})
    model.__dict__.setdefault("gossamer_attached", set()).add(name)


def forget(model: Any, name: str) -> None:
    """The opposite of `note`."""
    model.__dict__.get("gossamer_attached", set()).discard(name)
    own = getattr(model.config, METADATA_KEY, None)
    if not isinstance(own, dict) or name not in own:
        return
    rest = {key: value for key, value in own.items() if key != name}
    if rest.keys() <= {"format_version"}:
        delattr(model.config, METADATA_KEY)
    else:
        setattr(model.config, METADATA_KEY, rest)


def apply_attachments(model: Any, folder: Path) -> None:
    """Apply what `model.config` speaks of; what is applied already (`model.gossamer_attached`) is left as it is.

    Where they are not wanted they leave `model.config`: the model does not run with them, nor is it saved with them.
    """
    applied: set[str] = model.__dict__.setdefault("gossamer_attached", set())
    for name, entry in entries(model.config).items():
        if not _WANTED.get():
            forget(model, name)
        elif name not in applied:
            attachment(name).apply(model, folder, entry)
            applied.add(name)


def save_attachments(model: Any, folder: Path) -> None:
    """Write the files of everything applied to `model`; its entries go into `model.config`."""
    for name in sorted(model.__dict__.get("gossamer_attached", ())):
        getattr(model.config, METADATA_KEY)[name] = attachment(name).save(model, folder)
