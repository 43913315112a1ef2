"""DST in the Trainer: the budget holds, masks move to where the gradient is, killed runs go on exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import llama, rows
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from gossamer.errors import RecipeError
from gossamer.finetune.drop_grow import move, share_at
from gossamer.finetune.dst import BUFFER, Dst
from gossamer.finetune.tokens import Sequence
from gossamer.finetune.training import TrainingConfig, train
from gossamer.pruning.pattern import NM, Unstructured

STEPS = 12
OPTIONS = {"every": 3, "drop": 0.4, "stop": 0.75}


def masked(model: Any, pattern: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Magnitude masks, laid on; `model.gossamer_masks` says what they promise."""
    found = {}
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and name.split(".")[-2] in names:
            rows_of = parameter.detach().t() if "c_" in name else parameter.detach()
            keep = pattern.mask(rows_of.abs())
            found[name] = keep.t().contiguous() if "c_" in name else keep
            parameter.data.mul_(found[name])
    model.gossamer_masks = {name: SimpleNamespace(pattern=str(pattern)) for name in found}
    return found


class Watch(TrainerCallback):
    """Counts the zeros of the model after every step; kills the run before step `kill`."""

    def __init__(self, names: list[str], kill: int | None) -> None:
        self.names, self.kill = names, kill
        self.zeros: list[list[int]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == self.kill:
            raise RuntimeError("killed")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        self.zeros.append([int((model.get_parameter(name) == 0).sum()) for name in self.names])


def run(folder: Path, pattern: Any, *, kill: int | None = None, **changes: Any) -> Any:
    model = llama()
    masks = masked(model, pattern, ("q_proj", "up_proj", "down_proj"))
    attached = Dst().attach(model, masks, list(masks), OPTIONS, 0)
    watch = Watch(list(masks), kill)
    settings = {"steps": STEPS, "learning_rate": 2e-2, "batch": 4, "weight_decay": 0.1, "save_every": 5, "log_every": 1}
    config = TrainingConfig(folder=folder, callbacks=(*attached.callbacks, watch), **(settings | changes))
    metrics = train(model, config, attached.masks, data=rows())
    figures = attached.finish()
    assert attached.kept is not None
    return SimpleNamespace(
        model=model, before=masks, masks=dict(attached.kept()), zeros=watch.zeros, metrics=metrics, figures=figures
    )


@pytest.mark.parametrize("pattern", [Unstructured(0.75, "matrix"), NM(1, 4)])
def test_the_budget_holds_at_every_step(tmp_path, pattern):
    done = run(tmp_path, pattern)
    budget = [int((~mask).sum()) for mask in done.before.values()]
    for step, zeros in enumerate(done.zeros, 1):
        # more than the budget: grown a moment ago, and not trained yet
        assert all(b <= z <= b * 1.2 for z, b in zip(zeros, budget, strict=True)), step
    for name, mask in done.masks.items():
        weight = done.model.get_parameter(name)
        assert bool((weight[~mask] == 0).all()), name
        assert int((weight[mask] == 0).sum()) <= 2, name  # grown, and never given a gradient since
        assert int(mask.sum()) == int(done.before[name].sum())
        if isinstance(pattern, NM):
            assert (mask.view(len(mask), -1, 4).sum(-1) == 1).all()
    assert done.figures["moving"] == len(done.masks)
    assert done.figures["moved"] == sum(int((done.masks[n] & ~done.before[n]).sum()) for n in done.masks) > 0
    assert not any(BUFFER in name for name in done.model.state_dict())
    churn = {line["step"]: line["churn"] for line in done.metrics.history}
    assert churn[3] == pytest.approx(share_at(3, 9, 0.4), abs=0.01)
    assert [step for step, value in churn.items() if value] == [3, 6]  # 9 is where it stops


def test_a_move_follows_the_whole_gradient(tmp_path):
    """One step of plain SGD: the mask afterwards is `move` of the weights after it and the gradient of before."""
    first = llama()
    masks = masked(first, Unstructured(0.5, "matrix"), ("up_proj",))
    data = rows()
    config = TrainingConfig(
        folder=tmp_path, steps=2, learning_rate=1e-3, batch=4, accumulation=2, optimizer="sgd", momentum=0.0,
        schedule="ft", warmup=0.0, clip=None,
    )  # fmt: skip
    attached = Dst().attach(first, masks, list(masks), {"every": 1, "drop": 0.4, "stop": 1.0}, 0)
    seen: dict[str, Tensor] = {}

    class Gradient(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
            if state.global_step == 0:
                self.start = {name: p.detach().clone() for name, p in model.named_parameters()}

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
            if state.global_step == 1:
                seen.update({name: mask.clone() for name, mask in attached.masks.items()})
                seen["after"] = model.get_parameter(next(iter(masks))).detach().clone()

    watch = Gradient()
    train(first, replace(config, callbacks=(*attached.callbacks, watch)), attached.masks, data=data)
    other = llama()
    other.load_state_dict(watch.start)
    order = Sequence(data, 8, 0)
    batch = torch.stack([order[i]["input_ids"] for i in range(4)])
    logits = other(batch).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1)).backward()
    for name, mask in masks.items():
        weight = watch.start[name]
        gradient = other.get_parameter(name).grad
        stepped = torch.where(mask, weight - 1e-3 * gradient, weight)
        assert torch.equal(seen[name], move(stepped, gradient, mask, share_at(1, 2, 0.4)))


def test_a_killed_run_goes_on_exactly(tmp_path):
    whole = run(tmp_path / "whole", Unstructured(0.75, "matrix"))
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "half", Unstructured(0.75, "matrix"), kill=8)  # saved at 5, after the move at 3
    again = run(tmp_path / "half", Unstructured(0.75, "matrix"), resume=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert all(torch.equal(whole.masks[name], again.masks[name]) for name in whole.masks)
    assert whole.figures == again.figures


def test_transposed_matrices_move_in_groups_of_inputs(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    masks = masked(model, NM(1, 4), ("c_fc", "c_attn"))
    attached = Dst().attach(model, masks, list(masks), {"every": 1, "drop": 0.5, "stop": 1.0}, 0)
    config = TrainingConfig(folder=tmp_path, steps=4, batch=2, callbacks=attached.callbacks)
    train(model, config, attached.masks, data=rows())
    attached.finish()
    for name, mask in attached.masks.items():
        assert (mask.t().reshape(mask.shape[1], -1, 4).sum(-1) == 1).all(), name
        assert not torch.equal(mask, masks[name])
        assert bool((model.get_parameter(name)[~mask] == 0).all())


def test_a_dense_model_has_nothing_to_move():
    with pytest.raises(RecipeError, match="no linear layer of the model has one"):
        Dst().attach(llama(), {}, ["model.layers.0.mlp.up_proj.weight"], OPTIONS, 0)
