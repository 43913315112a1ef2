"""Weights that are no numbers any more are never saved, and the last checkpoint that is good is named."""

from __future__ import annotations

import pytest
import torch
from small import llama, rows
from transformers import TrainerCallback

from gossamer.errors import TrainingError
from gossamer.finetune.training import TrainingConfig, train


class Spoil(TrainerCallback):
    """A weight becomes NaN in step `step`, when its loss was finite."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, model=None, **more):
        if state.global_step == self.step:
            with torch.no_grad():
                model.get_parameter("model.norm.weight")[0] = float("nan")


@pytest.mark.parametrize(
    ("step", "kept"), [(1, "no checkpoint was saved before"), (2, "the last good checkpoint is checkpoint-1")]
)
def test_weights_that_are_not_finite(tmp_path, step, kept):
    config = TrainingConfig(folder=tmp_path, steps=4, batch=4, save_every=1, callbacks=(Spoil(step),))
    with pytest.raises(TrainingError, match=rf"model\.norm\.weight is not finite after step {step}; {kept}"):
        train(llama(), config, {}, data=rows())
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{step - 1}"] * (step - 1)
