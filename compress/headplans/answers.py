"""The model's own answers in place of the given ones: greedy, and kept on disk so that a resumed run has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..progress import Progress
from ..timing import Clock
from .items import Item

TEXT_ANSWER = 0.25  # of a window of plain text, where nothing says which part is an answer


def own_answers(
    model: Any,
    tokenizer: Any,
    items: Mapping[int, Sequence[Item]],
    validation: Sequence[Item],
    cache: Path,
    progress: Progress,
) -> tuple[dict[int, list[Item]], list[Item]]:
    """Every sequence with its last answer (of plain text: its last quarter) written by the model, at the same length.

    An answer that ends early ends its sequence. `cache`: a folder; one file per length, written when it is complete.
    """
    stop = getattr(tokenizer, "eos_token_id", None)
    found = {n: _answered(model, many, stop, cache / f"answers-{n}.pt", progress) for n, many in items.items()}
    return found, _answered(model, validation, stop, cache / "answers-validation.pt", progress)


def _answered(model: Any, items: Sequence[Item], stop: int | None, file: Path, progress: Progress) -> list[Item]:
    starts = [item.answer if item.answer > 1 else len(item.ids) - int(len(item.ids) * TEXT_ANSWER) for item in items]
    if file.exists():
        said = torch.load(file, weights_only=True)
    else:
        clock = Clock(len(items))
        said = []
        for done, (item, start) in enumerate(zip(items, starts, strict=True), 1):
            said.append(_generate(model, item.ids[:start], len(item.ids) - start, stop))
            progress.windows("own answers", done, len(items), clock.tick()[1], "sequences")
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".tmp")
        torch.save(said, unfinished)
        unfinished.replace(file)
    result = []
    for item, start, answer in zip(items, starts, said, strict=True):
        ids = torch.cat([item.ids[:start], answer])
        result.append(Item(ids, torch.arange(len(ids)) >= start))
    return result


@torch.no_grad()
def _generate(model: Any, prompt: Tensor, tokens: int, stop: int | None) -> Tensor:
    device = next(model.parameters()).device
    ids = prompt[None].to(device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, num_beams=1,
        eos_token_id=stop, pad_token_id=stop if stop is not None else 0,
    )  # fmt: skip
    return out[0, len(prompt) :].cpu()
