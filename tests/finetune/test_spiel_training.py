"""Sparse deltas in training: moments, choice of positions, resuming."""

from __future__ import annotations

import copy
import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spiel_models import QUICK, Net, Squares, adapted, batch, loss_of, optimizer_of, train
from torch import nn

from gossamer.errors import TrainingError
from gossamer.finetune.reselection import Reselection
from gossamer.finetune.spiel import product
from gossamer.finetune.spiel.candidates import Candidates
from gossamer.finetune.spiel.layer import layers_of
from gossamer.finetune.spiel.moments import step_adam


def state(model, adapter="default"):
    return [(layer.flat(adapter), layer.spiel_values[adapter].detach().clone()) for layer in layers_of(model, adapter)]


def same(a, b):
    return all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


def test_schedule():
    schedule = Reselection(20, 5, 1, 0.2, "linear", 100, 1.0)
    assert [t for t in range(101) if schedule.is_due(t)] == [5, 25, 45, 65, 85]
    assert [t for t in range(30) if schedule.is_open(t)] == [0, 1, 2, 3, 4, 20, 21, 22, 23, 24]
    assert [schedule.replaced(t) for t in (5, 25, 85, 100)] == pytest.approx([1.0, 0.15, 0.03, 0.0])
    assert Reselection(20, 5, 1, 0.2, "cosine", 100, 1.0).replaced(50) == pytest.approx(0.1)
    assert not any(schedule.is_open(t) for t in range(86, 101))  # no window whose choice never comes


@pytest.mark.parametrize(("window", "every"), [(5, 5), (5, 3), (5, 1), (2, 5), (1, 4)])
def test_matrices_take_turns_to_be_looked_at(window, every):
    schedule = Reselection(20, window, every, 0.2, "linear", 100, 1.0)
    turns = min(window, every)
    for start in (0, 20, 40) if window == 5 else (0, 20):
        opened = [t for t in range(start - 5, start + 20) if t >= 0 and schedule.is_open(t)][:window]
        looks = [[schedule.looks(t, matrix) for t in opened] for matrix in range(2 * turns)]
        assert all(sum(update) == 2 for update in zip(*looks, strict=True))  # as many in every update
        assert all(sum(matrix) >= window // turns >= 1 for matrix in looks)


@pytest.mark.parametrize("backend", ["csr", "dense", "weight"])
def test_between_looks_what_is_held_goes_on_and_nothing_enters(backend):
    """The second layer looks in the second of three updates: its sums are those of the last two."""
    model = adapted(policy="ag", slots=1000, interval=10, window=3, look_every=2, backend=backend)
    second = layers_of(model, "default")[1]
    optimizer = optimizer_of(model, lr=0.0)
    weight = second.get_base_layer().weight
    twin = Net()  # the deltas are 0
    taken, m, total = second.flat("default"), torch.zeros(weight.numel()), Squares(twin.second)
    for step in range(3):
        assert second.watches["default"].looks == (step == 1)
        update = Squares(twin.second)
        update.backward(twin.second, loss_of(twin, step))
        train(model, optimizer, step, step + 1)
        if step:
            m = 0.6 * m + 0.4 * update.gradient.reshape(-1)
            total.gradient += update.gradient
        if step == 1:
            total.rows, total.cols = update.rows, update.cols  # of the update that looks
    want = total.scores().index_fill(0, taken, 0.0).topk(len(taken)).indices.sort().values
    assert torch.equal(second.flat("default"), want)
    held = optimizer.state[second.spiel_values["default"]]
    torch.testing.assert_close(held["m"], m[want], rtol=2e-3, atol=1e-7)
    assert held["birth"].tolist() == [1] * len(want)


@pytest.mark.parametrize("policy", ["static", "ag", "ma"])
def test_training_learns_and_keeps_the_number_of_entries(policy):
    model = adapted(policy=policy, **QUICK)
    counts = [len(layer.spiel_values["default"]) for layer in layers_of(model, "default")]
    start = state(model)
    optimizer = optimizer_of(model, lr=0.1 if policy == "ma" else 0.02)
    before = float(sum(loss_of(model, i) for i in range(5)))
    for _ in range(6):
        train(model, optimizer, 0, 5)
    assert float(sum(loss_of(model, i) for i in range(5))) < 0.9 * before
    assert [len(layer.spiel_values["default"]) for layer in layers_of(model, "default")] == counts
    for flat, _ in state(model):
        assert torch.equal(flat, flat.unique())
    moved = not all(torch.equal(a[0], b[0]) for a, b in zip(start, state(model), strict=True))
    assert moved == (policy != "static")
    if policy == "static":
        assert optimizer.history == []
    else:
        assert [h["update"] for h in optimizer.history] == [2, 6, 10, 14, 18, 22, 26, 30]
        assert optimizer.history[0]["share"] == 1.0
        assert optimizer.history[0]["replaced"] == optimizer.history[0]["entries"] == 60


def test_static_entries_are_trained_by_adamw():
    model = adapted(policy="static")
    twin = copy.deepcopy(model)
    other = torch.optim.AdamW(
        [p for p in twin.parameters() if p.requires_grad], 0.02, betas=(0.6, 0.999), eps=1e-6, weight_decay=0.1
    )
    train(model, optimizer_of(model, weight_decay=0.1), 0, 6)
    train(twin, other, 0, 6)
    for (_, ours), (_, theirs) in zip(state(model), state(twin), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("micro", "clip"), [(1, None), (3, None), (2, 0.05)])
def test_new_entries_begin_with_adams_own_moments(micro, clip):
    """With room for every candidate: the positions of the best scores, and dense Adam's state there."""
    model = adapted(policy="ag", slots=1000, interval=10, window=3, look_every=1)
    first = layers_of(model, "default")[0]
    optimizer = optimizer_of(model, lr=0.0)
    taken = first.flat("default")
    weight = first.get_base_layer().weight
    size = weight.numel()
    twin = Net()  # the deltas are 0
    m, v, total = torch.zeros(size), torch.zeros(size), Squares(twin.first)
    for step in range(3):
        optimizer.zero_grad()
        update, scale = Squares(twin.first), 1.0
        for i in range(micro):
            update.backward(twin.first, loss_of(twin, step * micro + i) / micro)
            (loss_of(model, step * micro + i) / micro).backward()
        if clip:
            values = [p for p in model.parameters() if p.requires_grad]
            scale = clip / float(nn.utils.clip_grad_norm_(values, clip))
        optimizer.step()
        total.add(update, scale)
        dense = scale * update.gradient.reshape(-1)
        m, v = 0.6 * m + 0.4 * dense, 0.999 * v + 0.001 * dense**2
    free = torch.ones(size, dtype=torch.bool)
    free[taken] = False
    want = total.scores().masked_fill(~free, 0).topk(len(taken)).indices.sort().values
    assert torch.equal(first.flat("default"), want)
    held = optimizer.state[first.spiel_values["default"]]
    torch.testing.assert_close(held["m"], m[want], rtol=2e-3, atol=1e-7)
    torch.testing.assert_close(held["v"], v[want], rtol=4e-3, atol=1e-9)
    assert held["birth"].tolist() == [0] * len(want)


def test_blocks_of_a_gradient_come_to_the_same_choice(monkeypatch):
    found = []
    for block in (10_000, 4 * 17):
        monkeypatch.setattr(product, "BLOCK", block)
        model = adapted(policy="ag", slots=1000, interval=4, window=4, look_every=2, share=0.5)
        train(model, optimizer_of(model), 0, 12, micro=2)
        found.append([flat for flat, _ in state(model)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_windows_that_follow_each_other_know_nothing_of_each_other():
    """With no update between them: every choice is by its own window's gradients, among positions that are free."""
    model = adapted(policy="ag", slots=1000, interval=3, window=3, share=0.5, look_every=1)
    first = layers_of(model, "default")[0]
    optimizer = optimizer_of(model, lr=0.0)
    twin = Net()  # the deltas are 0
    for window in range(3):
        taken, total = first.flat("default"), Squares(twin.first)
        for step in range(3 * window, 3 * window + 3):
            total.backward(twin.first, loss_of(twin, step))
            train(model, optimizer, step, step + 1)
        found = first.flat("default")
        assert torch.equal(found, found.unique())
        count = int(optimizer.history[-1]["share"] * len(taken))
        assert count > 0
        want = total.scores().index_fill(0, taken, 0.0).topk(count).indices
        assert set(found.tolist()) - set(taken.tolist()) == set(want.tolist())


def test_moments_of_new_entries_take_the_scale_of_their_first_gradient():
    """Clipping that begins with them must not leave them with momentum that outweighs everything after."""
    model = adapted(policy="ag", slots=1000, interval=10, window=3)
    optimizer = optimizer_of(model, lr=0.0)
    train(model, optimizer, 0, 3)
    first = layers_of(model, "default")[0].spiel_values["default"]
    before = optimizer.state[first]["m"].clone()
    train(model, optimizer, 3, 4, clip=1e-4)
    share = optimizer.state[first]["m"].norm() / (0.9 * before.norm())
    assert 1e-5 < share < 0.01
    assert "fresh" not in optimizer.state[first]


def test_a_small_sketch_finds_persistent_gradients():
    source = torch.Generator().manual_seed(0)
    rows, cols = 40, 50
    hot = torch.randperm(rows * cols, generator=source)[:20]
    sketch = Candidates(rows, cols, 40, torch.empty(0, dtype=torch.int64), None)
    for _ in range(12):
        gradient = torch.randn(rows * cols, generator=source)
        gradient[hot] += 2
        sketch.begin(None)
        for first in range(0, rows, 7):
            sketch.see(first, gradient.view(rows, cols)[first : first + 7].clone())
        sketch.end(torch.zeros(1))
        assert len(sketch.tensors["position"]) <= 40
    sketch.fold(1.0, (0.9, 0.999))
    assert len(set(sketch.grown(20).flat.tolist()) & set(hot.tolist())) >= 14


@pytest.mark.parametrize(("height", "least"), [(40, 20), (20, 20), (7, 18)])  # norms of columns are a guess in a part
def test_spread_weighs_a_gradient_by_its_channels(height, least):
    """In one look, block by block: the best by G^2 / (r c), or nearly, which are others than those by |G|."""
    source = torch.Generator().manual_seed(1)
    rows, cols = 40, 50
    scale = torch.outer(30 ** torch.rand(rows, generator=source), 30 ** torch.rand(cols, generator=source))
    gradient = torch.randn(rows, cols, generator=source) * scale
    sketch = Candidates(rows, cols, 40, torch.empty(0, dtype=torch.int64), None, spread=True)
    sketch.begin(None)
    for first in range(0, rows, height):
        sketch.see(first, gradient[first : first + height].clone())
    sketch.end(torch.zeros(1))
    sketch.fold(1.0, (0.9, 0.999))
    found = set(sketch.grown(20).flat.tolist())
    norms = torch.outer(gradient.norm(dim=1), gradient.norm(dim=0))
    assert len(found & set((gradient**2 / norms).view(-1).topk(20).indices.tolist())) >= least
    assert len(found & set(gradient.abs().view(-1).topk(20).indices.tolist())) <= 14


@pytest.mark.parametrize("shape", [(1,), (40,), (5, 8)])
@pytest.mark.parametrize("done", [7, 60])  # fewer updates than entries, and more
def test_every_entry_is_corrected_by_its_own_age(shape, done):
    source = torch.Generator().manual_seed(0)
    values, gradient, m = (torch.randn(shape, generator=source) for _ in range(3))
    v = torch.rand(shape, generator=source)
    birth = torch.randint(0, done, shape, generator=source, dtype=torch.int32)
    state = {"m": m.clone(), "v": v.clone(), "birth": birth}
    group = {"betas": (0.6, 0.999), "eps": 1e-8, "lr": 0.1, "weight_decay": 0.0}
    m, v, age = 0.6 * m + 0.4 * gradient, 0.999 * v + 0.001 * gradient**2, (done - birth).double()
    wanted = values - 0.1 * (m / (1 - 0.6**age)) / ((v / (1 - 0.999**age)).sqrt() + 1e-8)
    step_adam(values, gradient, state, done, group)
    torch.testing.assert_close(values, wanted.float(), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["static", "ag", "ma"])
@pytest.mark.parametrize("stop", [3, 5, 6])  # before, in and at the end of a window
def test_resuming_is_exact(tmp_path, policy, stop):
    config = {"policy": policy, **QUICK}
    whole = adapted(**config)
    train(whole, optimizer_of(whole), 0, 11, micro=2)
    model = adapted(**config)
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, stop, micro=2)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    again = adapted(**config)
    optimizer = optimizer_of(again)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(again, optimizer, stop, 11, micro=2)
    assert same(state(again), state(whole))


def test_the_trainer_resumes_exactly(tmp_path, tiny):
    from torch.utils.data import Dataset
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    class Texts(Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, i):
            ids = torch.randint(300, (12,), generator=torch.Generator().manual_seed(i))
            return {"input_ids": ids, "labels": ids}

    def run(folder, until, resume=None):
        model = adapted(AutoModelForCausalLM.from_pretrained(tiny), target_modules=["q_proj", "down_proj"], **QUICK)
        optimizer = optimizer_of(model, total=6)
        arguments = TrainingArguments(
            str(folder), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=5,
            report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=0.02, logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=Texts(), optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "a", 6)
    again = run(tmp_path / "b", 6, resume=str(tmp_path / "a" / "checkpoint-5"))
    assert same(state(again), state(whole))


def trained_with_others(policy, rank):
    """The entries after 7 steps with DDP, which nothing holds afterwards."""
    model = adapted(policy=policy, **QUICK)
    optimizer = optimizer_of(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for step in range(7):
        optimizer.zero_grad()
        x, y = batch(100 * rank + step)
        nn.functional.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
    return [(flat.tolist(), values.tolist()) for flat, values in state(model)]


def one_of_two(folder):
    """In a process of its own, named by RANK: what it trained as a file below `folder`."""
    from gossamer.compress.distributed import leave
    from gossamer.finetune.spiel.ranks import check_equal

    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank = dist.get_rank()
    found = {policy: trained_with_others(policy, rank) for policy in ("ag", "ma")}
    try:
        check_equal([torch.tensor([rank])], "the positions")
    except TrainingError as error:
        found["error"] = str(error)
    dist.barrier()
    leave()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    raise SystemExit(0)


def test_two_processes_choose_the_same_positions(launcher, tmp_path):
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]}; "
    code += f"import test_spiel_training; test_spiel_training.one_of_two({str(tmp_path)!r})"
    for process in launcher.start_group(2, "--version", before=code):
        done = process.wait()
        assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    alone = layers_of(adapted(policy="ag", **QUICK), "default")[0].flat("default").tolist()
    assert all(first[policy][0][0] != alone for policy in ("ag", "ma"))
    assert "rank 1 disagrees with rank 0" in first["error"]


def test_a_layer_without_gradient_is_told():
    class Half(Net):
        def forward(self, x):
            return self.head(torch.tanh(self.second(torch.zeros(len(x), 17))))

    model = adapted(Half())
    optimizer = optimizer_of(model)
    loss_of(model, 0).backward()
    with pytest.raises(TrainingError, match="first is first: it was never called in the forward pass"):
        optimizer.step()
    frozen = adapted()
    optimizer = optimizer_of(frozen)
    frozen(batch(0)[0])
    with pytest.raises(TrainingError, match="does not reach the loss"):
        optimizer.step()
    frozen.requires_grad_(False)
    with pytest.raises(TrainingError, match="0 trainable sparse adapters"):
        optimizer_of(frozen)


def test_other_trained_modules_are_trained_too():
    model = adapted(modules_to_save=["head"])
    before = model.base_model.model.head.modules_to_save["default"].weight.clone()
    train(model, optimizer_of(model), 0, 3)
    assert not torch.equal(before, model.base_model.model.head.modules_to_save["default"].weight)
