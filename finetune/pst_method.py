"""PST as a method of fine-tuning: prunes to a pattern while thin factors, norms, biases and the head are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from ..errors import RecipeError
from ..pruning.pattern import Pattern, Unstructured, parse_pattern
from .biasnorm import bias_and_norm_names, train_only
from .methods import Attached, Method
from .pst import PstConfig, PstWeight


class Pst(Method):
    """Every prunable matrix gets a mask; those that have one can only lose more weights."""

    reads = frozenset({"sparsity", "pattern", "rank", "score_rank"})

    def share(self, parameters: int, shapes: Sequence[tuple[int, int]], options: Mapping[str, Any]) -> float:
        ranks = options["rank"] + options["score_rank"] + 1
        return min(1.0, ranks * sum(rows + cols for rows, cols in shapes) / parameters + 0.001)

    def prunes(self, options: Mapping[str, Any]) -> Pattern:
        return target_pattern(options)

    def attach(
        self, model: Any, masks: Mapping[str, Tensor], targets: Sequence[str], options: Mapping[str, Any], seed: int
    ) -> Attached:
        pattern = target_pattern(options)
        config = PstConfig(rank=options["rank"], score_rank=options["score_rank"])
        train_only(model, bias_and_norm_names(model))
        head = model.get_output_embeddings()
        if head is not None and head.weight is not model.get_input_embeddings().weight:
            head.weight.requires_grad_(True)
        run = _Run(beside=sum(p.numel() for p in model.parameters() if p.requires_grad))
        skipped = []
        for number, name in enumerate(targets):
            module = model.get_submodule(name.rpartition(".")[0])
            if isinstance(module, (nn.Linear, Conv1D)):
                mask = masks.get(name)
                run.add(name, module, pattern, config, mask, seed + number)
            else:
                skipped.append(name)
        if not run.weights:
            raise RecipeError("no matrix of the model can be pruned by PST", hint="it knows nn.Linear and Conv1D")
        others = {name: mask for name, mask in masks.items() if name not in run.weights}
        notes = [f"{len(skipped)} fused expert parameters are not pruned by PST and stay as they are"]
        return Attached(
            others, run.finish, callbacks=(run,), kept=lambda: others | run.masks, notes=notes if skipped else [],
            patterns=run.patterns,
        )  # fmt: skip


def target_pattern(options: Mapping[str, Any]) -> Pattern:
    """The pattern that the stage asks for: N:M, or a sparsity of every matrix."""
    if options["pattern"] is not None:
        return parse_pattern(options["pattern"])
    return parse_pattern(repr(0.5 if options["sparsity"] is None else options["sparsity"]), "matrix")


class _Run(TrainerCallback):
    """The parametrized weights of one run; moves their schedules and takes them off in the end.

    `beside`: numbers that are trained besides: norms, biases, the head.
    """

    def __init__(self, beside: int = 0) -> None:
        self.beside = beside
        self.weights: dict[str, tuple[Any, PstWeight]] = {}
        self.masks: dict[str, Tensor] = {}
        self.patterns: dict[str, str] = {}

    def add(self, name: str, module: Any, pattern: Pattern, config: PstConfig, mask: Tensor | None, seed: int) -> None:
        transposed = isinstance(module, Conv1D)
        allowed = mask.t() if transposed and mask is not None else mask
        module.weight.requires_grad_(False)
        made = PstWeight(module.weight, pattern, config, transposed=transposed, allowed=allowed, seed=seed, name=name)
        parametrize.register_parametrization(module, "weight", made, unsafe=True)
        self.weights[name] = (module, made)
        self.patterns[name] = str(pattern)

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        for module, made in self.weights.values():
            made.advance(module.parametrizations.weight.original, state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **more: Any) -> None:
        if logs is not None and "loss" in logs:
            logs["sparsity"] = float(next(iter(self.weights.values()))[1].sparsity)

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        """Ordinary modules again, with exact zeros."""
        trained = self.beside
        for name, (module, made) in self.weights.items():
            original = module.parametrizations.weight.original
            weight, keep = made.finish(original)
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            module.weight.data = weight
            self.masks[name] = keep
            zeros = int((~keep).sum())
            if isinstance(made.pattern, Unstructured) and zeros != made.pattern.zeros(*keep.shape):  # had more before
                self.patterns[name] = str(Unstructured.for_count(zeros, *keep.shape))
            trained += made.trainable
        return {"trained": trained, "adapted": len(self.weights)}
