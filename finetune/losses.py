"""What retraining minimises: the text's own next tokens, the dense model's prediction of them, or a mix.

All losses are *sums* over the predicted tokens; the trainer divides by the number of tokens of the whole step, so that
accumulation and data parallelism change nothing but rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import RecipeError, TrainingError

if TYPE_CHECKING:
    from .tokens import TokenRows

IGNORED = -100  # label of a token that nothing is to be learned from
KINDS = ("lm", "distill", "mix")


@dataclass(frozen=True)
class LossConfig:
    """Which loss, and its numbers.

    Attributes:
        kind: "lm": cross-entropy to the text. "distill": KL(dense, sparse). "mix": share * distill + (1 - share) * lm.
        temperature: both distributions of "distill" are softened by it; the loss is multiplied by its square, so that
            gradients keep their size (Hinton et al., arXiv 1503.02531).
        share: of "distill" in "mix".
        hidden: weight of the relative squared distance of hidden states to the dense model's, averaged over layers
            (||h - dense||^2 / ||dense||^2 per token, after Kurtic et al., arXiv 2310.06927); 0 leaves them out.
    """

    kind: str = "lm"
    temperature: float = 1.0
    share: float = 0.5
    hidden: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RecipeError(f"loss {self.kind!r} is unknown; allowed: {', '.join(KINDS)}")
        if self.temperature <= 0 or not 0 <= self.share <= 1 or self.hidden < 0:
            raise RecipeError(
                f"temperature {self.temperature:g}, share {self.share:g} and hidden {self.hidden:g} do not fit",
                hint="temperature > 0, share in [0, 1], hidden >= 0",
            )

    @property
    def needs_teacher(self) -> bool:
        return self.kind != "lm" or self.hidden > 0


def lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropy of labels[:, 1:] under logits[:, :-1], float32. Logits [b, t, v], labels [b, t]."""
    return functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def distillation_loss(logits: Tensor, dense: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """temperature^2 * sum of KL(dense || sparse) at the positions whose next token has a label, float32."""
    chosen = labels[:, 1:] != IGNORED
    ours = functional.log_softmax(logits[:, :-1][chosen].float() / temperature, dim=-1)
    theirs = functional.log_softmax(dense[:, :-1][chosen].float() / temperature, dim=-1)
    return temperature**2 * functional.kl_div(ours, theirs, reduction="sum", log_target=True)


def hidden_loss(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Mean over layers of sum over predicting positions of ||h - h_dense||^2 / ||h_dense||^2, float32.

    The first state, the embedding, is left out: pruning does not touch it.
    """
    chosen = labels[:, 1:] != IGNORED
    terms = []
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        a, b = a[:, :-1][chosen].float(), b[:, :-1][chosen].float()
        terms.append(((a - b).square().sum(-1) / b.square().sum(-1).clamp_min(1e-12)).sum())
    return torch.stack(terms).mean()


def loss_sum(config: LossConfig, model: Any, teacher: Any | None, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The configured loss of one micro-batch, summed over its predicted tokens.

    Raises:
        TrainingError: the loss needs the dense model and there is none.
    """
    options: dict[str, Any] = {"use_cache": False, "output_hidden_states": config.hidden > 0}
    out = model(**inputs, **options)
    if not config.needs_teacher:
        return lm_loss(out.logits, labels)
    if teacher is None:
        raise TrainingError(f"loss {config.kind} compares with the dense model, and none was given")
    with torch.no_grad():
        dense = teacher(**inputs, **options)
    total = torch.zeros((), device=labels.device)
    if config.kind != "lm":
        share = config.share if config.kind == "mix" else 1.0
        total = total + share * distillation_loss(out.logits, dense.logits, labels, config.temperature)
    if config.kind != "distill":
        share = 1 - config.share if config.kind == "mix" else 1.0
        total = total + share * lm_loss(out.logits, labels)
    if config.hidden > 0:
        total = total + config.hidden * hidden_loss(out.hidden_states, dense.hidden_states, labels)
    return total


@torch.no_grad()
def row_losses(model: Any, rows: TokenRows, batch: int = 8) -> Tensor:
    """Mean cross-entropy per predicted token of every row, float32 [rows], with the model in eval mode.

    Paired over two models it gives the standard error of their difference.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    found = []
    for start in range(0, len(rows), batch):
        items = [rows.row(index) for index in range(start, min(start + batch, len(rows)))]
        inputs = {key: torch.stack([item[key] for item in items]).to(device) for key in items[0]}
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        losses = functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        found.append((losses.sum(1) / (labels != IGNORED).sum(1).clamp_min(1)).cpu())
    model.train(was_training)
    return torch.cat(found) if found else torch.empty(0)
