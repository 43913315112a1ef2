"""What an adapter is made of, as peft stores it beside the adapter's tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from ...errors import RecipeError
from ..budget import ALLOCATIONS, check_budget
from ..reselection import check_schedule, window_of
from .product import BACKENDS

POLICIES = ("static", "ag", "ma")
SELECTIONS = ("random", "magnitude", "gradient", "snip", "fisher")
BY_DATA = ("gradient", "snip", "fisher")
PLACES = ("all", "kept", "pruned", "seft")
SHARES = {"static": 0.5, "ag": 0.5, "ma": 0.2}  # of the entries that the first choice replaces; static makes none
FILE_DTYPES = ("float32", "bfloat16")


class MethodName(str):
    """The name of a method that is no member of peft's enumeration, with what its error messages ask a member for."""

    @property
    def value(self) -> str:
        return str(self)

    @property
    def name(self) -> str:
        return str(self)


SPIEL = MethodName("SPIEL")


@dataclass
class SpielConfig(PeftConfig):
    """Sparse deltas: K trainable entries per matrix, at positions that are chosen once or move during training.

    Attributes:
        target_modules: names or endings of names, or one regular expression, of linear layers; None means all of them
            but the output embedding.
        exclude_modules: the same, for layers to leave out.
        layers_to_transform, layers_pattern: decoder blocks by number, as elsewhere in peft.
        modules_to_save: further modules that are trained as a whole and saved.
        bias: "none", "all" or "spiel_only".
        density: fraction of the adapted weights that is trained. One of the three budgets; 0.01 where none is given.
        num_weights: the number of entries.
        rank_equivalent: as many entries as LoRA of this rank would train on the same layers.
        allocation: "uniform", "erk", or "global": the highest scores of all layers together (needs a selection by
            score), each layer between 0.1 and 4 times its uniform share.
        policy: "static" keeps the positions; "ag" replaces the smallest deltas by the positions with the largest
            accumulated gradient; "ma" trains by SM3 and grows where its row and column moments are largest.
        selection: the positions to begin with: "random"; "magnitude" (largest |w|); or by data, through
            `select.selecting`: "gradient" (|sum g|), "snip" (|w sum g|), "fisher" (sum g^2).
        where: on a base with masks, "kept": only weights that are not pruned; "pruned": only those that are; "seft":
            anywhere, and merging prunes to the exact pattern again; "all". None: "kept" if there are masks, else "all".
        seed: of everything that is drawn at random.
        interval, window, look_every, share, anneal: see `reselection.Reselection`. A window of None is as long as the
            interval; a share of None is the policy's, 0.5 for "ag" and 0.2 for "ma".
        slots: growth candidates that are followed, per entry to be replaced.
        backend: "csr", "dense" or "weight" instead of the choice by device, dtype and density.
        file_dtype: of the values in the adapter's file, "float32" or "bfloat16". They are trained in float32.
        base_fingerprint: of the weights that the adapter was trained on; written when it is saved, into the model's own
            copy of the configuration.
        layer_fingerprints: the same of every layer by itself: layer name -> digest.
        check_base: refuse to load on other weights.
        gossamer_version: of the library that wrote it.
    """

    target_modules: Any = None
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    density: float | None = None
    num_weights: int | None = None
    rank_equivalent: float | None = None
    allocation: str = "uniform"
    policy: str = "ag"
    selection: str = "random"
    where: str | None = None
    seed: int = 0
    interval: int = 10
    window: int | None = None
    look_every: int = 5
    share: float | None = None
    anneal: str = "linear"
    slots: int = 2
    backend: str | None = None
    file_dtype: str = "float32"
    base_fingerprint: str | None = None
    layer_fingerprints: dict[str, str] | None = None
    check_base: bool = True
    gossamer_version: str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._from_file = self.base_fingerprint is not None
        self.peft_type = SPIEL  # type: ignore[assignment]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        check_budget(self.density, self.num_weights, self.rank_equivalent)
        _one_of("policy", self.policy, POLICIES)
        self.window = window_of(self.interval, self.window)
        self.share = share_of(self.policy, self.share)
        check_schedule(self.interval, self.window, self.look_every, self.share, self.anneal)
        _one_of("allocation", self.allocation, ALLOCATIONS)
        _one_of("selection", self.selection, SELECTIONS)
        _one_of("file_dtype", self.file_dtype, FILE_DTYPES)
        _one_of("bias", self.bias, ("none", "all", "spiel_only"))
        if self.where is not None:
            _one_of("where", self.where, PLACES)
        if self.backend is not None:
            _one_of("backend", self.backend, BACKENDS)
        if self.slots < 1:
            raise RecipeError(f"slots must be at least 1, got {self.slots}")
        if self.allocation == "global" and self.selection == "random":
            raise RecipeError(
                "allocation 'global' compares scores, and selection 'random' has none",
                hint=f"take one of the selections {', '.join(SELECTIONS[1:])}",
            )

    @property
    def is_loaded(self) -> bool:
        """Whether it comes from a saved adapter: its layers wait for positions instead of choosing some."""
        return self._from_file


def share_of(policy: str, share: float | None) -> float:
    """The policy's own, where none is given."""
    return SHARES[policy] if share is None else share


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RecipeError(f"{name} {value!r} is unknown; allowed: {', '.join(allowed)}")
