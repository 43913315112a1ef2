"""A head plan as one window per layer, for engines that have such windows of their own and none per head.

Only plans whose layers are uniform can be said so: all KV heads of a layer keep the same, and not a share of the length.
A planner that is told to tie the heads of a layer makes such plans; they lose most of what a plan per head gains.
"""

from __future__ import annotations

from typing import Any

from ..errors import RecipeError
from .plan import HeadPlan

ENGINES = ("transformers", "tensorrt-llm")


def layer_windows(plan: HeadPlan) -> tuple[tuple[int | None, int], ...]:
    """(window, sinks) of every layer: the newest `window` tokens, None for all of them, beside the first `sinks`.

    RecipeError naming the first layer that has no such window.
    """
    found: list[tuple[int | None, int]] = []
    for index, rules in enumerate(plan.heads):
        if len(set(rules)) > 1:
            raise RecipeError(
                f"layer {index} of the head plan keeps different parts of the past in its {len(rules)} KV heads",
                hint="only a plan with one rule per layer fits engines without windows per head",
            )
        rule = rules[0]
        if rule.slope == 1024 and rule.alpha >= 0:
            found.append((None, 0))
        elif rule.slope:
            raise RecipeError(
                f"layer {index} of the head plan keeps a share of the length ({rule.beta:g}), not a fixed window",
                hint="only a plan with beta 0 or 1 fits engines with fixed windows",
            )
        else:
            found.append((max(rule.sink + plan.block, rule.alpha) - rule.sink, rule.sink))
    return tuple(found)


def engine_settings(plan: HeadPlan, engine: str) -> dict[str, Any]:
    """What to tell an engine: entries of config.json ("transformers") or arguments of KvCacheConfig ("tensorrt-llm").

    RecipeError where the engine cannot do what the plan says.
    """
    if engine not in ENGINES:
        raise RecipeError(f"engine is {engine!r}, allowed: {', '.join(ENGINES)}")
    layers = layer_windows(plan)
    sinks = {sink for window, sink in layers if window is not None}
    if engine == "transformers":
        widths = {window for window, _ in layers if window is not None}
        if sinks - {0}:
            raise RecipeError(
                f"layers of the head plan keep {max(sinks)} sinks, and windows of transformers have none",
                hint="make the plan with sinks 0, or run it with Gossamer",
            )
        if len(widths) > 1:
            raise RecipeError(
                f"the head plan has windows of {', '.join(map(str, sorted(widths)))} tokens, "
                "and models of transformers have one width for all layers with a window",
                hint="make the plan with one span, or run it with Gossamer",
            )
        kinds = ["full_attention" if window is None else "sliding_attention" for window, _ in layers]
        return {"layer_types": kinds, "sliding_window": next(iter(widths), None), "use_sliding_window": bool(widths)}
    if len(sinks) > 1:
        raise RecipeError(
            f"layers of the head plan keep {', '.join(map(str, sorted(sinks)))} sinks, TensorRT-LLM has one number",
            hint="make the plan with one number of sinks",
        )
    everything = plan.positions or plan.lengths[-1]
    sink = next(iter(sinks), 0)
    # Its windows count the sinks.
    return {
        "max_attention_window": [everything if window is None else window + sink for window, _ in layers],
        "sink_token_length": sink,
    }
