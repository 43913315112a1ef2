"""Which matrices write straight into the residual stream, and the stream's error at that place.

A matrix whose output y is added to a tensor z of its block (z = rest + y) can make up for the error of everything that
was pruned before it. With z_dense and z_sparse measured on the dense and on the pruned-so-far model, the output that
would repair z is

    y* = z_dense - (z_sparse - y_sparse) = W x + (z_dense - z_sparse),    x: the input the pruned model sees.

No names of modules are used. The place of z is found by adding noise to y once: z is the first later input of a leaf
module, or the block's output, that changes by exactly that noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import BlockArgs, Prunable, StreamedModel
from .capture import Stop
from .prunable import owner_of

OUTPUT = ""  # the name of the block's own output among the places of z
TOLERANCE = 0.05  # relative: 16-bit models round the sum

Places = dict[str, str]


def residual_places(
    model: StreamedModel, index: int, block: nn.Module, hidden: Tensor, args: BlockArgs, window: int
) -> Places:
    """Prunable name -> leaf module whose input is z, or OUTPUT. Matrices that write elsewhere are left out.

    hidden: [1, length, width], the block's input for `window`. One pass per matrix as wide as the hidden state.
    """
    candidates = [p for p in model.prunables(index) if p.expert is None and p.shape[0] == hidden.shape[-1]]
    if not candidates:
        return {}
    root = model.block_names[index]
    base = _trace(model, index, block, hidden, args, window)
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    noise = (noise * hidden.float().std()).to(hidden.dtype)
    places = {}
    for prunable in candidates:
        owner = owner_of(block, root, prunable)
        with _perturbed(owner, noise) as outputs:
            moved = _trace(model, index, block, hidden, args, window)
        place = _first_moved(base, moved, outputs, noise)
        if place is not None:
            places[prunable.name] = place
    return places


@contextmanager
def watching(
    block: nn.Module, places: Sequence[str], unpack: Callable[[Any], Tensor], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Inside: `see(place, z)` at every listed place while the block runs. The pass ends after the last of them.

    `unpack`: the hidden state in what the block returns.
    """
    left: set[str] = set()

    def begin(*_: object) -> None:
        left.update(places)

    def note(place: str, z: Tensor) -> None:
        if place in left:
            left.discard(place)
            see(place, z)
            if not left:
                raise Stop

    with ExitStack() as stack:
        stack.callback(block.register_forward_pre_hook(begin).remove)
        for place in places:
            if place == OUTPUT:
                stack.callback(block.register_forward_hook(lambda _m, _i, out: note(OUTPUT, unpack(out))).remove)
            else:
                hook = _pre_hook(partial(note, place))
                stack.callback(block.get_submodule(place).register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def needed(groups: Sequence[Sequence[Prunable]], places: Mapping[str, str]) -> list[str]:
    """The places that the matrices of these groups write to, each once."""
    return list(dict.fromkeys(places[p.name] for group in groups for p in group if p.name in places))


def _trace(
    model: StreamedModel, index: int, block: nn.Module, hidden: Tensor, args: BlockArgs, window: int
) -> list[tuple[str, Tensor]]:
    """(leaf module, its first tensor input) in call order, and the block's output at the end."""
    seen: list[tuple[str, Tensor]] = []

    def see(name: str, z: Tensor) -> None:
        seen.append((name, z.detach().clone()))

    with ExitStack() as stack:
        for name, module in block.named_modules():
            if name and not any(True for _ in module.children()):
                hook = _pre_hook(partial(see, name))
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        output = model.run_block(index, block, hidden, args, window)
    seen.append((OUTPUT, output))
    return seen


@contextmanager
def _perturbed(owner: nn.Module, noise: Tensor) -> Iterator[list[Tensor]]:
    outputs: list[Tensor] = []

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        changed = output + noise.to(output.device).view(output.shape)
        outputs.append(changed.detach().clone())
        return changed

    handle = owner.register_forward_hook(hook)
    try:
        yield outputs
    finally:
        handle.remove()


def _first_moved(
    base: list[tuple[str, Tensor]], moved: list[tuple[str, Tensor]], outputs: list[Tensor], noise: Tensor
) -> str | None:
    """The first place whose value changed by the noise and is not the matrix' own output; it must be called once."""
    if len(outputs) != 1 or [name for name, _ in base] != [name for name, _ in moved]:
        return None
    names = [name for name, _ in base]
    for (name, before), (_, after) in zip(base, moved, strict=True):
        if after.numel() != noise.numel() or after.shape[-1] != noise.shape[-1] or names.count(name) != 1:
            continue
        change = (after.float() - before.float()).cpu().view(noise.shape) - noise.float()
        own = torch.equal(after.reshape(-1), outputs[0].reshape(-1))
        if not own and float(change.norm()) <= TOLERANCE * float(noise.float().norm()):
            return name
    return None


def _pre_hook(see: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if tensor is not None:
            see(tensor)

    return hook
