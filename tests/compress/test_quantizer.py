"""transformers loads sparse folders to the bits of the dense model, with masks, or not at all."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import same_bits
from exports import assert_same, dense_twin, expanded, mask_twin, plain, rewrite, save_family_sparse, save_sparse
from families import save_family
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, Transpose, WeightConverter

from gossamer.compress.format import SourceMask
from gossamer.compress.quantizer import GossamerConfig
from gossamer.errors import CheckpointError, GossamerError, ModelError

CASES = [
    ("llama", torch.bfloat16, 1, 10**9),
    ("llama", torch.float16, 2, 45_000),
    ("qwen3", torch.float32, 1, 10**9),
    ("gemma3", torch.bfloat16, 1, 10**9),
    ("gpt2", torch.float32, 2, 75_000),
    ("opt", torch.float16, 1, 10**9),
    ("mixtral", torch.bfloat16, 1, 10**9),
    ("mixtral", torch.float32, 2, 90_000),
    ("qwen3_moe", torch.float16, 3, 10**9),
    ("gpt_oss", torch.bfloat16, 2, 10**9),
]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Memory that was never written is NaN, so that a forgotten tensor cannot look like a small random one."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def sparse(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, variant="sparse", **{"dtype": "auto"} | options)


def dense(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto"} | options)


@pytest.mark.parametrize(("family", "dtype", "every", "shard"), CASES)
def test_bit_equal_to_the_dense_model(tmp_path, family, dtype, every, shard):
    folder = save_family_sparse(family, tmp_path / "sparse", dtype=dtype, every=every, shard=shard)
    shards = len(list(folder.glob("model.sparse*.safetensors")))
    assert shards == 1 if shard == 10**9 else shards >= 3
    model = sparse(folder)
    assert model.dtype == dtype
    assert not model.training
    assert_same(model, dense(dense_twin(folder, tmp_path / "dense")))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("every", [1, 3])
def test_masks_are_those_of_the_file(tmp_path, family, every):
    """Reference: a checkpoint of ones and zeros, converted by transformers like weights."""
    folder = save_family_sparse(family, tmp_path / "sparse", every=every)
    reference = dense(mask_twin(folder, tmp_path / "masks"))
    model = sparse(folder)
    _, masks = expanded(folder)
    kept = dict(reference.named_parameters())
    assert sum(mask.zeros for mask in model.gossamer_masks.values()) == sum(int((~m).sum()) for m in masks.values())
    for name, parameter in model.named_parameters():
        mask = model.gossamer_masks.get(name)
        assert (mask is None) == bool((kept[name] != 0).all()), name
        if mask is not None:
            assert torch.equal(mask.to_bool(), kept[name] != 0)
            assert torch.equal(parameter == 0, kept[name] == 0)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtype_casts_like_a_dense_checkpoint(tmp_path, family, dtype):
    folder = save_family_sparse(family, tmp_path / "sparse", dtype=torch.bfloat16)
    model = sparse(folder, dtype=dtype)
    assert model.dtype == dtype
    assert_same(model, dense(dense_twin(folder, tmp_path / "dense"), dtype=dtype))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(tmp_path, device_map):
    folder = save_family_sparse("mixtral", tmp_path / "sparse")
    assert_same(sparse(folder, device_map=device_map), dense(dense_twin(folder, tmp_path / "dense")))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_offloaded_to_disk(tmp_path, family):
    folder = save_family_sparse(family, tmp_path / "sparse")
    places = {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    model = sparse(folder, device_map=places, offload_folder=str(tmp_path / "offload"))
    reference = dense(dense_twin(folder, tmp_path / "dense"))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)
    model.save_pretrained(tmp_path / "again")
    assert_same(sparse(tmp_path / "again"), reference)
    extra = plain(tmp_path / "again").keys() - plain(folder).keys()
    assert extra <= {"lm_head.weight"}  # transformers cannot see that offloaded weights are tied


def convert_by(monkeypatch, family: str, converter: WeightConverter) -> None:
    """The conversion that transformers knows for the family, until the test ends."""
    conversion_mapping.get_checkpoint_conversion_mapping(family)  # the table is built when it is first asked
    known = conversion_mapping._checkpoint_conversion_mapping_cache
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", known | {family: [converter]})


def there_and_back(base: Path, tmp_path: Path) -> dict[str, SourceMask]:
    """Weights, masks and the saved file against references; returns the model's masks."""
    folder = save_sparse(base, tmp_path / "sparse")
    model = sparse(folder)
    assert_same(model, dense(dense_twin(folder, tmp_path / "dense")))
    kept = dense(mask_twin(folder, tmp_path / "masks")).state_dict()
    assert all(torch.equal(mask.to_bool(), kept[name] != 0) for name, mask in model.gossamer_masks.items())
    model.save_pretrained(tmp_path / "again")
    first, second = plain(folder), plain(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(same_bits(first[key], second[key]) for key in first)
    return model.gossamer_masks


def test_one_transposed_tensor_for_two_parameters(tmp_path, monkeypatch):
    base = save_family("llama", tmp_path / "base")
    tensors = plain(base)
    for name in [name for name in tensors if name.endswith("gate_proj.weight")]:
        both = [tensors.pop(name), tensors.pop(name.replace("gate_proj", "up_proj"))]
        tensors[name.replace("gate_proj", "gate_up_t")] = torch.cat(both).T.contiguous()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    targets = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    convert_by(monkeypatch, "llama", WeightConverter("mlp.gate_up_t.weight", targets, [Transpose(0, 1), Chunk(0)]))
    masks = there_and_back(base, tmp_path)
    assert len(masks) == 3 * 7
    assert not any(mask.record.transposed for mask in masks.values())


def test_two_tensors_for_one_parameter_stored_by_inputs(tmp_path, monkeypatch):
    base = save_family("gpt2", tmp_path / "base")
    tensors = plain(base)
    for name in [name for name in tensors if name.endswith("c_fc.weight")]:
        whole = tensors.pop(name)
        for part, half in zip("ab", whole.chunk(2, dim=1), strict=True):
            tensors[name.replace("c_fc", f"c_fc_{part}")] = half.contiguous()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    sources = ["mlp.c_fc_a.weight", "mlp.c_fc_b.weight"]
    convert_by(monkeypatch, "gpt2", WeightConverter(sources, "mlp.c_fc.weight", [Concatenate(dim=1)]))
    masks = there_and_back(base, tmp_path)
    assert masks["transformer.h.0.mlp.c_fc.weight"].bits.shape == (80, 6)
    assert all(mask.record.transposed for mask in masks.values())


def test_tied_embeddings_stay_tied(tmp_path):
    model = sparse(save_family_sparse("qwen3", tmp_path / "sparse"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_by_model_class_without_head_and_with_a_given_config(tmp_path):
    folder = save_family_sparse("llama", tmp_path / "sparse")
    twin = dense_twin(folder, tmp_path / "dense")
    assert_same(LlamaForCausalLM.from_pretrained(folder, variant="sparse"), dense(twin))
    assert_same(AutoModel.from_pretrained(folder, variant="sparse"), AutoModel.from_pretrained(twin))
    assert_same(sparse(folder, config=AutoConfig.from_pretrained(folder)), dense(twin))


def test_keys_without_the_base_model_prefix(tmp_path):
    """GPT-2 on the hub: `h.0...` where the model has `transformer.h.0...`."""
    folder = save_family_sparse("gpt2", tmp_path / "sparse")

    def edit(tensors, metadata):
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        return {name: text.replace("transformer.h.", "h.") for name, text in metadata.items()}

    reference = dense(dense_twin(folder, tmp_path / "dense"))
    rewrite(folder, edit)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["masks_sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    assert_same(sparse(folder), reference)


def test_generates_the_same_tokens(tmp_path):
    folder = save_family_sparse("llama", tmp_path / "sparse")
    prompt = torch.arange(5, 15)[None]
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = dense(dense_twin(folder, tmp_path / "dense")).generate(prompt, **options)
    assert torch.equal(sparse(folder).generate(prompt, **options), expected)


def test_copies_and_pickles(tmp_path):
    model = sparse(save_family_sparse("mixtral", tmp_path / "sparse"))
    clone = copy.deepcopy(model)
    assert_same(clone, model)
    assert clone.save_pretrained.__self__ is clone
    assert_same(pickle.loads(pickle.dumps(model)), model)


def test_a_folder_with_both(tmp_path):
    """The plain name gives the dense file: an ordinary model, with the masks that lie beside it."""
    from gossamer.compress.convert import convert

    folder = save_family_sparse("llama", tmp_path / "sparse")
    convert(folder, tmp_path / "dense", "dense")
    for path in [tmp_path / "dense" / "model.safetensors", tmp_path / "dense" / "gossamer" / "masks.safetensors"]:
        target = folder / path.relative_to(tmp_path / "dense")
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    by_variant, by_name = sparse(folder), dense(folder)
    assert_same(by_variant, by_name)
    assert getattr(by_name, "hf_quantizer", None) is None
    assert not hasattr(by_name.config, "quantization_config")
    assert by_name.gossamer_masks.keys() == by_variant.gossamer_masks.keys()


# ---- what must not load ----------------------------------------------------------------------------------------------


def drop(name):
    return lambda tensors, _: tensors.pop(name).shape and None


def move_a_bit(tensors, _):
    """As many bits as before, one of them elsewhere: only the hash tells."""
    bits = tensors["model.layers.1.mlp.up_proj.weight_bitmask"]
    row = next(r for r in range(len(bits)) if int(bits[r, 2]) not in (0, 255))
    byte = int(bits[row, 2])
    bits[row, 2] = (byte >> 1) | ((byte & 1) << 7)


def change_count(tensors, _):
    tensors["model.layers.0.self_attn.q_proj.weight_bitmask"][0, -1] ^= 0b10


def lose_metadata(tensors, metadata):
    return {"format": "pt"}


def lower_nnz(tensors, metadata):
    document = json.loads(metadata["gossamer"])
    document["matrices"]["model.layers.2.mlp.down_proj.weight"]["nnz"] -= 1
    return metadata | {"gossamer": json.dumps(document)}


def other_shape(tensors, metadata):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


DAMAGES = [
    (move_a_bit, "model.layers.1.mlp.up_proj.weight"),
    (change_count, "model.layers.0.self_attn.q_proj.weight"),
    (lose_metadata, "weight_bitmask is packed"),
    (lower_nnz, "model.layers.2.mlp.down_proj.weight"),
    (drop("model.layers.0.mlp.up_proj.weight_values"), "model.layers.0.mlp.up_proj.weight_values"),
    (drop("model.layers.0.mlp.up_proj.weight_bitmask"), "model.layers.0.mlp.up_proj.weight_bitmask"),
    (drop("model.layers.1.input_layernorm.weight"), "model.layers.1.input_layernorm.weight"),
    (drop("lm_head.weight"), "lm_head.weight"),
    (drop("model.embed_tokens.weight"), "model.embed_tokens.weight"),
    (other_shape, "model.norm.weight"),
]


@pytest.mark.parametrize(("damage", "names"), DAMAGES)
def test_a_damaged_file_is_named(tmp_path, damage, names):
    folder = save_family_sparse("llama", tmp_path / "sparse")
    rewrite(folder, damage)
    with pytest.raises(GossamerError, match=names.replace(".", r"\.")) as error:
        sparse(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [1, 5000])
def test_a_truncated_file(tmp_path, cut):
    folder = save_family_sparse("llama", tmp_path / "sparse")
    path = folder / "model.sparse.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match="cut short"):
        sparse(folder)


@pytest.mark.parametrize("every", [1, 2])
def test_a_missing_expert(tmp_path, every):
    folder = save_family_sparse("mixtral", tmp_path / "sparse", every=every)

    def edit(tensors, metadata):
        document = json.loads(metadata["gossamer"])
        for name in list(tensors):
            if "layers.1." in name and ".experts.4.w2." in name:
                del tensors[name]
        document["matrices"] = {
            k: v for k, v in document["matrices"].items() if "layers.1" not in k or ".4.w2" not in k
        }
        return metadata | {"gossamer": json.dumps(document)}

    rewrite(folder, edit)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.down_proj"):
        sparse(folder)


@pytest.mark.parametrize("change", [{"modules": 3}, {"masks_sha256": "0" * 64}])
def test_config_of_another_checkpoint(tmp_path, change):
    folder = save_family_sparse("llama", tmp_path / "sparse")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="different checkpoints"):
        sparse(folder)


@pytest.mark.parametrize("version", [3, 0, "1", True])
def test_other_format_versions(version):
    with pytest.raises(CheckpointError, match="format version"):
        GossamerConfig(format_version=version)


def test_unknown_fields_of_the_config_are_kept():
    given = {"quant_method": "gossamer", "format_version": 1, "modules": 4, "masks_sha256": "ab", "later": [1]}
    assert GossamerConfig.from_dict(given).to_dict() == given


def test_a_dense_model_is_not_made_sparse_by_loading(tmp_path):
    folder = save_family_sparse("llama", tmp_path / "sparse")
    with pytest.raises(ValueError, match="pre-quantized"):
        dense(dense_twin(folder, tmp_path / "dense"), quantization_config=GossamerConfig())


def test_wrong_config_is_told_before_loading(tmp_path):
    folder = save_family_sparse("llama", tmp_path / "sparse")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 72}))
    with pytest.raises(ModelError, match="mlp"):
        sparse(folder)


# ---- registration ----------------------------------------------------------------------------------------------------

TABLES = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as q, AUTO_QUANTIZATION_CONFIG_MAPPING as c; "
REGISTERED = "assert q['gossamer'].__name__ == 'GossamerHfQuantizer' and c['gossamer'].__name__ == 'GossamerConfig'"


@pytest.mark.parametrize(
    "code",
    [
        "import gossamer, sys, importlib; importlib.reload(gossamer); gossamer._hook.install(); "
        "waiting = lambda: sorted(f.name for f in sys.meta_path if type(f).__name__ == '_AfterImport'); "
        f"assert waiting() == ['peft', 'transformers.quantizers.auto']; {TABLES}{REGISTERED}; "
        "gossamer._hook.install(); gossamer._hook.register(); import peft; assert not waiting()",
        f"{TABLES}import gossamer; {REGISTERED}",
        f"import transformers; from gossamer import load; transformers.LlamaForCausalLM; {TABLES}{REGISTERED}; "
        "import gossamer; assert load is gossamer.load and callable(load)",
        "import gossamer, sys; from gossamer.errors import GossamerError; "
        "assert not {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules); assert 'load' in dir(gossamer)",
    ],
)
def test_registration_in_every_order(code):
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:gossamer", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_unknown_names_of_the_package():
    import gossamer

    with pytest.raises(AttributeError, match="nothing"):
        gossamer.nothing  # noqa: B018


def test_a_transformers_without_the_tables_is_still_importable(monkeypatch):
    import transformers.quantizers.auto as table

    from gossamer import _hook

    monkeypatch.delattr(table, "AUTO_QUANTIZER_MAPPING")
    with pytest.warns(UserWarning, match="convert --to dense"):
        _hook.register()
