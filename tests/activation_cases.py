"""Activation policies made by hand for tiny models, and what they compute by another definition: hooks in torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, save_family
from torch import Tensor
from transformers import AutoModelForCausalLM

from gossamer.activation_sparsity.base import (
    CoreGuide,
    CoreNeurons,
    GateThreshold,
    LinearPolicy,
    MLPParts,
    Policy,
)  # fmt: skip
from gossamer.compress.activation.file import NAME, write_policy

FILE = "gossamer/activation.safetensors"
PARTS = {
    "llama": ("mlp", "gate_proj", "up_proj", "down_proj", "silu"),
    "mistral": ("mlp", "gate_proj", "up_proj", "down_proj", "silu"),
    "qwen2": ("mlp", "gate_proj", "up_proj", "down_proj", "silu"),
    "qwen3": ("mlp", "gate_proj", "up_proj", "down_proj", "silu"),
    "gemma2": ("mlp", "gate_proj", "up_proj", "down_proj", "gelu_tanh"),
    "phi3": ("mlp", "gate_up_proj", "gate_up_proj", "down_proj", "silu"),
    "phi": ("mlp", None, "fc1", "fc2", "gelu_tanh"),
    "opt": ("", None, "fc1", "fc2", "relu"),
    "gpt2": ("mlp", None, "c_fc", "c_proj", "gelu_tanh"),
}  # fmt: skip


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shapes_of(family: str) -> dict[str, tuple[int, int]]:
    known = FAMILIES[family]
    layers = getattr(known.config(), "num_hidden_layers", None) or known.config().n_layer
    return {f"{known.path}.{i}.{name}": shape for i in range(layers) for name, shape in known.prunable.items()}


def sites_of(family: str) -> dict[str, str]:
    known = FAMILIES[family]
    layers = len({name.removeprefix(known.path).split(".")[1] for name in shapes_of(family)})
    groups = [group for step in known.steps for group in step]
    return {
        f"{known.path}.{i}.{name}": f"{known.path}.{i}.{group[0]}"
        for i in range(layers)
        for group in groups
        for name in group
    }


def entry(
    shape: tuple[int, int], seed: int, size: float = 1.0, *, all_parts: bool = True, site: int = 0
) -> LinearPolicy:
    """Thresholds around `size`; with center, shift and a residual of rank 2."""
    out, width = shape
    own, common = generator(seed), generator(1000 + site)
    threshold = torch.rand(width, generator=common) * 2 * size
    if not all_parts:
        return LinearPolicy(threshold)
    return LinearPolicy(
        threshold,
        torch.randn(width, generator=common) * 0.1 * size,
        torch.randn(out, generator=own) * 0.1,
        torch.randn(out, 2, generator=own) * 0.1,
        torch.randn(2, width, generator=own) * 0.1,
    )


def linear_policy(family: str, size: float = 1.0, *, all_parts: bool = True) -> Policy:
    """Every map skips; those of one site skip the same."""
    shapes, sites = shapes_of(family), sites_of(family)
    leaders = sorted(set(sites.values()))
    linears = {
        name: entry(shape, i, size, all_parts=all_parts, site=leaders.index(sites[name]))
        for i, (name, shape) in enumerate(shapes.items())
    }
    return Policy("auto", shapes, linears, sites=sites, facts={"target": 0.5})


def mlp_parts(family: str) -> dict[str, MLPParts]:
    shapes = shapes_of(family)
    path, gate, up, down, activation = PARTS[family]
    found = {}
    for i in range(sum(name.endswith(f".{path}.{down}".replace("..", ".")) for name in shapes)):
        block = f"{FAMILIES[family].path}.{i}"
        owner = f"{block}.{path}" if path else block
        neurons = shapes[f"{owner}.{down}"][1]
        named = None if gate is None else f"{owner}.{gate}"
        found[owner] = MLPParts(named, f"{owner}.{up}", f"{owner}.{down}", activation, neurons)
    return found


def core_policy(
    family: str, share: float = 0.4, *, similarity: bool = False, refresh: int = 0, drift: float = 0.5
) -> Policy:
    mlps, parts = {}, mlp_parts(family)
    for i, (name, part) in enumerate(parts.items()):
        keep, g = int(share * part.neurons), generator(i)
        clusters = None
        if similarity:
            picks = [torch.randperm(part.neurons, generator=g)[:keep].sort().values for _ in range(3)]
            clusters = torch.stack(picks).int()
        mlps[name] = CoreNeurons(part, keep, torch.rand(part.neurons, generator=g) + 0.5, clusters)
    last = list(parts)[-1]
    guide = CoreGuide(0.3, refresh=refresh, drift=drift)
    if similarity:
        centroids = torch.rand(3, parts[last].neurons, generator=generator(9))
        guide = CoreGuide(0.3, last, 20, centroids, refresh, drift)
    return Policy("coreinfer", shapes_of(family), {}, mlps, sites_of(family), guide)


def gate_policy(family: str, size: float = 0.1) -> Policy:
    mlps = {
        name: GateThreshold(part, torch.rand(part.neurons, generator=generator(i)) * size)
        for i, (name, part) in enumerate(mlp_parts(family).items())
    }
    return Policy("cats", shapes_of(family), {}, mlps, sites_of(family))


def give(folder: Path, policy: Policy) -> Path:
    """Write the policy beside the weights of `folder`, as a stage does."""
    said = write_policy(folder / FILE, policy)
    config = json.loads((folder / "config.json").read_text())
    config.setdefault("gossamer", {"format_version": 1})[NAME] = said
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def family_with(family: str, folder: Path, policy: Policy, *, dtype: torch.dtype = torch.float32) -> Path:
    return give(save_family(family, folder, dtype=dtype), policy)


def plain_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """By transformers alone."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 90, shape, generator=generator(seed))


def decode(model: Any, given: Tensor, prompt: int, **options: Any) -> Tensor:
    """Logits [batch, tokens - prompt, vocabulary]: a prompt, then the other tokens one by one."""
    with torch.no_grad():
        out = model(input_ids=given[:, :prompt], use_cache=True, **options)
        found = []
        for i in range(prompt, given.shape[1]):
            out = model(input_ids=given[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits[:, -1])
    return torch.stack(found, 1)


def hooked(model: Any, policy: Policy) -> Any:
    """A plain model whose maps compute the policy's definition for one-token calls, by hooks and float64."""

    def run(layer: Any, x: Tensor, one: LinearPolicy, transposed: bool) -> Tensor:
        weight = layer.weight.t() if transposed else layer.weight
        moved = x if one.center is None else (x.float() - one.center).to(x.dtype)
        mask = moved.float().abs() > one.threshold
        y = (moved * mask).double() @ weight.double().t()
        if one.left is not None:
            y = y + (moved * ~mask).double() @ one.right.double().t() @ one.left.double().t()
        y = y + (0 if layer.bias is None else layer.bias.double()) + (0 if one.shift is None else one.shift.double())
        return y.to(x.dtype)

    for name, one in policy.linears.items():
        layer = model.get_submodule(name)
        transposed = type(layer).__name__ == "Conv1D"

        def after(layer: Any, args: Any, y: Tensor, one: Any = one, transposed: bool = transposed) -> Tensor | None:
            rows = args[0].shape[-2]  # OPT lays its sequences end to end
            return run(layer, args[0], one, transposed) if rows == 1 else None

        layer.register_forward_hook(after)
    return model
