"""Progressive N:M flow on weights: values and gradients worked out by hand, resuming, removal."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from gossamer.errors import RecipeError, TrainingError
from gossamer.pruning.flow import Flow, FlowMatrix, FlowOptions
from gossamer.pruning.flow_schedule import KINDS
from gossamer.pruning.mask import Mask
from gossamer.pruning.pattern import NM

W = torch.tensor(
    [
        [0.1, -0.8, 0.3, 0.5, -0.2, 0.7, -0.6, 0.4],
        [-0.9, 0.2, 0.6, -0.1, 0.3, -0.5, 0.8, 0.7],
    ]
)


def linear(weight: Tensor = W) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        module.weight.copy_(weight)
    return module


def attached(module: nn.Module, pattern: NM, kind: str, steps: int = 5, **options: Any) -> Flow:
    matrix = {name: options.pop(name) for name in ("transposed", "allowed", "parameter") if name in options}
    return Flow({"m": FlowMatrix(module, pattern, **matrix)}, FlowOptions(kind, steps, **options))


def kept(*rows: str) -> Tensor:
    """bool from rows such as "x... .x.."."""
    return torch.tensor([[c == "x" for c in row.replace(" ", "")] for row in rows])


# Every schedule on W, 5 steps, the last one frozen: pattern of the mask and beta, step by step.
THREE_OF_FOUR = (".xxx .xxx", "xxx. .xxx")
TWO_OF_FOUR = (".x.x .xx.", "x.x. ..xx")
ONE_OF_FOUR = (".x.. .x..", "x... ..x.")
FOUR_OF_EIGHT = (".x.. .xx.", "x.x. ..xx")
BY_HAND = {
    "mdgf-linear": (NM(1, 4), [(ONE_OF_FOUR, beta) for beta in (1.0, 0.75, 0.5, 0.25, 0.0)]),
    "mdgf-exp": (NM(1, 4), [(ONE_OF_FOUR, math.exp(-5 * u)) for u in (0, 0.25, 0.5, 0.75)] + [(ONE_OF_FOUR, 0.0)]),
    "sdgf-stepwise": (
        NM(1, 4),
        [(THREE_OF_FOUR, 0.0), (THREE_OF_FOUR, 0.0), (TWO_OF_FOUR, 0.0), (ONE_OF_FOUR, 0.0), (ONE_OF_FOUR, 0.0)],
    ),
    "sdgf-geometric": (
        NM(1, 2),  # 8:16 does not divide 8 inputs; 4:8, 2:4 and 1:2 do
        [
            ((".x.x .xx.", "x.x. ..xx"), 0.0),
            ((".x.x .xx.", "x.x. ..xx"), 0.0),
            (TWO_OF_FOUR, 0.0),
            ((".x.x .xx.", "x.x. .xx."), 0.0),
            ((".x.x .xx.", "x.x. .xx."), 0.0),
        ],
    ),
    "sr-ste": (NM(1, 4), [(ONE_OF_FOUR, 0.0)] * 5),
    "ste": (NM(1, 4), [(ONE_OF_FOUR, 0.0)] * 5),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_schedule_by_hand(kind: str, transposed: bool) -> None:
    pattern, steps = BY_HAND[kind]
    module = linear(W.t() if transposed else W)
    flow = attached(module, pattern, kind, transposed=transposed)
    upstream = torch.randn(2, 8)
    for step, (rows, beta) in enumerate(steps):
        flow.at(step)
        mask = kept(*rows)
        value = module.weight.t() if transposed else module.weight
        torch.testing.assert_close(value, torch.where(mask, W, W * beta))
        assert torch.equal(flow.weights["m"].mask().to_bool(), mask)
        original = module.parametrizations.weight.original
        original.grad = None
        (value * upstream).sum().backward()
        gradient = original.grad.t() if transposed else original.grad
        straight = kind in ("sr-ste", "ste")
        torch.testing.assert_close(gradient, upstream if straight else torch.where(mask, upstream, upstream * beta))
    masks = flow.finish()
    assert torch.equal(masks["m"].to_bool(), kept(*steps[-1][0]))
    assert masks["m"].pattern == str(pattern)


def test_groups_where_the_whole_row_competes() -> None:
    # 4:8 on rows whose halves are uneven: the frame before 2:4 keeps what 2:4 would not
    weight = torch.tensor([[0.9, 0.8, 0.7, 0.1, 0.2, 0.3, 0.4, 0.0]])
    module = linear(weight)
    flow = attached(module, NM(1, 2), "sdgf-geometric", steps=6, tail=0.5)
    found = []
    for step in (0, 1, 2):
        flow.at(step)
        found.append((module.weight != 0).int().tolist()[0])
    assert found == [[1, 1, 1, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1, 1, 0], [1, 0, 1, 0, 0, 1, 1, 0]]
    assert flow.left_out == [("m", NM(8, 16))]


@pytest.mark.parametrize("kind", ["mdgf-exp", "mdgf-linear", "sdgf-stepwise"])
def test_product_gradient_against_finite_differences(kind: str) -> None:
    module = nn.Linear(8, 3).double()
    flow = attached(module, NM(1, 4), kind)
    flow.at(2)
    x, weight = torch.randn(5, 8, dtype=torch.float64), module.parametrizations.weight.original
    _ = module.weight  # the mask is chosen; moving w by 1e-6 keeps it

    def loss(value: Tensor) -> Tensor:
        return (x @ flow.weights["m"](value).T).tanh().sum()

    assert torch.autograd.gradcheck(loss, (weight.detach().clone().requires_grad_(),))


def test_straight_gradient_is_that_of_the_forward_value() -> None:
    module = linear()
    flow = attached(module, NM(1, 4), "mdgf-linear", straight=True)
    flow.at(2)
    x = torch.randn(3, 8)
    value = module.weight.detach().requires_grad_()
    (expected,) = torch.autograd.grad((x @ value.T + module.bias).square().sum(), value)
    module(x).square().sum().backward()
    torch.testing.assert_close(module.parametrizations.weight.original.grad, expected)


def test_bias_takes_part_and_is_trained() -> None:
    module = linear()
    attached(module, NM(1, 4), "ste")
    x = torch.randn(3, 8)
    torch.testing.assert_close(module(x), x @ (W * kept(*ONE_OF_FOUR)).T + module.bias)
    module(x).sum().backward()
    assert torch.equal(module.bias.grad, torch.tensor([3.0, 3.0]))


@pytest.mark.parametrize("decoupled", [True, False])
def test_lambda_by_hand(decoupled: bool) -> None:
    module = linear()
    flow = attached(module, NM(1, 4), "sr-ste", shrink=0.5, decoupled=decoupled)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    flow.watch(optimizer)
    for _ in range(2):  # two micro-batches: lambda counts once all the same
        (module.weight * 0.25).sum().backward()
    optimizer.step()
    mask = kept(*ONE_OF_FOUR)
    expected = W - 0.1 * (0.5 + torch.where(mask, 0.0, 0.5 * W))
    torch.testing.assert_close(module.parametrizations.weight.original.detach(), expected)


def test_decoupled_lambda_is_untouched_by_adam() -> None:
    module = linear()
    flow = attached(module, NM(1, 4), "sr-ste", shrink=0.5)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.0)
    flow.watch(optimizer)
    (module.weight * 0.0).sum().backward()  # no gradient: what moves was moved by lambda
    optimizer.step()
    expected = torch.where(kept(*ONE_OF_FOUR), W, W * 0.95)
    torch.testing.assert_close(module.parametrizations.weight.original.detach(), expected)


def test_default_lambdas() -> None:
    assert FlowOptions("sr-ste", 5).rate == 0.1
    assert FlowOptions("sr-ste", 5, decoupled=False).rate == 2e-4
    assert FlowOptions("mdgf-exp", 5, decoupled=False).rate == 0.0
    assert FlowOptions("ste", 5, shrink=0.3).rate == 0.3


def test_mask_is_chosen_once_per_step() -> None:
    module = linear()
    flow = attached(module, NM(1, 4), "ste")
    before = module.weight.detach()
    with torch.no_grad():
        module.parametrizations.weight.original.copy_(W.flip(1))
    during = module.weight.detach()  # the same step: same mask, new values
    assert torch.equal(during != 0, before != 0)
    flow.at(1)
    assert torch.equal(module.weight != 0, kept("..x. ..x.", ".x.. ...x"))


def test_frozen_tail_keeps_its_mask() -> None:
    module = linear()
    flow = attached(module, NM(1, 4), "ste", steps=10, tail=0.5)
    frozen = []
    for step in range(10):
        flow.at(step)
        with torch.no_grad():
            module.parametrizations.weight.original.copy_(torch.randn(2, 8))
        frozen.append((module.weight != 0).tolist())
    # the mask of step 5 was chosen from the values that step 4 left
    assert all(mask == frozen[5] for mask in frozen[5:])
    assert len({str(mask) for mask in frozen[:5]}) > 1
    last = module.parametrizations.weight.original.detach().clone()
    mask = flow.finish()["m"].to_bool()
    assert mask.tolist() == frozen[5]
    assert torch.equal(module.weight, last * mask)


@pytest.mark.parametrize(("tail", "steps"), [(1.0, 4), (0.8, 2)])  # 0.8 of 2 steps rounds to both of them
@pytest.mark.parametrize("kind", KINDS)
def test_a_tail_of_all_steps_trains_under_one_mask(kind: str, tail: float, steps: int) -> None:
    module = linear()
    flow = attached(module, NM(1, 4), kind, steps=steps, tail=tail)
    for step in range(steps):
        flow.at(step)
        assert torch.equal(module.weight != 0, kept(*ONE_OF_FOUR))
        with torch.no_grad():
            module.parametrizations.weight.original.copy_(torch.randn(2, 8))
    assert torch.equal(flow.finish()["m"].to_bool(), kept(*ONE_OF_FOUR))


def test_flip_rate_counts_changed_entries() -> None:
    module = linear()
    flow = attached(module, NM(1, 4), "ste", steps=20)
    _ = module.weight
    assert flow.flip_rate() == 0.0
    original = module.parametrizations.weight.original
    with torch.no_grad():
        original[0, 0] = 2.0  # takes the place of 0.8: two entries of 16 change
    flow.at(1)
    _ = module.weight
    flow.at(2)
    _ = module.weight
    assert flow.flip_rate() == pytest.approx(2 / 16 / 2)  # two choices, the second without a change
    assert flow.flip_rate() == 0.0


def test_earlier_mask_is_only_shrunk() -> None:
    before = kept(".xxx .x..", "...x ....")
    module = linear(W * before)
    mask = Mask.from_bool(before, "mixed")
    flow = attached(module, NM(2, 4), "mdgf-linear", allowed=mask, straight=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    flow.watch(optimizer)
    for step in range(5):
        flow.at(step)
        optimizer.zero_grad()
        mse_loss(module(torch.randn(4, 8)), torch.randn(4, 2)).backward()
        optimizer.step()
        assert (module.parametrizations.weight.original[~before] == 0).all()
        assert (module.weight[~before] == 0).all()
    final = flow.finish()["m"].to_bool()
    assert not (final & ~before).any()
    assert final.sum(1).tolist() == [3, 1]
    assert torch.equal(module.weight != 0, final)


def test_stack_of_experts() -> None:
    stack = torch.stack([W, W.flip(1)])
    module = nn.Module()
    module.gate_up_proj = nn.Parameter(stack.mT.contiguous())  # [experts, in, out]
    flow = attached(module, NM(1, 4), "ste", parameter="gate_up_proj", transposed=True)
    one = kept(*ONE_OF_FOUR)
    assert torch.equal(module.gate_up_proj.mT, stack * torch.stack([one, one.flip(1)]))
    mask = flow.finish()["m"]
    assert torch.equal(mask.to_bool(), torch.cat([one, one.flip(1)]))
    assert module.gate_up_proj.shape == (2, 8, 2)


def test_removal_leaves_an_ordinary_masked_module() -> None:
    module = linear(torch.where(W == 0.3, -W, W))
    parameter = module.weight
    flow = attached(module, NM(1, 4), "mdgf-exp", steps=3, tail=0.0)
    for step in range(3):
        flow.at(step)
        module(torch.randn(2, 8)).sum().backward()
    masks = flow.finish()
    assert type(module) is nn.Linear
    assert module.weight is parameter
    assert set(module.state_dict()) == {"weight", "bias"}
    assert torch.equal(module.weight != 0, masks["m"].to_bool())
    assert not torch.signbit(module.weight[~masks["m"].to_bool()]).any()
    assert masks["m"].zeros == NM(1, 4).zeros(2, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_in_the_middle_of_a_frame_is_exact(kind: str) -> None:
    data = [(torch.randn(6, 16), torch.randn(6, 16)) for _ in range(14)]
    first = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))

    def start() -> tuple[nn.Module, Flow, torch.optim.Optimizer]:
        model = copy.deepcopy(first)
        matrices = {"a": FlowMatrix(model[0], NM(1, 8)), "b": FlowMatrix(model[2], NM(2, 8))}
        flow = Flow(matrices, FlowOptions(kind, 14, tail=0.2, shrink=0.3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        flow.watch(optimizer)
        return model, flow, optimizer

    def train(model: nn.Module, flow: Flow, optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
        for step in range(begin, end):
            flow.at(step)
            optimizer.zero_grad()
            mse_loss(model(data[step][0]), data[step][1]).backward()
            optimizer.step()

    model, flow, optimizer = start()
    train(model, flow, optimizer, 0, 14)
    rates = flow.flip_rate()
    for stop in (4, 12):  # inside a frame, and inside the frozen tail
        half, half_flow, half_optimizer = start()
        train(half, half_flow, half_optimizer, 0, stop)
        before = half_flow.flip_rate() * (stop - 1)  # the first choice is compared with nothing
        weights, state = copy.deepcopy(half.state_dict()), copy.deepcopy(half_optimizer.state_dict())
        again, again_flow, again_optimizer = start()
        again.load_state_dict(weights)
        assert {w.step for w in again_flow.weights.values()} == {stop - 1}
        again_optimizer.load_state_dict(state)
        train(again, again_flow, again_optimizer, stop, 14)
        for name, value in model.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name
        if stop == 4:
            assert before + again_flow.flip_rate() * 8 == pytest.approx(rates * 11)  # choices of steps 1..3 and 4..11
    ours, theirs = flow.finish(), again_flow.finish()
    assert {name: mask.sha256() for name, mask in ours.items()} == {n: mask.sha256() for n, mask in theirs.items()}
    assert torch.equal(model(data[0][0]), again(data[0][0]))


def test_another_schedule_does_not_continue() -> None:
    saved = linear()
    attached(saved, NM(1, 4), "ste", steps=5)
    other = linear()
    attached(other, NM(1, 4), "ste", steps=6)
    with pytest.raises(TrainingError, match="saved schedule has 5 steps, this one 6"):
        other.load_state_dict(saved.state_dict())


def test_assigning_a_weight_chooses_anew() -> None:
    module = linear()
    attached(module, NM(1, 4), "ste")
    _ = module.weight
    module.weight = W.flip(1)
    assert torch.equal(module.weight, W.flip(1) * kept("..x. ..x.", ".x.. ...x"))


def test_bad_patterns_change_nothing() -> None:
    good, bad = linear(), nn.Linear(10, 4)
    matrices = {"good": FlowMatrix(good, NM(1, 4)), "layers.0.up": FlowMatrix(bad, NM(1, 4))}
    with pytest.raises(RecipeError, match=r"pattern 1:4 does not fit layers.0.up: its 10 inputs"):
        Flow(matrices, FlowOptions("ste", 5))
    assert type(good) is nn.Linear
    with pytest.raises(RecipeError, match="shrink must be at least 0, got -1"):
        FlowOptions("ste", 5, shrink=-1.0)
    with pytest.raises(RecipeError, match="schedule 'x' is unknown"):
        FlowOptions("x", 5)


def test_a_shared_parameter_is_refused_and_nothing_is_changed() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 8), "up": nn.Linear(8, 4), "head": nn.Linear(8, 4)})
    model["head"].weight = model["embedding"].weight
    matrices = {name: FlowMatrix(model[name], NM(1, 4)) for name in ("up", "head")}
    with pytest.raises(RecipeError, match="weight of head is shared by embedding.weight and head.weight"):
        Flow(matrices, FlowOptions("ste", 5), model)
    model["up"].weight = model["head"].weight
    with pytest.raises(RecipeError, match="weight of up is shared by up and head"):
        Flow(matrices, FlowOptions("ste", 5))
    assert type(model["up"]) is type(model["head"]) is nn.Linear


def test_gradient_checkpointing_sees_one_mask() -> None:
    from torch.utils.checkpoint import checkpoint

    module = linear()
    flow = attached(module, NM(1, 4), "mdgf-linear")
    flow.at(1)
    x = torch.randn(3, 8)
    plain = torch.autograd.grad(module(x).square().sum(), module.parametrizations.weight.original)[0]
    saved = torch.autograd.grad(
        checkpoint(module, x, use_reentrant=False).square().sum(), module.parametrizations.weight.original
    )[0]
    assert torch.equal(plain, saved)


def test_bfloat16_weights() -> None:
    module = linear().to(torch.bfloat16)
    flow = attached(module, NM(1, 4), "mdgf-linear")
    flow.at(2)
    assert torch.equal(module.weight, torch.where(kept(*ONE_OF_FOUR), W, W * 0.5).to(torch.bfloat16))
    assert module.weight.dtype == torch.bfloat16


def test_shape_of_an_earlier_mask_is_checked() -> None:
    with pytest.raises(ValueError, match=r"the mask so far is \[3, 8\], the weight has 2 rows of 8"):
        attached(linear(), NM(1, 4), "ste", allowed=Mask.from_bool(torch.ones(3, 8, dtype=torch.bool), "x"))
