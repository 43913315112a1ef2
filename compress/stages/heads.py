"""The heads stage: a head plan for the weights as they are written, as an entry of the checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...attention.plan import HeadPlan, HeadRule
from ...attention.rivals import duo, read_duo, read_moa
from ...errors import RecipeError
from .. import distributed
from ..headplans.candidates import needs_profile, streaming_rule
from ..headplans.facts import head_facts
from ..headplans.make import make_plan
from ..headplans.settings import Settings, check_density, settle
from ..headplans.texts import HeadTexts, head_texts
from ..needs import Needs, whole_needs
from ..plan import Plan, Planning, StagePlan, evaluation_dtype
from ..recipe import DEFAULT_CALIBRATION
from ..stage_recipes.heads import HeadsStage
from ..text import load_tokenizer
from ..whole import open_whole
from .base import Context, StageReport


@dataclass(frozen=True)
class HeadsPlan(StagePlan):
    """A heads stage: what is planned for, and the sequences it is planned on."""

    stage: HeadsStage
    settings: Settings = field(kw_only=True)
    texts: HeadTexts = field(kw_only=True)

    @property
    def digest(self) -> str:
        return f"{self.texts.calibration.digest} {self.texts.validated.digest}"


class Heads:
    """Influence, candidate plans, and the choice among them on held-out text."""

    def plan(self, index: int, stage: HeadsStage, planning: Planning) -> HeadsPlan:
        """Shapes, imported plans and texts. GossamerError for whatever does not fit."""
        if distributed.world() > 1:
            raise RecipeError(
                f"head plans are made in one process, and {distributed.world()} were started",
                hint="run the same command without a launcher",
            )
        settings = settle(stage, head_facts(planning.skeleton.config, planning.skeleton.attention_is_replaceable))
        settings = _with_file(settings)
        if settings.imported is None:
            check_density(settings, _cheapest(settings))
        texts = head_texts(
            planning.texts, stage.calibration or DEFAULT_CALIBRATION, stage.validation, settings.lengths,
            settings.validation, stage.nsamples, stage.validation_samples, planning.recipe.seed,
        )  # fmt: skip
        return HeadsPlan(index, stage, settings=settings, texts=texts)

    def needs(self, plan: Plan, stage: HeadsPlan) -> Needs:
        return whole_needs(plan, stage, trained=0.0, tokens=stage.settings.validation)

    def run(self, context: Context, stage: HeadsPlan) -> StageReport:
        """Plan on the model as it stands, and say so in config.json under "heads"."""
        started = time.monotonic()
        model = open_whole(context, dtype=evaluation_dtype(context.plan.machine)).eval()
        tokenizer = load_tokenizer(context.plan.source.folder)
        made = make_plan(
            model, tokenizer, stage.settings, stage.texts,
            seed=context.plan.recipe.seed, progress=context.progress, cache=context.state_folder(stage),
        )  # fmt: skip
        entry = made.plan.to_json()
        result = {
            "plan": {key: entry[key] for key in ("model_type", "block", "lengths", "density", "made")},
            "layers_density": layer_densities(made.plan),
            "candidates": made.judged,
            "chosen": made.chosen,
            "profiled": needs_profile(stage.settings),
        }
        return StageReport("heads", stage.index, time.monotonic() - started, result, entry=entry)


def layer_densities(plan: HeadPlan) -> list[dict[str, float]]:
    """Per layer, the share of keys kept at every length."""
    return [
        {str(n): sum(r.kept(n, plan.block) for r in layer) / (plan.kv_heads * n) for n in plan.lengths}
        for layer in plan.heads
    ]


def _cheapest(settings: Settings) -> list[HeadRule]:
    """Rules among which is the cheapest that the method may give a head."""
    if settings.stage.method == "duo":
        return [streaming_rule(settings)]
    if settings.stage.method == "uniform":
        return [HeadRule(0, 0, 0.0)]  # its sinks are lowered until they fit
    return settings.rules


def _with_file(settings: Settings) -> Settings:
    """The settings with the rules of the stage's plan file, if it has one."""
    stage, facts = settings.stage, settings.facts
    if stage.plan_file is None:
        return settings
    path = Path(stage.plan_file).expanduser()
    if stage.method == "moa":
        rules = read_moa(path, facts.layers, facts.query_heads, facts.kv_heads, settings.lengths, settings.sink)
    else:
        gates, (sink, recent) = read_duo(path, facts.layers, facts.kv_heads)
        rule = HeadRule(sink, sink + recent, 0.0)
        rules = duo(gates, stage.density, settings.lengths, settings.least, rule, path.name)
    return replace(settings, imported=rules)
