"""`finetune --base-quant`: an adapter beside weights in 4 or 8 bits, merged into what those stand for; masks hold."""

from __future__ import annotations

import importlib.util
import json
import signal

import pytest
import torch
from families import save_family
from peft import PeftModel
from test_finetune_stage import KILL
from tiny import digests, report, save_llama, save_texts, save_words, tensors
from torch import nn

import gossamer
from gossamer.compress.recipe import ExportStage, FinetuneStage, PruneStage, Recipe, build
from gossamer.compress.run import compress, plan
from gossamer.errors import CheckpointError, GossamerError, RecipeError
from gossamer.finetune.quantised import plain, quantise

KINDS = ["nf4", "fp4", "int8"]
ADAPTER = "gossamer/adapter-0"


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama of widths that fill no block of 64 evenly."""
    folder = save_llama(tmp_path_factory.mktemp("wide"), hidden_size=48, intermediate_size=72)
    save_texts(folder)
    return folder


def stage(model, method="spiel-ag", **fields) -> FinetuneStage:
    values = {"steps": 6, "batch": 4, "seqlen": 16, "log_every": 1, "save_every": 0, "learning_rate": 0.01}
    own = {"rank": 2} if method == "lora" else {"rank_equivalent": 2, "adapter_dtype": "float32"}
    if method in ("spiel-ag", "spiel-ma"):
        own |= {"interval": 2, "window": 1}
    return FinetuneStage(data=str(model / "calibration.txt"), method=method, **(values | own | fields))


def expected(model, folder, kind, dtype=torch.float32):
    """By hand: quantise the loaded model's projections, read them back, merge the adapter by peft."""
    base = gossamer.load(model, packed=False, dtype=dtype)
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and "proj" in name]
    quantise(base, names, kind, dtype)
    for name in names:
        parent, _, own = name.rpartition(".")
        setattr(base.get_submodule(parent), own, plain(base.get_submodule(name)))
    wrapped = PeftModel.from_pretrained(base, folder)
    return {name: p.detach() for name, p in wrapped.merge_and_unload().named_parameters()}


@pytest.mark.parametrize(
    ("method", "kind"),
    [("spiel-ag", "nf4"), ("spiel-ma", "fp4"), ("static", "int8"), ("lora", "nf4"), ("lora", "int8")],
)
def test_the_merge_is_into_what_the_quantised_weights_stand_for(wide, tmp_path, method, kind):
    out = tmp_path / "out"
    compress(wide, out, Recipe(stages=(stage(wide, method, base_quant=kind), ExportStage(format="dense"))))
    found = next(s for s in report(out)["stages"] if s["stage"] == "finetune")
    assert found["base_quant"] == kind
    assert found["heldout"]["after"] < found["heldout"]["before"]
    assert found["adapted"] == 21
    new, old = tensors(out), tensors(wide)
    config = json.loads((out / ADAPTER / "adapter_config.json").read_text())
    if method != "lora":  # it knows the weights from before they were quantised, and these are now others
        config["check_base"] = False
        (out / ADAPTER / "adapter_config.json").write_text(json.dumps(config))
    wanted = expected(wide, out / ADAPTER, kind)
    for name in old:
        if "proj" in name:
            torch.testing.assert_close(new[name], wanted[name], rtol=1e-6, atol=1e-7)
            error = float((new[name] - old[name]).norm() / old[name].norm())
            assert (0.002 if kind == "int8" else 0.05) < error < 0.6
        else:
            assert torch.equal(new[name], old[name])
    assert json.loads((out / "config.json").read_text()).get("quantization_config") is None


def test_the_adapter_belongs_to_the_weights_before_they_were_quantised(wide, tmp_path):
    compress(wide, tmp_path / "out", Recipe(stages=(stage(wide, base_quant="nf4"), ExportStage(format="dense"))))
    folder = tmp_path / "out" / ADAPTER
    PeftModel.from_pretrained(gossamer.load(wide, packed=False), folder)
    with pytest.raises(CheckpointError, match="trained on other weights"):
        PeftModel.from_pretrained(gossamer.load(tmp_path / "out", packed=False), folder)


@pytest.mark.parametrize(
    ("kind", "pattern", "where"), [("nf4", "2:4", None), ("int8", "0.5", None), ("nf4", "2:4", "seft")]
)
def test_masks_of_a_pruned_base_hold(wide, tmp_path, kind, pattern, where):
    prune = PruneStage(method="magnitude", pattern=pattern)
    compress(wide, tmp_path / "pruned", Recipe(stages=(prune, ExportStage())))
    tune = stage(wide, where=where, base_quant=kind, learning_rate=0.03)
    made = compress(wide, tmp_path / "out", Recipe(stages=(prune, tune, ExportStage(format="both"))))
    before, after = (gossamer.load(tmp_path / name, packed=False) for name in ("pruned", "out"))
    moved = 0
    for name, mask in before.gossamer_masks.items():
        now = after.gossamer_masks[name]
        assert (now.zeros, now.pattern) == (mask.zeros, mask.pattern)
        kept, weight = now.to_bool(), after.get_parameter(name).detach()
        moved += int((kept != mask.to_bool()).sum())
        assert not weight[~kept].any()
        assert not torch.signbit(weight[~kept]).any()
        assert weight[kept].count_nonzero() > 0.7 * kept.sum()  # small ones may be rounded to the code of zero
    assert (moved > 0) == (where == "seft")
    (entry,) = [e for e in made["stages"] if e["stage"] == "finetune"]
    assert entry["zeros"] == sum(mask.zeros for mask in before.gossamer_masks.values())


def test_in_bfloat16_what_is_not_adapted_stays_to_the_bit(wide, tmp_path):
    """The head and the embedding compute in bfloat16; what is written of them is the source's float32."""
    tune = stage(wide, "static", base_quant="nf4", precision="bfloat16")
    compress(wide, tmp_path / "out", Recipe(stages=(tune, ExportStage(format="dense"))))
    new, old = tensors(tmp_path / "out"), tensors(wide)
    assert all(torch.equal(new[name], old[name]) for name in old if "proj" not in name)
    found = next(s for s in report(tmp_path / "out")["stages"] if s["stage"] == "finetune")
    assert found["heldout"]["after"] < found["heldout"]["before"]


@pytest.mark.parametrize(
    ("family", "method"), [("gpt2", "spiel-ag"), ("gpt2", "lora"), ("mixtral", "static"), ("qwen2", "lora")]
)
def test_other_families(tmp_path, family, method):
    """Conv1D is turned round and back; fused experts and routers stay as they are; biases are kept."""
    model = save_family(family, tmp_path / "model", dtype=torch.bfloat16)
    save_words(model, 97)
    (model / "calibration.txt").write_text(" ".join(f"w{(7 * k * k + k // 3) % 97}" for k in range(1500)))
    tune = stage(model, method, seqlen=12, base_quant="nf4", learning_rate=1e-3)
    compress(model, tmp_path / "out", Recipe(stages=(tune, ExportStage(format="dense"))))
    new, old = tensors(tmp_path / "out"), tensors(model)
    assert {name: (t.dtype, t.shape) for name, t in new.items()} == {
        name: (t.dtype, t.shape) for name, t in old.items()
    }
    moved = {name for name in old if not torch.equal(new[name], old[name])}
    assert moved
    assert all(old[name].dim() == 2 and "expert" not in name and "embed" not in name for name in moved)
    for name in moved:
        weight = old[name].float()
        wanted = stands_for(weight.t()).t() if family == "gpt2" else stands_for(weight)
        assert float((new[name].float() - wanted).norm() / weight.norm()) < 0.1, name


def stands_for(weight):
    """[out, in] in nf4, and back."""
    net = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    net[0].weight.data.copy_(weight)
    quantise(net, ["0"], "nf4", torch.float32)
    return plain(net[0]).weight


def test_after_a_kill_it_goes_on_to_the_same_bits(wide, launcher, tmp_path):
    def words(out, *more):
        return [
            "finetune", wide, "-o", out, "--method", "spiel-ag", "--density", 0.05, "--base-quant", "nf4",
            "--data", wide / "calibration.txt", "--seqlen", 16, "--steps", 8, "--no-eval", "--set", "batch=4",
            "--set", "save_every=3", "--set", "interval=4", "--set", "window=2", *more,
        ]  # fmt: skip

    assert launcher.run(*words(tmp_path / "plain")).returncode == 0
    done = launcher.run(*words(tmp_path / "out"), before=KILL.format(step=5, signal="SIGKILL"))
    assert done.returncode == -signal.SIGKILL, done.stderr
    again = launcher.run(*words(tmp_path / "out"), "--resume")
    assert again.returncode == 0, again.stderr
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("static", "nf4"),
        *(pytest.param(m, k, marks=pytest.mark.slow) for m, k in (("lora", "int8"), ("spiel-ag", "fp4"))),
    ],
)
def test_two_processes_train_the_adapter_of_one(wide, launcher, tmp_path, method, kind):
    """Data parallel: each holds the whole quantised base; gradients are summed in another order.

    Candidates of spiel-ag are looked for in each process's own gradients: positions are equal on all ranks, which the
    run proves itself, and not those of one process.
    """
    words = [
        "finetune", wide, "--method", method, "--base-quant", kind, "--data", wide / "calibration.txt", "--seqlen", 16,
        "--steps", 6, "--no-eval", "--set", "batch=4", "--set", "save_every=0", "--learning-rate", 0.01,
        *(["--set", "rank=2"] if method == "lora" else ["--density", 0.05, "--set", "adapter_dtype=float32"]),
        *(["--set", "interval=2", "--set", "window=1"] if method == "spiel-ag" else []),
    ]  # fmt: skip
    found = []
    for count in (1, 2):
        out = tmp_path / str(count)
        for done in [process.wait() for process in launcher.start_group(count, *words, "-o", out)]:
            assert done.returncode == 0, done.stderr
        found.append(tensors(out / ADAPTER, "adapter*.safetensors"))
    one, two = found
    assert one.keys() == two.keys()
    assert len(one) >= 14
    for name, tensor in one.items():
        if method == "spiel-ag":
            assert tensor.shape == two[name].shape
            continue
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=2e-5)


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "masklora", "bias-norm", "dst", "pst"])
def test_methods_that_train_weights_are_refused_before_one_is_read(wide, tmp_path, method):
    tune = FinetuneStage(data=str(wide / "calibration.txt"), method=method, base_quant="nf4", steps=1, seqlen=16)
    with pytest.raises(RecipeError, match=f"{method} trains the weights themselves"):
        compress(wide, tmp_path / "out", Recipe(stages=(tune,)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("method", "optimizer"), [("spiel-ma", "adamw-8bit"), ("spiel-ag", "sgd")])
def test_an_optimizer_that_a_method_does_not_have(wide, tmp_path, method, optimizer):
    """It was ignored without a word before."""
    with pytest.raises(RecipeError, match="has an optimizer of its own"):
        compress(wide, tmp_path / "out", Recipe(stages=(stage(wide, method, optimizer=optimizer),)))


def test_all_that_makes_it_small_at_once(wide, tmp_path):
    """4-bit base, 8-bit moments, bfloat16, gradient checkpointing: it learns, and positions move."""
    tune = stage(
        wide, base_quant="nf4", optimizer="adamw-8bit", precision="bfloat16", gradient_checkpointing=True, steps=8
    )
    compress(wide, tmp_path / "out", Recipe(stages=(tune, ExportStage(format="dense"))))
    found = next(s for s in report(tmp_path / "out")["stages"] if s["stage"] == "finetune")
    assert found["heldout"]["after"] < found["heldout"]["before"]
    assert found["reselections"][0]["replaced"] > 0


def test_an_unknown_kind(wide):
    with pytest.raises(GossamerError, match="base_quant"):
        build(FinetuneStage, method="lora", base_quant="int4")


def test_without_bitsandbytes_it_says_so(wide, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
    )
    with pytest.raises(RecipeError, match="needs the package bitsandbytes"):
        compress(wide, tmp_path / "out", Recipe(stages=(stage(wide, base_quant="int8"),)))
    assert list(tmp_path.iterdir()) == []


def test_fsdp_is_refused(wide, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="does not go with FSDP"):
        compress(wide, tmp_path / "out", Recipe(stages=(stage(wide, base_quant="nf4"),)))


def test_lora_on_a_pruned_base_is_refused(wide, tmp_path):
    stages = (PruneStage(method="magnitude"), stage(wide, "lora", base_quant="nf4"), ExportStage())
    with pytest.raises(RecipeError, match="cannot keep the zeros"):
        compress(wide, tmp_path / "out", Recipe(stages=stages))


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_the_estimate_counts_codes(wide, tmp_path):
    """Weights that are 1.6 % in a width of 48; what is left of the difference are the codes."""
    peaks = {}
    for kind in (None, "int8", "nf4"):
        recipe = Recipe(stages=(stage(wide, "static", base_quant=kind),))
        estimate = plan(wide, tmp_path / "out", recipe).estimate
        peaks[kind] = estimate.peak.bytes - estimate.resident  # what the process held already moves between the plans
    assert peaks["nf4"] < peaks["int8"] < peaks[None]


def test_only_one_block_is_dense_while_the_model_is_opened(wide, tmp_path, monkeypatch):
    """Float matrices of the blocks that are alive when a layer is quantised: those of one block."""
    import gc

    from gossamer.compress import quantisedbase

    seen = []

    def counting(block, names, kind, dtype):
        gc.collect()
        sizes = [(48, 48), (24, 48), (72, 48), (48, 72)]
        alive = [
            o for o in gc.get_objects() if isinstance(o, nn.Parameter) and not o.is_meta and tuple(o.shape) in sizes
        ]
        seen.append(sum(1 for p in alive if p.is_floating_point()))
        quantise(block, names, kind, dtype)

    monkeypatch.setattr(quantisedbase, "quantise", counting)
    compress(wide, tmp_path / "out", Recipe(stages=(stage(wide, "static", base_quant="nf4"),)))
    assert seen == [7, 7, 7]
