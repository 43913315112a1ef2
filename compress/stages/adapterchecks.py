"""What stages with adapters refuse while they are planned: no weight has been read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner

from ...errors import CheckpointError, RecipeError
from ...finetune.methods import get_method
from ...finetune.spiel.layout import COUNTS
from ..adapters import LORA, PREFIX, SPIEL, Adapter
from ..plan import Planning
from ..prunable import Prunable
from ..stage_recipes.finetune import FinetuneStage


def masked_before(index: int, planning: Planning) -> bool:
    """Whether the source has masks, or an earlier stage makes some."""
    return bool(planning.source.records()) or _makes_masks(planning.recipe.stages[:index])


def room_of(index: int, planning: Planning, targets: Iterable[Prunable]) -> list[int | None] | None:
    """Kept weights of every target, None for one without a mask; None where an earlier stage decides about them."""
    if _makes_masks(planning.recipe.stages[:index]):
        return None
    records = planning.source.records()
    found: list[int | None] = []
    for target in targets:
        own = [records[key] for key in planning.skeleton.source_keys(target) if key in records]
        if sum(record.nnz + record.zeros for record in own) not in (0, target.size):
            return None  # stored together with others
        found.append(sum(record.nnz for record in own) if own else None)
    return found


def check_adapter(adapter: Adapter, masked: bool, planning: Planning) -> None:
    """Whether the adapter can become part of this model.

    Raises:
        CheckpointError: peft has no such method, or the layers are none of the model's, or of another size.
        RecipeError: it would undo the model's pruning.
    """
    tuners: dict[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING
    if not issubclass(tuners.get(adapter.kind, object), BaseTuner):
        kinds = sorted(str(kind.value) for kind, tuner in tuners.items() if issubclass(tuner, BaseTuner))
        raise CheckpointError(
            f"{adapter.folder} is an adapter of method {adapter.kind!r}, which cannot be merged",
            hint=f"methods that can: {', '.join(kinds)}",
        )
    if masked and adapter.kind != SPIEL:
        raise RecipeError(
            f"an adapter of method {adapter.kind} would undo the pruning of the model",
            hint="merge it before pruning",
        )
    sizes = {p.name: p.shape for i in range(planning.skeleton.num_blocks) for p in planning.skeleton.prunables(i)}
    for name, shape in _layers(adapter):
        if _is_tied(name, planning):
            raise CheckpointError(
                f"{adapter.folder} adapts {name}, whose weights are the embedding's in {planning.model}: merging would "
                "change the embedding as well",
                hint="load it beside the model with PeftModel.from_pretrained, or train one without this layer",
            )
        if f"{name}.weight" not in planning.skeleton.keys.groups and name not in sizes:
            raise CheckpointError(
                f"{adapter.folder} adapts {name}, which is no layer of {planning.model}",
                hint="it was made for another model: its adapter_config.json names one",
            )
        known = sizes.get(name)
        if known is not None and any(n is not None and n != size for n, size in zip(shape, known, strict=True)):
            said = " x ".join("?" if n is None else str(n) for n in shape)
            raise CheckpointError(
                f"{adapter.folder} has {said} for {name}, which is {known[0]} x {known[1]} in {planning.model}",
                hint="it was made for another model: its adapter_config.json names one",
            )


def _is_tied(name: str, planning: Planning) -> bool:
    head = planning.skeleton.head()
    return head is not None and name == head.name and planning.skeleton.head_is_tied


def _layers(adapter: Adapter) -> list[tuple[str, tuple[int | None, int | None]]]:
    """(name, (out, in) as far as the file says) of every layer of sparse deltas or LoRA; of other methods none."""
    shapes = {key: entry.shape for key, entry in adapter.file.entries.items()}
    found: list[tuple[str, tuple[int | None, int | None]]] = []
    if adapter.kind == SPIEL:
        found = [(layer, (_size(shapes.get(f"{layer}.{COUNTS}"), 0), None)) for layer in adapter.layers()]
    elif adapter.kind == LORA:
        end = ".lora_A.weight"
        stems = [key.removesuffix(end) for key in shapes if key.endswith(end)]
        found = [(s, (_size(shapes.get(f"{s}.lora_B.weight"), 0), _size(shapes[s + end], 1))) for s in stems]
    return [(name.removeprefix(PREFIX), shape) for name, shape in found]


def _size(shape: Sequence[int] | None, axis: int) -> int | None:
    return None if shape is None or len(shape) <= axis else shape[axis]


def _makes_masks(stages: Iterable[Any]) -> bool:
    return any(
        s.makes_masks or (isinstance(s, FinetuneStage) and bool(get_method(s.method).prunes(s.model_dump())))
        for s in stages
    )
