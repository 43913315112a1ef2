"""Trials of a search: the losses of whole runs, from the first block that differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from families import VOCAB, save_family

from gossamer.activation_sparsity.base import LinearPolicy, Policy
from gossamer.activation_sparsity.method import Fitted
from gossamer.compress.activation.trials import Trials
from gossamer.compress.activation.walk import Walk
from gossamer.compress.blocks import StreamedModel
from gossamer.compress.source import open_source

LENGTH, WINDOWS = 16, 5


class Counted(Walk):
    """A walk that notes which blocks run."""

    def advance(self, index, *args, **more):
        self.ran = [*getattr(self, "ran", []), index]
        return super().advance(index, *args, **more)


@pytest.fixture(params=[1 << 28, 1], ids=["in memory", "on disk"])
def walk(request: pytest.FixtureRequest, tmp_path: Path) -> Counted:
    source = open_source(str(save_family("llama", tmp_path / "model")))
    model = StreamedModel.open(source, source.folder, dtype=torch.float32)
    windows = torch.randint(3, VOCAB, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))
    made = Counted(model, windows, memory_bytes=request.param, scratch=tmp_path)
    made.memory = request.param
    return made


def entries(walk: Walk, threshold: float) -> list[dict[str, LinearPolicy]]:
    """One dictionary per block."""
    return [
        {p.name: LinearPolicy(torch.full((p.shape[1],), threshold)) for p in walk.model.prunables(index)}
        for index in range(walk.model.num_blocks)
    ]


def policy_of(walk: Walk, blocks: Sequence[Mapping[str, LinearPolicy]]) -> Policy:
    shapes = {p.name: p.shape for index in range(walk.model.num_blocks) for p in walk.model.prunables(index)}
    return Policy("test", shapes, {name: entry for block in blocks for name, entry in block.items()})


def test_a_trial_runs_from_the_first_block_that_differs(walk: Counted, tmp_path: Path) -> None:
    model, count = walk.model, walk.model.num_blocks
    assert count >= 3
    small, large = entries(walk, 0.3), entries(walk, 0.8)
    names = [[p.name for p in model.prunables(index)] for index in range(count)]
    trials = Trials(lambda: walk, lambda f: policy_of(walk, [b.linears for b in f]), names, walk.memory)

    def loss(blocks: Sequence[Mapping[str, LinearPolicy]], base: bool = False) -> float:
        walk.ran = []
        return trials([Fitted(block) for block in blocks], base=base)

    def whole(blocks: Sequence[Mapping[str, LinearPolicy]]) -> float:
        losses = walk.run(policy_of(walk, blocks), reads=False).losses
        return sum(losses) / len(losses)

    everything = list(range(count))
    unlike = [large[0], *small[1:]]
    assert loss(unlike) == whole(unlike)  # no base yet
    assert loss(small, base=True) == whole(small)
    for first in everything:
        changed = [*small[:first], large[first], *small[first + 1 :]]
        found = loss(changed)
        assert walk.ran == everything[first:]
        assert found == whole(changed) != whole(small)
    again = loss(small)
    assert (again, walk.ran) == (whole(small), [count - 1])
    one_matrix = [*small[:-1], {**small[-1], names[-1][-1]: large[-1][names[-1][-1]]}]
    assert (loss(one_matrix), walk.ran) == (whole(one_matrix), [count - 1])
    without = [*small[:-2], {}, small[-1]]  # an entry that is gone is a change as well
    assert (loss(without), walk.ran) == (whole(without), everything[-2:])

    assert loss(large, base=True) == whole(large)  # another base: the old one is forgotten
    mixed = [*large[:-1], small[-1]]
    assert (loss(mixed), walk.ran) == (whole(mixed), [count - 1])
    trials.close()
    assert loss(mixed) == whole(mixed)
    assert not list(tmp_path.glob("walk-*"))  # nothing is left on disk
