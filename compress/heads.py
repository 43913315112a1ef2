"""A head plan on a model of transformers: its classes stay as they are, caches and masks follow the plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers.generation.configuration_utils import GenerationMode

from ..attention.block import restore, shorten
from ..attention.decode import NAME as DECODE
from ..attention.function import NAME, HeadsOfLayer
from ..attention.plan import HeadPlan
from ..attention.ragged import RaggedCache
from ..errors import CheckpointError, ModelError, RecipeError
from .attachments import entries, forget, note

ENTRY = "heads"  # in config.json
CacheKind = Literal["ragged", "masked"]


@dataclass(frozen=True)
class Applied:
    """A model's plan, as its attribute `gossamer_heads`. `before`: the attention it had."""

    plan: HeadPlan
    cache: CacheKind
    before: str | None


def apply(model: Any, plan: HeadPlan, *, cache: CacheKind = "ragged") -> Any:
    """Runs `model` by `plan` from now on; the model.

    Every forward pass follows the plan's mask. `generate` makes a cache that holds only what the plan keeps ("ragged"),
    and so does whoever passes `past_key_values=new_cache(model)`. With "masked", or with any other cache, the same
    tokens come out, but everything is kept. The plan is saved with the model. ModelError for a model that the plan was
    not made for, or whose attention cannot be replaced.
    """
    _put_on(model, plan, cache)
    note(model, ENTRY, plan.to_json())
    return model


def remove(model: Any) -> Any:
    """Takes the plan off again; a model without one stays as it is."""
    if NAME in model.__dict__:
        _take_off(model)
        forget(model, ENTRY)
    return model


@contextmanager
def applied(model: Any, plan: HeadPlan, *, cache: CacheKind = "masked") -> Iterator[Any]:
    """Inside the block, `model` runs by `plan`; afterwards by what it had before, which is also what is saved."""
    earlier: Applied | None = getattr(model, NAME, None)
    try:
        _put_on(model, plan, cache)
        yield model
    finally:
        _take_off(model)
        if earlier is not None:
            _put_on(model, earlier.plan, earlier.cache)


def new_cache(model: Any, reserve: int = 0) -> RaggedCache | None:
    """An empty cache for the model's plan with room for `reserve` tokens from the begin; None without such a plan."""
    said: Applied | None = getattr(model, NAME, None)
    return RaggedCache(said.plan, reserve) if said is not None and said.cache == "ragged" else None


def _put_on(model: Any, plan: HeadPlan, cache: CacheKind) -> None:
    if cache not in ("ragged", "masked"):
        raise RecipeError(f"cache is {cache!r}, allowed: 'ragged' and 'masked'")
    config = model.config.get_text_config(decoder=True)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    name = type(model).__name__
    plan.check_model(
        config.model_type, config.num_hidden_layers, config.num_attention_heads, kv_heads, width, name
    )  # fmt: skip
    modules = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    found = {module.layer_idx for module in modules}
    if found != set(range(plan.layers)):
        raise ModelError(
            f"{name} does not say which layer an attention module belongs to, so no head plan can be applied"
        )
    _take_off(model)
    before = config._attn_implementation
    model.set_attn_implementation(NAME)
    if config._attn_implementation != NAME:
        raise ModelError(f"the attention function of {name} cannot be replaced, so no head plan can be applied")
    for module in modules:
        setattr(module, NAME, HeadsOfLayer(plan, module.layer_idx))
    model.gossamer_heads = Applied(plan, cache, before)
    # `generate` prepares masks of static caches, to be copied and compiled; ours are made inside, and are no tensors.
    model.create_masks_for_generate = _mask_as_it_is
    model._valid_auto_compile_criteria = _never
    if cache == "ragged":
        for module in modules:
            shorten(module)
        model._prepare_cache_for_generation = partial(_prepare_cache, model)  # unlike a bound method it can be pickled


def _take_off(model: Any) -> None:
    applied: Applied | None = model.__dict__.pop(NAME, None)
    if applied is None:
        return
    model.set_attn_implementation(applied.before)
    for module in model.modules():
        module.__dict__.pop(NAME, None)
        if applied.before != DECODE:  # with that one, the short way was there before
            restore(module)
    for name in ("create_masks_for_generate", "_valid_auto_compile_criteria", "_prepare_cache_for_generation"):
        model.__dict__.pop(name, None)


def _mask_as_it_is(*, attention_mask: Any = None, **rest: Any) -> Any:
    return attention_mask


def _never(*rest: Any) -> bool:
    return False


def _prepare_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, *rest: Any) -> Any:
    """`generate` asks its model for a cache: it gets ours, unless it wants one to crop or of its own kind."""
    own = (
        model_kwargs.get("past_key_values") is None
        and generation_config.use_cache is not False
        and generation_config.cache_implementation is None
        and mode != GenerationMode.ASSISTED_GENERATION
        and not generation_config.is_assistant
    )
    if own:
        model_kwargs["past_key_values"] = new_cache(model)
        return None
    usual = type(model)._prepare_cache_for_generation
    return usual(model, generation_config, model_kwargs, mode, *rest)


class HeadsAttachment:
    """The head plan of a checkpoint (attachments.py): all of it is in config.json."""

    def apply(self, model: Any, folder: Path, entry: dict[str, Any]) -> None:
        """Run `model` by the plan in `entry`. CheckpointError when it is malformed or of another model."""
        try:
            apply(model, HeadPlan.from_json(entry))
        except (CheckpointError, ModelError) as error:
            hint = "attachments=False loads the model without it"
            raise CheckpointError(
                f"{folder}: {error.message}", hint=f"{error.hint}; {hint}" if error.hint else hint
            ) from error

    def save(self, model: Any, folder: Path) -> dict[str, Any]:
        """The plan that was applied last."""
        return entries(model.config)[ENTRY]
