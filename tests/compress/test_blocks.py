"""StreamedModel: what is in memory when, what is recorded, the head, dtypes and names, how bad models are refused."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from families import VOCAB, FolderTensors, save_family
from safetensors.torch import load_file, save_file
from streamed import captured, ids, open_model
from torch import nn
from transformers import AutoModelForCausalLM

from gossamer.compress.blocks import HEAD, StreamedModel
from gossamer.compress.capture import Recorder
from gossamer.compress.hf_private import PRIVATE_NAMES, resolve_names
from gossamer.errors import ModelError


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_family("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> Path:
    """Tied embeddings."""
    return save_family("qwen3", tmp_path_factory.mktemp("qwen3"))


def edited(folder: Path, out: Path, *, config=None, tensors=None) -> Path:
    """A copy of a single-file checkpoint with changes: `config` updates config.json, `tensors(dict)` the weights."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    if config is not None:
        values = json.loads((out / "config.json").read_text()) | config
        (out / "config.json").write_text(json.dumps(values))
    if tensors is not None:
        save_file(tensors(load_file(out / "model.safetensors")), out / "model.safetensors", metadata={"format": "pt"})
    return out


# ---- what is in memory ----------------------------------------------------------------------------------------------


def resident(model: StreamedModel) -> list[str]:
    return [name for name, p in model._model.named_parameters() if not p.is_meta]


def test_opening_reads_no_weights(llama):
    source = FolderTensors(llama)
    model = StreamedModel.open(source, llama)
    for i in range(model.num_blocks):
        for prunable in model.prunables(i):
            model.source_keys(prunable)
    assert not source.reads
    assert resident(model) == []
    assert (model.num_blocks, model.vocab_size, model.max_positions) == (3, VOCAB, 128)


def test_a_block_reads_its_own_keys_and_is_freed(llama):
    source = FolderTensors(llama)
    model = StreamedModel.open(source, llama)
    block = model.load_block(1)
    assert sorted(source.reads) == sorted(model.block_keys(1))
    assert all(key.startswith("model.layers.1.") for key in source.reads)
    assert resident(model) == []
    assert not block.training
    assert not any(p.requires_grad for p in block.parameters())
    alive = [weakref.ref(p) for p in block.parameters()]
    del block
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_two_copies_of_a_block_are_independent(llama):
    model = open_model(llama)
    first, second = model.load_block(0), model.load_block(0)
    prunable = model.prunables(0)[0]
    model.set_weight(first, prunable, torch.zeros(prunable.shape))
    assert model.weight(second, prunable).abs().min() > 0


def test_outer_modules_come_and_go(llama):
    source = FolderTensors(llama)
    model = StreamedModel.open(source, llama)
    with model.outer():
        with model.outer():
            pass
        assert resident(model) == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
        assert sorted(source.reads) == sorted(model.outer_keys())
    assert resident(model) == []


# ---- what is recorded -----------------------------------------------------------------------------------------------


def test_equal_arguments_are_stored_once(tmp_path):
    model = open_model(save_family("gemma2", tmp_path))
    one, _ = captured(model, 1)
    many, hidden = captured(model, 5)
    assert len(hidden) == 5
    assert one.nbytes == many.nbytes > 0
    assert len(many.calls) == 2, "sliding and full layers have their own masks"
    assert many.index == [dict.fromkeys(range(5), call) for call in (0, 1, 0, 1)]


def test_arguments_that_depend_on_the_input_are_kept_per_window(tmp_path):
    recorder = Recorder(ids(3), 1)
    for w in range(3):
        recorder.start(w)
        hidden, extra = torch.zeros(1, 4, 2), torch.full((2,), float(w == 2))
        recorder.note(0, (hidden,), {"extra": extra, "same": torch.ones(3), "flag": None}, hidden)
        extra += 5  # recorded values must not follow
    record = recorder.record
    assert record.index == [{0: 0, 1: 0, 2: 1}]
    assert record.arguments(0, 2, hidden)[1]["extra"].tolist() == [1.0, 1.0]
    assert len(record.pool) == 3


def test_only_some_windows_are_captured(llama):
    model, hidden = open_model(llama), {}
    args = model.capture(ids(5), hidden.__setitem__, indices=[1, 4])
    assert sorted(hidden) == [1, 4]
    assert (args.length, len(args.windows)) == (20, 5)
    everything = {}
    model.capture(ids(5), everything.__setitem__)
    assert torch.equal(hidden[4], everything[4])
    out = model.run_block(2, model.load_block(2), hidden[4], args, 4)
    assert out.shape == (1, 20, 48)


def test_run_block_leaves_its_input_alone(llama):
    model = open_model(llama)
    args, hidden = captured(model)
    before = hidden[0].clone()
    out = model.run_block(0, model.load_block(0), hidden[0], args, 0)
    assert torch.equal(hidden[0], before)
    assert not torch.equal(out, before)


# ---- the head -------------------------------------------------------------------------------------------------------


def test_untied_head(llama):
    model = open_model(llama)
    head = model.head()
    assert (head.name, head.block, head.shape, model.head_is_tied) == ("lm_head", HEAD, (VOCAB, 48), False)
    assert model.source_keys(head) == ["lm_head.weight"]
    loaded = model.load_head()
    truth = load_file(llama / "model.safetensors")["lm_head.weight"]
    assert torch.equal(model.weight(loaded, head), truth)
    mask = torch.rand(head.shape) < 0.5
    model.set_weight(loaded, head, truth * 2)
    (exported,) = model.export_head(loaded, mask)
    assert exported.key == "lm_head.weight"
    assert torch.equal(exported.tensor, torch.where(mask, truth * 2, 0.0))


def test_tied_head_and_untying(qwen3):
    tied, free = open_model(qwen3), open_model(qwen3, untie=True)
    assert tied.head_is_tied
    assert not free.head_is_tied
    embedding = load_file(qwen3 / "model.safetensors")["model.embed_tokens.weight"]
    head = free.load_head()
    assert torch.equal(free.weight(head, free.head()), embedding)
    (exported,) = free.export_head(head, None)
    assert exported.key == "lm_head.weight"
    assert torch.equal(exported.tensor, embedding)
    assert free.config.tie_word_embeddings is False
    args, hidden = captured(tied, 1)
    assert torch.equal(free.logits(hidden[0], args, 0), tied.logits(hidden[0], args, 0))


def test_two_stored_matrices_that_differ_are_not_tied(qwen3, tmp_path):
    key = "model.embed_tokens.weight"
    same = edited(qwen3, tmp_path / "same", tensors=lambda t: t | {"lm_head.weight": t[key].clone()})
    other = edited(qwen3, tmp_path / "other", tensors=lambda t: t | {"lm_head.weight": t[key] + 1})
    assert open_model(same).head_is_tied
    model = open_model(other)
    assert not model.head_is_tied
    args, hidden = captured(model, 1)
    x = model.head_input(hidden[0], args, 0)
    assert torch.equal(model.logits(hidden[0], args, 0), nn.functional.linear(x, model.load_head().weight))


def test_head_input_gives_the_logits(llama):
    model = open_model(llama)
    args, hidden = captured(model, 1)
    x = model.head_input(hidden[0], args, 0)
    assert x.shape == (20, 48)
    logits = nn.functional.linear(x, model.load_head().weight)
    torch.testing.assert_close(logits, model.logits(hidden[0], args, 0))


# ---- dtypes, names, shards ------------------------------------------------------------------------------------------


def test_loading_in_another_dtype_equals_from_pretrained_and_exports_the_source_dtype(llama):
    model, source = open_model(llama, dtype=torch.bfloat16), FolderTensors(llama)
    args, hidden = captured(model, 1)
    reference = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    x = hidden[0]
    assert x.dtype == torch.bfloat16
    for i in range(model.num_blocks):
        x = model.run_block(i, model.load_block(i), x, args, 0)
    with torch.no_grad():
        assert torch.equal(model.logits(x, args, 0), reference(input_ids=args.windows[:1]).logits[0].float())
    prunable = model.prunables(0)[0]
    (exported,) = model.export_block(0, model.load_block(0), {prunable.name: None})
    assert exported.tensor.dtype == torch.float32
    assert torch.equal(exported.tensor, source.read(exported.key).bfloat16().float())


def test_dtype_defaults_to_the_checkpoints(tmp_path):
    folder = save_family("llama", tmp_path / "a", dtype=torch.bfloat16)
    assert open_model(folder).dtype == torch.bfloat16
    bare = edited(folder, tmp_path / "b", config={"dtype": None, "torch_dtype": None})
    assert open_model(bare).dtype == torch.bfloat16


def test_modules_kept_in_float32_are_loaded_as_from_pretrained_does(tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    folder = save_family("llama", tmp_path, dtype=torch.bfloat16)
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["input_layernorm"])
    block = open_model(folder).load_block(0)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).model.layers[0]
    assert block.input_layernorm.weight.dtype == torch.float32
    assert {n: p.dtype for n, p in block.named_parameters()} == {n: p.dtype for n, p in reference.named_parameters()}


def test_a_checkpoint_without_the_base_prefix(tmp_path):
    """gpt2's own files say h.0.attn..., transformers' class transformer.h.0.attn...: exports keep the file's names."""
    whole = save_family("gpt2", tmp_path / "a")
    bare = edited(whole, tmp_path / "b", tensors=lambda t: {k.removeprefix("transformer."): v for k, v in t.items()})
    model, source = open_model(bare), FolderTensors(bare)
    assert model.block_names[0] == "transformer.h.0"
    names = [p.name for p in model.prunables(1)]
    exported = model.export_block(1, model.load_block(1), dict.fromkeys(names))
    assert sorted(e.key for e in exported) == sorted(
        k for k in model.block_keys(1) if k[-9:] != "ln.weight" and ".c_" in k and k.endswith("weight")
    )
    assert all(e.transposed and torch.equal(e.tensor, source.read(e.key)) for e in exported)


def test_only_tensors_that_hold_a_named_matrix_are_exported(tmp_path):
    folder = save_family("mixtral", tmp_path)
    model = open_model(folder)
    expert = next(p for p in model.prunables(0) if p.name.endswith("gate_up_proj.3"))
    keys = [f"model.layers.0.block_sparse_moe.experts.3.{w}.weight" for w in ("w1", "w3")]
    assert model.source_keys(expert) == keys
    mask = torch.rand(expert.shape) < 0.5
    exported = {e.key: e for e in model.export_block(0, model.load_block(0), {expert.name: mask})}
    assert sorted(exported) == keys
    assert torch.equal(exported[keys[0]].mask, mask[:80])
    assert torch.equal(exported[keys[1]].mask, mask[80:])


def test_one_expert_of_a_fused_source_tensor(tmp_path):
    folder = save_family("gpt_oss", tmp_path)
    model = open_model(folder)
    expert = next(p for p in model.prunables(0) if p.name.endswith("down_proj.2"))
    mask = torch.rand(expert.shape) < 0.5
    (exported,) = model.export_block(0, model.load_block(0), {expert.name: mask})
    assert exported.transposed
    assert exported.mask[[0, 1, 3]].all()
    assert torch.equal(exported.mask[2], mask.T)


def test_sharded_checkpoint(tmp_path):
    folder = save_family("llama", tmp_path, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    model = open_model(folder)
    args, hidden = captured(model, 1)
    x = hidden[0]
    for i in range(model.num_blocks):
        x = model.run_block(i, model.load_block(i), x, args, 0)
    with torch.no_grad():
        truth = AutoModelForCausalLM.from_pretrained(folder)(input_ids=args.windows).logits[0]
    assert torch.equal(model.logits(x, args, 0), truth)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"model_type": "nonsense"}, "cannot be used"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised .gptq."),
        ({"num_hidden_layers": 4}, "no tensor for model.layers.3"),
        ({"intermediate_size": 81}, "config.json asks for"),
    ],
)
def test_unsupported_models(llama, tmp_path, config, says):
    with pytest.raises(ModelError, match=says):
        open_model(edited(llama, tmp_path / "m", config=config))


def test_missing_and_corrupt_config(llama, tmp_path):
    folder = edited(llama, tmp_path / "m")
    (folder / "config.json").write_text("{ not json")
    with pytest.raises(ModelError, match=r"config\.json"):
        open_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_model(folder)


def test_integer_weights_are_refused(llama, tmp_path):
    key = "model.layers.1.mlp.up_proj.weight"
    folder = edited(llama, tmp_path / "m", tensors=lambda t: t | {key: t[key].to(torch.int8)})
    with pytest.raises(ModelError, match=f"{key} is torch.int8"):
        open_model(folder)


def test_missing_tensor_is_named(llama, tmp_path):
    key = "model.layers.2.self_attn.v_proj.weight"
    folder = edited(llama, tmp_path / "m", tensors=lambda t: {k: v for k, v in t.items() if k != key})
    with pytest.raises(ModelError, match=key):
        open_model(folder)


def test_missing_private_name_is_named():
    assert set(resolve_names(PRIVATE_NAMES)) == set(PRIVATE_NAMES)
    with pytest.raises(ModelError, match=r"transformers\.modeling_utils\.no_such_thing"):
        resolve_names(PRIVATE_NAMES | {"no_such_thing": "transformers.modeling_utils"})
