"""Calibration of activation policies and their evaluation, on tiny random models of many families.

The oracle is a run token by token through plain transformers with a cache: dense for the prompt, then under hooks that
say in a few lines what each matrix does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, VOCAB, save_family
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gossamer.activation_sparsity.auto import Auto, Options
from gossamer.activation_sparsity.base import CoreNeurons, LinearPolicy, Policy
from gossamer.activation_sparsity.cats import Cats
from gossamer.activation_sparsity.coreinfer import CoreInfer
from gossamer.activation_sparsity.method import Method
from gossamer.activation_sparsity.rsparse import RSparse
from gossamer.activation_sparsity.threshold import Threshold
from gossamer.activation_sparsity.wina import Wina
from gossamer.compress.activation import calibrate
from gossamer.compress.activation.calibrate import Calibration
from gossamer.compress.activation.parts import Parts
from gossamer.compress.activation.walk import Walk, increase, prompt_length
from gossamer.compress.blocks import StreamedModel
from gossamer.compress.progress import Progress
from gossamer.compress.source import open_source
from gossamer.errors import DataError, ModelError, RecipeError

LENGTH, WINDOWS = 24, 8
EDGE = 2e-2  # an input on the edge of its threshold may fall on either side, in few windows
FEW = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "opt", "gpt2"]
MLPS = {"llama": "silu", "mistral": "silu", "qwen2": "silu", "qwen3": "silu", "gemma2": "gelu_tanh", "phi3": "silu"}
MLPS |= {"opt": "relu", "gpt2": "gelu_tanh"}


class Tiny:
    """A family's model, its windows, and a calibration of it."""

    def __init__(self, name: str, folder: Path, windows: int = WINDOWS) -> None:
        self.folder = save_family(name, folder / "model")
        source = open_source(str(self.folder))
        self.model = StreamedModel.open(source, source.folder, dtype=torch.float32)
        generator = torch.Generator().manual_seed(3)
        self.windows = torch.randint(3, VOCAB, (windows, LENGTH), generator=generator)
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.walk = Walk(self.model, self.windows, memory_bytes=1 << 28, scratch=self.scratch)

    def calibration(self, method: Method, **more: object) -> Calibration:
        return Calibration(
            self.model, self.windows, method, memory_bytes=1 << 28, scratch=self.scratch, walk=self.walk, **more
        )


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Tiny] = {}

    def make(name: str) -> Tiny:
        if name not in made:
            made[name] = Tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


def token_by_token(folder: Path, ids: Tensor, start: int, policy: Policy) -> Tensor:
    """Logits [L - start, vocab] of plain transformers with a cache: the prompt at once, then one token at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sparse = [False]

    def hook(entry: LinearPolicy):
        def run(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not sparse[0]:
                return None
            weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
            x = args[0] if entry.center is None else args[0] - entry.center
            keep = x.abs() > entry.threshold
            y = (x * keep) @ weight.T + (0 if module.bias is None else module.bias)
            y = y + (0 if entry.shift is None else entry.shift)
            return y if entry.left is None else y + ((x * ~keep) @ entry.right.T) @ entry.left.T

        return run

    for name, entry in policy.linears.items():
        model.get_submodule(name).register_forward_hook(hook(entry))
    found = []
    with torch.no_grad():
        out = model(input_ids=ids[None, :start], use_cache=True)
        sparse[0] = True
        for position in range(start, len(ids)):
            out = model(
                input_ids=ids[None, position : position + 1], past_key_values=out.past_key_values, use_cache=True
            )
            found.append(out.logits[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize("name", FEW)
def test_one_pass_gives_what_decoding_token_by_token_gives(name: str, tinies) -> None:
    tiny = tinies(name)
    policy = tiny.calibration(Auto(Options(allocation="even", gradient=False))).run(0.4)
    assert len(policy.linears) == 3 * len(FAMILIES[name].prunable) or name == "gemma2"
    losses = tiny.walk.run(policy).losses
    start = tiny.walk.start
    gaps = []
    for loss, ids in zip(losses, tiny.windows, strict=True):
        logits = token_by_token(tiny.folder, ids, start, policy)[:-1]
        gaps.append(abs(loss - float(nn.functional.cross_entropy(logits, ids[start + 1 :]))))
    assert sorted(gaps)[WINDOWS // 2] < 1e-5
    assert max(gaps) < EDGE


@pytest.mark.parametrize("name", FEW)
def test_mlps_are_found_by_their_numbers(name: str, tinies) -> None:
    tiny = tinies(name)
    calibration = tiny.calibration(Threshold(uniform=True))
    for found in calibration.found.values():
        assert not found.dense
        ((path, parts),) = found.mlps
        assert parts.activation == MLPS[name]
        assert (parts.gate is None) == (name in ("opt", "gpt2"))
        assert parts.fused == (name == "phi3")
        assert parts.down.startswith(path)
        if parts.gate is not None and not parts.fused:
            assert parts.gate.endswith("gate_proj")
    extent = calibration.extent
    whole = sum(p.size for i in range(tiny.model.num_blocks) for p in tiny.model.prunables(i))
    assert extent.whole == extent.sites == whole


METHODS = {
    "threshold": lambda: Threshold(step=0.2),
    "wina": lambda: Wina(uniform=True),
    "rsparse": lambda: RSparse(population=4, generations=1),
    "auto": lambda: Auto(Options(rounds=1, groups=4)),
    "coreinfer": CoreInfer,
    "cats": Cats,
}


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_meets_its_target(name: str, method: str, tinies) -> None:
    tiny = tinies(name)
    target = 0.2
    if method == "cats" and name in ("opt", "gpt2"):
        with pytest.raises(ModelError, match="a gate"):
            tiny.calibration(METHODS[method]()).run(target)
        return
    policy = tiny.calibration(METHODS[method]()).run(target)
    run = tiny.walk.run(policy)
    # the floor of R-Sparse is one rank and one channel per matrix, of neurons one: coarse in matrices this small
    assert run.reads.sparsity == pytest.approx(target, abs=0.06 if method == "rsparse" else 0.02)
    assert policy.facts["calibrated"] == pytest.approx(run.reads.sparsity)
    assert policy.method == method


@pytest.mark.parametrize("method", ["threshold", "coreinfer"])
@pytest.mark.parametrize("name", [*FEW, "qwen3_moe"])
def test_windows_together_are_windows_one_by_one(name: str, method: str, tinies, tmp_path: Path) -> None:
    """Losses and what is read; OPT's blocks flatten a batch of windows into rows."""
    tiny = tinies(name)
    if method == "coreinfer" and name not in MLPS:
        return
    policy = tiny.calibration(METHODS[method]()).run(0.15 if name == "qwen3_moe" else 0.3)
    assert policy.linears or policy.mlps
    together = tiny.walk.run(policy)
    read: dict[str, int] = {}
    for window, loss in enumerate(together.losses):
        folder = tmp_path / str(window)
        folder.mkdir()
        alone = Walk(tiny.model, tiny.windows[window : window + 1], memory_bytes=1 << 28, scratch=folder)
        found = alone.run(policy)
        assert found.losses[0] == pytest.approx(loss, rel=1e-4)
        for matrix, count in found.reads.read.items():
            read[matrix] = read.get(matrix, 0) + count
    sizes = {p.name: p.size for i in range(tiny.model.num_blocks) for p in tiny.model.prunables(i)}
    tokens = WINDOWS * (LENGTH - tiny.walk.start)
    assert together.reads.whole == {matrix: tokens * size for matrix, size in sizes.items()}
    for matrix, count in together.reads.read.items():  # an input on the edge of its threshold may fall on either side
        assert read[matrix] == pytest.approx(count, rel=2e-3)


def test_what_experts_read_counts(tinies) -> None:
    tiny = tinies("qwen3_moe")
    notes: list[str] = []
    run = tiny.calibration(Threshold(uniform=True), progress=_Notes(notes))
    policy = run.run(0.15)
    assert policy.facts["calibrated"] == pytest.approx(0.15, abs=0.01)
    assert not notes
    reads = tiny.walk.run(policy).reads
    experts = [name for name in reads.whole if ".experts." in name]
    assert experts
    assert all(reads.read[name] == reads.whole[name] for name in experts)


def test_a_target_that_is_missed_is_told(tinies) -> None:
    """Core neurons of a tiny model come one by one."""
    notes: list[str] = []
    policy = tinies("llama").calibration(CoreInfer(keep=0.5), progress=_Notes(notes)).run(0.1)
    assert abs(policy.facts["calibrated"] - 0.1) > 0.05
    assert notes
    assert "not 10.0% as asked" in notes[-1]


@pytest.mark.parametrize("method", ["threshold", "wina", "rsparse", "auto", "coreinfer", "cats"])
def test_a_restart_goes_on_to_the_same_policy(method: str, tinies, monkeypatch: pytest.MonkeyPatch) -> None:
    """From finished blocks alone: nothing that a method remembers of its own fits is needed."""
    monkeypatch.setattr(calibrate, "TOLERANCE", 0.0)  # goals are corrected
    make = (lambda: Wina(step=0.2)) if method == "wina" else METHODS[method]
    tiny, kept = tinies("llama"), _Kept()
    whole = tiny.calibration(make(), parts=kept).run(0.3)
    assert any(round_ > 0 for round_, _ in kept.blocks)
    for last in range(1, len(kept.blocks), 2):
        again = _Kept(dict(list(kept.blocks.items())[:last]), kept.shares)
        policy = tiny.calibration(make(), parts=again).run(0.3)
        assert policy.facts["calibrated"] == whole.facts["calibrated"]
        for name, entry in whole.linears.items():
            for part, tensor in entry.tensors().items():
                assert torch.equal(tensor, policy.linears[name].tensors()[part]), (last, name, part)
        assert policy.mlps.keys() == whole.mlps.keys()


class _Kept(Parts):
    """Finished blocks in memory, as a journal would have them."""

    def __init__(self, blocks: dict | None = None, shares: dict | None = None) -> None:
        self.blocks, self.shares = blocks or {}, shares

    def budgets(self):
        return self.shares

    def keep_budgets(self, budgets) -> None:
        self.shares = dict(budgets)

    def block(self, round_, index):
        return self.blocks.get((round_, index))

    def keep_block(self, round_, index, fitted, reads) -> None:
        self.blocks[round_, index] = (fitted, dict(reads.read), dict(reads.whole))


class _Notes(Progress):
    def __init__(self, into: list[str]) -> None:
        super().__init__()
        self.into = into

    def note(self, text: str) -> None:
        self.into.append(text)


def test_reads_are_counted_exactly(tinies) -> None:
    tiny = tinies("llama")
    policy = tiny.calibration(Threshold(uniform=True)).run(0.5)
    name = "model.layers.0.mlp.down_proj"
    policy = replace(
        policy, linears={name: replace(policy.linears[name], left=torch.zeros(48, 2), right=torch.zeros(2, 80))}
    )
    seen = []
    block = tiny.model.load_block(0)
    (down,) = [p for p in tiny.model.prunables(0) if p.name == name]
    for window in range(WINDOWS):
        with tiny.model.observe(block, [down], lambda _, x: seen.append(x.clone())):
            tiny.model.run_block(0, block, tiny.walk._embedded.get(window), tiny.walk.args, window)
    start = tiny.walk.start
    active = sum(int((x[start:].abs() > policy.linears[name].threshold).sum()) for x in seen)
    tokens = WINDOWS * (LENGTH - start)
    reads = tiny.walk.run(policy).reads
    assert reads.read[name] == active * 48 + tokens * 2 * (48 + 80)
    assert reads.whole[name] == tokens * 48 * 80
    other = "model.layers.1.mlp.up_proj"
    assert reads.read[other] == reads.whole[other] == tokens * 80 * 48


def test_no_sparsity_is_the_dense_model_bit_for_bit(tinies) -> None:
    tiny = tinies("qwen2")
    dense = tiny.walk.run(None).losses
    for method in (Threshold(), Auto(), RSparse(), CoreInfer()):
        policy = tiny.calibration(method).run(0.0)
        run = tiny.walk.run(policy)
        assert run.losses == dense, method.name
        assert run.reads.sparsity == 0


def test_core_neurons_come_from_the_prompt_alone(tinies) -> None:
    """Changing later tokens changes no set: the losses of the first sparse position stay, bit for bit."""
    tiny = tinies("llama")
    policy = tiny.calibration(CoreInfer()).run(0.3)
    start = tiny.walk.start
    other = tiny.windows.clone()
    other[:, start + 2 :] = other[:, start + 2 :].flip(1)
    folder = tiny.scratch / "other"
    folder.mkdir(exist_ok=True)
    changed = Walk(tiny.model, other, memory_bytes=1 << 28, scratch=folder)
    for walk in (tiny.walk, changed):
        with walk.final(policy) as hidden:
            walk.kept = torch.stack([hidden.get(w)[0, start : start + 2] for w in range(WINDOWS)])  # type: ignore[attr-defined]
    assert torch.equal(tiny.walk.kept, changed.kept)


def test_windows_do_not_see_each_other(tinies) -> None:
    """Alone or beside seven others, whatever runs together."""
    tiny = tinies("mistral")
    policy = tiny.calibration(CoreInfer()).run(0.3)
    together = tiny.walk.run(policy).losses
    for window in (0, 3):
        folder = tiny.scratch / f"alone-{window}"
        folder.mkdir(exist_ok=True)
        alone = Walk(tiny.model, tiny.windows[window : window + 1], memory_bytes=1 << 28, scratch=folder)
        assert alone.run(policy).losses[0] == pytest.approx(together[window], abs=1e-6)


def test_clusters_guide_every_layer(tinies) -> None:
    tiny = tinies("llama")
    policy = tiny.calibration(CoreInfer(mode="similarity")).run(0.3)
    assert policy.guide is not None
    assert policy.guide.signature == "model.layers.2.mlp"
    clusters = tiny.walk.clusters(policy)
    assert clusters is not None
    assert set(clusters) == set(range(WINDOWS))
    assert max(clusters.values()) < len(policy.guide.centroids)
    for entry in policy.mlps.values():
        assert isinstance(entry, CoreNeurons)
        assert entry.clusters.shape == (len(policy.guide.centroids), entry.keep)
    assert tiny.walk.run(policy).reads.sparsity == pytest.approx(0.3, abs=0.02)


def test_more_than_a_method_can_reach_says_what_it_can(tinies) -> None:
    tiny = tinies("llama")
    with pytest.raises(RecipeError, match=r"cats can skip at most 4\d\.\d%.*0\.4\d") as caught:
        tiny.calibration(Cats()).run(0.9)
    assert "auto" in str(caught.value)


def test_core_neurons_need_a_token_that_votes(tinies, tmp_path: Path) -> None:
    tiny = tinies("llama")
    walk = Walk(tiny.model, tiny.windows, memory_bytes=1 << 28, scratch=tmp_path, prompt=0.01)
    assert walk.start == 1
    with pytest.raises(DataError, match="a prompt of one token has none that votes"):
        Calibration(
            tiny.model, tiny.windows, CoreInfer(mode="similarity"), memory_bytes=1 << 28, scratch=tmp_path, walk=walk
        ).run(0.2)
    policy = tiny.calibration(CoreInfer()).run(0.2)
    assert walk.run(policy).reads.sparsity == 0.0  # as at decode


def test_padding_and_short_windows_are_named(tinies) -> None:
    tiny = tinies("llama")
    padded = torch.ones_like(tiny.windows, dtype=torch.bool)
    padded[:, tiny.walk.start :] = False
    with pytest.raises(DataError, match="prompt or padding"):
        tiny.calibration(Threshold(), usable=padded)
    with pytest.raises(DataError, match="nothing to score"):
        prompt_length(10, 0.9)
    assert prompt_length(10, 0.25) == 2
    assert prompt_length(3, 0.01) == 1  # the first token is always dense


def test_padding_is_not_calibrated_on(tinies) -> None:
    tiny = tinies("llama")
    usable = torch.ones_like(tiny.windows, dtype=torch.bool)
    usable[4:] = False
    some = tiny.calibration(Threshold(uniform=True), usable=usable)._fit(
        0, 0.5, 0.5, {}, tiny.calibration(Cats()).extent
    )
    every = tiny.calibration(Threshold(uniform=True))._fit(0, 0.5, 0.5, {}, tiny.calibration(Cats()).extent)
    name = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(some[0].linears[name].threshold, every[0].linears[name].threshold)


def test_gradients_at_sites_are_those_of_autograd(tinies) -> None:
    from gossamer.compress.activation.gather import site_gradients

    tiny = tinies("opt")
    found = tiny.calibration(Threshold(uniform=True)).found[2]
    block = tiny.model.load_block(2)
    hidden = torch.randn(1, LENGTH, 48)
    upper = torch.randn(1, LENGTH, 48)
    below, total, _ = site_gradients(tiny.model, 2, block, found, hidden, upper, tiny.walk, 0)
    step = 1e-2
    nudge = torch.randn_like(hidden)
    up, down = (tiny.model.run_block(2, block, hidden + s * step * nudge, tiny.walk.args, 0) for s in (1, -1))
    slope = float(((up - down) * upper).sum()) / (2 * step)
    assert slope == pytest.approx(float((below * nudge).sum()), rel=2e-2)
    fc2 = next(p for p in tiny.model.prunables(2) if p.name.endswith("fc2"))
    assert torch.allclose(total[fc2.name], upper[0] @ tiny.model.weight(block, fc2), atol=1e-4)


def test_the_increase_is_paired_by_window() -> None:
    dense = [1.0, 2.0, 3.0, 4.0]
    rise, error = increase([loss + 0.01 for loss in dense], dense)
    assert rise == pytest.approx(0.01005, abs=1e-5)
    assert error == pytest.approx(0.0, abs=1e-9)
