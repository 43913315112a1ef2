"""Packed examples: which models keep them apart, and rows for those that do not."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gossamer.compress.instructions import Example
from gossamer.compress.traindata import pack
from gossamer.finetune.losses import IGNORED, row_losses
from gossamer.finetune.packing import apart, one_per_row, sees_neighbours
from gossamer.finetune.tokens import TokenRows

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": (SMALL | {"intermediate_size": 64}, False),
    "gpt2": ({"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, False),
    "gpt_neox": (SMALL | {"intermediate_size": 64}, False),
    "opt": (SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32}, True),
    "bloom": (SMALL, True),
    "falcon": (SMALL, True),
    "mpt": ({"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4}, True),
    "mamba": ({"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}, True),
}


def examples() -> list[Example]:
    return [Example(list(range(k, k + 5)), [IGNORED] * 3 + [k + 3, k + 4]) for k in range(9)]


def model_of(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MODELS[kind][0])).train()


@pytest.mark.parametrize("kind", MODELS)
def test_losses_of_packed_examples_are_those_of_each_alone(kind):
    model, packed = model_of(kind), pack(examples(), 12, 0)
    assert sees_neighbours(model, 12) == MODELS[kind][1]
    assert model.training
    rows = apart(model, packed)
    assert (rows is packed) != MODELS[kind][1]
    together = float((row_losses(model, rows) * (rows.labels[:, 1:] != IGNORED).sum(1)).sum())
    alone = sum(2 * float(row_losses(model, pack([one], 12, 0))) for one in examples())
    assert together == pytest.approx(alone, rel=1e-5)


def test_one_per_row():
    rows = one_per_row(pack(examples(), 12, 0))
    assert rows.positions is None
    assert [row[:5].tolist() for row in rows.ids] == [one.ids for one in examples()]
    assert [row[:5].tolist() for row in rows.labels] == [one.labels for one in examples()]
    assert bool((rows.labels[:, 5:] == IGNORED).all())
    assert rows.length == 12


def test_running_text_is_never_probed():
    rows = TokenRows(torch.zeros(3, 4, dtype=torch.int64))
    assert apart(None, rows) is rows


def test_no_rows_have_no_losses():
    assert row_losses(model_of("llama"), TokenRows(torch.zeros(0, 4, dtype=torch.int64))).shape == (0,)
