"""Soups: one mask for all, a streaming mean, and which candidates go in."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gossamer.errors import CheckpointError, RecipeError, TrainingError
from gossamer.pruning.mask import Mask
from gossamer.pruning.mean import Mean, average, check_same_masks, has_statistics, masks_sha256, recalibrate
from gossamer.pruning.soup import better, check_count, ensemble_losses, greedy, learn_weights, noise, uniform_weights


def masks(seed: int = 0) -> dict[str, Mask]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: Mask.from_bool(torch.rand(rows, cols, generator=draw) > 0.5, "0.5")
        for name, rows, cols in (("a", 3, 11), ("b", 4, 8))
    }


# ---- equal masks ---------------------------------------------------------------------------------------------------


def test_equal_masks_have_one_digest_whatever_their_order_or_pattern() -> None:
    other = {name: Mask(mask.bits.clone(), mask.cols, "another") for name, mask in reversed(masks().items())}
    assert check_same_masks([masks(), other]) == masks_sha256(masks()) == masks_sha256(other)
    assert masks_sha256(masks(1)) != masks_sha256(masks())


def test_a_different_mask_is_refused_by_name() -> None:
    one_bit = masks()
    one_bit["b"].bits[2, 0] ^= 1
    with pytest.raises(CheckpointError, match="b is masked differently in left and in right"):
        check_same_masks([masks(), one_bit], ["left", "right"])
    with pytest.raises(CheckpointError, match="b has no mask in candidate 3"):
        check_same_masks([masks(), masks(), {"a": masks()["a"]}])
    with pytest.raises(CheckpointError, match="b has no mask in candidate 1"):
        check_same_masks([{"a": masks()["a"]}, masks()])
    wider = masks() | {"a": Mask.from_bool(torch.ones(3, 12, dtype=torch.bool), "")}
    with pytest.raises(CheckpointError, match=r"a is \(3, 11\) in candidate 1 and \(3, 12\) in candidate 2"):
        check_same_masks([masks(), wider])


# ---- the average ---------------------------------------------------------------------------------------------------


def states(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(3)
    keep = masks()["a"].to_bool()
    return [{"a": (torch.randn(3, 11, generator=draw) * keep).to(dtype), "n": torch.tensor(7)} for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [(1, 1, 1), (0.5, 0.25, 0.25), (0, 3, 1)])
def test_the_mean_equals_float64_and_keeps_every_zero(dtype: torch.dtype, weights: tuple[float, ...]) -> None:
    made = states(3, dtype)
    found = average([lambda s=s: s for s in made], weights)
    exact = sum(w * s["a"].double() for w, s in zip(weights, made, strict=True)) / sum(weights)
    assert found["a"].dtype == dtype
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(found["a"].double(), exact, rtol=2 * tolerance, atol=2 * tolerance)
    assert bool((found["a"][~masks()["a"].to_bool()] == 0).all())
    assert torch.equal(found["n"], torch.tensor(7))


def test_bfloat16_is_summed_in_float32() -> None:
    """256 + 1 is 256 in bfloat16; the mean of 256 and seven 258s is 257.75, which rounds to 258."""
    found = average(
        [lambda v=v: {"w": torch.tensor([v], dtype=torch.bfloat16)} for v in [256.0] + [258.0] * 7], [1] * 8
    )
    assert found["w"].item() == 258.0


def test_equal_candidates_average_to_themselves_bit_for_bit() -> None:
    one = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-20}
    for count in (2, 3, 5, 7):
        assert torch.equal(average([lambda: one] * count, [0.3] * count)["w"], one["w"])


def test_a_candidate_of_weight_zero_is_not_loaded() -> None:
    def never() -> dict[str, torch.Tensor]:
        raise AssertionError

    assert average([never, lambda: states(1)[0]], (0.0, 1.0))["a"].shape == (3, 11)


def test_the_mean_holds_nothing_of_a_candidate() -> None:
    made = states(2)
    mean = Mean()
    mean.add(made[0])
    expected = average([lambda: states(2)[0], lambda: states(2)[1]], (1, 1))["a"]
    made[0]["a"].fill_(math.nan)
    mean.add(made[1])
    assert torch.equal(mean.result()["a"], expected)


def test_what_cannot_be_averaged_is_refused() -> None:
    one, other = states(2)
    mean = Mean()
    mean.add(one)
    with pytest.raises(CheckpointError, match=r"does not have the same tensors as the others: b"):
        mean.add(other | {"b": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"a is \[3, 12\] in B and \[3, 11\] in the others"):
        mean.add({"a": torch.ones(3, 12), "n": one["n"]}, name="B")
    with pytest.raises(CheckpointError, match="n holds int64 values that differ in B"):
        mean.add(other | {"n": torch.tensor(8)}, name="B")
    with pytest.raises(TrainingError, match="a of B is not finite"):
        mean.add({"a": torch.full((3, 11), math.inf), "n": one["n"]}, name="B")
    with pytest.raises(ValueError, match="above 0"):
        mean.add(one, -1.0)
    with pytest.raises(ValueError, match="nothing"):
        Mean().result()


def test_batch_norm_is_averaged_and_measured_anew() -> None:
    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        made = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        for _ in range(seed + 1):
            made(torch.randn(16, 4))
        return made.eval()

    candidates = [model(0), model(1)]
    soup = average([c.state_dict for c in candidates], (1, 1))
    assert soup["1.num_batches_tracked"].item() == 2
    assert soup["1.num_batches_tracked"].dtype == torch.int64
    mixed = model(0)
    mixed.load_state_dict(soup)
    assert has_statistics(mixed)
    assert not has_statistics(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    data = [torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    recalibrate(mixed, [lambda m, x=x: m(x) for x in data])
    seen = torch.stack([mixed[0](x).mean(0) for x in data]).mean(0)
    torch.testing.assert_close(mixed[1].running_mean, seen)
    assert mixed[1].momentum == 0.1
    assert not mixed.training


# ---- which candidates ----------------------------------------------------------------------------------------------


def test_noise_by_hand() -> None:
    assert noise(torch.tensor([1.0, 3.0])) == pytest.approx(math.sqrt(2) / math.sqrt(2))  # std sqrt(2), n = 2
    assert noise(torch.tensor([1.0])) == math.inf
    old, new = torch.tensor([3.0, 3.0]), torch.tensor([2.0, 0.0])  # gain 1 and 3: mean 2, noise 1
    assert better(new, old, 1.9)
    assert not better(new, old, 2.0)
    assert better(new, old, 0.0)
    assert not better(old, old, 0.0)


def test_greedy_takes_what_helps_in_the_order_of_the_losses() -> None:
    base = torch.linspace(1.0, 2.0, 20)
    losses = [base + 0.3, base, base + 0.1]  # best is 1, then 2, then 0
    asked: list[tuple[float, ...]] = []
    answers = {
        (0.0, 0.5, 0.5): base - 0.2,
        (1 / 3, 1 / 3, 1 / 3): base - 0.2 + torch.tensor([0.5, -0.52] * 10),  # 0.01 better, far below its noise
    }

    def evaluate(weights: tuple[float, ...]) -> torch.Tensor:
        asked.append(weights)
        return answers[weights]

    found = greedy(losses, evaluate)
    assert asked == list(answers)
    assert found.weights == (0.0, 0.5, 0.5)
    assert found.loss == pytest.approx(1.3)
    assert greedy(losses, evaluate, margin=0.0).weights == (1 / 3, 1 / 3, 1 / 3)


def test_greedy_never_ends_above_the_best_candidate() -> None:
    losses = [torch.full((8,), 2.0), torch.full((8,), 1.0)]
    found = greedy(losses, lambda weights: torch.full((8,), 1.5))
    assert found.weights == (0.0, 1.0)
    assert found.loss == 1.0
    equal = greedy([losses[0], losses[0]], lambda weights: losses[0])
    assert equal.weights == (1.0, 0.0)


def test_learned_weights_find_the_minimum_on_the_simplex() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    aim = torch.tensor([0.5, 1.0], dtype=torch.float64)  # = 0.25, 0.5, 0.25

    def gradient(weights: tuple[float, ...]) -> tuple[float, list[float]]:
        w = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
        loss = ((w @ points - aim) ** 2).sum()
        loss.backward()
        return float(loss.detach()), w.grad.tolist()

    found = learn_weights(3, gradient, steps=200)
    assert found == pytest.approx((0.25, 0.5, 0.25), abs=0.02)
    assert sum(found) == pytest.approx(1.0)
    assert learn_weights(3, gradient, steps=1) == (1 / 3, 1 / 3, 1 / 3)
    with pytest.raises(TrainingError, match="nan"):
        learn_weights(2, lambda weights: (math.nan, [0.0, 0.0]))


def test_ensemble_by_hand() -> None:
    p = torch.tensor([[0.5, 0.1], [0.25, 0.3]])
    assert ensemble_losses(p.log()).tolist() == pytest.approx([-math.log(0.375), -math.log(0.2)])
    assert ensemble_losses(p[:1].log()).tolist() == pytest.approx((-p[0].log()).tolist())


def test_counts() -> None:
    assert uniform_weights([2, 0], 3) == (0.5, 0.0, 0.5)
    check_count(3, 3)
    with pytest.raises(RecipeError, match="at least 2"):
        check_count(1)
    with pytest.raises(RecipeError, match="4 processes were started for 3 candidates"):
        check_count(3, 4)
