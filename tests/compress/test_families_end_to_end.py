"""Every family through the whole job: written files read by plain safetensors, loaded by plain transformers.

What is expected is written by hand: names and shapes of the matrices (families.py), the tensors that hold them, exact
counts of zeros, and the axis along which N of every M stay.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import FAMILIES, MLP, VOCAB, save_family
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gossamer.compress.convert import convert
from gossamer.compress.recipe import EvaluateStage, ExportStage, PruneStage, Recipe
from gossamer.compress.run import compress, plan

SPARSITY = 0.43  # of no matrix here a whole number of zeros per row
LETTERS = "".join(map(chr, range(ord("!"), ord("~") + 1)))  # 94 characters: tokens 2, 3, ...
DEPTH = {"gemma2": 4, "gemma3": 4, "gpt_oss": 4}


@dataclass(frozen=True)
class Job:
    """A model, where it was written, and the tensors of both."""

    name: str
    model: Path
    out: Path
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    report: dict


def expected(name: str) -> dict[str, tuple[int, int]]:
    """Every prunable matrix of the model with its (out, in), by hand."""
    family = FAMILIES[name]
    found = {}
    for index in range(DEPTH.get(name, 3)):
        inside = family.prunable
        if name == "qwen3_moe" and index == 1:  # its config makes this block an ordinary one
            inside = {n: shape for n, shape in inside.items() if "experts" not in n} | MLP
        found |= {f"{family.path}.{index}.{n}": shape for n, shape in inside.items()}
    return found


def stored_as(name: str, matrix: str) -> list[str]:
    """Checkpoint keys of a matrix, by hand: what each family's published checkpoints are called."""
    path, _, last = matrix.rpartition(".")
    if not last.isdigit():
        return [f"{matrix}.weight"]
    holder, _, kind = path.rpartition(".")
    if name == "gpt_oss":
        return [path]
    if name == "mixtral":
        names = {"gate_up_proj": ["w1", "w3"], "down_proj": ["w2"]}[kind]
        holder = holder.replace(".mlp.", ".block_sparse_moe.")
    else:
        names = {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}[kind]
    return [f"{holder}.{last}.{part}.weight" for part in names]


def matrix_of(name: str, tensors: dict[str, torch.Tensor], matrix: str) -> torch.Tensor:
    """[out, in] of a matrix in the written tensors."""
    parts = [tensors[key] for key in stored_as(name, matrix)]
    if name == "gpt2":
        return parts[0].T
    if name == "gpt_oss" and matrix.rpartition(".")[2].isdigit():
        return parts[0][int(matrix.rpartition(".")[2])].T
    return torch.cat(parts)


def read(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}
    return found


def save_letters(folder: Path) -> None:
    """A byte-level tokenizer with one token per printable character: every tokenizer class reads it alike."""
    symbols = ["<s>", "</s>", *LETTERS]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="</s>").save_pretrained(folder)


def save_text(path: Path, seed: int) -> None:
    draw = random.Random(seed)
    path.write_text("".join(draw.choice(LETTERS) for _ in range(2000)))


def prune_stage(folder: Path, **options) -> PruneStage:
    values = {"method": "wanda", "calibration": str(folder / "calibration.txt"), "nsamples": 8, "seqlen": 24}
    return PruneStage(**(values | options))


def recipe(stage: PruneStage, folder: Path | None = None, form: str = "dense") -> Recipe:
    stages = [stage, ExportStage(format=form)]
    if folder is not None:
        stages.insert(1, EvaluateStage(data=str(folder / "evaluation.txt"), seqlen=24, windows=3))
    return Recipe(stages=stages)


def run(name: str, model: Path, out: Path, what: Recipe) -> Job:
    report = compress(model, out, what)
    return Job(name, model, out, read(model), read(out), json.loads((out / "report.json").read_text()) | report.data)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """A random model of a family with tokenizer and texts; made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = save_family(name, tmp_path_factory.mktemp(name) / "model", dtype=torch.bfloat16)
            save_letters(folder)
            save_text(folder / "calibration.txt", 1)
            save_text(folder / "evaluation.txt", 2)
            made[name] = folder
        return made[name]

    return make


@pytest.fixture(scope="module", params=list(FAMILIES))
def job(request, model_of, tmp_path_factory) -> Job:
    """The family at 43 % by wanda, evaluated, written dense."""
    model = model_of(request.param)
    out = tmp_path_factory.mktemp("out") / request.param
    return run(request.param, model, out, recipe(prune_stage(model, sparsity=SPARSITY), model))


def test_the_names_are_the_hand_written_ones(job):
    assert {row["name"]: tuple(row["shape"]) for row in job.report["layers"]} == expected(job.name)


def test_zeros_in_the_file_equal_the_plan(job, tmp_path):
    planned = plan(job.model, tmp_path / "out", Recipe(**job.report["recipe"]))
    zeros = {item.name: item.zeros for item in planned.changes[0].jobs}
    assert zeros == {n: round(SPARSITY * rows * cols) for n, (rows, cols) in expected(job.name).items()}
    assert zeros == {n: int((matrix_of(job.name, job.after, n) == 0).sum()) for n in zeros}


def test_zeros_are_spread_over_the_rows(job):
    """Wanda compares within a row: counts of two rows of one matrix differ by one at most, which tells the axis.

    Experts that saw too few tokens are pruned by magnitude, within the matrix; the report says so.
    """
    methods = {row["name"]: row["method"] for row in job.report["layers"]}
    assert set(methods.values()) == ({"wanda", "magnitude"} if "magnitude" in methods.values() else {"wanda"})
    for name, method in methods.items():
        if method == "wanda":
            counts = (matrix_of(job.name, job.after, name) == 0).sum(1)
            assert int(counts.max() - counts.min()) <= 1, name
        else:
            assert any(note.startswith(f"{name}: ") for note in job.report["notes"])


def test_keys_shapes_and_untouched_weights_are_those_of_the_input(job):
    assert {k: (t.shape, t.dtype) for k, t in job.after.items()} == {
        k: (t.shape, t.dtype) for k, t in job.before.items()
    }
    pruned = {key for n in expected(job.name) for key in stored_as(job.name, n)}
    for key, tensor in job.after.items():
        if key in pruned:
            kept = tensor != 0
            assert torch.equal(tensor[kept], job.before[key][kept]), key
            assert not torch.signbit(tensor[~kept]).any()
        else:
            assert torch.equal(tensor, job.before[key]), key


def test_plain_transformers_loads_it(job):
    config = json.loads((job.out / "config.json").read_text())
    assert "quantization_config" not in config
    model, info = AutoModelForCausalLM.from_pretrained(job.out, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        logits = model.eval()(ids).logits
        dense = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()(ids).logits
    assert torch.isfinite(logits).all()
    assert not torch.equal(logits, dense)


def test_the_reported_perplexity_is_that_of_the_loaded_model(job):
    model = AutoModelForCausalLM.from_pretrained(job.out, dtype=torch.float32).eval()
    text = (job.model / "evaluation.txt").read_text()
    ids = torch.tensor([2 + LETTERS.index(letter) for letter in text[: 3 * 24]]).view(3, 24)
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(model(w[None]).logits[0, :-1], w[1:]) for w in ids]
    evaluation = job.report["evaluation"]
    assert evaluation["after"]["cross_entropy"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert evaluation["protocol"]["windows"] == 3
    assert evaluation["kl"] > 0


def test_modules_that_stay_dense_are_named(job):
    family, depth = FAMILIES[job.name], DEPTH.get(job.name, 3)
    named = {row["name"] for row in job.report["skipped"]}
    mixed = [i for i in range(depth) if not (job.name == "qwen3_moe" and i == 1)]
    assert named == {f"{family.path}.{i}.{n}" for i in mixed for n in family.unprunable}


def test_sparse_and_back(job, tmp_path):
    """Dense -> sparse -> dense gives every tensor bit for bit; the sparse files are another set of tensors."""
    convert(job.out, tmp_path / "sparse", "sparse")
    sparse = read(tmp_path / "sparse")
    assert all(f"{key}_bitmask" in sparse for n in expected(job.name) for key in stored_as(job.name, n))
    convert(tmp_path / "sparse", tmp_path / "dense", "dense")
    again = read(tmp_path / "dense")
    assert again.keys() == job.after.keys()
    assert all(torch.equal(again[key].view(torch.uint8), job.after[key].view(torch.uint8)) for key in again)


def kept_per_group(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """How many of every `size` consecutive inputs stay, by a loop over the columns."""
    counts = [sum((matrix[:, c + j] != 0).int() for j in range(size)) for c in range(0, matrix.shape[1], size)]
    return torch.stack(counts, 1)


LAYOUTS = [(name, method) for name in ("llama", "mixtral", "qwen3_moe") for method in ("magnitude", "sparsegpt")]
LAYOUTS += [(name, method) for name in ("gpt2", "gpt_oss") for method in ("magnitude", "sparsegpt", "gossamer")]


@pytest.mark.parametrize(("name", "method"), LAYOUTS)
def test_n_of_m_stay_along_the_inputs(name, method, model_of, tmp_path):
    """1:4 keeps one of four: the other axis would show other counts at once."""
    model = model_of(name)
    what = recipe(prune_stage(model, method=method, pattern="1:4", sparsity=None))
    done = run(name, model, tmp_path / "out", what)
    assert {row["name"] for row in done.report["layers"]} == set(expected(name))
    for matrix in expected(name):
        found = matrix_of(name, done.after, matrix)
        assert bool((kept_per_group(found, 4) == 1).all()), matrix
    across = [matrix_of(name, done.after, matrix) for matrix in expected(name)]
    assert not all(bool((kept_per_group(matrix.T.contiguous(), 4) == 1).all()) for matrix in across)


@pytest.mark.parametrize("method", ["sparsegpt", "gossamer"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
def test_methods_that_move_weights_leave_everything_else_alone(name, method, model_of, tmp_path):
    model = model_of(name)
    done = run(name, model, tmp_path / "out", recipe(prune_stage(model, method=method, sparsity=0.5)))
    pruned = {key for n in expected(name) for key in stored_as(name, n)}
    for key in done.before.keys() - pruned:
        assert torch.equal(done.after[key], done.before[key]), key
    for n, (rows, cols) in expected(name).items():
        assert int((matrix_of(name, done.after, n) == 0).sum()) == rows * cols // 2
    assert any(not torch.equal(done.after[key], done.before[key] * (done.after[key] != 0)) for key in pruned)


def test_lora_of_plain_peft_on_the_dense_gpt2(model_of, tmp_path):
    """Transformers and peft alone train an adapter on the exported folder; the zeros stay where they are."""
    from peft import LoraConfig, get_peft_model

    model = model_of("gpt2")
    done = run("gpt2", model, tmp_path / "out", recipe(prune_stage(model, sparsity=0.5)))
    loaded = AutoModelForCausalLM.from_pretrained(done.out, dtype=torch.float32)
    before = {name: parameter.clone() for name, parameter in loaded.named_parameters()}
    targets = ["c_attn", "c_proj", "c_fc"]
    tuned = get_peft_model(loaded, LoraConfig(r=2, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM"))
    ids = torch.randint(3, VOCAB, (2, 24))
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    tuned.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    base = tuned.unload()
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())


@pytest.mark.parametrize("include", [(), ("lm_head", "mlp")])
def test_untied_head_is_written(include, model_of, tmp_path):
    """With or without being pruned: plain transformers finds the head's own weight, and every logit is as expected."""
    model = model_of("qwen3")
    stage = PruneStage(method="magnitude", untie=True, include=include)
    done = run("qwen3", model, tmp_path / "out", recipe(stage))
    embedding, head = done.after["model.embed_tokens.weight"], done.after["lm_head.weight"]
    assert torch.equal(embedding, done.before["model.embed_tokens.weight"])
    assert torch.equal(head[head != 0], embedding[head != 0])
    assert int((head == 0).sum()) == (head.numel() // 2 if include else 0)
    loaded, info = AutoModelForCausalLM.from_pretrained(done.out, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(loaded.lm_head.weight, head)
    assert torch.equal(loaded.model.embed_tokens.weight, embedding)
