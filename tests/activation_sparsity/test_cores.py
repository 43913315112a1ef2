"""Core neurons: votes, clusters, when they are chosen anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sites import PARTS, core, draw

from gossamer.activation_sparsity.base import CoreGuide
from gossamer.activation_sparsity.coreinfer import CoreInfer, clustered
from gossamer.activation_sparsity.cores import jaccard, nearest_cluster, refreshed, stable_core, top, vote
from gossamer.activation_sparsity.method import BlockData, Extent
from gossamer.errors import DataError


def test_votes_take_both_signs_and_the_norm_of_the_column() -> None:
    inner = torch.tensor([[0.0, -9.0, 1.0, 2.0, 0.0, 0.0], [5.0, -9.0, 0.0, 2.0, 0.0, 0.0]])
    votes, importance = vote(inner, core().norms, 0.5)
    assert votes.tolist() == [0, 1, 1, 0, 0, 0]  # one of three that are not zero, each: 2 (1 x 10), then 1 (-9)
    assert float(importance.sum()) == pytest.approx(2.0)
    assert stable_core(inner, core(), 0.5).tolist() == [1, 2]
    assert top(torch.zeros(6), torch.zeros(6), 3).tolist() == [0, 1, 2]


def test_a_cluster_is_found_by_the_signature() -> None:
    clusters = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    guide = CoreGuide(1.0, "mlp", 2, torch.tensor([[1.0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]]))
    assert nearest_cluster(torch.tensor([[9.0, 8, 0, 0, 0, 0]]), core(2, clusters), guide) == 0
    assert nearest_cluster(torch.tensor([[0.0, 0, 8, 9, 0, 0]]), core(2, clusters), guide) == 1


def test_a_core_is_taken_anew_only_after_drift() -> None:
    now = torch.tensor([0, 1], dtype=torch.int32)
    near, far = torch.tensor([[9.0, 8, 0, 0, 0, 0]]), torch.tensor([[0.0, 0, 0, 0, 8, 9]])
    guide = CoreGuide(1.0, refresh=4, drift=0.5)
    assert refreshed(now, near, core(), guide) is now
    assert refreshed(now, far, core(), guide).tolist() == [4, 5]
    assert jaccard(now, torch.tensor([1, 2], dtype=torch.int32)) == pytest.approx(1 / 3)


def test_clusters_hold_the_neurons_of_their_own_prompts() -> None:
    kinds = torch.arange(16) % 4
    prompts = [
        draw(9, 12, seed=k) * 0.01 + 5 * torch.nn.functional.one_hot(kind * 3, 12) for k, kind in enumerate(kinds)
    ]
    parts = replace(PARTS, neurons=12)
    data = BlockData(0, [], {"mlp": parts}, {}, {"mlp": prompts}, {"mlp": torch.ones(12)})
    method = CoreInfer(mode="similarity", keep=0.25, alpha=0.1)
    fitted = method.fit(data, {}, 0.0, Extent(100, 30, 70, 100))
    (found,), guide = method.conclude([fitted], lambda _: 0.0, lambda _: None)
    assert guide is not None
    assert guide.centroids is not None
    for kind in range(4):
        cluster = nearest_cluster(prompts[kind], found.mlps["mlp"], guide)
        assert kind * 3 in found.mlps["mlp"].clusters[cluster].tolist()
    with pytest.raises(DataError, match="1 prompts"):
        clustered(torch.ones(1, 5), 0)
