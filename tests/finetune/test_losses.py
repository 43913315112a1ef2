"""Losses against formulas written out, and the sums that make accumulation exact."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gossamer.errors import RecipeError, TrainingError
from gossamer.finetune.losses import (
    IGNORED,
    LossConfig,
    distillation_loss,
    hidden_loss,
    lm_loss,
    loss_sum,
    row_losses,
)
from gossamer.finetune.tokens import TokenRows


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, dense = (torch.randn(3, 5, 11, generator=generator) for _ in range(2))
    labels = torch.randint(0, 11, (3, 5), generator=generator)
    labels[0, 2] = labels[2, 1:4] = labels[1, 0] = IGNORED
    return logits, dense, labels


def predicting(labels: torch.Tensor) -> list[tuple[int, int]]:
    return [(b, t) for b in range(3) for t in range(4) if labels[b, t + 1] != IGNORED]


def test_language_model_loss_is_a_sum_over_labelled_tokens():
    logits, _, labels = example()
    expected = sum(-torch.log_softmax(logits[b, t], 0)[labels[b, t + 1]] for b, t in predicting(labels))
    assert len(predicting(labels)) == 8
    torch.testing.assert_close(lm_loss(logits, labels), expected)
    torch.testing.assert_close(lm_loss(logits[:1], labels[:1]) + lm_loss(logits[1:], labels[1:]), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_the_divergence_from_the_dense_model(temperature):
    logits, dense, labels = example()
    expected = torch.zeros(())
    for b, t in predicting(labels):
        p, q = torch.softmax(dense[b, t] / temperature, 0), torch.softmax(logits[b, t] / temperature, 0)
        expected += temperature**2 * (p * (p / q).log()).sum()
    torch.testing.assert_close(distillation_loss(logits, dense, labels, temperature), expected)
    assert distillation_loss(dense, dense, labels, temperature).item() == pytest.approx(0, abs=1e-5)


def test_hidden_states_are_compared_layer_by_layer_without_the_embedding():
    _, _, labels = example()
    ours, theirs = (tuple(torch.randn(3, 5, 4) for _ in range(3)) for _ in range(2))
    expected = 0.0
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        expected += sum(((a[i] - b[i]) ** 2).sum() / (b[i] ** 2).sum() for i in predicting(labels)) / 2
    torch.testing.assert_close(hidden_loss(ours, theirs, labels), expected)


def test_mix_and_hidden_add_up():
    logits, dense, labels = example()
    states, others = (tuple(torch.randn(3, 5, 4) for _ in range(2)) for _ in range(2))

    def model(**_):
        return SimpleNamespace(logits=logits, hidden_states=states)

    def teacher(**_):
        return SimpleNamespace(logits=dense, hidden_states=others)

    found = loss_sum(LossConfig("mix", 2.0, 0.25, 0.5), model, teacher, {}, labels)
    expected = (
        0.25 * distillation_loss(logits, dense, labels, 2.0)
        + 0.75 * lm_loss(logits, labels)
        + 0.5 * hidden_loss(states, others, labels)
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(loss_sum(LossConfig(), model, None, {}, labels), lm_loss(logits, labels))
    with pytest.raises(TrainingError, match="none was given"):
        loss_sum(LossConfig("distill"), model, None, {}, labels)


def test_bad_numbers():
    with pytest.raises(RecipeError, match="loss 'kd' is unknown"):
        LossConfig("kd")
    with pytest.raises(RecipeError, match="temperature > 0"):
        LossConfig("distill", temperature=0)
    with pytest.raises(RecipeError, match="share in"):
        LossConfig("mix", share=1.5)


def test_loss_of_every_row_does_not_depend_on_the_batch():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(11, 11)

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=self.table(input_ids))

    model = Model()
    _, _, labels = example()
    rows = TokenRows(torch.randint(0, 11, (3, 5)), labels)
    found = row_losses(model, rows, batch=2)
    for row in range(3):
        own = TokenRows(rows.ids[row : row + 1], labels[row : row + 1])
        expected = lm_loss(model.table(own.ids), labels[row : row + 1]) / max(1, own.predicted)
        torch.testing.assert_close(found[row], expected.detach())
    assert model.training
