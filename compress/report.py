"""The report of a run: one dictionary with fixed keys (docs/report.md), shown as a table, a card, a page."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from .checkpoint import atomic_write_text
from .evaluate import Comparison, Protocol

SCHEMA = 1


@dataclass(frozen=True)
class Report:
    """`data` is what report.json holds; its keys are listed in docs/report.md."""

    data: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def to_json(self) -> str:
        return json.dumps(_finite(self.data), indent=2, ensure_ascii=False) + "\n"

    def save(self, folder: Path) -> None:
        atomic_write_text(folder / "report.json", self.to_json())

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, before, after) of the closing table, as text."""
        size, sparsity = self.data["bytes"], self.data["sparsity"]
        rows = []
        evaluation = self.data["evaluation"]
        if evaluation is not None:
            before, after = evaluation["before"], evaluation["after"]
            rows.append(("perplexity", f"{before['perplexity']:.4f}", f"{after['perplexity']:.4f}"))
            rows.append(("KL to dense (nats/token)", "0", f"{evaluation['kl']:.4f}"))
        skipped = None if evaluation is None else evaluation.get("activation")
        if skipped is not None:
            before, after = (skipped[when]["perplexity"] for when in ("before", "after"))
            rows.append(("perplexity at decode", f"{before:.4f}", f"{after:.4f}"))
            rows.append(("weights skipped at decode", percent(0), percent(skipped["sparsity"])))
        elif (made := self._policy) is not None:
            rows.append(("weights skipped at decode", percent(0), percent(made["sparsity"]) + " (calibration)"))
        rows.append(("sparsity of prunable weights", percent(sparsity["before"]), percent(sparsity["prunable"])))
        rows.append(("sparsity of all parameters", percent(sparsity["all_before"]), percent(sparsity["all"])))
        if self._rounded:
            rows.append(("values of pruned matrices", "as in the model", self.data["values"]))
        rows.append(("weights on disk", human_bytes(size["before"]), human_bytes(size["after"])))
        if size["prunable_before"]:
            rows.append(
                ("of which pruned matrices", human_bytes(size["prunable_before"]), human_bytes(size["prunable_after"]))
            )
        return rows

    @property
    def _rounded(self) -> bool:
        return self.data.get("values", "same") != "same" and self.data["bytes"]["prunable_before"] > 0

    @property
    def _policy(self) -> dict[str, Any] | None:
        """What the activation stage says, where there is one."""
        return next((stage for stage in self.data.get("stages", ()) if stage["stage"] == "activation"), None)

    def footer(self) -> list[str]:
        """Lines below the table: protocol, time, memory, what was skipped."""
        lines = []
        if self.data["evaluation"] is not None:
            lines.append("perplexity: " + describe_protocol(self.data["evaluation"]["protocol"]))
            if "activation" in self.data["evaluation"]:
                lines.append("perplexity at decode: " + self.data["evaluation"]["activation"]["method"])
        if self.data["calibration"] is not None:
            lines.append("calibration: " + self.data["calibration"]["description"])
        if self._rounded:
            lines.append(f"values: {self.data['values']}; lossy: kept weights of pruned matrices were rounded")
        lines.append(f"{self.data['time_s']:.1f} s, peak memory {human_bytes(self.data['peak_memory_bytes'])}")
        lines += [f"note: {note}" for note in self.data["notes"]]
        return lines


def evaluation_entry(comparison: Comparison, protocol: Protocol) -> dict[str, Any]:
    """One evaluation as it stands in the report."""
    before, after = comparison.before, comparison.after
    return {
        "before": before.as_dict(),
        "after": after.as_dict(),
        "increase": after.perplexity / before.perplexity - 1,
        "kl": comparison.kl,
        "protocol": asdict(protocol),
    }


def describe_protocol(protocol: dict[str, Any]) -> str:
    """The protocol in one line."""
    return (
        f"{protocol['dataset']} ({protocol['text']}), {protocol['windows']} windows of {protocol['seqlen']} tokens, "
        f"stride {protocol['stride']}, BOS {protocol['bos']}, {protocol['predicted_tokens']} predicted tokens, "
        f"{protocol['dtype']}, {protocol['method']}"
    )


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they can change a result."""
    import torch
    import transformers

    return {
        "gossamer": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def human_bytes(count: float) -> str:
    """Bytes as 1.23 GB (decimal units, as file managers and the hub show them)."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def percent(fraction: float) -> str:
    """0.5 as 50.00 %."""
    return f"{100 * fraction:.2f} %"


def _finite(value: Any) -> Any:
    """JSON has no infinity: such a number becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
