"""What is made of a phase's candidates: the best of them, their ensemble and their soups, compared on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...finetune.tokens import TokenRows
from ...pruning.mean import has_statistics, recalibrate
from ...pruning.soup import Soup, greedy, learn_weights, uniform_weights
from .. import distributed
from ..soups import ensemble_per_row, log_probabilities, mixed, per_row, slopes
from ..stage_recipes.imp import SoupStage
from ..wholestate import StateFile, load_tensors
from .imp import mean
from .targets import TargetPlan


@dataclass(frozen=True)
class SoupPlan(TargetPlan):
    """`measured`: rows on which everything is compared once, at the end; nothing is chosen on them."""

    measured: TokenRows | None = field(default=None, compare=False, kw_only=True)


def measure_statistics(model: Any, plan: SoupPlan) -> None:
    """Running statistics of `model` on the first 64 batches of the training text."""
    rows, device, batch = plan.text.train, next(model.parameters()).device, plan.stage.batch
    batches = [
        lambda m, ids=rows.ids[start : start + batch]: m(input_ids=ids.to(device), use_cache=False)
        for start in range(0, min(len(rows), 64 * batch), batch)
    ]
    recalibrate(model, batches)


class Choice:
    """Candidates on disk, one after the other in `model`; `entries` hold their log p of `rows`, the held-out text."""

    def __init__(
        self, plan: SoupPlan, rows: TokenRows, model: Any, paths: Sequence[Path], entries: Sequence[dict[str, Any]]
    ) -> None:
        assert isinstance(plan.stage, SoupStage)
        self.plan, self.stage, self.rows, self.model, self.entries = plan, plan.stage, rows, model, entries
        self.load: list[Callable[[], dict[str, Tensor]]] = [partial(_read, path) for path in paths]

    def choose(self, *, last: bool) -> dict[str, Any]:
        """Compare best candidate, ensemble and soups; leave the one that was asked for in the model.

        `last`: of the phases; then all of them are measured on the text of `measure`, too.
        """
        count, entries = len(self.load), self.entries
        found: dict[str, Soup] = {}
        figures: dict[str, Any] = {}
        if len(self.rows):
            losses = [per_row(entry["log_p"], self.rows) for entry in entries]
            best = min(range(count), key=lambda i: (float(losses[i].mean()), i))
            found["best"] = Soup(uniform_weights([best], count), losses[best])
            figures["ensemble"] = mean(ensemble_per_row([entry["log_p"] for entry in entries], self.rows))
            whole = uniform_weights(range(count), count)
            found["uniform"] = Soup(whole, self._losses(whole, self.rows))
            known = {whole: found["uniform"].losses}
            found["greedy"] = greedy(
                losses, lambda w: known[w] if w in known else self._losses(w, self.rows), self.stage.margin
            )
            if self.stage.soup == "learned":
                weights = learn_weights(count, self._slope, self.stage.learning_steps)
                found["learned"] = Soup(weights, self._losses(weights, self.rows))
        else:
            found["uniform"] = Soup(uniform_weights(range(count), count), torch.zeros(0))
        heldout = {name: {"loss": mean(soup.losses), "weights": list(soup.weights)} for name, soup in found.items()}
        figures = {"compared": heldout, **figures}
        if last and self.plan.measured is not None:
            figures["measured"] = self._measure(found)
        chosen = found[self.stage.soup]
        self._blend(chosen.weights)
        return {"weights": chosen.weights, "heldout": mean(chosen.losses), **figures}

    def _blend(self, weights: tuple[float, ...]) -> None:
        """The soup with these weights, in the model."""
        load_tensors(self.model, mixed(self.load, weights, next(self.model.parameters()).device))
        if has_statistics(self.model):
            measure_statistics(self.model, self.plan)

    def _losses(self, weights: tuple[float, ...], rows: TokenRows) -> Tensor:
        """Of that soup, row by row; rank 0's figures on every rank: all of them must choose alike."""
        self._blend(weights)
        return distributed.from_rank(per_row(log_probabilities(self.model, rows, self.stage.batch), rows), 0)

    def _slope(self, weights: tuple[float, ...]) -> tuple[float, list[float]]:
        self._blend(weights)
        return slopes(self.model, self.load, self.rows, self.stage.batch)

    def _measure(self, soups: dict[str, Soup]) -> dict[str, Any]:
        """Losses on the text of `measure`, of which nothing above depends."""
        rows = self.plan.measured
        assert rows is not None
        found: dict[str, Any] = {
            "text": rows.name,
            "candidates": [mean(per_row(entry["measured_p"], rows)) for entry in self.entries],
            "ensemble": mean(ensemble_per_row([entry["measured_p"] for entry in self.entries], rows)),
        }
        for name, soup in soups.items():
            found[name] = mean(self._losses(soup.weights, rows))
        return found


def _read(path: Path) -> dict[str, Tensor]:
    return StateFile(path).tensors()
