"""What can be pruned, by structure; [out, in] views; grouping by shared input, on blocks made for the purpose."""

from __future__ import annotations

import pytest
import torch
from families import FolderTensors, save_family
from torch import nn
from transformers.pytorch_utils import Conv1D

from gossamer.compress.blocks import StreamedModel
from gossamer.compress.observe import InputLog, observing, seeing
from gossamer.compress.prunable import Prunable, find_prunables, matrix_view

UNKNOWN = "is not a linear map known here (nn.Linear, Conv1D, fused experts)"


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 10)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.sigmoid(self.gate(x)) * self.up(x))


class Mixture(nn.Module):
    """The older style: a list of small networks; token t goes to expert t % used."""

    def __init__(self, used: int) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.shared_gate = nn.Linear(6, 1)
        self.experts = nn.ModuleList([Expert() for _ in range(4)])
        self.used = used

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for e in range(self.used):
            out[:, e :: self.used] = self.experts[e](x[:, e :: self.used])
        return out * torch.sigmoid(self.shared_gate(x))


class Odd(nn.Module):
    """A block with everything that must be told apart."""

    def __init__(self, used: int = 4) -> None:
        super().__init__()
        self.q = nn.Linear(6, 8)
        self.k = nn.Linear(6, 3)
        self.twice = nn.Linear(6, 6)
        self.conv1d = Conv1D(5, 6)
        self.conv = nn.Conv1d(6, 6, 3)
        self.table = nn.Embedding(7, 6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.norm = nn.LayerNorm(6)
        self.matrix = nn.Parameter(torch.zeros(3, 3))
        self.moe = Mixture(used)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.view(-1, 6)
        self.q(x), self.k(flat), self.conv1d(input_ := x * 2), self.conv1d(input_)
        return self.moe(self.twice(self.twice(x)))


def names(prunables: list[Prunable]) -> list[str]:
    return [p.name for p in prunables]


def test_found_by_structure():
    prunables, rest = find_prunables(Odd(), "m.0", 0)
    experts = [f"m.0.moe.experts.{e}.{n}" for e in range(4) for n in ("gate", "up", "down")]
    assert names(prunables) == ["m.0.q", "m.0.k", "m.0.twice", "m.0.conv1d", *experts]
    shapes = {p.name: (p.shape, p.kind) for p in prunables}
    assert shapes["m.0.k"] == ((3, 6), "linear")
    assert shapes["m.0.conv1d"] == ((5, 6), "conv1d")


def test_everything_else_is_named_with_a_reason():
    reasons = dict(find_prunables(Odd(), "m.0", 0)[1])
    assert reasons == {
        "m.0.matrix": f"Odd {UNKNOWN}",
        "m.0.conv.weight": "Conv1d is a convolution",
        "m.0.table.weight": "an embedding is looked up, not multiplied",
        "m.0.attention.in_proj_weight": f"MultiheadAttention {UNKNOWN}",
        "m.0.attention.out_proj": "nn.MultiheadAttention uses it without calling it",
        "m.0.moe.gate": "a linear router or gate of a mixture of experts",
        "m.0.moe.shared_gate": "a linear router or gate of a mixture of experts",
    }


def test_views_write_to_the_parameter_in_its_own_orientation():
    block = Odd()
    by_name = {p.name: p for p in find_prunables(block, "m.0", 0)[0]}
    matrix = torch.arange(30.0).view(5, 6)
    matrix_view(block, "m.0", by_name["m.0.conv1d"]).copy_(matrix)
    assert torch.equal(block.conv1d.weight, matrix.T)
    matrix_view(block, "m.0", by_name["m.0.k"])[1, 4] = 9.0
    assert block.k.weight[1, 4] == 9.0


@pytest.mark.parametrize(("family", "transposed"), [("mixtral", False), ("gpt_oss", True)])
def test_fused_views(family, transposed, tmp_path):
    folder = save_family(family, tmp_path)
    model = StreamedModel.open(FolderTensors(folder), folder)
    block = model.load_block(1)
    prunable = next(p for p in model.prunables(1) if p.name.endswith("gate_up_proj.2"))
    stack = block.get_parameter("mlp.experts.gate_up_proj")
    own = stack[2].T if transposed else stack[2]
    assert torch.equal(model.weight(block, prunable), own)
    assert model.weight(block, prunable).data_ptr() != stack.data_ptr()
    others = stack.clone()
    model.set_weight(block, prunable, torch.full(prunable.shape, 3.0))
    assert (own == 3.0).all()
    assert torch.equal(stack[[0, 1, 3]], others[[0, 1, 3]])


def run_log(block: Odd, x: torch.Tensor) -> InputLog:
    prunables = find_prunables(block, "m.0", 0)[0]
    log = InputLog("m.0", prunables)
    with seeing(block, "m.0", prunables, log.see), torch.no_grad():
        block(x)
    return log


def short(steps):
    return [[[p.name.removeprefix("m.0.") for p in group] for group in step] for step in steps]


def test_steps_of_a_block_with_listed_experts():
    steps = short(run_log(Odd(), torch.randn(1, 12, 6)).steps())
    experts = [f"moe.experts.{e}" for e in range(4)]
    assert steps == [
        [["q", "k"]],
        [["conv1d"]],
        [["twice"]],
        [[f"{e}.gate", f"{e}.up"] for e in experts],
        [[f"{e}.down"] for e in experts],
    ]


def test_experts_without_tokens_join_their_siblings():
    steps = short(run_log(Odd(used=2), torch.randn(1, 12, 6)).steps())
    assert steps[3:] == [
        [[f"moe.experts.{e}.gate", f"moe.experts.{e}.up"] for e in range(4)],
        [[f"moe.experts.{e}.down"] for e in range(4)],
    ]


def test_steps_do_not_depend_on_which_experts_were_used():
    block = Odd()
    prunables = find_prunables(block, "m.0", 0)[0]
    orders = []
    for experts in ((3, 1), (0, 2)):
        log = InputLog("m.0", prunables)
        with seeing(block, "m.0", prunables, log.see), torch.no_grad():
            for e in experts:
                block.moe.experts[e](torch.randn(2, 6))
        orders.append(short(log.steps()))
    assert orders[0] == orders[1]
    assert orders[0][:2] == [
        [[f"moe.experts.{e}.gate", f"moe.experts.{e}.up"] for e in range(4)],
        [[f"moe.experts.{e}.down"] for e in range(4)],
    ]


def test_uses_are_counted():
    calls = run_log(Odd(), torch.randn(1, 12, 6)).calls
    assert calls["m.0.twice"] == 2
    assert calls["m.0.conv1d"] == 2
    assert calls["m.0.q"] == 1


def test_a_tensor_changed_in_place_is_another_input():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.a(x)
            x += 1
            return first + self.b(x)

    block = InPlace()
    prunables = find_prunables(block, "m.0", 0)[0]
    log = InputLog("m.0", prunables)
    with seeing(block, "m.0", prunables, log.see), torch.no_grad():
        block(torch.randn(3, 4))
    assert short(log.steps()) == [[["a"]], [["b"]]]


def test_observing_sees_every_use_as_rows():
    block, seen = Odd(), []
    prunable = next(p for p in find_prunables(block, "m.0", 0)[0] if p.name == "m.0.twice")
    x = torch.randn(2, 5, 6)
    with observing(block, "m.0", [prunable], lambda p, rows: seen.append(rows.clone()), {}, False), torch.no_grad():
        block(x)
        block(x)
    assert [rows.shape for rows in seen] == [(10, 6)] * 4
    assert torch.equal(seen[0], x.view(10, 6))
    with torch.no_grad():
        block(x)
    assert len(seen) == 4, "the hook outlived its context"


def test_every_pass_counts_anew():
    """Expert 3 gets no token in the first pass; the second must still see all matrices before it stops."""
    block, seen = Odd(used=3), []
    wanted = [p for p in find_prunables(block, "m.0", 0)[0] if p.name in ("m.0.q", "m.0.moe.experts.3.down")]
    ended = []
    with observing(block, "m.0", wanted, lambda p, rows: seen.append(p.name), {}, True), torch.no_grad():
        block(torch.randn(1, 12, 6))
        ended.append(1)
        block.moe.used = 4
        block(torch.randn(1, 12, 6))
        ended.append(2)
    assert ended == [1]
    assert seen == ["m.0.q", "m.0.q", "m.0.moe.experts.3.down"]
