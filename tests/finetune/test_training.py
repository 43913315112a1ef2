"""The training path: zeros through 200 steps, resume to the last bit, exact accumulation, loud failures."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from small import llama, masks_of, rows, zeros_of
from transformers import TrainerCallback

from gossamer.errors import CheckpointError, RecipeError, TrainingError
from gossamer.finetune import trainer as trainer_module
from gossamer.finetune.losses import LossConfig
from gossamer.finetune.masked import MaskGuard
from gossamer.finetune.training import TrainingConfig, retrain_on, train

RECIPES = {
    "sgd with momentum": {"optimizer": "sgd", "learning_rate": 0.1},
    "adamw": {},
    "adamw with decay": {"weight_decay": 0.3},
    "accumulation": {"accumulation": 2},
    "clipping": {"clip": 0.05},
    "bfloat16": {"precision": "bfloat16"},
    "checkpointing": {"gradient_checkpointing": True},
    "8 bit": {"optimizer": "adamw-8bit"},
}


class Watch(TrainerCallback):
    """Zeros of every tenth part of the steps, and the optimizer's state at the end."""

    def __init__(self, masks):
        self.masks, self.zeros, self.state = masks, [], {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **more):
        if state.global_step % (args.max_steps // 10) == 0:
            self.zeros.append(zeros_of(model, self.masks))
        if state.global_step == args.max_steps:
            for name, mask in self.masks.items():
                held = optimizer.state[model.get_parameter(name)]
                self.state[name] = [
                    v
                    for v in held.values()
                    if isinstance(v, torch.Tensor) and v.shape == mask.shape and v.dtype.is_floating_point
                ]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(o, id=n, marks=pytest.mark.slow if n in ("adamw", "checkpointing") else [])
        for n, o in RECIPES.items()
    ],
)
def test_zeros_stay_through_200_steps(tmp_path, options):
    model = llama()
    masks = masks_of(model)
    watch = Watch(masks)
    config = TrainingConfig(folder=tmp_path, steps=200, batch=4, learning_rate=1e-2, log_every=10, callbacks=(watch,))
    metrics = train(model, replace(config, **options), masks, data=rows())
    expected = sum(int((~mask).sum()) for mask in masks.values())
    assert watch.zeros == [expected] * 10
    for name, mask in masks.items():
        kept = model.get_parameter(name).detach()[mask]
        assert (kept != 0).all(), name
        assert watch.state[name] or "8bit" in str(options), name
        for value in watch.state[name]:
            assert not value[~mask].any(), name
    assert metrics.loss < 0.7 * metrics.history[0]["loss"] or options.get("clip") or "8bit" in str(options)
    assert metrics.sparsity == pytest.approx(expected / sum(mask.numel() for mask in masks.values()))
    assert not model.training
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters() if p._post_accumulate_grad_hooks)


@pytest.mark.parametrize("broken", ["attach", "watch"])
def test_without_its_hooks_a_save_fails(tmp_path, monkeypatch, broken):
    """Without the hook after the step masked gradients still protect a fresh optimizer; without both the save fails."""
    monkeypatch.setattr(MaskGuard, "watch", lambda self, optimizer: None)
    if broken == "attach":
        monkeypatch.setattr(MaskGuard, "attach", lambda self: None)
    model = llama()
    config = TrainingConfig(folder=tmp_path, steps=4, batch=4, save_every=2)
    if broken == "watch":  # gradients are masked, there is no earlier momentum: nothing revives a weight
        train(model, config, masks_of(model), data=rows())
        return
    with pytest.raises(TrainingError, match="are no longer zero"):
        train(model, config, masks_of(model), data=rows())
    assert not list(tmp_path.glob("checkpoint-*"))


def test_accumulation_and_the_size_of_micro_batches_change_only_rounding(tmp_path):
    """Rows with different numbers of labels: a mean of means would differ."""
    found = []
    for accumulation in (1, 2, 8):
        model = llama()
        config = TrainingConfig(
            folder=tmp_path / str(accumulation), steps=10, batch=8, accumulation=accumulation, learning_rate=1e-2
        )
        train(model, config, masks_of(model), data=rows(labelled=False))
        found.append(model)
    for other in found[1:]:
        for name, parameter in found[0].named_parameters():
            torch.testing.assert_close(other.get_parameter(name), parameter, rtol=1e-3, atol=2e-5)


def test_one_step_by_hand(tmp_path):
    """SGD's first step without clipping: W - lr * M . dL/dW, with the loss per predicted token of the whole step."""
    model, reference = llama(), llama()
    masks = masks_of(model)
    data = rows(4, labelled=False)
    with torch.no_grad():
        for name, mask in masks.items():
            reference.get_parameter(name).mul_(mask)
    logits = reference(data.ids).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), data.labels[:, 1:].flatten()).backward()
    config = TrainingConfig(
        folder=tmp_path, steps=1, batch=4, accumulation=2, optimizer="sgd", learning_rate=0.5, clip=None, warmup=0.0
    )
    train(model, config, masks, data=data)
    for name, parameter in reference.named_parameters():
        grad = parameter.grad * masks[name] if name in masks else parameter.grad
        torch.testing.assert_close(model.get_parameter(name), parameter - 0.5 * grad, rtol=1e-4, atol=1e-6)


class Stop(TrainerCallback):
    """Ends the run after a step the hard way, as a kill would, but for the process."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **more):
        if state.global_step == self.step:
            raise RuntimeError("killed")


@pytest.mark.parametrize(
    "options", [{}, {"optimizer": "sgd", "accumulation": 2}, {"schedule": "clr", "weight_decay": 0.1}]
)
def test_a_resumed_run_is_equal_to_the_last_bit(tmp_path, options):
    config = TrainingConfig(folder=tmp_path / "whole", steps=12, batch=4, log_every=2, learning_rate=1e-2, **options)
    whole = llama()
    expected = train(whole, config, masks_of(whole), data=rows())
    cut = replace(config, folder=tmp_path / "cut", save_every=5, resume=True)
    first = llama()
    with pytest.raises(RuntimeError, match="killed"):
        train(first, replace(cut, callbacks=(Stop(8),)), masks_of(first), data=rows())
    again = llama()
    metrics = train(again, cut, masks_of(again), data=rows())
    assert metrics.resumed_from == 5
    for name, parameter in whole.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    figures = [[(line["step"], line["lr"]) for line in m.history] for m in (expected, metrics)]
    assert figures[0] == figures[1]
    written = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [2, 4, 6, 8, 10, 12]


def test_a_finished_run_is_not_trained_again(tmp_path):
    config = TrainingConfig(folder=tmp_path, steps=4, batch=4, save_every=10, resume=True)
    model, again = llama(), llama()
    train(model, config, masks_of(model), data=rows())
    metrics = train(again, config, masks_of(again), data=rows())
    assert (metrics.steps, metrics.resumed_from) == (4, 4)
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_the_newest_complete_checkpoint_counts(tmp_path):
    """One whose state file is missing or cut off was not written to its end."""
    config = TrainingConfig(folder=tmp_path, steps=6, batch=4, save_every=3)
    model = llama()
    train(model, config, masks_of(model), data=rows())
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-8" / "trainer_state.json").write_text('{"global_step": 8')
    assert trainer_module.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    (tmp_path / "checkpoint-6" / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(llama(), replace(config, steps=8, resume=True), {}, data=rows())


def test_a_loss_that_is_no_number_stops_before_the_step(tmp_path):
    """The weights of the last good step stay, and its checkpoint is named."""

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **more):
            if state.global_step == 3:
                self.before = model.model.embed_tokens.weight.detach().clone()
                self.at = model.model.norm.weight
                self.at.data[0] = float("inf")

    poison = Poison()
    model = llama()
    config = TrainingConfig(folder=tmp_path, steps=6, batch=4, save_every=2, callbacks=(poison,))
    with pytest.raises(TrainingError, match="not finite at step 4; the last good checkpoint is checkpoint-2"):
        train(model, config, masks_of(model), data=rows())
    assert torch.equal(model.model.embed_tokens.weight, poison.before)
    assert (tmp_path / "checkpoint-2").is_dir()


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    class Poison(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **more):
            if state.global_step == 2:
                model.model.norm.weight.data[0] = float("nan")

    model = llama()
    config = TrainingConfig(folder=tmp_path, steps=3, batch=4, save_every=3, callbacks=(Poison(),))
    with pytest.raises(TrainingError, match=r"model\.norm\.weight is not finite after step 3"):
        train(model, config, masks_of(model), data=rows())


def test_an_interruption_saves_and_a_resumed_run_ends_equal(tmp_path):
    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **more):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    config = TrainingConfig(folder=tmp_path, steps=8, batch=4, log_every=2)
    whole = llama()
    train(whole, replace(config, folder=tmp_path / "whole"), masks_of(whole), data=rows())
    model = llama()
    with pytest.raises(KeyboardInterrupt):
        train(model, replace(config, callbacks=(Press(),)), masks_of(model), data=rows())
    assert signal.getsignal(signal.SIGINT) is handler
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    again = llama()
    train(again, replace(config, resume=True), masks_of(again), data=rows())
    for name, parameter in whole.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_distillation_pulls_towards_the_dense_model(tmp_path):
    dense, model = llama(), llama()
    train(dense, TrainingConfig(folder=tmp_path / "dense", steps=60, batch=4, learning_rate=1e-2), {}, data=rows())
    before = {name: p.detach().clone() for name, p in dense.named_parameters()}
    model.load_state_dict(dense.state_dict())
    masks = masks_of(model, 0.7)
    config = TrainingConfig(
        folder=tmp_path / "sparse", steps=60, batch=4, learning_rate=1e-2, loss=LossConfig("distill", hidden=0.1)
    )
    metrics = retrain_on(rows(), teacher=dense)(model, config, masks)
    assert metrics.history[-1]["loss"] < 0.5 * metrics.history[0]["loss"]
    for name, parameter in dense.named_parameters():
        assert torch.equal(parameter, before[name])


def test_masks_come_with_the_model_unless_given(tmp_path):
    model = llama()
    model.gossamer_masks = masks_of(model)
    config = TrainingConfig(folder=tmp_path, tokens=100, batch=2)
    metrics = train(model, config, data=rows())
    assert metrics.steps == 5  # 100 tokens in steps of 2 x 12
    assert zeros_of(model, model.gossamer_masks) == sum(int((~m).sum()) for m in model.gossamer_masks.values())
    train(model, replace(config, folder=tmp_path / "dense"), {}, data=rows())
    assert sum(int((model.get_parameter(name) == 0).sum()) for name in model.gossamer_masks) < 10


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"steps": 1, "tokens": 1}, RecipeError, "one of the two"),
        ({}, RecipeError, "one of the two"),
        ({"steps": 0}, RecipeError, "at least 1"),
        ({"steps": 1, "precision": "fp8"}, RecipeError, "'fp8' is unknown"),
        ({"steps": 1, "learning_rate": 0.0}, RecipeError, "must be positive"),
        ({"steps": 1, "schedule": "step"}, RecipeError, "'step' is unknown"),
        ({"steps": 1, "optimizer": "lion"}, RecipeError, "'lion' is unknown"),
        ({"steps": 1, "batch": 3, "accumulation": 2}, TrainingError, "no multiple of 1 processes x 2"),
    ],
)
def test_settings_that_cannot_be(tmp_path, options, error, match):
    with pytest.raises(error, match=match):
        train(llama(), TrainingConfig(folder=tmp_path, **options), {}, data=rows())


@pytest.mark.parametrize(
    ("environment", "match"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed ZeRO is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, "needs FSDP version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "needs FSDP version 2"),
    ],
)
def test_what_partitions_behind_our_back_is_refused(tmp_path, monkeypatch, environment, match):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=match):
        train(llama(), TrainingConfig(folder=tmp_path, steps=1), {}, data=rows())


def test_nothing_to_train(tmp_path):
    model = llama().requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing to train"):
        train(model, TrainingConfig(folder=tmp_path, steps=1), {}, data=rows())
