"""Learning rates for retraining a pruned network, as pure functions of the step.

Zimmer, Spiegel and Pokutta, "How I Learned to Stop Worrying and Love Retraining" (ICLR 2023, arXiv 2111.00843), after
Renda et al. (LRW, ICLR 2020) and Le and Hua (SLR/CLR, ICLR 2021). `step` counts from 0 to total - 1. FT, LRW and SLR
replay the dense training's learning rates (`history`, one per step); of a published model nobody knows them, and the
schedules that need only a peak (CLR, LLR, ALLR) remain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import RecipeError

WARMUP = 0.1  # share of the steps in which the rate rises, along half a cosine


@dataclass(frozen=True)
class Rates:
    """What a schedule starts from.

    Attributes:
        peak: the largest learning rate; where `history` is given and `peak` is not wanted, its maximum.
        floor: the smallest one, where CLR ends and what FT is, unless `history` says it.
        history: learning rates of the dense training, step by step, its own warm-up left out.
        damage: ||W - W_pruned|| / ||W||, the relative norm that pruning took, for ALLR.
        pruned: share of the remaining weights that this phase pruned, for ALLR; 0 where it found nothing to prune.
        span: retraining steps over dense training steps, for ALLR; None when nobody knows.
        warmup: share of the steps for the rise of SLR, CLR, LLR and ALLR.
    """

    peak: float
    floor: float = 0.0
    history: tuple[float, ...] = ()
    damage: float | None = None
    pruned: float | None = None
    span: float | None = None
    warmup: float = WARMUP


def ft(step: int, total: int, rates: Rates) -> float:
    """Fine-tuning: the last learning rate of the dense training, constant."""
    return rates.history[-1] if rates.history else rates.floor or rates.peak


def lrw(step: int, total: int, rates: Rates) -> float:
    """Learning rate rewinding: the last `total` rates of the dense training once more."""
    history = _history(rates, "lrw")
    if total > len(history):
        raise RecipeError(
            f"schedule lrw replays the last {total} steps of the dense training, which had {len(history)}",
            hint="retrain for fewer steps, or use slr, clr or llr",
        )
    return history[len(history) - total + step]


def slr(step: int, total: int, rates: Rates) -> float:
    """Scaled rewinding: the whole dense schedule compressed to the steps after the warm-up."""
    history = _history(rates, "slr")
    return _risen(
        step, total, rates.warmup, history[0], lambda at: history[min(int(at * len(history)), len(history) - 1)]
    )


def clr(step: int, total: int, rates: Rates) -> float:
    """Cyclic rewinding: half a cosine from the peak to the floor."""
    peak, floor = rates.peak, min(rates.history) if rates.history else rates.floor
    return _risen(step, total, rates.warmup, peak, lambda at: floor + (peak - floor) * (1 + math.cos(math.pi * at)) / 2)


def llr(step: int, total: int, rates: Rates) -> float:
    """Linear rewinding: from the peak straight to zero."""
    return _risen(step, total, rates.warmup, rates.peak, lambda at: rates.peak * (1 - at))


def allr(step: int, total: int, rates: Rates) -> float:
    """Adaptive linear rewinding: LLR from a start that grows with the damage done and with the length of retraining.

    start = clip(peak * damage / sqrt(pruned), peak * min(span, 1), peak): without `span` the lower limit is 0. Where
    nothing was pruned it is the lower limit, or as in LLR where that is 0: no step would change a weight.
    """
    if rates.damage is None or rates.pruned is None or not 0 <= rates.pruned <= 1:
        raise RecipeError(
            "schedule allr needs the damage of the pruning and the share of weights it took",
            hint="it is meant for the phases of iterative pruning; use llr elsewhere",
        )
    lowest = rates.peak * min(rates.span or 0.0, 1.0)
    if rates.pruned == 0:
        start = lowest or rates.peak
    else:
        start = min(max(rates.peak * rates.damage / math.sqrt(rates.pruned), lowest), rates.peak)
    return _risen(step, total, rates.warmup, start, lambda at: start * (1 - at))


Schedule = Callable[[int, int, Rates], float]
SCHEDULES: dict[str, Schedule] = {"ft": ft, "lrw": lrw, "slr": slr, "clr": clr, "llr": llr, "allr": allr}
DEFAULT_SCHEDULE = "llr"


def get_schedule(name: str) -> Schedule:
    """RecipeError for a name that is not in the table."""
    if name not in SCHEDULES:
        raise RecipeError(f"schedule {name!r} is unknown; allowed: {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def warmup_steps(total: int, share: float) -> int:
    """Steps of the rise; at least one step is left for the schedule itself."""
    return min(round(total * share), total - 1)


def _risen(step: int, total: int, share: float, start: float, rest: Callable[[float], float]) -> float:
    """Half a cosine from 0 towards `start` over the warm-up, then `rest(position in [0, 1))`.

    The first step of a rise is not 0: a step without an update would be wasted.
    """
    rise = warmup_steps(total, share)
    if step < rise:
        return start * (1 - math.cos(math.pi * (step + 1) / (rise + 1))) / 2
    return rest((step - rise) / (total - rise))


def _history(rates: Rates, name: str) -> Sequence[float]:
    if not rates.history:
        raise RecipeError(
            f"schedule {name} needs the learning rates of the dense training",
            hint="give them with `history`, or use clr or llr, which need only a peak",
        )
    return rates.history
