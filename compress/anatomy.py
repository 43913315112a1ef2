"""What a model consists of, known before any weight is read: blocks, prunable matrices, checkpoint keys, the head."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .keymap import KeyMap, Piece, Tensors
from .prunable import HEAD, Prunable, find_prunables
from .revert import Exporter
from .skeleton import find_blocks

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Anatomy:
    """The part of StreamedModel that needs config.json and headers only. ModelError for an incomplete checkpoint."""

    def __init__(
        self, model: Any, source: Tensors, dtype: torch.dtype, device: torch.device, *, untie: bool = False
    ) -> None:
        self.config = model.config
        self.dtype = dtype
        self.device = device
        self._model = model
        self._untie = untie
        self._source = source
        self._blocks_path, self._blocks = find_blocks(model)
        self._keys = KeyMap(model, source, dtype, device)
        self._exporter = Exporter(model, self._keys, source)
        self._found = [
            find_prunables(b, name, i) for i, (b, name) in enumerate(zip(self._blocks, self.block_names, strict=True))
        ]
        self._check_complete()

    @property
    def keys(self) -> KeyMap:
        """Which checkpoint keys hold which parameter."""
        return self._keys

    @property
    def num_blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self._blocks)

    @property
    def block_names(self) -> list[str]:
        """["model.layers.0", ...]: names as in transformers' model."""
        return [f"{self._blocks_path}.{i}" for i in range(len(self._blocks))]

    @property
    def max_positions(self) -> int | None:
        """Longest window the model was made for; None where the config sets no limit (ALiBi)."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def attention_is_replaceable(self) -> bool:
        """Whether the model's class computes its attention through transformers' attention functions."""
        return bool(getattr(self._model, "_supports_attention_backend", False))

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.config.get_text_config().vocab_size)

    def block_keys(self, i: int) -> list[str]:
        """Checkpoint keys of block i, natural order."""
        return self._keys.sources(f"{self.block_names[i]}.")

    def outer_keys(self) -> list[str]:
        """All other checkpoint keys, those the model does not use included."""
        inside = {key for i in range(self.num_blocks) for key in self.block_keys(i)}
        every = self._source.keys()
        return [key for key in every if key not in inside]

    def prunables(self, i: int) -> list[Prunable]:
        """Matrices of block i that can be pruned, in module order; needs no weights."""
        return list(self._found[i][0])

    def unprunable(self, i: int) -> list[tuple[str, str]]:
        """(name, reason) of every other weight of >= 2 dimensions in block i."""
        return list(self._found[i][1])

    def head(self) -> Prunable | None:
        """The output matrix (block = HEAD); None when the model has no linear one."""
        module = self._model.get_output_embeddings()
        name = next((n for n, m in self._model.named_modules() if m is module), None) if module is not None else None
        if name is None or not isinstance(module, nn.Linear):
            return None
        return Prunable(name, HEAD, (module.out_features, module.in_features), "head")

    @cached_property
    def head_is_tied(self) -> bool:
        """True when the output matrix is the embedding: pruning it needs `open(..., untie=True)`.

        A checkpoint that stores both with different values is not tied, whatever its config says: transformers' rule.
        """
        head = self.head()
        partner = None if head is None else self._tied_to(head.parameter)
        if head is None or partner is None:
            return False
        stored = [self._keys.groups[n].sources[0] for n in (head.parameter, partner) if n in self._keys.groups]
        return len(stored) < 2 or torch.equal(*(self._source.read(key) for key in stored))

    def source_keys(self, prunable: Prunable) -> list[str]:
        """Checkpoint keys that hold this matrix; needs no weights. An untied head may have none yet."""
        if prunable.parameter not in self._keys.groups:
            return []
        return [piece.key for piece in self.source_pieces(prunable)]

    def source_pieces(self, prunable: Prunable) -> list[Piece]:
        """The same with orientation and experts of each; ModelError for an untied head that is not stored."""
        if prunable.parameter not in self._keys.groups:
            raise ModelError(f"the checkpoint has no tensor of its own for {prunable.parameter}")
        return self._exporter.pieces(prunable)

    @property
    def _class(self) -> str:
        return type(self._model).__name__

    def _check_complete(self) -> None:
        """Every parameter has its tensor, and every prunable one is a float matrix."""
        head = self.head()
        untied = head.parameter if head is not None and self._untie else None
        missing = [n for n in self._keys.missing() if self._tied_to(n) is None and n != untied]
        if missing:
            raise ModelError(
                f"the checkpoint has no tensor for {missing[0]} ({len(missing)} missing)",
                hint="config.json and weights belong to different models, or the head was not saved",
            )
        for prunables, _ in self._found:
            for name in {p.parameter for p in prunables}:
                self._check_float(name)

    def _check_float(self, parameter: str) -> None:
        for key in self._keys.groups[parameter].sources:
            dtype = self._source.meta(key).dtype
            if dtype not in _FLOATS:
                raise ModelError(
                    f"tensor {key} is {dtype}; Gossamer prunes {', '.join(str(d) for d in _FLOATS)}",
                    hint="give the original model, or dequantise it first",
                )

    def _tied_to(self, parameter: str) -> str | None:
        """The parameter that `parameter` shares its tensor with, in either direction, if any."""
        tied = self._model.all_tied_weights_keys
        return tied.get(parameter) or next((a for a, b in tied.items() if b == parameter), None)

    def _head(self) -> Prunable:
        head = self.head()
        if head is None:
            raise ModelError(f"{self._class} has no linear output layer")
        return head

    @property
    def _embedding(self) -> str:
        module = self._model.get_input_embeddings()
        return next(name for name, m in self._model.named_modules() if m is module)

    def _root(self, prunable: Prunable) -> str:
        return prunable.name if prunable.block == HEAD else self.block_names[prunable.block]
