"""One token through a block in compiled halves, against its modules one by one and against plain transformers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from activation_cases import gate_policy, give, linear_policy, plain_model
from decoding import CLOSE, DTYPES, by_modules, counted_ways, decode, halves, loaded
from exports import dense_twin, save_family_sparse
from families import save_family
from headplans import plan_for
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import gossamer
from gossamer.attention.filled import FilledCache
from gossamer.compress.generate import generate
from gossamer.compress.heads import apply
from gossamer.kernels.modules.counting import counting
from gossamer.kernels.modules.sparse_linear import dense_products
from gossamer.kernels.modules.watch import Watch
from gossamer.kernels.tier import current, forced

pytestmark = pytest.mark.skipif(current() is None, reason="the compiled kernels are not there")


@pytest.fixture
def taken(monkeypatch):
    return counted_ways(monkeypatch)


KINDS = [
    (kind, dtype)
    for kind in ("dense", "bitmask", "int8", "active", "dual", "neurons")
    for dtype in DTYPES
    if dtype is not torch.float32 or kind not in ("bitmask", "int8", "dual")
]


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("planned", [False, True])
def test_every_kind_of_layer_is_what_the_modules_compute(kind, dtype, planned, tmp_path, taken):
    model = loaded(kind, tmp_path, dtype)
    if planned:
        apply(model, plan_for(model))
    layers = model.config.num_hidden_layers
    for batch in (1, 3):
        wanted = by_modules(model, batch=batch)
        taken.clear()
        found = decode(model, batch=batch)
        # Sequences of a batch have neurons of their own: then the MLP itself deals them out.
        apart = kind == "neurons" and batch > 1
        wanted_halves = {"attention": 9 * layers, "feed": 0 if apart else 9 * layers, "modules": 9 * layers * apart}
        assert halves(taken) == wanted_halves
        # The first block of a token looks at what came with it, and the very first token prepares the halves.
        assert taken["whole"] == (0 if apart else (9 - (batch == 1)) * (layers - 1))
        scale = float(wanted.float().abs().max())
        assert float((found.float() - wanted.float()).abs().max()) <= CLOSE[dtype] * scale


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_it_is_the_model_that_transformers_runs(family, tmp_path, taken):
    """Two of them have a sliding window: where it is shorter than the sequence, attention is the modules'."""
    folder = save_family(family, tmp_path / "m")
    model, plain = gossamer.load(folder, dtype=torch.float32), plain_model(folder)
    given = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = plain(given).logits[:, 7:]
    found = decode(model)
    steps = 9 * model.config.num_hidden_layers
    assert taken["feed"] == steps
    assert 0 < taken["attention"] == steps - taken["modules"]
    assert (family == "llama") == (taken["modules"] == 0)
    assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


def test_a_packed_model_is_its_dense_twin(tmp_path, taken):
    folder = save_family_sparse("llama", tmp_path / "m", dtype=torch.bfloat16)
    wanted = decode(plain_model(dense_twin(folder, tmp_path / "twin")), cache=FilledCache(3, 40))
    found = decode(gossamer.load(folder, dtype=torch.bfloat16))
    assert taken["modules"] == 0 < taken["attention"]
    assert float((found - wanted).abs().max()) <= 3e-2 * float(wanted.abs().max())


@pytest.mark.parametrize("kind", ["dense", "bitmask", "int8", "active", "dual", "neurons"])
def test_the_same_bits_for_any_number_of_threads_and_alone(kind, tmp_path):
    model = loaded(kind, tmp_path, torch.bfloat16)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(decode(model, batch=1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("tier", ["scalar", "avx2"])
def test_every_tier(tier, tmp_path, taken):
    from gossamer.kernels.tier import available

    if tier not in available():
        pytest.skip(f"no tier {tier} here")
    model = loaded("dual", tmp_path, torch.bfloat16)
    with forced(tier):
        wanted = by_modules(model)
        found = decode(model)
    assert taken["modules"] == 0 < taken["attention"]
    assert float((found - wanted).abs().max()) <= 2e-2 * float(wanted.abs().max())


def test_memory_that_holds_no_token_is_not_read(tmp_path, monkeypatch):
    model = loaded("dense", tmp_path, torch.float32)
    wanted = decode(model)
    own = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *shape, **words: own(self, *shape, **words).fill_(torch.nan)
    )
    assert torch.equal(decode(model), wanted)


class _Seen:
    def __init__(self):
        self.calls = 0

    def __call__(self, *words):
        self.calls += 1


@pytest.mark.parametrize(
    "path", ["input_layernorm", "self_attn", "self_attn.k_proj", "mlp", "mlp.down_proj", "mlp.act_fn"]
)
def test_hooks_are_called(path, tmp_path, taken):
    """Before and after a half has been prepared, and only as long as they are there."""
    model = loaded("bitmask", tmp_path, torch.bfloat16)
    wanted = decode(model)
    seen = _Seen()
    handle = model.model.layers[1].get_submodule(path).register_forward_hook(seen)
    taken.clear()
    found = decode(model)
    assert (seen.calls, taken["modules"]) == (10, 9)  # the prompt, and nine tokens of one half
    assert float((found - wanted).abs().max()) <= 2e-2 * float(wanted.abs().max())
    handle.remove()
    taken.clear()
    assert torch.equal(decode(model), wanted)
    assert taken["modules"] == 0
    handle = nn.modules.module.register_module_forward_hook(seen)
    try:
        decode(model)
    finally:
        handle.remove()
    assert seen.calls > 100


@pytest.mark.parametrize("path", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn"])
@pytest.mark.parametrize("kind", ["dense", "bitmask"])
def test_a_forward_of_somebodys_own_runs(path, kind, tmp_path):
    """Set on the module itself, as accelerate's hooks do it: before the first token and after some."""
    for before in (True, False):
        model = loaded(kind, tmp_path / str(before), torch.bfloat16)
        if not before:
            decode(model)
        module = model.model.layers[1].get_submodule(path)
        module.forward = lambda x, forward=module.forward: forward(x) * 0.25
        wanted = by_modules(model)
        assert float((decode(model) - wanted).abs().max()) <= 2e-2 * float(wanted.abs().max())


def test_constants_that_change_are_seen(tmp_path):
    model = loaded("dense", tmp_path, torch.float32)
    before = decode(model)
    attention, norm = model.model.layers[1].self_attn, model.model.layers[2].post_attention_layernorm
    attention.scaling, norm.variance_epsilon = 3 * attention.scaling, 0.5
    found = decode(model)
    assert not torch.allclose(found, before, atol=1e-3)
    torch.testing.assert_close(found, by_modules(model), rtol=1e-4, atol=1e-4)
    weight = attention.o_proj.weight
    weight.data = weight.data.t()  # the same memory, in another order
    torch.testing.assert_close(decode(model), by_modules(model), rtol=1e-4, atol=1e-4)


def test_a_tensor_cut_short_in_its_memory_is_seen():
    layer = nn.Linear(8, 6)
    watch = Watch([layer])
    assert watch.same()
    layer.weight.data = layer.weight.data[:3]  # the same address and strides
    assert not watch.same()


def test_one_of_three_siblings_is_trained(tmp_path):
    """Query, key and value are computed together once seen in turn; one that needs a gradient goes its own way."""
    model = loaded("dense", tmp_path, torch.float32)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    model.requires_grad_(False)
    weight = model.model.layers[0].self_attn.v_proj.weight.requires_grad_(True)
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert weight.grad is not None
    assert bool((weight.grad != 0).any())


def test_what_is_put_in_the_place_of_a_part_is_used(tmp_path, taken):
    model = loaded("dense", tmp_path, torch.float32)
    before = decode(model)
    block = model.model.layers[2]
    block.mlp.up_proj.weight.data.mul_(2)  # in place
    doubled = decode(model)
    assert not torch.equal(before, doubled)
    block.mlp.up_proj.weight = nn.Parameter(block.mlp.up_proj.weight.detach() / 2)  # another tensor
    torch.testing.assert_close(decode(model), before)
    block.self_attn.o_proj = nn.Linear(*block.self_attn.o_proj.weight.shape[::-1], bias=False)  # another layer
    taken.clear()
    other = decode(model)
    assert taken["modules"] == 9
    assert not torch.equal(other, before)
    torch.testing.assert_close(other, by_modules(model), rtol=1e-4, atol=1e-4)
    block.self_attn.o_proj.weight.data.zero_()
    block.mlp.down_proj.load_state_dict({"weight": torch.zeros_like(block.mlp.down_proj.weight)}, assign=True)
    block.input_layernorm.weight.data.fill_(torch.nan)  # a block whose halves add nothing is not there
    assert decode(model).isnan().all()


def test_other_dtypes_copies_and_pickles(tmp_path, taken):
    model = loaded("active", tmp_path, torch.float32)
    wanted = decode(model)
    made = copy.deepcopy(model)
    block = made.model.layers[0]
    assert block._gossamer_halves.attention is None
    assert block.forward.args == (block,)
    assert torch.equal(decode(made), wanted)
    block.mlp.down_proj.packed.zero_()
    assert not torch.equal(decode(made), wanted)
    assert torch.equal(decode(model), wanted)
    model.to(torch.bfloat16)
    found = decode(model)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, by_modules(model))
    assert taken["modules"] == 0
    plain = gossamer.load(save_family("llama", tmp_path / "plain"), dtype=torch.float32)
    wanted = decode(plain)
    made = pickle.loads(pickle.dumps(plain))
    assert made.model.layers[0]._gossamer_halves.attention is None
    assert torch.equal(decode(made), wanted)


def test_who_wants_more_than_numbers_gets_the_modules(tmp_path, taken):
    model = loaded("active", tmp_path, torch.bfloat16)
    wanted = decode(model)
    taken.clear()
    with counting() as counts:
        assert torch.allclose(decode(model).float(), wanted.float(), atol=0.05)
    assert counts.steps == 9
    assert all(tally.every > tally.read > 0 for tally in counts.values())
    with dense_products():
        decode(model)
    model.train()
    decode(model)
    assert halves(taken) == {"attention": 0, "feed": 0, "modules": 0}


def test_a_gradient_goes_through_the_modules(tmp_path, taken):
    model = loaded("dense", tmp_path, torch.float32)
    model(input_ids=torch.tensor([[5]]), use_cache=False).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    assert halves(taken) == {"attention": 0, "feed": 0, "modules": 0}


def test_low_rank_rests_and_gate_thresholds_are_left_to_their_modules(tmp_path, taken):
    model = gossamer.load(give(save_family("llama", tmp_path / "a"), linear_policy("llama", 0.5)), dtype=torch.float32)
    wanted = by_modules(model)
    assert torch.equal(decode(model), wanted)
    assert taken["attention"] == taken["feed"] == 0
    model = gossamer.load(give(save_family("llama", tmp_path / "b"), gate_policy("llama")), dtype=torch.float32)
    wanted = by_modules(model)
    torch.testing.assert_close(decode(model), wanted, rtol=1e-4, atol=1e-4)
    assert taken["attention"] == 27
    assert taken["feed"] == 0


def test_an_attention_function_of_somebodys_own_is_used(tmp_path, taken):
    model, seen = loaded("dense", tmp_path, torch.float32), []
    wanted = decode(model)

    def own(module, query, *rest, **more):
        seen.append(query.shape[2])
        return sdpa_attention_forward(module, query, *rest, **more)

    AttentionInterface.register("somebodys_own", own)
    AttentionMaskInterface.register("somebodys_own", sdpa_mask)
    model.set_attn_implementation("somebodys_own")
    taken.clear()
    torch.testing.assert_close(decode(model), wanted, rtol=1e-4, atol=1e-4)
    assert seen == [7] * 3 + [1] * 27
    assert halves(taken) == {"attention": 0, "feed": 27, "modules": 27}


def test_blocks_of_another_kind_stay_as_they_are(tmp_path, taken):
    for family in ("qwen3", "gemma2", "mixtral", "opt"):
        model = gossamer.load(save_family(family, tmp_path / family), dtype=torch.float32)
        decode(model, cache=FilledCache(model.config.num_hidden_layers, 30))
    assert taken["attention"] == 0
    model = gossamer.load(save_family("llama", tmp_path / "changed"), dtype=torch.float32)
    for layer in model.model.layers:
        layer.forward = layer.forward
        kind = type(layer.mlp)
        layer.mlp.__class__ = type("Other", (kind,), {"forward": lambda self, x: self.down_proj(self.up_proj(x))})
    taken.clear()
    decode(model)
    assert taken["feed"] == 0


def test_a_norm_without_a_weight_is_left_to_itself(tmp_path, taken):
    model = loaded("dense", tmp_path, torch.float32)
    block = model.model.layers[1]
    block.input_layernorm, block.post_attention_layernorm = nn.Identity(), nn.Identity()
    torch.testing.assert_close(decode(model), by_modules(model), rtol=1e-4, atol=1e-4)
    assert halves(taken) == {"attention": 18, "feed": 18, "modules": 18}


def test_the_decode_loop_runs_on_it(tmp_path, taken):
    """Tokens of transformers' own generate, from a cache that grows, for several sequences."""
    model = gossamer.load(save_family("llama", tmp_path / "m"), dtype=torch.float32)
    given = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(3))
    wanted = plain_model(tmp_path / "m").generate(given, max_new_tokens=12, do_sample=False, eos_token_id=None)[:, 6:]
    assert torch.equal(torch.stack(list(generate(model, given, 12)), 1), wanted)
    assert halves(taken) == {"attention": 33, "feed": 33, "modules": 0}
    mine = model.generate(given, max_new_tokens=12, do_sample=False, eos_token_id=None)[:, 6:]
    assert torch.equal(mine, wanted)
    assert taken["feed"] == 66  # its cache is transformers' own: attention in the modules, the MLP here
