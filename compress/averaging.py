"""`gossamer soup`: checkpoints that were trained apart under one mask, averaged into one checkpoint.

Nothing is loaded as a model unless a text is given to compare on: the mean is taken tensor by tensor from the files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError
from ..finetune.packing import apart
from ..finetune.tokens import TokenRows
from ..kernels.bitmask.dispatch import compress as packed_rows
from ..pruning.mean import Mean
from ..pruning.soup import NOISE_MARGIN, Soup, check_count, check_margin, greedy, normalised, uniform_weights
from . import memory
from .attachments import entries
from .checkpoint import MAX_SHARD_SIZE, assemble, atomic_write_text, partial_folder, publish, verify
from .convert import copy_companions
from .copies import check_copies
from .data import evaluation_windows, load_text, token_ids
from .format import METADATA_KEY, dense_config, sparse_config, summarise
from .load import load
from .modelfolder import MASKS
from .plan import sequence_length
from .progress import Progress
from .soups import ensemble_per_row, log_probabilities, per_row
from .source import FolderSource, open_source
from .table import byte_view
from .text import load_tokenizer
from .traindata import instruction_rows
from .values import FloatSource
from .writer import storage_errors

REPORT = "soup.json"
_MARKER = "soup-unfinished"
_STALE = ("report.json", "report.html", "recipe.yaml", "README.md", REPORT)  # of one candidate, not of the mean


class MeanSource(FloatSource):
    """The weighted mean of checkpoints, tensor by tensor, with the masks that they share."""

    def __init__(self, sources: Sequence[FolderSource], names: Sequence[str], weights: Sequence[float]) -> None:
        super().__init__(sources[0])
        self._parts = [part for part in zip(sources, names, weights, strict=True) if part[2]]

    def read(self, key: str) -> Tensor:
        mean = Mean()
        for source, name, weight in self._parts:
            mean.add({key: source.read(key)}, weight, name)
        return mean.result()[key]

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        return self.read(key)[start:stop].clone()

    def values(self, key: str) -> Tensor | None:
        record = self.base.record(key)
        if record is None or self.base.values(key) is None:
            return None
        return packed_rows(record.as_rows(self.read(key)), self.base.bits(key))

    def chunks(self, key: str) -> Iterator[Tensor]:
        yield byte_view(self.read(key))

    def digest(self) -> str:
        return " ".join(f"{weight!r} {source.digest()}" for source, _, weight in self._parts)


def average_checkpoints(
    models: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    data: str | None = None,
    margin: float = NOISE_MARGIN,
    seqlen: int | None = None,
    windows: int | None = 128,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Average `models` into the new folder `out`; what was done, as in OUT/soup.json.

    `weights`: one per model, not negative; default equal parts. `data`: a held-out text on which every candidate, their
    prediction ensemble and the soups are compared (of instructions, the responses); without weights, the greedy soup on
    it is written.

    The form is that of the first model. OUT appears only when it was read back and found right. Raises RecipeError for
    a wrong request, CheckpointError for other masks or shapes, ModelError for other architectures or tokenizers.
    """
    progress = progress or Progress()
    check_count(len(models))
    shares = None if weights is None else normalised(weights, len(models))
    check_margin(margin)
    if windows is not None and windows < 1:
        raise RecipeError(f"windows must be at least 1, got {windows}", hint="128 are usual")
    out = Path(os.path.abspath(out))
    partial = _place(models, out, overwrite)
    sources = [open_source(str(model)) for model in models]
    names = [str(model) for model in models]
    masks = check_copies(sources, names)
    kind = "sparse" if any(sources[0].values(key) is not None for key in sources[0].records()) else "dense"
    with storage_errors(partial, 0):
        partial.mkdir(parents=True)
        (partial / _MARKER).touch()
    try:
        compared: dict[str, Any] = {}
        if data is not None:
            rows = _rows(sources[0], data, seqlen, windows, trust_remote_code)
            compared, best = _compare(sources, names, rows, partial, shares, margin, trust_remote_code, progress)
            shares = shares or best
        final = shares or uniform_weights(range(len(models)), len(models))
        progress.working("write the average")
        report = {
            "models": names,
            "weights": list(final),
            "masks_sha256": masks,
            "matrices_with_masks": len(sources[0].records()),
            "form": kind,
            **compared,
        }
        report |= _write(sources, names, final, partial, kind, report)
        publish(partial / "files", out, overwrite=overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report | {"output": str(out)}


def _place(models: Sequence[str | Path], out: Path, overwrite: bool) -> Path:
    for model in models:
        if Path(model).exists() and Path(model).resolve() == out.resolve():
            raise RecipeError(f"{out} is one of the models", hint="write to another folder")
    return partial_folder(out, _MARKER, overwrite=overwrite)


# ---- which is best ---------------------------------------------------------------------------------------------------


def _rows(source: FolderSource, data: str, seqlen: int | None, limit: int | None, trust: bool) -> TokenRows:
    from .blocks import StreamedModel

    skeleton = StreamedModel.open(source, source.folder, trust_remote_code=trust)
    length = sequence_length(seqlen, skeleton.max_positions, "--seqlen")
    tokenizer = load_tokenizer(source.folder)
    instructed = instruction_rows(data, tokenizer, length, limit)
    if instructed is not None:
        return instructed
    text = load_text(data, "evaluation")
    ids = token_ids(tokenizer, text)
    return TokenRows(evaluation_windows(ids, length, limit, text.name), name=text.name)


def _compare(
    sources: Sequence[FolderSource],
    names: Sequence[str],
    rows: TokenRows,
    partial: Path,
    shares: tuple[float, ...] | None,
    margin: float,
    trust: bool,
    progress: Progress,
) -> tuple[dict[str, Any], tuple[float, ...]]:
    """Losses of candidates, ensemble and soups, and the weights of the greedy soup."""
    count = len(sources)

    def scored(weights: tuple[float, ...]) -> Tensor:
        nonlocal rows
        folder = partial / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        mean = MeanSource(sources, names, weights)
        assemble(mean, folder, "dense")
        config = dense_config(_plain(sources[0]), summarise(mean.records()))
        atomic_write_text(folder / "config.json", json.dumps(config))
        model = load(folder, dtype=torch.float32, packed=False, attachments=False, trust_remote_code=trust)
        rows = apart(model, rows)  # the same for every candidate: they are of one architecture
        found = log_probabilities(model, rows, 4)
        del model
        memory.release()
        return found

    known: dict[tuple[float, ...], Tensor] = {}

    def losses(weights: tuple[float, ...]) -> Tensor:
        if weights not in known:
            known[weights] = per_row(scored(weights), rows)
        return known[weights]

    single = []
    for index in range(count):
        progress.working(f"measure {names[index]}")
        single.append(scored(uniform_weights([index], count)))
        known[uniform_weights([index], count)] = per_row(single[index], rows)
    progress.working("measure the soups")
    each = [per_row(log_p, rows) for log_p in single]
    chosen = greedy(each, losses, margin)
    every = uniform_weights(range(count), count)
    found: dict[str, Soup] = {"uniform": Soup(every, losses(every)), "greedy": chosen}
    if shares is not None:
        found["given"] = Soup(shares, losses(shares))
    best = min(range(count), key=lambda i: (float(each[i].mean()), i))
    compared = {
        "text": rows.name,
        "windows": len(rows),
        "seqlen": rows.length,
        "candidates": [float(loss.mean()) for loss in each],
        "best": {"model": names[best], "loss": float(each[best].mean())},
        "ensemble": float(ensemble_per_row(single, rows).mean()),
        "soups": {name: {"loss": soup.loss, "weights": list(soup.weights)} for name, soup in found.items()},
    }
    return {"compared": compared}, chosen.weights


# ---- writing ---------------------------------------------------------------------------------------------------------


def _plain(source: FolderSource) -> dict[str, Any]:
    """config.json without what was measured on one candidate's weights."""
    config = dict(source.config)
    own = config.get(METADATA_KEY)
    if isinstance(own, dict):
        stale = {*entries(config), "activation", "recipe_sha256"}
        config[METADATA_KEY] = {key: value for key, value in own.items() if key not in stale}
    return config


def _write(
    sources: Sequence[FolderSource],
    names: Sequence[str],
    weights: tuple[float, ...],
    partial: Path,
    kind: str,
    report: dict[str, Any],
) -> dict[str, Any]:
    work = partial / "files"
    work.mkdir()
    mean = MeanSource(sources, names, weights)
    assemble(mean, work, kind, MAX_SHARD_SIZE)
    checked = verify(work, mean, kind)
    build = sparse_config if kind == "sparse" else dense_config
    config = build(_plain(sources[0]), checked.summary)
    atomic_write_text(work / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    copy_companions(sources[0].folder, work)
    for name in _STALE:
        (work / name).unlink(missing_ok=True)
    for path in (work / MASKS).parent.glob("*"):
        if path.name != Path(MASKS).name:
            path.unlink()
    if (work / MASKS).parent.is_dir() and not (work / MASKS).exists():  # the sparse form holds its masks itself
        (work / MASKS).parent.rmdir()
    figures = {"zeros": checked.zeros, "payload": checked.payload}
    atomic_write_text(work / REPORT, json.dumps(report | figures, indent=2) + "\n")
    return figures
