"""SpIEL and its rivals as methods of `gossamer finetune`: an adapter is trained beside the weights, then merged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from ...errors import RecipeError
from ..budget import total
from ..losses import LossConfig, loss_sum
from ..methods import Attached, Method
from ..quantised import is_quantised, origin_of, plain
from ..tokens import TokenRows, order
from .base import describe, writable_weight
from .config import BY_DATA, SpielConfig
from .layer import Linear
from .model import PREFIX, SpielModel
from .optimizer import SpielOptimizer
from .select import selecting

ADAPTER = "default"
BUDGET = ("density", "num_weights", "rank_equivalent")
SCORED_ROWS = 64  # of the training text, for a selection by data


class _Adapter(Method):
    """What methods of peft have in common here. `options` below are the fields of the finetune stage."""

    beside = True

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
            return {"trained": trained, "adapted": len(names), **log.figures(), **_lost(model)}

        def kept() -> Mapping[str, Tensor]:
            fresh = getattr(model, "spiel_masks", {})
            return {
                name: _oriented(fresh[name].to_bool(), mask) if name in fresh else mask for name, mask in masks.items()
            }

        return Attached(
            now, finish, (log,), log.make if log.inner else None, kept,
            [f"{skipped} fused expert parameters have no adapter and stay as they are"] if skipped else [],
            prepare=lambda rows: _prepare(model, rows, options["batch"], seed),
            save=lambda folder: save_adapter(model, folder),
            merged=(lambda: merged(model, names)) if quantised else None,
        )  # fmt: skip


class _Spiel(_Adapter):
    reads = frozenset(
        (*BUDGET, "allocation", "selection", "where", "interval", "window", "replace", "anneal")
        + ("adapter_dtype", "base_quant")
    )
    optimizers = frozenset({"adamw", "adamw-8bit"})
    policy = "ag"
    selection = "random"

    def share(self, parameters: int, shapes: Sequence[tuple[int, int]], options: Mapping[str, Any]) -> float:
        return total(shapes, *(options[name] for name in BUDGET)) / parameters

    def tuner(self, model: Any, names: list[str], options: Mapping[str, Any], seed: int) -> SpielModel:
        config = SpielConfig(
            target_modules=names,
            policy=self.policy,
            selection=options["selection"] or self.selection,
            seed=seed,
            share=options["replace"],
            file_dtype=options["adapter_dtype"],
            task_type="CAUSAL_LM",  # type: ignore[arg-type]
            **{name: options[name] for name in (*BUDGET, "allocation", "where", "interval", "window", "anneal")},
        )
        return SpielModel(model, config, ADAPTER)

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

    optimizers = frozenset({"adamw"})
    policy = "ma"
    learning_rate = 2e-3


class Static(_Spiel):
    """Positions are chosen once, by the gradient on a few rows unless `selection` says otherwise."""

    policy = "static"
    selection = "gradient"


class Lora(_Adapter):
    """peft's LoRA, the rival. Merging makes a pruned model dense, so it is refused there."""

    reads = frozenset({"rank", "alpha", "base_quant"})

    def share(self, parameters: int, shapes: Sequence[tuple[int, int]], options: Mapping[str, Any]) -> float:
        return min(1.0, options["rank"] * sum(rows + cols for rows, cols in shapes) / parameters)

    def tuner(self, model: Any, names: list[str], options: Mapping[str, Any], seed: int) -> BaseTuner:
        if getattr(model, "gossamer_masks", None):
            raise RecipeError(
                "method lora cannot keep the zeros of a pruned model",
                hint="use masklora or spiel-ag, or fine-tune first",
            )
        torch.manual_seed(seed)
        config = LoraConfig(r=options["rank"], lora_alpha=options["alpha"], target_modules=names, task_type="CAUSAL_LM")  # type: ignore[arg-type]
        return LoraModel(model, config, ADAPTER)


class ChurnLog(TrainerCallback):
    """Makes the optimizer, and writes how many entries the last choice of positions replaced into the metrics."""

    def __init__(self, inner: Callable[[Any], Any] | None) -> None:
        self.inner = inner
        self._made: Any = None
        self._told = 0

    def make(self, model: Any) -> Any:
        assert self.inner is not None
        self._made = self.inner(model)
        return self._made

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        new = self._history()[self._told :]
        self._told += len(new)
        if new and logs is not None:
            logs["churn"] = sum(one["replaced"] for one in new) / new[-1]["entries"]

    def figures(self) -> dict[str, Any]:
        return {"reselections": self._history()} if self._history() else {}

    def _history(self) -> list[dict[str, Any]]:
        return [] if self._made is None else list(self._made.history)


def save_adapter(model: Any, folder: Path) -> list[str]:
    """Writes adapter_model.safetensors and adapter_config.json, as peft reads them; their names."""
    config: PeftConfig = model.peft_config[ADAPTER]
    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    named = {PREFIX + key.removeprefix(PREFIX): tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.inference_mode = True
    config.save_pretrained(str(folder))
    return ["adapter_model.safetensors", "adapter_config.json"]


@torch.no_grad()
def merged(model: Any, names: Sequence[str]) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(parameter name, base plus delta in float32, new mask or None) of adapted layers, in the parameter's shape.

    A quantised base counts as the matrix that it stands for. Each layer is emptied when the next one is asked for: two
    float32 matrices exist at a time. What merging reports is left on the model, as by `SpielModel`.
    """
    model.spiel_reports, model.spiel_masks = {}, {}
    for name in names:
        layer: Any = model.get_submodule(name)
        base, mask = layer.get_base_layer(), None
        matrix: Tensor
        origin = origin_of(base)
        if isinstance(layer, Linear):
            layer.dequantise()
            layer.merge()
            matrix = writable_weight(layer.get_base_layer(), layer.base, name)
            model.spiel_reports[name] = dict(layer.reports)
            if layer.merged_mask is not None:
                model.spiel_masks[f"{name}.weight"] = layer.merged_mask
                mask = _oriented(layer.merged_mask.to_bool(), matrix)
        else:
            matrix = plain(base).weight.data if is_quantised(base) else base.weight.data.float()
            matrix = matrix + layer.get_delta_weight(ADAPTER).float()
        if origin is not None and origin.transposed:
            matrix, mask = matrix.t(), None if mask is None else mask.t()
        yield f"{name}.weight", matrix, mask
        layer.base_layer = nn.Identity()


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


def _oriented(rows: Tensor, like: Tensor) -> Tensor:
    """A mask in the [out, in] view, in the orientation of the parameter's own mask."""
    return (rows if rows.shape == like.shape else rows.t()).to(like.device)


def _lost(model: Any) -> dict[str, Any]:
    """Share of the entries that merging lost to the rounding of the weights."""
    reports = [one for found in getattr(model, "spiel_reports", {}).values() for one in found.values()]
    entries = sum(one.entries for one in reports)
    return {"lost_in_merging": sum(one.lost for one in reports) / entries} if entries else {}
