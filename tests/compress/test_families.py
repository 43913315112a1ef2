"""Every family, streamed: prunable names, bit equality with model.forward, export key for key, masks in place."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, VOCAB, FolderTensors, save_family
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gossamer.compress.blocks import StreamedModel

LENGTH = 24  # longer than every sliding window


@pytest.fixture(scope="module", params=list(FAMILIES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, save_family(request.param, tmp_path_factory.mktemp(request.param))


def open_model(folder: Path, **options) -> StreamedModel:
    return StreamedModel.open(FolderTensors(folder), folder, **options)


def windows(n: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCAB, (n, length), generator=torch.Generator().manual_seed(5))


def reference_pass(folder: Path, path: str, ids: torch.Tensor, dtype: torch.dtype):
    """Outputs of every block and the logits of a model loaded by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    outputs: list[torch.Tensor] = []

    def note(module, args, output):
        outputs.append((output if isinstance(output, torch.Tensor) else output[0]).clone())

    for block in model.get_submodule(path):
        block.register_forward_hook(note)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    return outputs, logits


def check_equal_to_forward(folder: Path, path: str, dtype: torch.dtype) -> None:
    model, ids = open_model(folder, dtype=dtype), windows()
    hidden: dict[int, torch.Tensor] = {}
    args = model.capture(ids, hidden.__setitem__)
    for w in range(len(ids)):
        outputs, logits = reference_pass(folder, path, ids[w : w + 1], dtype)
        x = hidden[w]
        for i in range(model.num_blocks):
            x = model.run_block(i, model.load_block(i), x, args, w)
            assert x.dtype == dtype
            assert torch.equal(x, outputs[i]), f"block {i}, window {w}"
        assert torch.equal(model.logits(x, args, w), logits[0].float())


def test_streaming_equals_forward_bit_for_bit(saved):
    name, folder = saved
    check_equal_to_forward(folder, FAMILIES[name].path, torch.float32)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_equals_forward_bit_for_bit(name, dtype, tmp_path):
    check_equal_to_forward(save_family(name, tmp_path, dtype=dtype), FAMILIES[name].path, dtype)


def test_prunables_are_the_hand_written_ones(saved):
    name, folder = saved
    family, model = FAMILIES[name], open_model(folder)
    assert model.block_names[0] == f"{family.path}.0"
    found = {p.name: p.shape for p in model.prunables(0)}
    assert found == {f"{family.path}.0.{n}": shape for n, shape in family.prunable.items()}
    assert [n for n, _ in model.unprunable(0)] == [f"{family.path}.0.{n}" for n in family.unprunable]
    assert all(reason for _, reason in model.unprunable(0))


def test_steps_are_the_hand_written_ones(saved):
    name, folder = saved
    family, model = FAMILIES[name], open_model(folder)
    hidden: dict[int, torch.Tensor] = {}
    args = model.capture(windows(1), hidden.__setitem__)
    steps = model.input_steps(0, model.load_block(0), hidden[0], args)
    prefix = f"{family.path}.0."
    assert [[sorted(p.name for p in g) for g in s] for s in steps] == [
        [sorted(prefix + n for n in g) for g in s] for s in family.steps
    ]


def test_keys_are_split_without_loss(saved):
    _, folder = saved
    model, source = open_model(folder), FolderTensors(folder)
    parts = [key for i in range(model.num_blocks) for key in model.block_keys(i)] + model.outer_keys()
    assert sorted(parts) == sorted(source.keys())
    assert not source.reads


def test_unchanged_export_equals_source(saved):
    _, folder = saved
    model, source = open_model(folder), FolderTensors(folder)
    for i in range(model.num_blocks):
        names = [p.name for p in model.prunables(i)]
        exported = model.export_block(i, model.load_block(i), dict.fromkeys(names))
        promised = {key for p in model.prunables(i) for key in model.source_keys(p)}
        assert {e.key for e in exported} == promised
        for e in exported:
            assert e.mask is None
            assert torch.equal(e.tensor, source.read(e.key))
            assert e.tensor.dtype == source.read(e.key).dtype


def random_masks(model: StreamedModel, i: int, seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + i)
    return {p.name: torch.rand(p.shape, generator=generator) < 0.5 for p in model.prunables(i)}


def write(folder: Path, files: dict[Path, dict[str, torch.Tensor]], out: Path) -> None:
    for file in folder.glob("*.json"):
        shutil.copy(file, out)
    for file, tensors in files.items():
        save_file(tensors, out / file.name, metadata={"format": "pt"})


def matrix_in(model, name: str, kind: str) -> torch.Tensor:
    """[out, in] of a prunable in a model loaded by transformers, by the layout its classes document."""
    if kind == "expert":
        path, _, expert = name.rpartition(".")
        stack = model.get_parameter(path)[int(expert)]
        return stack.T if model.config.model_type == "gpt_oss" else stack
    weight = model.get_parameter(f"{name}.weight")
    return weight.T if kind == "conv1d" else weight


def test_masked_export_loads_as_the_masked_model(saved, tmp_path):
    """Write the export into a copy of the checkpoint, load it by transformers: exactly the masked entries are zero."""
    _, folder = saved
    model = open_model(folder)
    files = {f: load_file(f) for f in folder.glob("*.safetensors")}
    masks: dict[str, torch.Tensor] = {}
    kinds = {p.name: p.kind for i in range(model.num_blocks) for p in model.prunables(i)}
    for i in range(model.num_blocks):
        mine = random_masks(model, i)
        for e in model.export_block(i, model.load_block(i), mine):
            tensors = next(t for t in files.values() if e.key in t)
            assert e.mask.shape == e.tensor.shape == tensors[e.key].shape
            assert torch.equal(e.tensor, torch.where(e.mask, tensors[e.key], 0.0))
            assert not torch.signbit(e.tensor[~e.mask]).any()
            tensors[e.key] = e.tensor
        masks |= mine
    write(folder, files, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    original = AutoModelForCausalLM.from_pretrained(folder)
    for name, mask in masks.items():
        now, before = matrix_in(loaded, name, kinds[name]), matrix_in(original, name, kinds[name])
        assert torch.equal(now, torch.where(mask, before, 0.0)), name
