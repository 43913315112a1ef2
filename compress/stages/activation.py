"""The activation stage: an activation policy, calibrated on the weights as they will be written, beside them."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...activation_sparsity.base import Policy
from ...activation_sparsity.method import Method
from ...activation_sparsity.registry import get_policy_method
from ...errors import RecipeError
from .. import distributed
from ..activation.calibrate import Calibration
from ..activation.file import FILE, write_policy
from ..activation.methods import make_method, with_watched
from ..activation.parts import StoredParts
from ..activation.products import measured, products, runtime_dtype
from ..activation.speed import sparsity_for
from ..activation.target import Found, highest_sparsity
from ..activation.validation import two_parts
from ..activation.walk import Walk, increase, prompt_length
from ..needs import Needs, Peak, block_bytes, held, hidden_bytes
from ..plan import Plan, Planning, StagePlan, calibration_dtype, sequence_length
from ..recipe import DEFAULT_CALIBRATION
from ..stage_recipes.activation import ActivationStage
from .base import Context, StageReport

VALIDATION = 1  # times as many windows as calibration has, of other text: where a perplexity target is measured
RESIDENT = 0.5  # of the memory limit: blocks of a model that takes less stay in memory
NOT_SIMULATED = "perplexity and sparsity of the evaluation are those of the prompt's neurons, without refresh"
HIDDEN_COPIES = 4  # of the hidden states: embedded, walking, dense inputs of the survey, gradients


@dataclass(frozen=True)
class ActivationPlan(StagePlan):
    """`windows`: calibration text. `validation`: windows of other text, where a perplexity target is measured."""

    stage: ActivationStage
    validation: Tensor | None = field(default=None, compare=False)


class Activation:
    """What the model skips at decode."""

    def plan(self, index: int, stage: ActivationStage, planning: Planning) -> ActivationPlan:
        """Windows. RecipeError or DataError for whatever does not fit."""
        model = planning.skeleton
        get_policy_method(stage.method)
        seqlen = sequence_length(stage.seqlen, model.max_positions, "--seqlen")
        prompt_length(seqlen, stage.prompt)
        if stage.layers is not None and stage.layers[1] >= model.num_blocks:
            raise RecipeError(
                f"layers ends at block {stage.layers[1]}, and the last of this model is {model.num_blocks - 1}",
                hint="blocks are counted from 0",
            )
        if not any(model.prunables(i) for i in range(model.num_blocks)):
            raise RecipeError("this model has no linear maps in its blocks: there is nothing to skip")
        data, validation = stage.calibration or DEFAULT_CALIBRATION, None
        if stage.target_ppl_increase is None:
            windows, source = planning.texts.calibration(data, stage.nsamples, seqlen)
        else:
            count = max(4, int(stage.nsamples * VALIDATION))
            windows, validation, source = two_parts(planning.texts, data, stage.nsamples, count, seqlen)
        return ActivationPlan(index, stage, windows=windows, calibration=source, validation=validation)

    def needs(self, plan: Plan, stage: ActivationPlan) -> Needs:
        """Hidden states up to the limit, one block with its float32 copy and the sample of its inputs."""
        dtype = _dtype(plan)
        states = hidden_bytes(plan, stage, dtype, HIDDEN_COPIES)
        block = block_bytes(plan, dtype.itemsize)
        return Needs(Peak(3 * block + held(plan, states), "one decoder block and its inputs"), states)

    def run(self, context: Context, stage: ActivationPlan) -> StageReport:
        """Calibrate, write the file, report."""
        return _Run(context, stage).run()


class _Run:
    def __init__(self, context: Context, plan: ActivationPlan) -> None:
        self.context, self.plan, self.stage = context, plan, plan.stage
        self.model = context.open(context.written(), _dtype(context.plan), untie=context.untied)
        self.memory = context.plan.machine.max_memory_bytes
        size = sum(p.size for i in range(self.model.num_blocks) for p in self.model.prunables(i))
        self.resident = size * self.model.dtype.itemsize < RESIDENT * self.memory
        self.folder = context.state_folder(plan)
        self.walk: Walk | None = None

    def run(self) -> StageReport:
        started = time.monotonic()
        found: Found | None = None
        if self.stage.target_ppl_increase is not None:
            found = self._by_perplexity(self.stage.target_ppl_increase)
            policy = found.policy
        else:
            policy = self._policy(self._goal())
        path = self.context.attachment(self.plan, FILE.rpartition("/")[2])
        entry = distributed.on_main(lambda: write_policy(path, policy))
        result = summary(policy)
        self._tell(result)
        if found is not None:
            result["validation"] = {
                "target": self.stage.target_ppl_increase, "increase": found.increase, "standard_error": found.error,
                "windows": 0 if self.plan.validation is None else len(self.plan.validation),
            }  # fmt: skip
        files = [str(path.relative_to(self.context.work))]
        seconds = time.monotonic() - started
        return StageReport("activation", self.plan.index, seconds, result, entry=entry, files=files)

    def _tell(self, result: dict[str, Any]) -> None:
        """What the figures of a later stage leave out."""
        if "note" in result and any(stage.stage.stage == "evaluate" for stage in self.context.plan.stages):
            self.context.progress.note(result["note"])

    def _goal(self) -> float:
        if self.stage.goal is not None:
            return self.stage.goal
        calibration = self._calibration(self._method(0))
        if self.stage.keep is not None:
            return (1 - self.stage.keep) * self._reachable(calibration)
        return float(distributed.on_main(lambda: self._measured_goal(calibration)))

    def _measured_goal(self, calibration: Calibration) -> float:
        """By times on this machine. A resumed run goes on with what was measured first, and with its parts."""
        assert self.stage.target_speedup is not None
        unit = f"{self.plan.name}/speedup"
        done = self.context.journal.done(unit)
        if done is not None:
            return float(done["sparsity"])
        dtype = runtime_dtype(self.model.config.dtype)
        found = [calibration.found[index] for index in range(self.model.num_blocks)]
        counts = products(self.model, found, self.context.written(), self.stage.method, dtype)
        goal = sparsity_for(
            counts, partial(measured, dtype=dtype), self._reachable(calibration), self.stage.target_speedup,
            self.context.progress.note, calibration.method.watched,
        )  # fmt: skip
        self.context.journal.finish(unit, {"sparsity": goal})
        return goal

    def _policy(self, goal: float) -> Policy:
        """The policy that skips `goal` of all weights. RecipeError when looks at drift leave too few tokens for it."""
        unit = f"{self.plan.name}/goal-{hashlib.sha256(repr(goal).encode()).hexdigest()[:8]}"
        shapes = {p.name: p.shape for i in range(self.model.num_blocks) for p in self.model.prunables(i)}
        calibration = self._calibration(self._method(self.context.plan.recipe.seed))
        calibration.parts = StoredParts(self.context, self.folder, unit, shapes)
        whole = calibration.method.watched
        if not whole:
            return calibration.run(goal)
        highest = self._reachable(calibration)
        if goal > highest + 1e-9:
            raise RecipeError(
                f"with refresh {self.stage.refresh}, {whole:.0%} of the tokens compute all neurons: {self.stage.method}"
                f" can skip at most {highest:.1%} of this model's linear weights, asked for is {goal:.1%}",
                hint=f"ask for at most {int(highest * 1000) / 1000}, or leave refresh out",
            )
        return with_watched(calibration.run(goal / (1 - whole)), whole)

    def _method(self, seed: int) -> Method:
        return make_method(self.stage, seed, self.model.num_blocks)

    def _reachable(self, calibration: Calibration) -> float:
        """The highest sparsity, over tokens that skip and those that are computed whole."""
        return calibration.reachable * (1 - calibration.method.watched)

    def _calibration(self, method: Method) -> Calibration:
        assert self.plan.windows is not None
        calibration = Calibration(
            self.model, self.plan.windows, method,
            memory_bytes=self.memory // 2, scratch=self.context.scratch, keep=self.folder,
            progress=self.context.progress, usable=usable(self.model, self.plan.windows), prompt=self.stage.prompt,
            resident=self.resident, name=self.plan.calibration.dataset if self.plan.calibration else "the text",
            walk=self.walk,
        )  # fmt: skip
        self.walk = calibration.walk
        return calibration

    def _by_perplexity(self, limit: float) -> Found:
        assert self.plan.validation is not None
        folder = self.context.scratch / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        highest = self._reachable(self._calibration(self._method(0)))
        assert self.walk is not None
        walk = Walk(
            self.model, self.plan.validation, memory_bytes=self.memory // 4, scratch=folder,
            prompt=self.stage.prompt, resident=self.resident,
        )  # fmt: skip
        walk.share_blocks(self.walk)
        dense = walk.run(None).losses
        return highest_sparsity(
            self._policy,
            lambda policy: increase(walk.run(policy, reads=False).losses, dense),
            limit,
            highest,
            self.context.progress.note,
        )


def _dtype(plan: Plan) -> torch.dtype:
    return calibration_dtype(plan.machine, plan.skeleton.dtype, plan.device)


def usable(model: Any, windows: Tensor) -> Tensor:
    """bool like `windows`: tokens that are no padding. A pad token that ends texts, too, is not one."""
    config = model.config.get_text_config()
    pad, end = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    ends = end if isinstance(end, (list, tuple)) else [end]
    if pad is None or pad in ends:
        return torch.ones_like(windows, dtype=torch.bool)
    return windows != pad


def summary(policy: Policy) -> dict[str, Any]:
    """What the report says of a policy."""
    facts = policy.facts
    found = {
        "method": policy.method,
        "target": facts.get("target"),
        "sparsity": facts.get("calibrated"),
        "prompt": facts.get("prompt"),
        "windows": facts.get("windows"),
        "matrices": facts.get("matrices"),
        "residual_ranks": {name: entry.rank for name, entry in policy.linears.items() if entry.rank},
        "vectors": sum(t.numel() for e in policy.linears.values() for t in e.tensors().values()),
    }
    if "watched" in facts:
        found |= {"watched": facts["watched"], "note": NOT_SIMULATED}
    return found
