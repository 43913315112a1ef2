"""A model that is never whole in memory: a meta skeleton, one decoder block at a time, the outer modules when needed.

The loop that a layerwise stage runs:

    model = StreamedModel.open(source, folder)
    with model.outer():
        args = model.capture(windows, store)               # embeddings of every window; arguments of every block
    for i in range(model.num_blocks):
        block = model.load_block(i)
        for step in model.input_steps(i, block, hidden[0], args):
            with model.observe(block, step, gather, stop=True):
                for w in range(n):
                    model.run_block(i, block, hidden[w], args, w, allow_stop=True)
            ... model.weight / model.set_weight ...
        exported = model.export_block(i, block, masks)
        for w in range(n):
            hidden[w] = model.run_block(i, block, hidden[w], args, w)
    with model.outer():
        logits = model.logits(hidden[w], args, w)

Nothing here knows a model family; how each part works is said in skeleton, keymap, prunable, experts, capture, observe.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import nn

from ..errors import ModelError
from .anatomy import Anatomy
from .capture import BlockArgs, CaptureStub, Recorder, Returns, Stop, injecting_stub, returns_of, stubbed
from .keymap import Tensors
from .materialise import Materialiser
from .observe import Group, InputLog, See, Step, observing, seeing
from .prunable import HEAD, Prunable, matrix_view
from .revert import Exported, exported
from .skeleton import build_skeleton, checkpoint_dtype, load_config, share_equal_buffers

__all__ = ["HEAD", "BlockArgs", "Exported", "Group", "Prunable", "Step", "StreamedModel"]


class StreamedModel(Anatomy):
    """A causal language model streamed from a TensorSource; made by `StreamedModel.open`."""

    def __init__(
        self, model: Any, source: Tensors, dtype: torch.dtype, device: torch.device, *, untie: bool = False
    ) -> None:
        super().__init__(model, source, dtype, device, untie=untie)
        share_equal_buffers(self._blocks)
        self._parts = Materialiser(model, self._keys, self._blocks_path, device, untie=untie)
        self._returns: dict[tuple[Any, ...], Returns] = {}
        self._calls: dict[str, int] = {}

    @classmethod
    def open(
        cls,
        source: Tensors,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
        untie: bool = False,
    ) -> StreamedModel:
        """Skeleton of the model in `folder`, weights from `source`; reads config.json and headers only.

        `dtype`: None = the checkpoint's (config.json, else the first float tensor), as `from_pretrained` decides.
        `untie`: give the output matrix its own weights although the checkpoint ties it to the embedding.
        Raises ModelError for a model that cannot be built, has no blocks, or whose checkpoint lacks tensors.
        """
        config = load_config(Path(folder), trust_remote_code=trust_remote_code)
        chosen = dtype or checkpoint_dtype(config, source)
        model = build_skeleton(config, chosen, trust_remote_code=trust_remote_code, untie=untie)
        return cls(model, source, chosen, torch.device(device), untie=untie)

    # ---- weights -------------------------------------------------------------------------------------------------

    def load_block(self, i: int) -> nn.Module:
        """A fresh copy of block i with its weights, on the device, eval; freed with its last reference."""
        return self._parts.part(self.block_names[i], self.block_keys(i))

    def assembled(self, blocks: Iterable[nn.Module]) -> Any:
        """The whole model: everything outside the blocks with its weights, and these in the place of its blocks.

        `blocks`: one per block, as `load_block` gives them or changed; asked for one after the other. Uses this object
        up: nothing can be streamed afterwards.
        """
        made = list(blocks)
        self._parts.load_outer()
        for i, block in enumerate(made):
            self._blocks[i] = block
        return self._model

    def load_head(self) -> nn.Module:
        """A fresh copy of the output layer with its weights (the embedding's where the checkpoint ties them)."""
        name = self._head().name
        keys = self._keys.sources(f"{name}.")
        if keys:
            return self._parts.part(name, keys)
        embedding = self._parts.part(self._embedding, self._keys.sources(f"{self._embedding}."))
        clone = copy.deepcopy(self._model.get_submodule(name))
        clone.weight = nn.Parameter(cast(torch.Tensor, embedding.weight).data, requires_grad=False)
        return clone

    def weight(self, block: nn.Module, prunable: Prunable) -> torch.Tensor:
        """Copy of the matrix as [out, in], in the block's dtype. `block`: from load_block (load_head for the head)."""
        return matrix_view(block, self._root(prunable), prunable).clone(memory_format=torch.contiguous_format)

    def set_weight(self, block: nn.Module, prunable: Prunable, tensor: torch.Tensor) -> None:
        """Write [out, in] into the block, rounded to the checkpoint's dtype: it then runs with what will be stored."""
        keys = self.source_keys(prunable)
        stored = tensor.to(self._source.meta(keys[0]).dtype) if keys else tensor
        with torch.no_grad():
            matrix_view(block, self._root(prunable), prunable).copy_(stored)

    def export_block(self, i: int, block: nn.Module, masks: Mapping[str, torch.Tensor | None]) -> list[Exported]:
        """Every checkpoint tensor that holds a matrix named in `masks`, as the source has it.

        `masks`: Prunable name -> bool [out, in], True = kept; None for a matrix whose weights changed without a mask.
        Keys of untouched tensors are not exported. Pruned entries are +0.0, all others the block's weights.
        """
        by_name = {p.name: p for p in self.prunables(i)}
        return self._exporter.export(block, self.block_names[i], [by_name[name] for name in masks], masks)

    def export_head(self, head: nn.Module, mask: torch.Tensor | None) -> list[Exported]:
        """The output matrix of `load_head`, like export_block. Untied heads come under transformers' own name."""
        prunable = self._head()
        if prunable.parameter in self._keys.groups:
            return self._exporter.export(head, prunable.name, [prunable], {prunable.name: mask})
        dtype = self._source.meta(self._keys.sources(f"{self._embedding}.")[0]).dtype
        return [exported(prunable.parameter, self.weight(head, prunable).to("cpu", dtype), mask, False)]

    # ---- running -------------------------------------------------------------------------------------------------

    def outer(self) -> AbstractContextManager[None]:
        """Inside: everything outside the blocks (embeddings, norms, head) is in memory; freed after. May be nested."""
        return self._parts.outer()

    def capture(
        self,
        windows: torch.Tensor,
        sink: Callable[[int, torch.Tensor], None],
        *,
        indices: Iterable[int] | None = None,
    ) -> BlockArgs:
        """Run the real forward over `windows` [n, L] with stubs for blocks; nothing after the last block runs.

        `indices`: only these windows (one rank's share); default all. `sink(w, hidden)` gets the first block's input,
        [1, L, d] on the CPU. Returns every block's arguments.
        ModelError when the model does not simply call its blocks once each, one after the other.
        """
        recorder = Recorder(windows.cpu(), self.num_blocks)
        stub = CaptureStub(self.block_names, recorder, sink, lambda i, hidden: self._structure(i, hidden, recorder))
        with self.outer(), stubbed(list(self._blocks), stub), torch.no_grad():
            for w in range(len(windows)) if indices is None else indices:
                stub.start(w)
                if self._forward(recorder.record.windows[w]) is not None:
                    raise ModelError(f"{self._class} never calls {self.block_names[-1]}")
        if any(recorder.record.index):  # no window, nothing seen
            recorder.record.returns = [self._returns[self._kind(i)] for i in range(self.num_blocks)]
        return recorder.record

    @property
    def whole(self) -> Any:
        """The model that owns the blocks, of which they are copies: what is set on it holds for those loaded later."""
        return self._model

    @overload
    def run_block(self, i: int, block: nn.Module, hidden: torch.Tensor, args: BlockArgs, w: int) -> torch.Tensor: ...

    @overload
    def run_block(
        self, i: int, block: nn.Module, hidden: torch.Tensor, args: BlockArgs, w: int, *, allow_stop: bool
    ) -> torch.Tensor | None: ...

    def run_block(
        self, i: int, block: nn.Module, hidden: torch.Tensor, args: BlockArgs, w: int, *, allow_stop: bool = False
    ) -> torch.Tensor | None:
        """Block i's output for window w: [1, L, d] on the device of `hidden`, which is left as it is.

        `allow_stop`: None when an observation with `stop` ended the pass.
        """
        x = hidden.to(self.device, copy=True)
        positional, named = args.arguments(i, w, x)
        try:
            with torch.no_grad():
                output = block(*positional, **named)
        except Stop:
            if not allow_stop:
                raise
            return None
        return args.returns[i].unpack(output).to(hidden.device)

    def logits(self, hidden: torch.Tensor, args: BlockArgs, w: int) -> torch.Tensor:
        """float32 [L, vocab] on the device: the model's own final norm, head and soft-capping on `hidden`."""
        stub = injecting_stub(self.block_names, args.returns, hidden.to(self.device))
        with self.outer(), stubbed(list(self._blocks), stub), torch.no_grad():
            output = self._forward(args.windows[w])
        return output.logits[0].float()

    def head_input(self, hidden: torch.Tensor, args: BlockArgs, w: int) -> torch.Tensor:
        """[L, d] on the device: what the output matrix multiplies when the last block gives `hidden`."""
        seen: list[torch.Tensor] = []

        def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen.append(inputs[0].detach().reshape(-1, inputs[0].shape[-1]))
            raise Stop

        handle = self._model.get_submodule(self._head().name).register_forward_pre_hook(note)
        stub = injecting_stub(self.block_names, args.returns, hidden.to(self.device))
        try:
            with self.outer(), stubbed(list(self._blocks), stub), torch.no_grad():
                self._forward(args.windows[w])
        finally:
            handle.remove()
        return seen[0]

    def output_gradient(
        self, hidden: torch.Tensor, args: BlockArgs, w: int, loss: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """d loss(logits) / d hidden, [1, L, d] on the CPU: `hidden` is the last block's output, logits float32."""
        x = hidden.to(self.device, copy=True).requires_grad_()
        stub = injecting_stub(self.block_names, args.returns, x)
        with self.outer(), stubbed(list(self._blocks), stub), torch.enable_grad():
            loss(self._forward(args.windows[w]).logits[0].float()).backward()
        assert x.grad is not None
        return x.grad.cpu()

    def block_gradient(
        self, i: int, block: nn.Module, hidden: torch.Tensor, gradient: torch.Tensor, args: BlockArgs, w: int
    ) -> torch.Tensor:
        """The gradient at block i's input, from the one at its output, for window w: [1, L, d] on the CPU."""
        x = hidden.to(self.device, copy=True).requires_grad_()
        positional, named = args.arguments(i, w, x)
        with torch.enable_grad():
            output = args.returns[i].unpack(block(*positional, **named))
            output.backward(gradient.to(self.device, output.dtype))
        assert x.grad is not None
        return x.grad.cpu()

    def input_steps(self, i: int, block: nn.Module, hidden: torch.Tensor, args: BlockArgs, w: int = 0) -> list[Step]:
        """Steps in the order of computation; a step is a list of groups; a group's matrices share one input.

        Llama: [[[q, k, v]], [[o]], [[gate, up]], [[down]]]. A mixture of fused experts ends in
        [[[e0.gate_up], [e1.gate_up], ...], [[e0.down], [e1.down], ...]]. Found by running window w once.
        """
        log = InputLog(self.block_names[i], self.prunables(i))
        with seeing(block, self.block_names[i], self.prunables(i), log.see):
            self.run_block(i, block, hidden, args, w)
        self._calls.update(log.calls)
        return log.steps()

    def input_groups(self, i: int, block: nn.Module, hidden: torch.Tensor, args: BlockArgs, w: int = 0) -> list[Group]:
        """The groups of `input_steps` in one list."""
        return [group for step in self.input_steps(i, block, hidden, args, w) for group in step]

    def observe(
        self, block: nn.Module, which: Iterable[Prunable | Group], callback: See, *, stop: bool = False
    ) -> AbstractContextManager[None]:
        """Inside: `callback(prunable, x [tokens, in])` for every input of the listed matrices while the block runs.

        `which`: prunables or groups; of a group only the first member is watched (its input is everyone's). Fused
        experts are called with their own tokens only, also when there are none; their block output then agrees with
        the model's default to rounding, so propagate outside this context. `stop`: end each pass once all have been
        seen: `run_block(..., allow_stop=True)` then returns None; without allow_stop the context itself ends there.
        x may be a view of a live activation: copy it to keep it.
        """
        first = [item[0] if isinstance(item, list) else item for item in which]
        path = self._root(first[0]) if first else ""
        return observing(block, path, first, callback, self._calls, stop)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _forward(self, window: torch.Tensor) -> Any:
        """The real forward on one window; None when a stub or hook ended it."""
        ids = window.view(1, -1).to(self.device)
        try:
            return self._model(input_ids=ids, use_cache=False)
        except Stop:
            return None
        except (TypeError, AttributeError, NotImplementedError) as error:
            raise ModelError(
                f"{self._class}.forward(input_ids, use_cache=False) with {self._blocks_path} replaced by stubs "
                f"failed: {error}"
            ) from error

    def _kind(self, i: int) -> tuple[Any, ...]:
        return tuple((name, type(module)) for name, module in self._blocks[i].named_modules())

    def _structure(self, i: int, hidden: torch.Tensor, recorder: Recorder) -> Returns:
        """What block i returns, seen by running one real block of its kind once."""
        kind = self._kind(i)
        if kind not in self._returns:
            args, kwargs = recorder.replay(i, hidden.clone())
            self._returns[kind] = returns_of(self.block_names[i], self.load_block(i)(*args, **kwargs), hidden)
        return self._returns[kind]
