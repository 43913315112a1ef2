"""A linear layer with sparse deltas beside its frozen weight."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ...errors import CheckpointError, RecipeError
from ...pruning.mask import Mask
from ..quantised import is_quantised, plain
from .base import describe, has_hooks, writable_weight
from .config import SpielConfig
from .merge import MergeReport, Overwritten, add, check_zeros, prune_again, restore, summed
from .positions import ByColumn, inverted, to_csr, to_flat
from .product import Watch, choose, delta_product


class SpielLayer(BaseTunerLayer):
    """What peft asks a layer for, and per adapter: values (float32), positions, where they may lie, who watches."""

    adapter_layer_names = ("spiel_values",)
    other_param_names = ("spiel_columns", "spiel_rowptr")

    spiel_values: nn.ParameterDict
    spiel_columns: BufferDict
    spiel_rowptr: BufferDict


class Linear(nn.Module, SpielLayer):
    """y = base(x) + x S^T for each active adapter's sparse S [out, in].

    The delta stays a term of its own in float32: nothing of it is rounded to the weight's dtype while it is trained.
    """

    def __init__(self, base_layer: nn.Module, name: str, mask: Mask | None, **options: Any) -> None:
        """`name`: of the layer in its model. `mask`: of the base weight, where it is pruned."""
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.mask = mask
        self.base = describe(self.get_base_layer(), **options)
        self.quantization_backend = self.base.quantization
        self.in_features, self.out_features = self.base.cols, self.base.rows
        self.spiel_values = nn.ParameterDict()
        self.spiel_columns = BufferDict(persistent=True)
        self.spiel_rowptr = BufferDict(persistent=True)
        self.places: dict[str, str] = {}
        self.backends: dict[str, str | None] = {}
        self._by_column: dict[str, ByColumn] = {}
        self.watches: dict[str, Watch] = {}
        self.reports: dict[str, MergeReport] = {}
        self.merged_mask: Mask | None = None
        self.stored: torch.dtype | None = None  # of the checkpoint that a merge will be written to
        self.calls = 0
        self.waiting: set[str] = set()  # adapters from a file whose tensors have not come yet
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._overwritten: list[list[Overwritten]] = []

    def _apply(self, fn: Any, recurse: bool = True) -> Linear:
        """`.to(torch.bfloat16)` is for the base: deltas stay float32, not rounded on the way."""
        before = {name: values.data for name, values in self.spiel_values.items()}
        super()._apply(fn, recurse)
        for name, values in self.spiel_values.items():
            if values.element_size() < 4:
                values.data = before[name].to(values.device, torch.float32)
        return self

    def update_layer(self, adapter_name: str, config: SpielConfig, inference_mode: bool = False) -> None:
        """A new adapter, without entries as yet."""
        place = config.where or ("all" if self.mask is None else "kept")
        if place != "all" and self.mask is None:
            raise RecipeError(
                f"where={place!r} needs masks, and {self.name} has none",
                hint="load a pruned model with its masks (model.gossamer_masks), or take where='all'",
            )
        self.places[adapter_name], self.backends[adapter_name] = place, config.backend
        self.set_delta(adapter_name, torch.empty(0, dtype=torch.int64), torch.empty(0))
        if config.is_loaded:
            self.waiting.add(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def allowed(self, adapter_name: str) -> Mask | None:
        """The positions that this adapter's entries may take; None is all of them."""
        place = self.places[adapter_name]
        if place in ("all", "seft"):
            return None
        assert self.mask is not None
        return self.mask if place == "kept" else inverted(self.mask)

    def room(self, adapter_name: str) -> int:
        """The number of positions that are allowed."""
        allowed = self.allowed(adapter_name)
        return self.out_features * self.in_features - (0 if allowed is None else allowed.zeros)

    def flat(self, adapter_name: str) -> Tensor:
        """Positions of the entries, ascending, int64 [K]."""
        return to_flat(self.spiel_rowptr[adapter_name], self.spiel_columns[adapter_name], self.in_features)

    def set_delta(self, adapter_name: str, flat: Tensor, values: Tensor) -> None:
        """Ascending positions and their values; in place, so that optimizers go on, where their number is the same."""
        self.set_csr(adapter_name, values, *to_csr(flat, self.out_features, self.in_features))

    def set_csr(self, adapter_name: str, values: Tensor, rowptr: Tensor, columns: Tensor) -> None:
        """The same, of positions as a layer holds them."""
        device = self._device()
        old = self.spiel_values.get(adapter_name)
        if old is not None and len(old) == len(values) and old.device == device:
            with torch.no_grad():
                old.copy_(values)
                self.spiel_rowptr[adapter_name].copy_(rowptr)
                self.spiel_columns[adapter_name].copy_(columns)
            return
        trained = True if old is None else old.requires_grad
        self.spiel_values[adapter_name] = nn.Parameter(values.to(device, torch.float32), requires_grad=trained)
        self.spiel_rowptr[adapter_name], self.spiel_columns[adapter_name] = rowptr.to(device), columns.to(device)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The delta as a dense matrix in float32, in the orientation of the base weight."""
        made = torch.zeros(self.out_features, self.in_features, device=self.spiel_values[adapter].device)
        made.view(-1)[self.flat(adapter)] = self.spiel_values[adapter].detach().float()
        return made.t() if self.base.transposed else made

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        self._check_arrived()
        active = [name for name in self.active_adapters if name in self.spiel_values and len(self.spiel_values[name])]
        if len(active) == 1 and not args and not kwargs and self._backend(active[0]) == "weight":
            layer = self.get_base_layer()
            return self._term(x, active[0], weight=layer.weight, bias=layer.bias)  # type: ignore[arg-type]
        y = self.base_layer(x, *args, **kwargs)
        if active and self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        for name in active:
            y = y + self._term(x, name).to(y.dtype)
        return y

    def _term(self, x: Tensor, name: str, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        backend = self._backend(name)
        if backend == "weight" and weight is None:
            backend = "dense"
        return delta_product(
            x, self.spiel_values[name], self.spiel_rowptr[name], self.spiel_columns[name], self.out_features,
            backend, weight=weight, bias=bias, watch=self.watches.get(name),
            by_column=self._by_column.setdefault(name, ByColumn()),
        )  # fmt: skip

    def _check_arrived(self) -> None:
        if not self.waiting.isdisjoint(self.active_adapters):
            raise CheckpointError(
                f"{self.name}: the tensors of a saved adapter were never put in",
                hint="load it by peft.PeftModel.from_pretrained(model, folder) after import gossamer",
            )

    def _backend(self, name: str) -> str:
        """The back end of an adapter. A weight is only copied where the base is a plain layer of delta's precision."""
        layer, values = self.get_base_layer(), self.spiel_values[name]
        copyable = self.base.plain and not has_hooks(layer) and not torch.is_autocast_enabled(values.device.type)
        dtype: torch.dtype | None = layer.weight.dtype if copyable else None  # type: ignore[assignment,union-attr]
        density = len(values) / (self.out_features * self.in_features)
        wanted = self.backends[name] or choose(values.device.type, dtype, density)
        return "dense" if wanted == "weight" and dtype not in (torch.float32, torch.float64) else wanted

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds deltas to the base weight. `safe_merge` changes nothing: results are always checked to be finite.

        Raises:
            ModelError: the base is quantised or packed, the sum is not finite, or a pruned weight would come back.
        """
        self.check_merge(adapter_names)
        for name in self._to_merge(adapter_names):
            weight, flat = writable_weight(self.get_base_layer(), self.base, self.name), self.flat(name)
            values = self.spiel_values[name].detach()
            written, self.reports[name] = add(weight, self.base.transposed, flat, values, self.stored)
            done = [written]
            if self.places[name] == "seft":
                assert self.mask is not None
                pruned, self.merged_mask = prune_again(weight, self.base.transposed, self.mask)
                done.append(pruned)
            self._overwritten.append(done)
            self.merged_adapters.append(name)

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raises what `merge` would raise, and changes nothing."""
        names = self._to_merge(adapter_names)
        if names:
            self._check_arrived()
        for name in names:
            weight, flat = writable_weight(self.get_base_layer(), self.base, self.name), self.flat(name)
            if self.places[name] == "kept":
                assert self.mask is not None
                check_zeros(self.mask, flat, self.name)
            summed(weight, self.base.transposed, flat, self.spiel_values[name].detach())

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        return [name for name in check_adapters_to_merge(self, adapter_names) if name in self.spiel_values]

    def dequantise(self) -> None:
        """Put an ordinary float32 layer in the place of a base of bitsandbytes: the one that deltas can merge into.

        Other layers stay as they are.
        """
        if is_quantised(self.get_base_layer()):
            self.base_layer = plain(self.get_base_layer())
            self.base, self.quantization_backend = describe(self.base_layer), None

    def unmerge(self) -> None:
        """The base weight as it was before merging, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = writable_weight(self.get_base_layer(), self.base, self.name)
        while self.merged_adapters:
            self.merged_adapters.pop()
            for one in reversed(self._overwritten.pop()):
                restore(weight, self.base.transposed, one)
        self.merged_mask = None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _device(self) -> torch.device:
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return torch.device("cpu") if device is None else device

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the base layer's device, but not to its dtype: deltas are float32 on every base."""
        target = device or self._device()
        values = self.spiel_values.get(adapter_name)
        if values is None or values.device.type == "meta":
            return
        if values.device != target or values.dtype != torch.float32:
            moved = values.detach().to(target, torch.float32)
            self.spiel_values[adapter_name] = nn.Parameter(moved, requires_grad=values.requires_grad)
        self.spiel_columns[adapter_name] = self.spiel_columns[adapter_name].to(target)
        self.spiel_rowptr[adapter_name] = self.spiel_rowptr[adapter_name].to(target)

    def __repr__(self) -> str:
        return "spiel." + super().__repr__()


def named_layers(model: nn.Module, adapter_name: str) -> list[tuple[str, Linear]]:
    """(name in the model as it is wrapped, layer) of the layers that have this adapter, in the model's order."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, Linear) and adapter_name in module.spiel_values
    ]


def layers_of(model: nn.Module, adapter_name: str) -> list[Linear]:
    """The layers that have this adapter, in the model's order."""
    return [layer for _, layer in named_layers(model, adapter_name)]
