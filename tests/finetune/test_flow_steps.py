"""N:M flow inside the Trainer: the global step drives it, a killed run goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from gossamer.errors import TrainingError
from gossamer.finetune.flow_steps import FlowSteps
from gossamer.finetune.tokens import TokenRows
from gossamer.finetune.training import TrainingConfig, train
from gossamer.pruning.flow import Flow, FlowMatrix, FlowOptions
from gossamer.pruning.pattern import NM

STEPS = 10
ROWS = TokenRows(torch.randint(0, 40, (24, 12), generator=torch.Generator().manual_seed(3)))


def model() -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def flowing(net: Any, kind: str, steps: int = STEPS) -> Flow:
    matrices = {
        f"{name}.weight": FlowMatrix(module, NM(1, 4) if "mlp" in name else NM(2, 4))
        for name, module in net.named_modules()
        if name.rpartition(".")[2] in ("q_proj", "o_proj", "up_proj", "down_proj")
    }
    return Flow(matrices, FlowOptions(kind, steps, tail=0.2, shrink=0.3))


class Stop(TrainerCallback):
    """Ends the run as a kill would, before the step that follows `after`."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == self.after:
            raise RuntimeError("killed")


def run(folder: Path, kind: str, *, kill: int | None = None, **changes: Any) -> tuple[dict[str, Tensor], list, Any]:
    net = model()
    flow = flowing(net, kind)
    callbacks = (FlowSteps(flow),) if kill is None else (FlowSteps(flow), Stop(kill))
    config = TrainingConfig(
        folder=folder, steps=STEPS, learning_rate=2e-2, batch=4, accumulation=2, weight_decay=0.1, save_every=3,
        log_every=1, callbacks=callbacks, **changes,
    )  # fmt: skip
    metrics = train(net, config, {}, data=ROWS)
    masks = flow.finish()
    return net.state_dict(), list(metrics.history), masks


@pytest.mark.parametrize(
    "kind", ["mdgf-exp", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sdgf-stepwise", "sr-ste"))]
)
def test_a_killed_run_goes_on_exactly(tmp_path: Path, kind: str) -> None:
    whole, history, masks = run(tmp_path / "whole", kind)
    for kill in (5, 9):  # the checkpoints are of steps 3 and 9; the mask freezes at 8
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path / f"half-{kill}", kind, kill=kill)
        again, rest, others = run(tmp_path / f"half-{kill}", kind, resume=True)
        assert {name: mask.sha256() for name, mask in masks.items()} == {n: m.sha256() for n, m in others.items()}
        for name, tensor in whole.items():
            assert torch.equal(tensor, again[name]), name
        drop = ("tokens_per_s",)
        assert [{k: v for k, v in line.items() if k not in drop} for line in rest] == [
            {k: v for k, v in line.items() if k not in drop} for line in history
        ]


def test_the_log_tells_flips_beta_and_sparsity(tmp_path: Path) -> None:
    state, history, masks = run(tmp_path, "mdgf-linear")
    assert [line["beta"] for line in history] == pytest.approx([0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0, 0, 0])
    assert all(0 <= line["flips"] < 0.5 for line in history)
    assert any(line["flips"] > 0 for line in history[:7])
    assert history[-1]["flips"] == 0
    zeros, entries = sum(mask.zeros for mask in masks.values()), sum(state[name].numel() for name in masks)
    assert history[-1]["sparsity"] == pytest.approx(zeros / entries)
    for name, mask in masks.items():
        group = state[name].view(len(state[name]), -1, 4)
        assert ((group != 0).sum(-1) <= (1 if "mlp" in name else 2)).all()
        assert torch.equal(state[name] != 0, mask.to_bool() & (state[name] != 0))
    assert set(state) == set(model().state_dict())


def test_another_length_does_not_go_on(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, "ste", kill=4)
    net = model()
    config = TrainingConfig(
        folder=tmp_path, steps=STEPS, batch=4, resume=True, callbacks=(FlowSteps(flowing(net, "ste", 12)),)
    )
    with pytest.raises(TrainingError, match="saved schedule has 10 steps, this one 12"):
        train(net, config, {}, data=ROWS)
