"""`gossamer inspect --activation`: CETT curves against loops, perplexities against transformers and reports."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from processes import Launcher
from tiny import report
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer.compress.activation.inspect import POINTS, NeuronCurve, inspect_activation
from gossamer.errors import DataError


@pytest.fixture(scope="module")
def curve():
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(37, 23, generator=generator)
    weight = torch.randn(11, 23, generator=generator)
    weight[:, 5] = 0  # a neuron without output is inactive at any threshold
    return NeuronCurve("down", weight.norm(dim=0), inner, weight), inner, weight


def test_the_curve_is_its_definition(curve):
    made, inner, weight = curve
    for threshold, share, cett in zip(made.thresholds, made.shares, made.cett, strict=True):
        inactive, errors = 0, []
        for row in inner:
            missed = torch.zeros(11, dtype=torch.float64)
            for i in range(23):
                if abs(row[i]) * weight[:, i].norm() <= threshold:
                    inactive += 1
                    missed += weight[:, i].double() * row[i].double()
            errors.append(float(missed.norm() / (weight.double() @ row.double()).norm()))
        assert share == pytest.approx(inactive / inner.numel(), abs=1e-6)
        assert cett == pytest.approx(sum(errors) / len(errors), abs=1e-4)
    assert made.cett[0] == 0
    assert made.shares[2:] == pytest.approx(POINTS[2:], abs=1.01 / inner.numel())


def test_a_cett_gives_the_largest_threshold_that_keeps_it(curve):
    made, _, _ = curve
    assert made.threshold(0.0) == made.thresholds[0]
    assert made.threshold(2.0) == made.thresholds[-1]
    for low, high in zip(range(2, len(POINTS) - 1), range(3, len(POINTS)), strict=True):
        between = made.threshold((made.cett[low] + made.cett[high]) / 2)
        assert between == pytest.approx((made.thresholds[low] + made.thresholds[high]) / 2)


def test_thresholds_of_the_policy_are_those_of_the_neurons(curve):
    made, inner, weight = curve
    limit = made.threshold(0.3)
    skipped = inner.abs() <= made.entry(0.3).threshold
    assert torch.equal(skipped, inner.abs() * weight.norm(dim=0) <= limit)
    assert skipped[:, 5].all()


def test_a_share_that_is_zero_anyway_costs_nothing():
    """Of a ReLU model most neurons are zero: the curve goes on to 99.9 % of them, and the table has a value at each."""
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(400, 60, generator=generator).sub(1.5).relu()
    weight = torch.randn(11, 60, generator=generator)
    made = NeuronCurve("down", weight.norm(dim=0), inner, weight)
    natural = float((inner == 0).float().mean())
    assert natural > 0.9
    assert made.at(0.5) == made.at(0.9) == 0.0
    assert made.shares[-1] == pytest.approx(0.999, abs=1e-3)
    known = [k for k, share in enumerate(made.shares) if share > natural + 1e-3]
    assert len(known) >= 4
    low, high = known[0], known[1]
    middle = (made.shares[low] + made.shares[high]) / 2
    assert made.at(middle) == pytest.approx((made.cett[low] + made.cett[high]) / 2)


@pytest.fixture(scope="module")
def skipping(launcher: Launcher, tiny: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("inspected") / "out"
    texts = ["--calibration", tiny / "calibration.txt", "--eval", tiny / "heldout.txt"]
    sizes = ["--nsamples", "8", "--seqlen", "32", "--eval-windows", "4"]
    done = launcher.run(
        "compress", tiny, "-o", out, *texts, *sizes, "--activation", "auto", "--activation-sparsity", 0.4
    )
    assert done.returncode == 0, done.stderr
    return out


def test_it_says_what_the_report_of_the_run_said(launcher: Launcher, tiny: Path, skipping: Path):
    evaluation = report(skipping)["evaluation"]
    heldout = tiny / "heldout.txt"
    words = ["inspect", skipping, "--activation", "--data", heldout, "--seqlen", 32, "--windows", 4]
    found = launcher.run(*words, "--json").json()
    said = evaluation["activation"]
    assert found["protocol"]["windows"] == 4
    assert found["perplexity"] == pytest.approx(said["before"]["perplexity"], rel=1e-6)
    policy = found["policy"]
    assert policy["method"] == "auto"
    assert policy["perplexity"] == pytest.approx(said["after"]["perplexity"], rel=1e-6)
    assert policy["sparsity"] == pytest.approx(said["sparsity"], abs=1e-6)
    assert policy["matrices"] == pytest.approx(said["matrices"], abs=1e-5)
    text = launcher.run(*words).stdout
    assert "PPL-1% sparsity" in text
    assert f"policy auto: {policy['sparsity']:.1%} of the linear weights skipped" in text


def test_perplexities_are_those_of_plain_transformers(tiny: Path):
    """Dense, and with every neuron below the shared CETT's threshold off at the scored positions."""
    found = inspect_activation(tiny, str(tiny / "heldout.txt"), seqlen=32, windows=3)
    ids = AutoTokenizer.from_pretrained(tiny)((tiny / "heldout.txt").read_text(), return_tensors="pt").input_ids[0]
    windows = ids[: 3 * 32].view(3, 32)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    start = 8  # a quarter of 32

    @torch.no_grad()
    def perplexity() -> float:
        losses = [
            torch.nn.functional.cross_entropy(model(w[None]).logits[0, start:-1], w[start + 1 :]) for w in windows
        ]
        return math.exp(sum(map(float, losses)) / 3)

    dense = perplexity()
    assert found["perplexity"] == pytest.approx(dense, rel=1e-5)
    assert "policy" not in found
    downs = [block.mlp.down_proj for block in model.model.layers]
    inputs: list[list[torch.Tensor]] = [[] for _ in downs]
    hooks = [
        d.register_forward_pre_hook(lambda _, x, k=k: inputs[k].append(x[0][0, start:])) for k, d in enumerate(downs)
    ]
    perplexity()
    for hook in hooks:
        hook.remove()
    curves = [
        NeuronCurve("", d.weight.detach().norm(dim=0), torch.cat(x), d.weight.detach())
        for d, x in zip(downs, inputs, strict=True)
    ]
    for percent, limit in (("1%", 0.01), ("5%", 0.05)):
        said = found["ppl"][percent]
        limits = [curve.entry(said["cett"]).threshold for curve in curves]

        def off(module: torch.nn.Module, x: tuple, limits: list = limits) -> tuple:
            kept = x[0].clone()
            kept[:, start:][kept[:, start:].abs() <= limits[downs.index(module)]] = 0
            return (kept,)

        hooks = [down.register_forward_pre_hook(off) for down in downs]
        sparse = perplexity()
        for hook in hooks:
            hook.remove()
        assert said["increase"] <= limit
        assert sparse / dense - 1 == pytest.approx(said["increase"], abs=2e-4)
    assert found["ppl"]["1%"]["sparsity"] <= found["ppl"]["5%"]["sparsity"]


def test_what_cannot_be_inspected_is_refused(launcher: Launcher, tiny: Path, tmp_path: Path):
    done = launcher.run("inspect", tiny, "--windows", 4)
    assert done.returncode == 2
    assert done.errors() == ["error: --data, --seqlen and --windows belong to --activation"]
    with pytest.raises(DataError, match="missing.txt does not exist"):
        inspect_activation(tiny, str(tmp_path / "missing.txt"))
    for words, said in (
        (["--seqlen", 0], "--seqlen must be at least 2, got 0"),
        (["--windows", 0], "at least 1, got 0"),
    ):
        done = launcher.run("inspect", tiny, "--activation", "--data", tiny / "heldout.txt", *words)
        assert done.returncode == 2
        assert said in done.errors()[0]
