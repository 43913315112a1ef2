"""An activation policy inside a checkpoint: saved, loaded, converted, inspected, and refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from activation_cases import FILE, core_policy, decode, family_with, gate_policy, give, ids, linear_policy, plain_model
from exports import save_family_sparse
from families import save_family
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gossamer
from gossamer.activation_sparsity.base import Policy
from gossamer.compress.activation.file import read_file, sha256, write_policy
from gossamer.compress.convert import convert
from gossamer.compress.inspect import inspect_model
from gossamer.errors import CheckpointError

POLICIES = {
    "linear": lambda: linear_policy("llama", 0.5),
    "cores": lambda: core_policy("llama"),
    "clusters": lambda: core_policy("llama", similarity=True),
    "gate": lambda: gate_policy("llama"),
}


def entry(folder):
    return json.loads((folder / "config.json").read_text())["gossamer"]["activation"]


def edit_entry(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["gossamer"]["activation"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def same(one: Policy, other: Policy) -> bool:
    from gossamer.activation_sparsity.store import to_tensors

    (a, left), (b, right) = to_tensors(one), to_tensors(other)
    return left == right and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", list(POLICIES))
@pytest.mark.parametrize("sparse", [False, True])
def test_save_and_load_give_the_same_logits(tmp_path, kind, sparse):
    make = save_family_sparse if sparse else save_family
    folder = give(make("llama", tmp_path / "m", dtype=torch.bfloat16), POLICIES[kind]())
    model, given = gossamer.load(folder), ids(1, 14)
    wanted = decode(model, given, 9)
    model.save_pretrained(tmp_path / "again")
    again = gossamer.load(tmp_path / "again")
    assert torch.equal(decode(again, given, 9), wanted)
    assert same(again.gossamer_activation.policy, POLICIES[kind]())
    assert entry(tmp_path / "again") == entry(folder)
    assert again.gossamer_masks.keys() == model.gossamer_masks.keys()
    if sparse:
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "again", variant="sparse").eval()
        assert torch.equal(decode(read, given, 9), wanted)
    assert (tmp_path / "again" / FILE).read_bytes() == (folder / FILE).read_bytes()


def test_plain_transformers_sees_a_dense_model(tmp_path):
    folder = family_with("llama", tmp_path / "m", linear_policy("llama", 0.5))
    gossamer.load(folder).save_pretrained(tmp_path / "again")
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM as A\nfor folder in sys.argv[1:]:\n"
        " m = A.from_pretrained(folder).eval()\n assert 'gossamer' not in sys.modules\n"
        " print(sum(p.double().sum().item() for p in m.parameters()), type(m.model.layers[0].mlp.up_proj).__name__)"
    )
    folders = [str(save_family("llama", tmp_path / "plain")), str(tmp_path / "again")]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    said = [line.split() for line in done.stdout.splitlines()]
    assert said[0] == said[1]
    assert said[0][1] == "Linear"
    given = ids(1, 9)
    with torch.no_grad():
        assert torch.equal(plain_model(tmp_path / "again")(given).logits, plain_model(folder)(given).logits)


def test_without_attachments_it_runs_dense_and_forgets_nothing_on_disk(tmp_path):
    folder = family_with("llama", tmp_path / "m", linear_policy("llama", 0.5))
    model = gossamer.load(folder, attachments=False)
    assert not hasattr(model, "gossamer_activation")
    given = ids(1, 12)
    assert torch.allclose(decode(model, given, 9), decode(plain_model(folder), given, 9), atol=1e-5)


@pytest.mark.parametrize("to", ["dense", "sparse"])
def test_convert_takes_it_along(tmp_path, to):
    folder = give(save_family_sparse("llama", tmp_path / "m", dtype=torch.bfloat16), linear_policy("llama", 0.5))
    convert(folder, tmp_path / "out", to)
    assert entry(tmp_path / "out") == entry(folder)
    given = ids(1, 12)
    found, wanted = (decode(gossamer.load(path), given, 9) for path in (tmp_path / "out", folder))
    assert ((found - wanted).norm() / wanted.norm()) < 0.1
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="sha256"):
        convert(folder, tmp_path / "bad", to)
    assert not (tmp_path / "bad").exists()


def test_inspect_says_what_there_is(tmp_path):
    folder = family_with("llama", tmp_path / "m", linear_policy("llama", 0.5))
    said = inspect_model(folder)["activation"]
    assert said["method"] == "auto"
    assert said["maps"] == 21
    assert said["mlps"] == 0
    assert said["rank"] == 2
    assert said["facts"] == {"target": 0.5}
    assert said["bytes"] == sum(t.nbytes for t in load_file(folder / FILE).values())
    json.dumps(said)
    assert inspect_model(save_family("llama", tmp_path / "plain"))["activation"] is None
    give(save_family("llama", tmp_path / "c"), core_policy("llama"))
    assert inspect_model(tmp_path / "c")["activation"]["mlps"] == 3


# ---- attacks ----


def rewritten(folder, edit, *, tell=True):
    """The file with `edit(tensors, record)` applied, by the safetensors library; config.json told so."""
    path = folder / FILE
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["policy"])
    tensors = load_file(path)
    edit(tensors, record)
    save_file(tensors, path, {"format": "pt", "policy": json.dumps(record)})
    if tell:
        edit_entry(folder, sha256=sha256(path))


UP = "model.layers.0.mlp.up_proj"


def nan(tensors, record):
    tensors[f"{UP}.threshold"][3] = float("nan")


def infinite_shift(tensors, record):
    tensors[f"{UP}.shift"][0] = float("inf")


def shorter(tensors, record):
    tensors[f"{UP}.threshold"] = tensors[f"{UP}.threshold"][:-1].clone()


def half(tensors, record):
    tensors[f"{UP}.center"] = tensors[f"{UP}.center"].half()


def gone(tensors, record):
    del tensors[f"{UP}.threshold"]


def extra(tensors, record):
    tensors["other"] = torch.zeros(3)


def another_shape(tensors, record):
    record["shapes"][UP] = [80, 49]


def unknown_map(tensors, record):
    record["shapes"]["model.layers.9.mlp.up_proj"] = [80, 48]


def unknown_version(tensors, record):
    record["version"] = 99


def not_a_list(tensors, record):
    record["linears"] = 3


def huge(tensors, record):
    record["shapes"][UP] = [1 << 62, 1 << 62]


EDITS = {
    nan: "not finite", infinite_shift: "not finite", shorter: "must be", half: "must be", gone: "lacks the tensor",
    extra: "does not name: other", another_shape: "must be", unknown_map: "another model",
    unknown_version: "version 99", not_a_list: "malformed", huge: "must be",
}  # fmt: skip


@pytest.mark.parametrize("edit", list(EDITS))
def test_a_changed_file_is_refused(tmp_path, edit):
    folder = family_with("llama", tmp_path / "m", linear_policy("llama"))
    rewritten(folder, edit, tell=False)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        gossamer.load(folder)
    edit_entry(folder, sha256=sha256(folder / FILE))
    with pytest.raises(CheckpointError, match=EDITS[edit]):
        gossamer.load(folder)


@pytest.mark.parametrize("value", [-1, 80, 7])
def test_clusters_out_of_range_are_refused(tmp_path, value):
    folder = family_with("llama", tmp_path / "m", core_policy("llama", similarity=True))

    def edit(tensors, record):
        rows = tensors["model.layers.1.mlp.clusters"]
        rows[0, -1 if value == 80 else 0] = value if value != 7 else int(rows[0, 1])  # twice the same

    rewritten(folder, edit)
    with pytest.raises(CheckpointError, match="core neurons of model.layers.1.mlp must rise"):
        gossamer.load(folder)


def test_truncated_missing_or_of_another_model(tmp_path):
    folder = family_with("llama", tmp_path / "m", linear_policy("llama"))
    data = (folder / FILE).read_bytes()
    for size in (0, 7, 100, len(data) - 1):
        (folder / FILE).write_bytes(data[:size])
        edit_entry(folder, sha256=sha256(folder / FILE))
        with pytest.raises(CheckpointError):
            gossamer.load(folder)
    other = family_with("mistral", tmp_path / "other", linear_policy("mistral"))
    shutil.copy(other / FILE, folder / FILE)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        gossamer.load(folder)
    edit_entry(folder, sha256=sha256(folder / FILE))
    with pytest.raises(CheckpointError, match="another model"):
        gossamer.load(folder)
    (folder / FILE).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        gossamer.load(folder)
    assert gossamer.load(folder, attachments=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"format_version": "1"}, "format version '1'"),
        ({"file": "../../etc/passwd"}, "is said to lie in"),
        ({"method": "cats"}, "config.json says 'cats'"),
        ({"sha256": None}, "sha256 differs"),
    ],
)
def test_an_entry_that_does_not_fit_is_refused(tmp_path, change, message):
    folder = family_with("llama", tmp_path / "m", linear_policy("llama"))
    edit_entry(folder, **change)
    with pytest.raises(CheckpointError, match=message):
        gossamer.load(folder)


def test_the_sparse_variant_is_refused_too(tmp_path):
    folder = give(save_family_sparse("llama", tmp_path / "m", dtype=torch.bfloat16), linear_policy("llama"))
    rewritten(folder, nan)
    with pytest.raises(CheckpointError, match="not finite"):
        AutoModelForCausalLM.from_pretrained(folder, variant="sparse")


def test_the_same_policy_gives_the_same_bytes(tmp_path):
    first = write_policy(tmp_path / "a.safetensors", linear_policy("llama"))
    assert write_policy(tmp_path / "b.safetensors", linear_policy("llama")) == first
    assert same(read_file(tmp_path / "a.safetensors"), linear_policy("llama"))
