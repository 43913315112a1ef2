"""The figures of `--dry-run`: bytes are those that a run then writes, memory is near the peak that it then has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import save_family
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.compress import run as driver
from gossamer.compress.estimate import folder_bytes
from gossamer.compress.recipe import ExportStage, PruneStage, Recipe
from gossamer.compress.run import compress, plan
from gossamer.errors import ResourceError

HALF = PruneStage(method="magnitude")


def recipe(*stages: PruneStage, form: str = "sparse", values: str = "same") -> Recipe:
    return Recipe(stages=[*stages, ExportStage(format=form, values=values)])


CASES = {
    "sparse": ("llama", recipe(HALF)),
    "dense": ("llama", recipe(HALF, form="dense")),
    "both": ("gpt2", recipe(HALF, form="both")),
    "n of m": ("gpt_oss", recipe(PruneStage(method="magnitude", pattern="1:4"))),
    "experts in several tensors": ("mixtral", recipe(PruneStage(method="magnitude", sparsity=0.37))),
    "some experts": ("gpt_oss", recipe(PruneStage(method="magnitude", exclude=(r"gate_up_proj\.[12]$",)))),
    "int8 values": ("gpt2", recipe(HALF, form="both", values="int8")),
    "int8 values of experts": ("gpt_oss", recipe(PruneStage(method="magnitude", sparsity=0.9), values="int8")),
    "int8 values of a head": (
        "qwen3",
        recipe(PruneStage(method="magnitude", untie=True, include=("lm_head", "mlp")), values="int8"),
    ),
    "two stages": ("llama", recipe(PruneStage(method="magnitude", sparsity=0.3), HALF)),
    "two stages, other matrices": (
        "llama",
        recipe(PruneStage(method="magnitude", include=("mlp",)), PruneStage(method="magnitude", include=("attn",))),
    ),
    "untied head": ("qwen3", recipe(PruneStage(method="magnitude", untie=True, include=("lm_head", "mlp")))),
    "untied, not pruned": ("qwen3", recipe(PruneStage(method="magnitude", untie=True), form="both")),
}


@pytest.mark.parametrize("case", list(CASES))
def test_bytes_are_exact(case, tmp_path, monkeypatch):
    name, what = CASES[case]
    model = save_family(name, tmp_path / "model", dtype=torch.bfloat16)
    found = plan(model, tmp_path / "out", what).estimate
    most: list[int] = []
    publish = driver._publish

    def publishing(context, *rest):
        files = list(context.partial.rglob("*.safetensors"))
        most.append(sum(path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in files))
        publish(context, *rest)

    monkeypatch.setattr(driver, "_publish", publishing)
    report = compress(model, tmp_path / "out", what)
    payload = report["bytes"]["payload"]
    sparse = sum(size for file, size in payload.items() if "sparse" in file)
    assert found.payload.get("sparse", 0) == sparse
    assert found.payload.get("dense", 0) == sum(payload.values()) - sparse
    assert sum(found.payload.values()) == report["bytes"]["after"]
    assert most == [found.disk]


def test_memory_limit_and_spilled_states(tmp_path):
    """Hidden states beyond half of the limit go to disk, and are counted there."""
    from gossamer.compress.needs import held
    from gossamer.compress.recipe import Machine
    from gossamer.compress.stages.prune_needs import prune_needs

    model = save_family("llama", tmp_path / "model")
    made = plan(model, tmp_path / "out", recipe(HALF), Machine(max_memory="20000"))
    stage = made.changes[0]
    object.__setattr__(stage, "windows", torch.zeros(10, 16, dtype=torch.int64))
    states = 10 * 16 * 48 * 4
    assert held(made, states) == 10000
    assert prune_needs(made, stage).disk == states - 10000


def test_a_full_disk_is_found_before_a_weight_is_read(tmp_path, monkeypatch):
    import shutil

    from gossamer.compress.safefile import SafeFile

    model = save_family("llama", tmp_path / "model")
    needed = plan(model, tmp_path / "out", recipe(HALF)).estimate.disk
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(SafeFile, "_read", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert plan(model, tmp_path / "out", recipe(HALF)).estimate.free == needed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(ResourceError, match="are free") as caught:
        compress(model, tmp_path / "out", recipe(HALF))
    assert "free disk space" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "block").write_bytes(b"1")
    assert plan(model, tmp_path / "out", recipe(HALF), resume=True).estimate.disk == needed


def test_folder_bytes(tmp_path):
    assert folder_bytes(tmp_path / "none") == 0
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"12345")
    (tmp_path / "c").write_bytes(b"1")
    assert folder_bytes(tmp_path) == 6


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """Wide enough for its matrices to be seen beside the libraries' own memory."""
    from tiny import save_texts, save_tokenizer

    folder = tmp_path_factory.mktemp("wide")
    config = LlamaConfig(
        vocab_size=320, hidden_size=1024, intermediate_size=2816, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    save_texts(folder)
    return folder


@pytest.mark.parametrize(("method", "cause"), [("sparsegpt", "down_proj (1024 x 2816)"), ("wanda", "(2816 x 1024)")])
def test_memory_is_near_the_measured_peak(wide, launcher, tmp_path, method, cause):
    words = ["compress", wide, "-o", tmp_path / "out", "--method", method, "--nsamples", 4, "--seqlen", 64, "--no-eval"]
    words += ["--calibration", wide / "calibration.txt", "--json", "-q"]
    found = launcher.run(*words, "--dry-run").json()["estimate"]
    peak = launcher.run(*words).json()["peak_memory_bytes"]
    assert found["peak"]["cause"].endswith(cause)
    more, wanted = peak - found["resident"], found["peak"]["bytes"] - found["resident"]
    assert 0.5 * wanted <= more <= 1.1 * wanted, (more, wanted)


def test_dry_run_prints_and_writes_them(wide, launcher, tmp_path):
    words = [
        "compress",
        wide,
        "-o",
        tmp_path / "out",
        "--method",
        "magnitude",
        "--no-eval",
        "--format",
        "both",
        "--dry-run",
    ]
    said = launcher.run(*words).stdout
    document = json.loads(launcher.run(*words, "--json").stdout)
    assert set(document["estimate"]) == {"payload", "disk", "free", "resident", "peak"}
    dense, sparse = document["estimate"]["payload"]["dense"], document["estimate"]["payload"]["sparse"]
    assert f"output: {dense / 1e6:.2f} MB dense, {sparse / 1e6:.2f} MB sparse" in said
    assert f"disk while it runs: {document['estimate']['disk'] / 1e6:.2f} MB, of " in said
    assert "peak memory: about " in said
    assert "model.layers.0.mlp." in said.partition("peak memory: about ")[2].splitlines()[0]
    assert not (tmp_path / "out").exists()
