"""Places where matrices write into the residual stream, found without names; rebuilding a block under its masks."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, VOCAB, FolderTensors, save_family

from gossamer.compress.blocks import StreamedModel
from gossamer.compress.calibration import collect, inputs_of
from gossamer.compress.evaluate import propagate
from gossamer.compress.hidden import HiddenStore
from gossamer.compress.residual import OUTPUT, residual_places
from gossamer.compress.stages.rebuild import parameter_masks, rebuild

# By hand, from the model's own forward: matrix -> the module that reads the sum, or the block's output.
LLAMA = {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": OUTPUT}
ATTENTION_ONLY = {"self_attn.o_proj": "post_attention_layernorm"}  # experts' outputs are weighted before they are added
WRITERS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": {},  # a norm stands between every output and the stream
    "gemma3": {},
    "phi3": LLAMA,
    "phi": {"self_attn.dense": OUTPUT, "mlp.fc2": OUTPUT},  # attention and MLP side by side
    "gpt2": {"attn.c_proj": "ln_2", "mlp.c_proj": OUTPUT},
    "opt": {"self_attn.out_proj": "final_layer_norm", "fc2": OUTPUT},
    "gpt_neox": {"attention.dense": OUTPUT, "mlp.dense_4h_to_h": OUTPUT},
    "falcon": {"self_attention.dense": OUTPUT, "mlp.dense_4h_to_h": OUTPUT},
    "bloom": {"self_attention.dense": "post_attention_layernorm", "mlp.dense_4h_to_h": OUTPUT},
    "mixtral": ATTENTION_ONLY,
    "qwen3_moe": ATTENTION_ONLY,
    "gpt_oss": ATTENTION_ONLY,
}


def opened(family: str, folder, windows: int = 1):
    """(model, recorded arguments, hidden states at block 0)."""
    save_family(family, folder)
    model = StreamedModel.open(FolderTensors(folder), folder)
    hidden: dict[int, torch.Tensor] = {}
    tokens = torch.randint(3, VOCAB, (windows, 20), generator=torch.Generator().manual_seed(1))
    return model, model.capture(tokens, hidden.__setitem__), hidden


def test_every_family_is_listed():
    assert WRITERS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", WRITERS)
def test_places(family, tmp_path):
    model, args, hidden = opened(family, tmp_path)
    places = residual_places(model, 0, model.load_block(0), hidden[0], args, 0)
    root = model.block_names[0] + "."
    assert {name.removeprefix(root): place for name, place in places.items()} == WRITERS[family]


def test_the_stream_is_read_where_the_place_says(tmp_path):
    model, args, hidden = opened("llama", tmp_path)
    block = model.load_block(0)
    (down,) = (p for p in model.prunables(0) if p.name.endswith("down_proj"))
    store = HiddenStore(tmp_path / "hidden", 1 << 20)
    store.put(0, hidden[0])
    seen, z = inputs_of(model, 0, block, [down], store, args, 0, ["post_attention_layernorm", OUTPUT])
    after_attention, after_block = z["post_attention_layernorm"], z[OUTPUT]
    assert torch.equal(after_block, model.run_block(0, block, hidden[0], args, 0))
    inner = seen[down.name] @ block.mlp.down_proj.weight.T
    assert torch.allclose((after_block - after_attention).view(-1, 48), inner, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_the_dense_model_moves_on_with_the_last_pass(family, tmp_path):
    """Where the pass goes to the block's end, its output is kept; elsewhere nothing changes."""
    model, args, hidden = opened(family, tmp_path, windows=3)
    stores = [HiddenStore(tmp_path / name, 1 << 20) for name in ("sparse", "dense")]
    for store in stores:
        for window, state in hidden.items():
            store.put(window, state)
    block, dense = model.load_block(0), model.load_block(0)
    places = residual_places(model, 0, block, hidden[0], args, 0)
    groups = model.input_groups(0, block, hidden[0], args)
    passed: set[int] = set()
    needs = frozenset({"gram", "target"})
    collect(model, 0, block, dense, groups, stores[0], stores[1], args, needs, 3, places, passed)
    assert passed == ({0, 1, 2} if OUTPUT in places.values() else set())
    for window in range(3):
        assert torch.equal(stores[0].get(window), hidden[window])
        output = model.run_block(0, dense, hidden[window], args, window)
        assert torch.equal(stores[1].get(window), output if window in passed else hidden[window])
    propagate(model, 0, dense, stores[1], args, 3, passed)
    for window in range(3):
        assert torch.equal(stores[1].get(window), model.run_block(0, dense, hidden[window], args, window))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
def test_masks_take_the_shape_of_the_parameters(family, tmp_path):
    """Transposed matrices and fused experts: the mask of a parameter zeroes what the mask of the matrix says."""
    model, _, _ = opened(family, tmp_path)
    block = model.load_block(0)
    generator = torch.Generator().manual_seed(2)
    chosen = model.prunables(0)
    masks = {p.name: torch.rand(p.shape, generator=generator) < 0.5 for p in chosen}
    before = {p.name: model.weight(block, p) for p in chosen}
    for name, mask in parameter_masks(model, 0, block, chosen, masks).items():
        block.get_parameter(name).data.mul_(mask)
    for prunable in chosen:
        assert torch.equal(model.weight(block, prunable), before[prunable.name] * masks[prunable.name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rebuilding_lowers_the_error_and_keeps_every_zero(dtype, tmp_path):
    save_family("llama", tmp_path / "model", dtype=dtype)
    model = StreamedModel.open(FolderTensors(tmp_path / "model"), tmp_path / "model")
    hidden, dense = (HiddenStore(tmp_path / name, 1 << 24) for name in ("hidden", "dense"))
    tokens = torch.randint(3, VOCAB, (24, 20), generator=torch.Generator().manual_seed(1))
    args = model.capture(tokens, hidden.put)
    whole, block = model.load_block(0), model.load_block(0)
    for window in range(24):
        dense.put(window, model.run_block(0, whole, hidden.get(window), args, window))
    masks = {p.name: model.weight(block, p).abs() > 0.05 for p in model.prunables(0)}
    for prunable in model.prunables(0):
        model.set_weight(block, prunable, model.weight(block, prunable) * masks[prunable.name])
    norms = block.input_layernorm.weight.clone()

    def error() -> float:
        runs = [model.run_block(0, block, hidden.get(w), args, w) - dense.get(w) for w in range(24)]
        return float(torch.stack(runs).float().square().mean())

    before = error()
    done = rebuild(model, 0, block, masks, hidden, dense, args, seed=0)
    assert error() < 0.9 * before
    assert done["after"] < done["before"]
    assert done["steps"] > 0
    for prunable in model.prunables(0):
        weight = model.weight(block, prunable)
        assert weight.dtype == dtype
        assert not bool(weight[~masks[prunable.name]].any())
        assert not bool(torch.signbit(weight[~masks[prunable.name]]).any())
    assert torch.equal(block.input_layernorm.weight, norms)
