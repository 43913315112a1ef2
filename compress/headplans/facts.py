"""What a head plan must know of a model, from its config alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...attention.plan import HeadPlan
from ...attention.rivals import Rules
from ...errors import ModelError


@dataclass(frozen=True)
class HeadFacts:
    """Shapes of a model's attention; `positions`: max_position_embeddings, None where the model states none."""

    model_type: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    positions: int | None

    @property
    def heads(self) -> int:
        """KV heads of all layers."""
        return self.layers * self.kv_heads

    def plan(self, rules: Rules, block: int, lengths: tuple[int, ...], made: dict[str, Any] | None = None) -> HeadPlan:
        """A plan of these rules for this model."""
        return HeadPlan(
            self.model_type, self.query_heads, self.head_dim, block, lengths, self.positions, rules, made or {}
        )


def head_facts(config: Any, supported: bool = True) -> HeadFacts:
    """From transformers' config. `supported`: whether the model class lets its attention function be replaced.

    ModelError for an architecture without ordinary attention in every layer.
    """
    text = config.get_text_config(decoder=True)
    layers: int | None
    heads: int | None
    layers, heads = getattr(text, "num_hidden_layers", None), getattr(text, "num_attention_heads", None)
    reason = None
    if not supported:
        reason = "its attention function cannot be replaced"
    elif not isinstance(layers, int) or not isinstance(heads, int):
        reason = "its config does not state one number of attention heads for all layers"
    elif getattr(text, "kv_lora_rank", None):
        reason = "its keys and values are stored compressed for all heads together"
    elif getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder model"
    else:
        kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            reason = f"it has layers of another kind ({', '.join(sorted(kinds))})"
    if reason is not None or layers is None or heads is None:
        raise ModelError(
            f"no head plan can be made for {text.model_type}: {reason}",
            hint="Llama, Qwen, Mistral and their relatives work",
        )
    return HeadFacts(
        text.model_type,
        layers,
        heads,
        getattr(text, "num_key_value_heads", None) or heads,
        getattr(text, "head_dim", None) or text.hidden_size // heads,
        getattr(text, "max_position_embeddings", None),
    )
