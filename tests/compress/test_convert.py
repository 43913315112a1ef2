"""Conversion is lossless in both directions, for matrices, Conv1D and stacked experts, and refuses to guess."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from checkpoints import legacy, model_folder, random_mask, random_tensor, same_bits, write_raw
from families import save_family
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gossamer.compress.checkpoint import assemble
from gossamer.compress.convert import convert
from gossamer.compress.format import pack, sparse_config, summarise
from gossamer.compress.source import OverlaySource, open_source
from gossamer.compress.writer import write_part
from gossamer.errors import CheckpointError, ModelError, RecipeError

OTHERS = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "generation_config.json": "{}",
    "recipe.yaml": "stages: []\n",
    "report.json": "{}",
    "README.md": "# Card\n",
    "layers.png": "png",
    "modeling_own.py": "pass\n",
}


def prunable_tensors(folder: Path) -> dict[str, tuple[torch.Tensor, bool]]:
    """Key -> (tensor, stored as [in, out]) of everything in the blocks with two or more dimensions, by name."""
    tensors = {k: t for path in sorted(folder.glob("model*.safetensors")) for k, t in load_file(path).items()}
    inside = {k: t for k, t in tensors.items() if t.dim() >= 2 and (".layers." in k or ".h." in k)}
    conv1d = ("c_attn", "c_proj", "c_fc")
    return {
        k: (t, any(name in k for name in conv1d) or t.dim() == 3)
        for k, t in inside.items()
        if "router" not in k and ".gate.weight" not in k and "bias" not in k and "sinks" not in k
    }


def prune(folder: Path, out: Path, seed: int = 0, **options) -> Path:
    """A sparse folder with random masks; every second matrix keeps the dense weights it had."""
    parts = out.with_name(out.name + "-parts")
    chosen = sorted(prunable_tensors(folder).items())[::2]
    packed = {}
    for i, (key, (tensor, transposed)) in enumerate(chosen):
        mask = random_mask(*tensor.shape, seed=seed + i, share=0.4)
        packed[key] = pack(tensor, mask, pattern="0.6", transposed=transposed)
    write_part(parts / "block-00000.safetensors", {}, packed)
    assemble(OverlaySource(open_source(folder), parts), out, "sparse", **options)
    config = json.loads((folder / "config.json").read_text())
    config = sparse_config(config, summarise({key: item.record for key, item in packed.items()}))
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, text in OTHERS.items():
        (out / name).write_text(text)
    return out


def weights(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("family", "dtype", "shard"),
    [("llama", torch.bfloat16, 10**9), ("gpt2", torch.float32, 10**9), ("gpt_oss", torch.float16, 40_000),
     ("mixtral", torch.bfloat16, 60_000)],
)  # fmt: skip
def test_there_and_back(tmp_path, family, dtype, shard):
    base = save_family(family, tmp_path / "base", dtype=dtype)
    first = prune(base, tmp_path / "first", max_shard_size=shard)
    files = convert(first, tmp_path / "dense", "dense", max_shard_size=shard)
    assert all(file.is_file() for file in files)
    second = tmp_path / "second"
    convert(tmp_path / "dense", second, "sparse", max_shard_size=shard)
    assert weights(first) == weights(second)
    third = tmp_path / "third"
    convert(second, third, "dense", max_shard_size=shard)
    assert weights(tmp_path / "dense") == weights(third)
    original = {k: t for path in base.glob("*.safetensors") for k, t in load_file(path).items()}
    dense = {k: t for path in third.glob("*.safetensors") for k, t in load_file(path).items()}
    assert {k: (t.shape, t.dtype) for k, t in original.items()} == {k: (t.shape, t.dtype) for k, t in dense.items()}


def test_transformers_loads_the_dense_form(tmp_path):
    base = save_family("gpt2", tmp_path / "base")
    first = prune(base, tmp_path / "first")
    convert(first, tmp_path / "dense", "dense", max_shard_size=100_000)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    source = open_source(first)
    state = model.state_dict()
    for key in source.records():
        assert same_bits(state[key], source.read(key))


def test_config_and_other_files(tmp_path):
    first = prune(save_family("llama", tmp_path / "base"), tmp_path / "first")
    convert(first, tmp_path / "dense", "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["gossamer"]["masks_sha256"]
    for name, text in OTHERS.items():
        assert (tmp_path / "dense" / name).read_text() == text
    (tmp_path / "dense" / "gossamer" / "plan.json").write_text("{}")
    convert(tmp_path / "dense", tmp_path / "again", "sparse")
    assert (tmp_path / "again" / "gossamer" / "plan.json").is_file()
    names = {p.name for p in (tmp_path / "again").rglob("*") if p.is_file()}
    assert names == {"model.sparse.safetensors", "config.json", "plan.json", *OTHERS}


def test_a_sparse_folder_can_be_sharded_anew(tmp_path):
    first = prune(save_family("llama", tmp_path / "base"), tmp_path / "first")
    convert(first, tmp_path / "shards", "sparse", max_shard_size=20_000)
    assert len(list((tmp_path / "shards").glob("model.sparse-*.safetensors"))) > 2
    convert(tmp_path / "shards", tmp_path / "one", "sparse")
    assert weights(first) == weights(tmp_path / "one")


def test_the_old_layout_becomes_ours(tmp_path):
    tensor = random_tensor(7, 13, dtype=torch.bfloat16).masked_fill(~random_mask(7, 13), 0)
    old = {"compression_config": None, "model_type": "llama"} | {
        "quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}}
    }
    write_raw(model_folder(tmp_path / "old", old) / "model.safetensors", legacy("m", tensor))
    convert(tmp_path / "old", tmp_path / "sparse", "sparse")
    convert(tmp_path / "old", tmp_path / "dense", "dense")
    for folder in ("sparse", "dense"):
        source = open_source(tmp_path / folder)
        assert same_bits(source.read("m.weight"), tensor)
        assert torch.equal(source.mask("m.weight").to_bool(), tensor != 0)
    config = json.loads((tmp_path / "sparse" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gossamer"
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


# ---- masks from zeros ------------------------------------------------------------------------------------------------


@pytest.fixture
def zeros(tmp_path) -> Path:
    """A foreign dense checkpoint: gpt_oss with 2:4 zeros in some experts, a zero here and there in the rest."""
    folder = save_family("gpt_oss", tmp_path / "foreign")
    tensors = load_file(folder / "model.safetensors")
    experts = tensors["model.layers.0.mlp.experts.down_proj"]  # [experts, in, out]
    experts.view(*experts.shape[:1], -1, 4, experts.shape[2])[:, :, 1:3] = 0
    query = tensors["model.layers.1.self_attn.q_proj.weight"]
    query[random_mask(*query.shape, share=0.7)] = 0
    query[0, 0] = -0.0
    tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = 0  # packing would not pay
    tensors["model.embed_tokens.weight"][:50] = 0  # never pruned
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_masks_are_never_inferred_in_silence(zeros, tmp_path):
    with pytest.raises(RecipeError, match="has no masks") as caught:
        convert(zeros, tmp_path / "out", "sparse")
    assert "--masks-from-zeros" in caught.value.hint
    assert not list(tmp_path.glob("out*"))


def test_masks_from_zeros_when_asked_for(zeros, tmp_path):
    convert(zeros, tmp_path / "out", "sparse", masks_from_zeros=True)
    source, before = open_source(tmp_path / "out"), load_file(zeros / "model.safetensors")
    experts, query = "model.layers.0.mlp.experts.down_proj", "model.layers.1.self_attn.q_proj.weight"
    assert set(source.records()) == {experts, query}
    assert source.pattern(experts) == "2:4"
    assert source.record(experts).transposed
    assert float(source.pattern(query)) == pytest.approx(0.7, abs=0.05)
    assert bool(source.mask(query).to_bool()[0, 0])  # -0.0 is a value: kept
    assert all(same_bits(source.read(key), tensor) for key, tensor in before.items())


def test_the_command(zeros, tmp_path):
    from typer.testing import CliRunner

    from gossamer.cli.main import app

    words = ["convert", str(zeros), str(tmp_path / "out"), "--to", "sparse"]
    refused = CliRunner().invoke(app, words)
    assert (refused.exit_code, "--masks-from-zeros" in refused.stderr) == (2, True)
    done = CliRunner().invoke(app, [*words, "--masks_from_zeros", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["files"] == [str(tmp_path / "out" / "model.sparse.safetensors")]
    assert CliRunner().invoke(app, [*words, "--masks-from-zeros"]).exit_code == 2
    assert CliRunner().invoke(app, [*words, "--masks-from-zeros", "--overwrite"]).exit_code == 0


@pytest.mark.parametrize("to", ["dense", "sparse"])
def test_masks_from_zeros_is_not_for_everything(zeros, tmp_path, to):
    if to == "sparse":
        zeros = prune(zeros, tmp_path / "masked")
    with pytest.raises(RecipeError, match="--masks-from-zeros|explicit masks"):
        convert(zeros, tmp_path / "out", to, masks_from_zeros=True)


def test_masks_from_zeros_without_zeros(tmp_path):
    folder = save_family("llama", tmp_path / "m")
    with pytest.raises(RecipeError, match="enough zeros"):
        convert(folder, tmp_path / "out", "sparse", masks_from_zeros=True)


# ---- refusals --------------------------------------------------------------------------------------------------------


def tiny(folder: Path, **config) -> Path:
    model_folder(folder, {"model_type": "llama"} | config)
    write_raw(folder / "model.safetensors", {"a.weight": random_tensor(4, 9)})
    return folder


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}},
        "text",
    ],
)
def test_quantised_checkpoints_are_refused(tmp_path, quantization):
    with pytest.raises(ModelError, match="is quantised"):
        convert(tiny(tmp_path / "m", quantization_config=quantization), tmp_path / "out", "dense")


def test_places_that_are_taken(tmp_path):
    model = tiny(tmp_path / "m")
    with pytest.raises(RecipeError, match="is the checkpoint itself"):
        convert(model, tmp_path / "x" / ".." / "m", "dense", overwrite=True)
    (tmp_path / "out").mkdir()
    convert(model, tmp_path / "out", "dense")
    with pytest.raises(RecipeError, match="is not empty"):
        convert(model, tmp_path / "out", "dense")
    (tmp_path / "out" / "old").touch()
    convert(model, tmp_path / "out", "dense", overwrite=True)
    assert not (tmp_path / "out" / "old").exists()
    with pytest.raises(RecipeError, match="'both' is unknown"):
        convert(model, tmp_path / "new", "both")


def test_a_partial_run_of_compress_is_left_alone(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "journal.jsonl").write_text("{}\n")
    with pytest.raises(RecipeError, match="unfinished run"):
        convert(tiny(tmp_path / "m"), tmp_path / "out", "dense")
    assert (tmp_path / "out.partial" / "journal.jsonl").exists()


def test_a_failure_leaves_nothing(tmp_path):
    model = tiny(tmp_path / "m")
    os.truncate(model / "model.safetensors", 150)
    with pytest.raises(CheckpointError):
        convert(model, tmp_path / "out", "dense")
    first = prune(save_family("llama", tmp_path / "base"), tmp_path / "first")
    path = first / "model.sparse.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF  # the last mask
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="_bitmask"):
        convert(first, tmp_path / "out", "dense")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("point", ["assemble", "verify:5", "publish", "published"])
def test_killed_and_repeated(launcher, tmp_path, point):
    first = prune(save_family("llama", tmp_path / "base"), tmp_path / "first")
    convert(first, tmp_path / "undisturbed", "dense")
    command = ["convert", first, tmp_path / "out", "--to", "dense"]
    assert launcher.run(*command, env={"GOSSAMER_FAILPOINT": point}).returncode == -signal.SIGKILL
    assert (tmp_path / "out").exists() == (point == "published")
    if point == "published":  # whole, but the working folder is still there: the next conversion removes it
        assert weights(tmp_path / "out") == weights(tmp_path / "undisturbed")
        (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert launcher.run(*command).returncode == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "undisturbed")
    assert not list(tmp_path.glob("out.*"))
