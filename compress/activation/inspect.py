"""What a model's activations allow: sparsity at a given error (CETT) per layer, and PPL-p% sparsity of its MLPs.

After the Sparsing Law (Luo et al. 2024). Neuron i of an MLP is inactive for a token where |h_i| ||W_down[:, i]|| <= e.
CETT of a layer at threshold e: the mean over tokens of ||sum of the inactive neurons' outputs|| / ||output||. One CETT,
shared by all layers, gives every layer its threshold; PPL-p% is the share of inactive neurons at the largest CETT
whose perplexity is at most p % above the dense one. ReLU or SiLU, gated or not.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...activation_sparsity.base import LinearPolicy, Policy
from ...errors import ModelError, RecipeError
from ..blocks import StreamedModel
from ..evaluate import Protocol
from ..format import METADATA_KEY
from ..plan import evaluation_dtype, sequence_length
from ..progress import Progress
from ..recipe import Machine, PruneStage, Recipe
from ..source import open_source
from ..text import Texts
from .file import NAME, read_policy
from .heldout import METHOD
from .sites import find_sites
from .walk import Walk, increase

POINTS = (  # shares of neurons on a layer's curve; of ReLU models nine in ten are zero anyway
    0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999,
)  # fmt: skip
TABLE = (0.1, 0.3, 0.6, 0.9, 0.95)  # of them, those that a table of all layers has
SAMPLE = 1024  # tokens
STEPS = 9  # of the bisection over CETT
PERCENT = (0.01, 0.05)


def inspect_activation(
    model: str | Path,
    data: str,
    *,
    seqlen: int | None = None,
    windows: int | None = 16,
    machine: Machine | None = None,
    progress: Progress | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """CETT curves per layer, PPL-1% and PPL-5%, and the realised sparsity of the policy that the checkpoint carries."""
    machine, progress = machine or Machine(), progress or Progress()
    if windows is not None and windows < 1:
        raise RecipeError(f"windows must be at least 1, got {windows}", hint="16 are usual")
    source = open_source(str(model), revision, token)
    dtype = evaluation_dtype(machine)
    streamed = StreamedModel.open(source, source.folder, dtype=dtype, trust_remote_code=trust_remote_code)
    length = sequence_length(seqlen, streamed.max_positions, "--seqlen")
    ids, protocol, _ = Texts(source.folder, Recipe(stages=(PruneStage(),)), streamed).evaluation(
        data, length, windows, dtype
    )
    with tempfile.TemporaryDirectory(prefix="gossamer-inspect-") as folder:
        walk = Walk(streamed, ids, memory_bytes=machine.max_memory_bytes // 2, scratch=Path(folder), progress=progress)
        dense = walk.run(None, "dense", reads=False)
        curves = _curves(walk)
        if not curves:
            raise ModelError("no MLP of the form down(act(up x)) or down(act(gate x) * up x) was found in this model")
        found: dict[str, Any] = {
            "model": str(model),
            "protocol": _described(protocol),
            "perplexity": dense.score.perplexity,
            "layers": [
                {"name": name, "cett": curve.as_dict(), "table": [round(curve.at(share), 5) for share in TABLE]}
                for name, curve in curves.items()
            ],
            "table": list(TABLE),
            "ppl": {f"{percent:.0%}": _ppl(walk, curves, dense.losses, percent) for percent in PERCENT},
        }
        entry = (source.config.get(METADATA_KEY) or {}).get(NAME)
        if entry is not None:
            found["policy"] = _of_policy(walk, read_policy(source.folder, entry), dense.losses)
        walk.close()
    return found


class NeuronCurve:
    """CETT of one MLP's down matrix at thresholds of its neurons' norms; both rising."""

    def __init__(self, down: str, norms: Tensor, inner: Tensor, weight: Tensor) -> None:
        self.down, self.norms = down, norms
        score = inner.abs() * norms
        output = (inner @ weight.T).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        ordered = score.flatten().sort().values
        self.thresholds = [float(ordered[max(0, math.ceil(p * len(ordered)) - 1)]) if p else 0.0 for p in POINTS]
        self.shares, self.cett = [], []
        for threshold in self.thresholds:
            inactive = score <= threshold
            self.shares.append(float(inactive.float().mean()))
            missed = (inner * inactive) @ weight.T
            self.cett.append(float((missed.norm(dim=1) / output).mean()))

    def threshold(self, cett: float) -> float:
        """The largest threshold with at most this CETT, on straight lines."""
        best = self.thresholds[0]
        for k in range(1, len(self.cett)):
            low, high = self.cett[k - 1], self.cett[k]
            if cett >= high:
                best = self.thresholds[k]
            elif cett > low:
                part = (cett - low) / (high - low)
                return self.thresholds[k - 1] + part * (self.thresholds[k] - self.thresholds[k - 1])
        return best

    def at(self, share: float) -> float:
        """CETT where this share of the neurons is inactive, on straight lines; 0 where so many are zero anyway."""
        k = next((k for k, reached in enumerate(self.shares) if reached >= share), len(self.shares) - 1)
        if k == 0 or self.shares[k] <= share:
            return self.cett[k]
        part = (share - self.shares[k - 1]) / (self.shares[k] - self.shares[k - 1])
        return self.cett[k - 1] + part * (self.cett[k] - self.cett[k - 1])

    def entry(self, cett: float) -> LinearPolicy:
        """As thresholds per channel: e / ||W_down[:, i]||."""
        tiny = torch.finfo(torch.float32).tiny
        return LinearPolicy(torch.where(self.norms > 0, self.threshold(cett) / self.norms.clamp_min(tiny), torch.inf))

    def as_dict(self) -> dict[str, float]:
        """CETT by share of inactive neurons."""
        return {f"{share:.3f}": round(cett, 5) for share, cett in zip(self.shares, self.cett, strict=True)}


def _curves(walk: Walk) -> dict[str, NeuronCurve]:
    model, found = walk.model, {}
    hidden = walk.embedded()
    try:
        for index in range(model.num_blocks):
            block = walk.block(index)
            sites = find_sites(model, index, block, hidden.get(0), walk.args)
            by_name = {p.name: p for p in model.prunables(index)}
            for path, parts in sites.mlps:
                inner = _inner(walk, index, block, by_name[parts.down], hidden)
                weight = model.weight(block, by_name[parts.down]).float()
                found[path] = NeuronCurve(parts.down, weight.norm(dim=0), inner, weight)
            walk.advance(index, block, hidden, None)
    finally:
        hidden.close()
    return found


def _inner(walk: Walk, index: int, block: nn.Module, down: Any, hidden: Any) -> Tensor:
    seen: list[Tensor] = []
    step = max(1, len(walk.windows) * (walk.windows.shape[1] - walk.start) // SAMPLE)
    with walk.model.observe(block, [down], lambda _, x: seen.append(x[walk.start :: step].float().clone())):
        for window in range(len(walk.windows)):
            walk.model.run_block(index, block, hidden.get(window), walk.args, window)
    return torch.cat(seen)


def _ppl(walk: Walk, curves: Mapping[str, NeuronCurve], dense: list[float], percent: float) -> dict[str, float]:
    """Bisection over the one CETT of all layers. `sparsity`: inactive neurons; `weights`: of all linear maps."""
    low, high = 0.0, 1.0
    best = {"cett": 0.0, "increase": 0.0, "sparsity": 0.0, "weights": 0.0}
    for _ in range(STEPS):
        cett = (low + high) / 2
        run = walk.run(Policy("", {}, {curve.down: curve.entry(cett) for curve in curves.values()}))
        rise, _error = increase(run.losses, dense)
        if rise > percent:
            high = cett
            continue
        low = cett
        skipped = run.reads.by_matrix()
        downs = [curve.down for curve in curves.values()]
        best = {
            "cett": round(min(cett, max(curve.cett[-1] for curve in curves.values())), 5), "increase": rise,
            "sparsity": sum(skipped[d] for d in downs) / len(downs), "weights": run.reads.sparsity,
        }  # fmt: skip
    return best


def _of_policy(walk: Walk, policy: Policy, dense: list[float]) -> dict[str, Any]:
    run = walk.run(policy)
    rise, error = increase(run.losses, dense)
    return {
        "method": policy.method,
        "perplexity": run.score.perplexity,
        "increase": rise,
        "standard_error": error,
        "sparsity": run.reads.sparsity,
        "matrices": run.reads.by_matrix(),
    }


def _described(protocol: Protocol) -> dict[str, Any]:
    return {"dataset": protocol.dataset, "windows": protocol.windows, "seqlen": protocol.seqlen, "method": METHOD}


__all__ = ["NeuronCurve", "inspect_activation"]
