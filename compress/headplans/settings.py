"""What a plan is made for, with every default filled in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...attention.plan import HeadRule
from ...attention.rivals import Rules
from ...attention.rules import (
    default_block,
    default_lengths,
    default_sinks,
    default_validation,
    search_space,
)
from ...errors import RecipeError
from ..stage_recipes.heads import HeadsStage
from .facts import HeadFacts


@dataclass(frozen=True)
class Settings:
    """A heads stage on one model.

    Attributes:
        lengths: where influence is measured.
        budgeted: where the density must hold: `lengths`, and one beyond them if the model goes further.
        validation: length of held-out sequences.
        block: step of the spans. least: what a head keeps beside its sinks at any rate.
        imported: rules of a file, for the methods that read one.
    """

    stage: HeadsStage
    facts: HeadFacts
    lengths: tuple[int, ...]
    budgeted: tuple[int, ...]
    validation: int
    block: int
    least: int
    sinks: tuple[int, ...]
    imported: Rules | None = None

    @property
    def rules(self) -> list[HeadRule]:
        """The search space."""
        return search_space(self.lengths, self.block, self.sinks, self.least, self.budgeted[-1])

    @property
    def sink(self) -> int:
        """Of rules that are not searched: the smallest number above 0, if any."""
        return min((s for s in self.sinks if s > 0), default=0)


def settle(stage: HeadsStage, facts: HeadFacts) -> Settings:
    """Defaults from the model's positions. RecipeError for a length beyond them, or sinks that leave no room."""
    lengths = stage.lengths or default_lengths(facts.positions)
    if facts.positions is not None and lengths[-1] > facts.positions:
        raise RecipeError(
            f"--lengths {lengths[-1]} is beyond the model's {facts.positions} positions",
            hint=f"name lengths up to {facts.positions}",
        )
    block = stage.block or default_block(lengths)
    sinks = stage.sinks if stage.sinks is not None else default_sinks(block)
    least = max(block // 4, 1)
    if lengths[0] < block:
        raise RecipeError(
            f"length {lengths[0]} is shorter than one block of {block} tokens", hint="name longer lengths, or a --block"
        )
    far = 2 * lengths[-1] if facts.positions is None else min(2 * lengths[-1], facts.positions)
    budgeted = (*lengths, far) if far > lengths[-1] else lengths
    return Settings(
        stage, facts, lengths, budgeted, default_validation(lengths, facts.positions), block, least, sinks
    )  # fmt: skip


def check_density(settings: Settings, rules: Sequence[HeadRule]) -> None:
    """RecipeError for a density that the cheapest of `rules` on every head exceeds."""
    for length in settings.budgeted:
        least = min(rule.kept(length, settings.least) for rule in rules)
        if least > settings.stage.density * length + 1e-9:
            raise RecipeError(
                f"no plan reaches density {settings.stage.density:g} at length {length}: every head keeps at least "
                f"{least} tokens, {least / length:.3g} of them",
                hint="ask for a larger density, or for fewer --sinks or a smaller --block",
            )
