"""What a run leaves on disk to go on from: the tensors that it changes, and the lines of metrics.jsonl."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import CheckpointError

STATE = "trainer_state.json"
WEIGHTS = "model.safetensors"
METRICS = "metrics.jsonl"


def changing(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of everything that training may change: trainable parameters and persistent buffers."""
    found = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = model.state_dict().keys()
    return found | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def read_tensors(folder: Path, model: nn.Module) -> None:
    """Put what `write_tensors` wrote back into the model. CheckpointError when it is damaged or of another one."""
    path = folder / WEIGHTS
    afresh = "throw the unfinished run away and start afresh"
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint=afresh) from error
    wanted = changing(model)
    if saved.keys() != wanted.keys() or any(saved[name].shape != wanted[name].shape for name in saved):
        raise CheckpointError(f"{path} is of another model or method", hint=afresh)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(saved[name])


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the largest step that was written to its end; its state file is written last."""
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            found.append((int(state["global_step"]), path))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return max(found)[1] if found else None


def kept_history(folder: Path, step: int) -> list[dict[str, float]]:
    """The lines of metrics.jsonl up to `step`; the file is cut off after them."""
    path = folder / METRICS
    lines = []
    if path.exists() and step > 0:
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue  # cut off by a kill
    kept = [line for line in lines if line.get("step", 0) <= step]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    return kept


def add_to_history(folder: Path, line: dict[str, float]) -> None:
    """One more line of metrics.jsonl."""
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C is only noted (the function given says so), the second one ends the program as usual."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
