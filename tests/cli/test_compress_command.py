"""gossamer compress: options become the recipe, and the recipe alone."""

from __future__ import annotations

import json
import re
import shlex
import types
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from gossamer.cli.main import app
from gossamer.compress.recipe import (
    DEFAULT_CALIBRATION,
    EvaluateStage,
    ExportStage,
    Machine,
    NmFlowStage,
    PruneStage,
    Recipe,
)
from gossamer.compress.stage_recipes.evaluate import DEFAULT_EVALUATION
from gossamer.compress.stage_recipes.sparsity import DEFAULT_SPARSITY


class Driver(types.ModuleType):
    """Stands in for compress.run: keeps what the command asked for."""

    def __init__(self) -> None:
        super().__init__("gossamer.compress.run")
        self.asked: dict = {}

    def compress(self, **job):
        self.asked = job
        report = types.SimpleNamespace(data={"evaluation": None, "bad": float("inf")})
        report.rows = lambda: [("perplexity", "4.2800", "9.9000")]
        report.footer = lambda: ["3.0 s, peak memory 1.00 GB"]
        return report


@pytest.fixture
def driver(monkeypatch):
    fake = Driver()
    monkeypatch.setitem(__import__("sys").modules, "gossamer.compress.run", fake)
    return fake


def run(*words: str):
    return CliRunner().invoke(app, ["compress", *words])


def asked(driver, *words: str) -> Recipe:
    result = run("MODEL", "-o", "OUT", *words)
    assert result.exit_code == 0, result.output
    return driver.asked["recipe"]


def test_no_options_give_the_default_recipe(driver):
    recipe = asked(driver)
    assert recipe == Recipe(stages=[PruneStage(), EvaluateStage(), ExportStage()])
    assert driver.asked["machine"] == Machine()
    assert (driver.asked["model"], driver.asked["out"]) == ("MODEL", Path("OUT"))
    assert [driver.asked[key] for key in ("revision", "token", "resume", "overwrite", "trust_remote_code")] == [
        None, None, False, False, False,
    ]  # fmt: skip


ALL = (
    "--method wanda --sparsity 0.6 --allocation owl --reconstruct --include q_proj --include k_proj --exclude down "
    "--untie --calibration c.txt --nsamples 8 --seqlen 64 --scope row --eval e.txt --eval-seqlen 32 --eval-windows 5 "
    "--allow-overlap --seed 7 --format both --values int8 --max-shard-size 1GB"
)


def test_every_option_reaches_the_recipe(driver):
    assert asked(driver, *ALL.split()) == Recipe(
        stages=[
            PruneStage(
                method="wanda", sparsity=0.6, allocation="owl", scope="row", reconstruct=True,
                include=("q_proj", "k_proj"), exclude=("down",), untie=True, calibration="c.txt", nsamples=8, seqlen=64,
            ),
            EvaluateStage(data="e.txt", seqlen=32, windows=5),
            ExportStage(format="both", values="int8", max_shard_size="1GB"),
        ],
        seed=7,
        allow_overlap=True,
    )  # fmt: skip


def test_machine_and_loading_options(driver):
    words = (
        "--device cpu --dtype bfloat16 --max-memory 2GiB --revision main --token SECRET --trust-remote-code --resume"
    )
    asked(driver, *words.split(), "--overwrite")
    assert driver.asked["machine"] == Machine(device="cpu", dtype="bfloat16", max_memory="2GiB")
    assert [driver.asked[key] for key in ("revision", "token", "resume", "overwrite", "trust_remote_code")] == [
        "main", "SECRET", True, True, True,
    ]  # fmt: skip


def test_underscores_are_accepted(driver):
    words = (
        "--eval_seqlen 32 --eval_windows 5 --allow_overlap --max_memory 1GiB --max_shard_size 1GB --trust_remote_code"
    )
    recipe = asked(driver, *words.split())
    assert recipe.stages[1] == EvaluateStage(seqlen=32, windows=5)
    assert recipe.allow_overlap


def test_pattern_and_no_eval(driver):
    recipe = asked(driver, "--pattern", "2:4", "--no_eval")
    assert recipe.stages == (PruneStage(pattern="2:4"), ExportStage())
    assert asked(driver, "--pattern", "block:4x8", "--sparsity", "0.7").stages[0].pattern_text == "block:4x8:0.7"


def test_the_card_gets_the_command_without_the_token(driver):
    asked(driver, "--token", "SECRET", "--include", "a b", "--no-eval")
    command = driver.asked["command"]
    assert "SECRET" not in command
    assert shlex.split(command) == [
        "gossamer", "compress", "MODEL", "-o", "OUT", "--token", "...", "--include", "a b", "--no-eval",
    ]  # fmt: skip
    asked(driver, "--token=SECRET")
    assert "SECRET" not in driver.asked["command"]


def test_recipe_file(driver, tmp_path):
    recipe = Recipe(stages=[PruneStage(sparsity=0.3), PruneStage(sparsity=0.6), EvaluateStage(windows=3)], seed=4)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert asked(driver, "--recipe", str(tmp_path / "r.yaml"), "--max-memory", "1GiB") == recipe


@pytest.mark.parametrize("option", [word for word in ALL.split() if word.startswith("--")])
def test_recipe_file_excludes_stage_options(driver, tmp_path, option):
    (tmp_path / "r.yaml").write_text(Recipe(stages=[PruneStage()]).to_yaml())
    given = shlex.split(re.search(rf"{option}( [^-]\S*)?", ALL)[0])
    result = run("M", "-o", "O", "--recipe", str(tmp_path / "r.yaml"), *given)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: --recipe cannot be combined with {option}\n")
    assert not driver.asked


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sparsity 0.5 --pattern 2:4", "sparsity or pattern, not both"),
        ("--sparsity 1", "sparsity must be in [0, 1), got 1"),
        ("--sparsity -0.1", "got -0.1"),
        ("--include (", "not a valid regular expression"),
        ("--allocation owl --pattern 2:4", "owl"),
        ("--allocation best", "allocation"),
        ("--scope layer", "scope"),
        ("--format zip", "format"),
        ("--values int4", "values"),
        ("--nsamples 0", "nsamples"),
        ("--seqlen 1", "seqlen"),
        ("--dtype int8", "dtype"),
        ("--max-memory 3XB", "is not a size"),
        ("--seed -1", "seed"),
        ("--no-eval --eval e.txt", "--no-eval contradicts --eval"),
        ("--no-eval --eval-windows 3", "--no-eval contradicts --eval-windows"),
        ("--recipe missing.yaml", "recipe missing.yaml cannot be read"),
    ],
)
def test_bad_options_are_one_line(driver, words, message):
    result = run("M", "-o", "O", *words.split())
    assert result.exit_code == 2, result.output
    first, *rest = result.stderr.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert all(line.startswith("hint: ") for line in rest)
    assert len(rest) <= 1
    assert not driver.asked


@pytest.mark.parametrize("words", ["M", "-o O", "M -o O --sparsity half", "M -o O --nonsense", "M N -o O"])
def test_bad_usage(driver, words):
    assert run(*words.split()).exit_code == 2
    assert not driver.asked


def test_table_and_json(driver):
    result = run("M", "-o", "O")
    assert "perplexity" in result.stdout
    assert "9.9000" in result.stdout
    assert "peak memory" in result.stdout
    document = json.loads(run("M", "-o", "O", "--json").stdout)
    assert document == {"evaluation": None, "bad": None}


def test_quiet_says_nothing_on_stderr(driver):
    assert run("M", "-o", "O", "-q").stderr == ""


def test_defaults_on_the_help_page_are_the_recipe_s():
    """The page may not import pydantic, so its defaults are text: here they meet the recipe."""
    prune, export, machine = PruneStage(), ExportStage(), Machine()
    said = {
        "--method": prune.method, "--sparsity": DEFAULT_SPARSITY, "--allocation": prune.allocation,
        "--nsamples": prune.nsamples, "--eval": DEFAULT_EVALUATION, "--seed": Recipe(stages=[prune]).seed,
        "--format": export.format, "--values": export.values, "--max-shard-size": export.max_shard_size,
        "--device": machine.device, "--dtype": machine.dtype, "--max-memory": machine.max_memory,
        "--calibration": f"{DEFAULT_CALIBRATION}, where the method needs text",
    }  # fmt: skip
    shown = {}
    for param in typer.main.get_command(app).commands["compress"].params:
        if found := re.search(r"\\\[default: (.+)\]$", param.help or ""):
            shown[param.opts[-1]] = found[1]
    assert {name: shown[name] for name in said} == {name: str(value) for name, value in said.items()}
    evaluate = {param.opts[-1]: param.default for param in typer.main.get_command(app).commands["eval"].params}
    assert evaluate["--data"] == EvaluateStage().data


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--method", "imp", "--sparsity", "0.9", "--steps", "12", "--set", "phases=4"], {"stage": "imp", "phases": 4}),
        (
            [
                "--method",
                "soup",
                "--steps",
                "9",
                "--set",
                "factor=learning-rate",
                "--set",
                "factor-values=1e-3,2e-3,5e-4",
            ],
            {"stage": "soup", "candidates": 3, "factor_values": ["1e-3", "2e-3", "5e-4"]},
        ),
        (["--method", "gradual", "--scope", "matrix", "--set", "every=3"], {"stage": "gradual", "every": 3}),
        (["--method", "random", "--set", "tries=2"], {"stage": "random", "tries": 2}),
    ],
)
def test_methods_that_prune_while_they_train(launcher, tiny, tmp_path, words, expected):
    texts = ["--data", tiny / "calibration.txt", "--seqlen", "32", "--no-eval", "--dry-run", "--json"]
    if "--steps" not in words:
        texts += ["--steps", "6"]
    done = launcher.run("compress", tiny, "-o", tmp_path / "out", *words, *texts)
    stage = done.json()["recipe"]["stages"][0]
    assert {key: stage[key] for key in expected} == expected


TRAIN = (
    "--method nm-flow --pattern 1:8 --pattern-for self_attn=2:4 --pattern-for up=dense --exclude down --seqlen 64 "
    "--data t.jsonl --steps 5 --learning-rate 0.01 --set flow=sr-ste --set batch=16 --set decoupled=false "
    "--set clip=none --set weight-decay=0.1 --no-eval"
)


def test_a_method_that_trains_is_a_stage_of_its_own(driver):
    assert asked(driver, *TRAIN.split()).stages == (
        NmFlowStage(
            pattern="1:8", patterns={"self_attn": "2:4", "up": "dense"}, exclude=("down",), seqlen=64, data="t.jsonl",
            steps=5, learning_rate=0.01, flow="sr-ste", batch=16, decoupled=False, clip=None, weight_decay=0.1,
        ),
        ExportStage(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method wanda --steps 5", "--steps belongs to methods that train: .*nm-flow"),
        ("--set batch=3", "--set belongs to methods that train"),
        ("--method nmflow", "method 'nmflow' is unknown; allowed: .*nm-flow"),
        ("--method nm-flow --calibration c.txt", "--calibration is for methods that measure; nm-flow trains"),
        ("--method nm-flow --set batch", "--set 'batch' is not understood"),
        ("--method nm-flow --set steps=3 --steps 4", "steps is given twice"),
        ("--method nm-flow --set stepz=3", "stepz is no field of a recipe; did you mean steps?"),
        ("--method nm-flow --set batch=two", "batch must be a valid integer"),
        ("--method nm-flow --nsamples 5", "nsamples is no field of a recipe"),
        ("--recipe r.yaml --data t.txt --set a=b", "--recipe cannot be combined with --data, --set"),
    ],
)
def test_options_of_training_that_contradict(driver, words, said):
    result = run("MODEL", "-o", "OUT", *words.split())
    assert result.exit_code == 2
    assert re.search(said, " ".join(result.output.split())), result.output
