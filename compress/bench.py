"""Benchmarks with a user's options: what cannot work is found before anything is measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import RecipeError, ResourceError
from ..kernels import extension
from ..kernels import tier as tiers
from ..kernels.bench import table
from ..kernels.bench.cases import DTYPES
from ..kernels.bench.measure import machine, measure_shape, measure_token
from ..kernels.bench.shapes import Shape, parse
from .environment import memory_bytes, usable_cores
from .progress import Progress

BYTES_PER_WEIGHT = 40  # of all contenders together, with what making and checking them takes for a while


@dataclass(frozen=True)
class KernelBench:
    """`text`: the report as Markdown. `wrong`: bad results.

    `report`: plain data, the machine, one entry per shape and one per operation on a token.
    """

    report: dict[str, Any]
    text: str
    wrong: list[str]


def bench_kernels(
    shapes: str,
    *,
    rounds: int,
    dtype: str = "bfloat16",
    threads: int | None = None,
    tier: str | None = None,
    json: Path | None = None,
    markdown: Path | None = None,
    progress: Progress | None = None,
) -> KernelBench:
    """Every kernel on every shape against the fastest dense product.

    threads: default torch's own; tier: default the one in use. json and markdown: files to write; a Markdown page that
    exists gets the tables between its two marks. Raises RecipeError for an option that cannot work and ResourceError
    where a shape needs more memory than there is.
    """
    found = parse(shapes)
    _check(found, rounds, dtype, threads)
    _check_files(json, markdown)
    progress = progress or Progress()
    with tiers.forced(_tier(tier)), _threads(threads):
        results = [_measured(shape, DTYPES[dtype], rounds, progress) for shape in found]
        progress.working("norms and attention of one token")
        token = measure_token(DTYPES[dtype], rounds)
        report = {"machine": machine(rounds, DTYPES[dtype]), "shapes": results, "token": token}
    text = table.markdown(report)
    if json is not None:
        table.write_json(json, report)
    if markdown is not None:
        table.write_page(markdown, text)
    return KernelBench(report, text, table.failures(report))


def _measured(shape: Shape, dtype: torch.dtype, rounds: int, progress: Progress) -> dict[str, Any]:
    label = "{} x {}".format(*shape)
    progress.working(f"{label}: checking the results")
    started: list[float] = []

    def each(done: int) -> None:
        started.append(time.monotonic())
        per_round = (started[-1] - started[0]) / max(1, done - 1)
        progress.windows(label, done, rounds, (rounds - done) * per_round, unit="rounds")

    return measure_shape(*shape, dtype, rounds, each)


def _check(shapes: list[Shape], rounds: int, dtype: str, threads: int | None) -> None:
    if rounds < 1:
        raise RecipeError(f"--rounds {rounds} is too few", hint="give 20 or more for figures worth keeping")
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype!r} is unknown; allowed: {', '.join(DTYPES)}")
    if threads is not None and not 1 <= threads <= usable_cores():
        raise RecipeError(
            f"--threads {threads} is out of range", hint=f"this process may use {usable_cores()} cores: 1 to that many"
        )
    rows, cols = max(shapes, key=lambda shape: shape[0] * shape[1])
    if rows * cols * BYTES_PER_WEIGHT > memory_bytes() > 0:
        raise ResourceError(
            f"{rows} x {cols} needs about {rows * cols * BYTES_PER_WEIGHT / 2**30:.0f} GiB of memory, there are "
            f"{memory_bytes() / 2**30:.0f} GiB",
            hint="leave that shape out, or name one with fewer rows",
        )


def _check_files(json: Path | None, markdown: Path | None) -> None:
    for file in (json, markdown):
        if file is not None and not file.absolute().parent.is_dir():
            raise RecipeError(f"{file} cannot be written: its folder does not exist", hint="create the folder first")
    if markdown is not None:
        table.check_page(markdown)


def _tier(name: str | None) -> str:
    available = tiers.available()
    if not available:
        raise RecipeError(
            "there are no compiled kernels to measure",
            hint=f"reinstall Gossamer with a C++ compiler, or unset {extension.VARIABLE}",
        )
    if name is not None and name not in available:
        raise RecipeError(
            f"--tier {name!r} is not among those of this processor and build: {', '.join(available)}",
            hint="leave --tier out for the fastest",
        )
    current = tiers.current()
    return name or (current.name if current else next(iter(available)))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
