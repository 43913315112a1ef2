"""The picture of a report: what pruning did to every kind of matrix, block by block."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

# Eight colours that stay apart for colour-blind readers (Okabe and Ito, "Color Universal Design", 2008).
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
_MARKERS = "os^DvP*X"

Series = dict[str, dict[int, float]]


def layer_series(rows: Sequence[Mapping[str, Any]], key: str) -> Series:
    """kind of matrix -> block -> mean of `key` over its matrices (experts are averaged); rows without one are left out.

    The block is the first number in a matrix' name, the kind what follows it: "model.layers.3.mlp.up_proj" is
    "mlp.up_proj" of block 3. Of several prune stages the last row of a matrix counts.
    """
    latest = {row["name"]: row for row in rows}
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, row in latest.items():
        match = re.search(r"\.(\d+)\.(.+)$", name)
        if match is not None and row[key] is not None:
            kind = re.sub(r"\.\d+$", "", match[2])
            found[kind][int(match[1])].append(row[key])
    return {kind: {b: sum(v) / len(v) for b, v in sorted(blocks.items())} for kind, blocks in found.items()}


def layers_png(rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """PNG of the relative output error and the sparsity of every kind of matrix over the blocks; None without rows."""
    sparsity = layer_series(rows, "sparsity")
    if not sparsity:
        return None
    error = layer_series(rows, "error_after")
    from matplotlib.figure import Figure  # not pyplot: no display, no state of the user's own plots

    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=110)
    panels = figure.subplots(1, 2 if error else 1, squeeze=False)[0]
    if error:
        _lines(panels[0], error, "relative output error on calibration text")
        if all(value > 0 for blocks in error.values() for value in blocks.values()):
            panels[0].set_yscale("log")
    _lines(panels[-1], {kind: {b: 100 * v for b, v in blocks.items()} for kind, blocks in sparsity.items()}, "zeros, %")
    panels[-1].set_ylim(0, 100)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _lines(axes: Any, series: Series, title: str) -> None:
    for index, (kind, blocks) in enumerate(series.items()):
        axes.plot(
            list(blocks),
            list(blocks.values()),
            color=COLOURS[index % len(COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4,
            linewidth=1.2,
            label=kind,
        )
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("block")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
