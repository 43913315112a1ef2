"""The demo model: a small Llama with its own tokenizer, trained in about two minutes on two cores, without network.

It exists so that the whole of Gossamer can be tried on any machine, and it is what the tests prune. The loop is written
out rather than left to the transformers Trainer: it is no longer than the Trainer's arguments would be, starts seconds
sooner, trains matrices and vectors by different optimizers, and bends its learning-rate schedule to a time limit.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import RecipeError, ResourceError, TrainingError
from .demo_text import collect_documents, split_documents

if TYPE_CHECKING:
    from torch import Tensor

CALIBRATION_FILE = "calibration.txt"
HELD_OUT_FILE = "heldout.txt"
TIME_LIMIT_S = 140.0

_BEGIN, _END = "<s>", "</s>"
_BEGIN_SHARE = 0.25  # of the training windows: they start with BOS, as generation does
_RATE = 4e-3  # AdamW: embeddings and norms
_MATRIX_RATE = 0.02  # Muon: the matrices inside the blocks
_FLOOR = 0.02  # of the peak learning rates, at the end of the schedule


@dataclass(frozen=True)
class DemoSize:
    """Shape of a demo model and how it is trained. Widths and lengths in features and tokens."""

    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int
    context: int
    batch: int
    steps: int


SIZES: dict[str, DemoSize] = {
    "standard": DemoSize(layers=4, width=128, inner=384, heads=4, vocabulary=2048, context=256, batch=8, steps=540),
    "tiny": DemoSize(layers=2, width=64, inner=172, heads=4, vocabulary=512, context=128, batch=8, steps=60),
}


@dataclass(frozen=True)
class DemoResult:
    """What `make_demo` made. `loss`: of the last training step; `perplexity`: held-out text, windows of the context.

    `steps`: those that were done; fewer than asked for when the time limit struck.
    """

    folder: Path
    parameters: int
    steps: int
    seconds: float
    loss: float
    perplexity: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self) | {"folder": str(self.folder)}


def make_demo(
    folder: str | Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    size: Literal["standard", "tiny"] = "standard",
    time_limit_s: float = TIME_LIMIT_S,
    progress: Callable[[int, int, float], None] | None = None,
) -> DemoResult:
    """Train a demo model into `folder`: an ordinary HuggingFace folder (bfloat16) plus calibration.txt and heldout.txt.

    Training ends after `steps` (default: the size's own) or when `time_limit_s` is used up, whichever comes first; the
    schedule ends with it. The same seed, thread count and versions give the same model unless the limit strikes.
    `progress(step, steps, loss)` is called after every step. Raises RecipeError when `folder` is taken, DataError when
    this Python has no library sources, TrainingError when the loss is not finite, ResourceError when it cannot write.
    """
    started = time.monotonic()
    target = Path(folder)
    _require_free(target)
    shape = SIZES[size]
    steps = shape.steps if steps is None else steps
    if steps < 1:
        raise RecipeError(f"steps must be at least 1, got {steps}")
    training, held_out = split_documents(collect_documents())
    tokenizer = _train_tokenizer(training, shape)
    model = _new_model(shape, seed)
    ids = _ids(tokenizer, training)
    done, loss = _train(model, ids, shape, steps, seed, started + time_limit_s, progress)
    perplexity = _perplexity(model, _ids(tokenizer, held_out), shape.context)
    _save(target, model, tokenizer, {CALIBRATION_FILE: training, HELD_OUT_FILE: held_out})
    return DemoResult(target, model.num_parameters(), done, time.monotonic() - started, loss, perplexity)


def _require_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"{folder} exists and is not empty", hint="choose a new folder")


def _train_tokenizer(text: str, shape: DemoSize) -> Any:
    """Byte-level BPE with one BOS at the start of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        special_tokens=[_BEGIN, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{_BEGIN} $A", special_tokens=[(_BEGIN, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BEGIN,
        eos_token=_END,
        pad_token=_END,
        model_max_length=shape.context,
        clean_up_tokenization_spaces=False,
    )


def _new_model(shape: DemoSize, seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=2,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _ids(tokenizer: Any, text: str) -> Tensor:
    import torch

    return torch.tensor(tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"])


def _train(
    model: Any,
    ids: Tensor,
    shape: DemoSize,
    steps: int,
    seed: int,
    deadline: float,
    progress: Callable[[int, int, float], None] | None,
) -> tuple[int, float]:
    """A short warm-up and a cosine to the end, over random windows of ids [n]. Returns (steps done, last loss)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    optimizers = _optimizers(model)
    started = time.monotonic()
    count, loss = 0, math.nan
    model.train()
    for step in range(steps):
        elapsed = (time.monotonic() - started) / max(deadline - started, 1e-9)
        done = max(step / steps, elapsed)
        if done >= 1:
            break
        batch = _batch(ids, shape, generator)
        out = model(input_ids=batch, labels=batch, use_cache=False).loss
        out.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in optimizers:
            _update(optimizer, rate * _schedule(step, steps, done))
        count, loss = step + 1, float(out.detach())
        if not math.isfinite(loss):
            raise TrainingError(f"the demo model's loss is {loss} after {step + 1} steps", hint="try another --seed")
        if progress is not None:
            progress(step + 1, steps, loss)
    return count, loss


def _optimizers(model: Any) -> list[tuple[Any, float]]:
    """(optimizer, peak rate): Muon for the matrices, which needs half the steps, AdamW for the rest."""
    import torch

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(others, lr=_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if hasattr(torch.optim, "Muon"):
        return [(torch.optim.Muon(matrices, lr=_MATRIX_RATE, momentum=0.95), _MATRIX_RATE), (adam, _RATE)]
    adam.add_param_group({"params": matrices, "weight_decay": 0.1})  # torch before 2.9: a weaker model
    return [(adam, _RATE)]


def _update(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _schedule(step: int, steps: int, done: float) -> float:
    """Share of the peak learning rates at `done` in [0, 1) of the training."""
    warm = min(1.0, (step + 1) / max(1, min(20, steps // 5)))
    return warm * (_FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))


def _batch(ids: Tensor, shape: DemoSize, generator: Any) -> Tensor:
    """Random windows [batch, context] of ids; some of them begin with BOS (token 0)."""
    import torch

    starts = torch.randint(0, len(ids) - shape.context + 1, (shape.batch,), generator=generator)
    batch = torch.stack([ids[start : start + shape.context] for start in starts.tolist()])
    begins = torch.rand(shape.batch, generator=generator) < _BEGIN_SHARE
    batch[begins, 0] = 0
    return batch


def _perplexity(model: Any, ids: Tensor, window: int) -> float:
    import torch

    model.eval()
    losses = []
    with torch.inference_mode():
        for batch in ids[: len(ids) // window * window].reshape(-1, window).split(8):
            losses += [float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in batch]
    return math.exp(math.fsum(losses) / len(losses))


def _save(folder: Path, model: Any, tokenizer: Any, texts: dict[str, str]) -> None:
    """Write everything beside `folder` and rename, so that a folder of that name is always whole."""
    import torch

    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for name, text in texts.items():
            (partial / name).write_bytes(text.encode("utf-8", "replace"))
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    except OSError as error:
        raise ResourceError(f"{folder} cannot be written: {error.strerror or error}") from error
