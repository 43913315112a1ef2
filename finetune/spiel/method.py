"""SpIEL and its rivals as methods of `gossamer finetune`: an adapter is trained beside the weights, then merged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ...errors import RecipeError
from ..budget import share_out, total
from ..losses import LossConfig, loss_sum
from ..methods import Attached, Method
from ..quantised import is_quantised
from ..tokens import TokenRows, order
from .base import describe
from .churn import ChurnLog
from .config import BY_DATA, SpielConfig
from .layer import Linear
from .model import SpielModel
from .optimizer import SpielOptimizer
from .select import selecting
from .written import ADAPTER, lost, merged, oriented, save_adapter

BUDGET = ("density", "num_weights", "rank_equivalent")
SCHEDULE = ("interval", "window", "look_every", "anneal")
SCORED_ROWS = 64  # of the training text, for a selection by data


@dataclass(frozen=True)
class Ground:
    """What an adapter will find, as far as headers say.

    Attributes:
        shapes: (out, in) of the matrices that may be adapted.
        masked: whether the model has masks by then.
        room: kept weights of each matrix, None without a mask; None: not known yet.
    """

    shapes: Sequence[tuple[int, int]]
    masked: bool
    room: Sequence[int | None] | None


class Adapting(Method):
    """What methods of peft have in common here. `options` below are the fields of the finetune stage."""

    beside = True

    @abstractmethod
    def check(self, options: Mapping[str, Any], ground: Ground) -> None:
        """RecipeError for options that the masks of the model do not allow; from headers alone."""

    @abstractmethod
    def tuner(self, model: Any, names: list[str], options: Mapping[str, Any], seed: int) -> BaseTuner:
        """The adapter, put into the model's layers of these names."""

    def optimizer(self, options: Mapping[str, Any]) -> Callable[[Any], Any] | None:
        """Makes the adapter's own optimizer for a model; None: that of every training stage."""
        return None

    def attach(
        self, model: Any, masks: Mapping[str, Tensor], targets: Sequence[str], options: Mapping[str, Any], seed: int
    ) -> Attached:
        names, skipped = _linear_layers(model, targets)
        quantised = any(is_quantised(model.get_submodule(name)) for name in names)
        tuner = self.tuner(model, names, options, seed)
        for layer in model.modules():
            if isinstance(layer, Linear):
                layer.stored = options.get("stored")
        inside = {f"{name}.weight" for name in names}
        now = {_inner(name) if name in inside else name: mask for name, mask in masks.items()}
        if quantised:  # codes have another shape, and nothing changes them
            now = {name: mask for name, mask in masks.items() if name not in inside}
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        log = ChurnLog(self.optimizer(options))

        def finish() -> dict[str, Any]:
            if not quantised:
                tuner.merge_and_unload()
            return {"trained": trained, "adapted": len(names), **log.figures(), **lost(model)}

        def kept() -> Mapping[str, Tensor]:
            fresh = getattr(model, "spiel_masks", {})
            return {
                name: oriented(fresh[name].to_bool(), mask) if name in fresh else mask for name, mask in masks.items()
            }

        return Attached(
            now, finish, (log,), log.make if log.inner else None, kept,
            [f"{skipped} fused expert parameters have no adapter and stay as they are"] if skipped else [],
            # not divided by the processes: each scores all rows, so that their number does not change the choice
            prepare=lambda rows: _prepare(model, rows, options["batch"] // options["accumulation"], seed),
            save=lambda folder: save_adapter(model, folder, options["base"]),
            merged=(lambda: merged(model, names)) if quantised else None,
        )  # fmt: skip


class _Spiel(Adapting):
    reads = frozenset(
        (*BUDGET, "allocation", "selection", "where", *SCHEDULE, "replace") + ("adapter_dtype", "base_quant")
    )
    optimizers = frozenset({"adamw", "adamw-8bit"})
    policy = "ag"
    selection = "gradient"

    def share(self, parameters: int, shapes: Sequence[tuple[int, int]], options: Mapping[str, Any]) -> float:
        return total(shapes, *(options[name] for name in BUDGET)) / parameters

    def check(self, options: Mapping[str, Any], ground: Ground) -> None:
        where, shapes, masked, room = options["where"], ground.shapes, ground.masked, ground.room
        if masked and where == "all":
            raise RecipeError(
                "where=all would bring pruned weights of the model back",
                hint="where=kept leaves them zero; where=seft trains anywhere and prunes to the same pattern again",
            )
        if where in ("kept", "seft") and (not masked or (room is not None and None in room)):
            missing = (
                "the model has none" if not masked or room is None else f"{room.count(None)} of its matrices have none"
            )
            raise RecipeError(
                f"where={where} needs masks, and {missing}",
                hint="leave where out: then each matrix is trained where its mask allows",
            )
        self.config(["any"], options, 0)  # it knows what goes together
        count = total(shapes, *(options[name] for name in BUDGET))
        if room is not None and where != "seft":
            sizes = [rows * cols for rows, cols in shapes]
            rooms = [size if one is None else one for one, size in zip(room, sizes, strict=True)]
            share_out(count, shapes, rooms, options["allocation"])

    def config(self, names: list[str], options: Mapping[str, Any], seed: int) -> SpielConfig:
        """Of the adapter on layers of these names."""
        return SpielConfig(
            target_modules=names,
            policy=self.policy,
            selection=options["selection"] or self.selection,
            seed=seed,
            share=options["replace"],
            file_dtype=options["adapter_dtype"],
            task_type="CAUSAL_LM",  # type: ignore[arg-type]
            **{name: options[name] for name in (*BUDGET, "allocation", "where", *SCHEDULE)},
        )

    def tuner(self, model: Any, names: list[str], options: Mapping[str, Any], seed: int) -> SpielModel:
        return SpielModel(model, self.config(names, options, seed), ADAPTER)

    def optimizer(self, options: Mapping[str, Any]) -> Callable[[Any], Any]:
        def make(model: Any) -> SpielOptimizer:
            return SpielOptimizer(
                model, options["learning_rate"], options["steps"], weight_decay=options["weight_decay"],
                eight_bit=options["optimizer"] == "adamw-8bit",
            )  # fmt: skip

        return make


class SpielAG(_Spiel):
    """Positions move to where the accumulated gradient is largest."""


class SpielMA(_Spiel):
    """Positions move to where SM3's row and column moments are largest; half the memory of SpIEL-AG. Trained by SM3."""

    reads = _Spiel.reads - {"look_every"}
    optimizers = frozenset({"adamw"})
    policy = "ma"
    selection = "random"
    learning_rate = 2e-3


class Static(_Spiel):
    """Positions are chosen once, by the gradient on a few rows unless `selection` says otherwise."""

    reads = _Spiel.reads - {*SCHEDULE, "replace"}
    policy = "static"


class Lora(Adapting):
    """peft's LoRA, the rival. Merging makes a pruned model dense, so it is refused there."""

    reads = frozenset({"rank", "alpha", "base_quant"})

    def share(self, parameters: int, shapes: Sequence[tuple[int, int]], options: Mapping[str, Any]) -> float:
        return min(1.0, options["rank"] * sum(rows + cols for rows, cols in shapes) / parameters)

    def check(self, options: Mapping[str, Any], ground: Ground) -> None:
        if ground.masked:
            raise RecipeError(
                "method lora cannot keep the zeros of a pruned model",
                hint="use masklora or spiel-ag, or fine-tune first",
            )

    def tuner(self, model: Any, names: list[str], options: Mapping[str, Any], seed: int) -> BaseTuner:
        torch.manual_seed(seed)
        config = LoraConfig(r=options["rank"], lora_alpha=options["alpha"], target_modules=names, task_type="CAUSAL_LM")  # type: ignore[arg-type]
        return LoraModel(model, config, ADAPTER)


def _prepare(model: Any, rows: TokenRows, batch: int, seed: int) -> None:
    """Scores positions on the first rows of the run, where the adapter's selection asks for it."""
    config = model.peft_config[ADAPTER]
    if not isinstance(config, SpielConfig) or config.selection not in BY_DATA:
        return
    device = next(model.parameters()).device
    chosen = order(len(rows), min(SCORED_ROWS, len(rows)), seed)
    with torch.enable_grad(), selecting(model, ADAPTER):
        for part in chosen.split(batch):
            found = [rows.row(int(i)) for i in part]
            inputs = {key: torch.stack([one[key] for one in found]).to(device) for key in found[0]}
            labels = inputs.pop("labels")
            (loss_sum(LossConfig(), model, None, inputs, labels) / labels.numel()).backward()
            model.zero_grad()


def _linear_layers(model: Any, targets: Sequence[str]) -> tuple[list[str], int]:
    """Names of the layers whose weights are targets, and the number of targets that are no layer of their own."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    names = [name.removesuffix(".weight") for name in targets if name.endswith(".weight")]
    linear = [name for name in names if name in modules and _is_linear(modules[name])]
    return linear, len(targets) - len(linear)


def _is_linear(module: nn.Module) -> bool:
    try:
        describe(module)
    except Exception:  # noqa: BLE001
        return False
    return not isinstance(module, BaseTunerLayer)


def _inner(name: str) -> str:
    return f"{name.removesuffix('weight')}base_layer.weight"
