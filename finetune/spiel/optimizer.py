"""The optimizer of sparse deltas: updates values and, when it is time, moves positions.

Everything that decides where positions go is optimizer state, so a training that saves and loads its optimizer as usual
goes on bit for bit, in the middle of a window too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import RecipeError, TrainingError
from ..reselection import Reselection, window_of
from .config import SpielConfig, share_of
from .layer import Linear, layers_of
from .moments import read_adam, start_adam, start_sm3, step_adam, step_sm3, write_adam
from .policy import Policy, Tracker, get_policy
from .positions import merged
from .ranks import average, check_equal
from .top import highest


@dataclass(frozen=True)
class Slot:
    """One adapter on one layer."""

    layer: Linear
    adapter: str

    @property
    def values(self) -> nn.Parameter:
        return self.layer.spiel_values[self.adapter]


class SpielOptimizer(torch.optim.Optimizer):
    """AdamW (SM3 under policy "ma") for a model with one trainable sparse adapter, and AdamW for what else is trained.

    Gradients of the micro-batches of an update must add up in `.grad`, as they do everywhere. Clipping and loss scales
    are found out from the gradients themselves, so candidates count as much as the entries.

    Attributes:
        history: one record per choice of positions: update, share, replaced entries, all entries.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        total_updates: int,
        *,
        betas: tuple[float, float] = (0.6, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        eight_bit: bool = False,
    ) -> None:
        """`total_updates`: of the whole training; the share of replaced entries falls to 0 there. `betas`: the first is
        lower than usual, since entries take rates at which momentum carries them too far (measured: docs/adapters.md).
        `eight_bit`: Adam's moments of the entries in 8 bits, 18 bytes of state per entry instead of 24.

        Raises:
            TrainingError: the model has no trainable sparse adapter, or several.
            RecipeError: `eight_bit` under policy "ma", which keeps no moments per entry.
        """
        self.adapter, self.config = _trained(model)
        self._slots = [Slot(layer, self.adapter) for layer in layers_of(model, self.adapter)]
        self._slots = [slot for slot in self._slots if len(slot.values)]
        self._policy: Policy = get_policy(self.config.policy)
        self._eight_bit = eight_bit
        if eight_bit and self._policy.moments != "adam":
            raise RecipeError(
                f"policy {self.config.policy} keeps no moments per entry that could be held in 8 bits",
                hint="leave 8 bits out; it takes less memory already",
            )
        share = share_of(self.config.policy, self.config.share)
        self.schedule = Reselection(
            interval=self.config.interval,
            window=window_of(self.config.interval, self.config.window),
            look_every=self.config.look_every,
            share=share,
            anneal=self.config.anneal,
            total=total_updates,
            first=1.0 if self.config.selection == "random" else share,
        )
        own = {id(slot.values) for slot in self._slots}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        groups: list[dict[str, Any]] = [
            {"params": [slot.values for slot in self._slots], "updates": 0, "history": [], "scale": 1.0}
        ]
        if others:
            groups.append({"params": others})
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._arm()

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.param_groups[0]["history"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; then, at the end of a window, the choice of positions.

        Raises:
            TrainingError: a layer got no gradient, or processes disagree about positions.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        main = self.param_groups[0]
        if main["updates"] == 0:
            self._check_gradients()
        done = main["updates"] = main["updates"] + 1
        scale = self._scale()
        self._fit_seeds(main["betas"][1], done)
        for slot in self._slots:
            if slot.values.grad is not None:
                self._update(slot, done, main)
        for group in self.param_groups[1:]:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state.update(start_adam(parameter, done - 1))
                    step_adam(parameter, parameter.grad, state, done, group)
        for _, tracker in self._watched():
            if scale is None:
                tracker.forget()
            else:
                tracker.fold(scale, main["betas"])
                main["scale"] = scale
        if self._policy.moves and self.schedule.is_due(done):
            self._choose(done)
        self._arm()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer does it, but whole numbers stay whole: torch would cast them to the parameter's dtype."""
        super().load_state_dict(state_dict)
        order = [p for group in self.param_groups for p in group["params"]]
        names = [i for group in state_dict["param_groups"] for i in group["params"]]
        for name, parameter in zip(names, order, strict=True):
            if name in state_dict["state"]:
                self.state[parameter] = _copied(state_dict["state"][name], parameter.device)
        self._arm(renew=True)

    def positions(self) -> list[Tensor]:
        """Flat positions of every adapted layer."""
        return [slot.layer.flat(slot.adapter) for slot in self._slots]

    def _update(self, slot: Slot, done: int, group: dict[str, Any]) -> None:
        values, state = slot.values, self.state[slot.values]
        assert values.grad is not None
        if self._policy.moments == "adam":
            if "birth" not in state:
                state.update(start_adam(values, done - 1, eight_bit=self._eight_bit))
            step_adam(values, values.grad, state, done, group)
            return
        if "row" not in state:
            state.update(start_sm3(slot.layer.out_features, slot.layer.in_features, values.device))
        flat = slot.layer.flat(slot.adapter)
        row, column = flat // slot.layer.in_features, flat % slot.layer.in_features
        step_sm3(values, values.grad, state, row, column, group)

    def _choose(self, done: int) -> None:
        """Drops the smallest values and grows as many entries elsewhere; the number of entries stays."""
        share, replaced = self.schedule.replaced(done), 0
        for slot, tracker in self._watched():
            count = int(share * len(slot.values))
            grown = self._policy.grow(slot.layer, slot.adapter, tracker, self.state[slot.values], count)
            self._move(slot, grown, done)
            replaced += len(grown.flat)
            del slot.layer.watches[slot.adapter]  # the next window, which may begin at once, has other candidates
        entries = sum(len(slot.values) for slot in self._slots)
        self.history.append({"update": done, "share": share, "replaced": replaced, "entries": entries})
        check_equal(self.positions(), "the positions of sparse deltas")

    def _move(self, slot: Slot, grown: Any, done: int) -> None:
        values, state = slot.values, self.state[slot.values]
        stay = highest(values.abs(), len(values) - len(grown.flat))
        staying = slot.layer.flat(slot.adapter)[stay]
        order = merged(staying, grown.flat)
        if "birth" in state:
            m, v = read_adam(state)
            write_adam(state, torch.cat([m[stay], grown.m])[order], torch.cat([v[stay], grown.v])[order])
            born = (done - grown.age).to(torch.int32)
            state["birth"] = torch.cat([state["birth"][stay], born])[order]
            state["fresh"] = (order >= len(stay)).clone()
        kept = torch.cat([values[stay], values.new_zeros(len(grown.flat))])[order]
        slot.layer.set_delta(slot.adapter, torch.cat([staying, grown.flat])[order], kept)
        if values.grad is not None:
            values.grad.zero_()  # of other positions now

    def _fit_seeds(self, beta2: float, done: int) -> None:
        """Moments of new entries at the scale of their first real gradient.

        Entries with large gradients may be clipped as soon as they count towards the norm, while the candidates that
        they were did not. Momentum from before would then outweigh all that follows. Adam does not care for the scale
        of its moments as long as later gradients have it too.
        """
        found = [
            (self.state[slot.values], slot.values.grad)
            for slot in self._slots
            if "fresh" in self.state[slot.values] and slot.values.grad is not None
        ]
        real = seeded = 0.0
        for state, gradient in found:
            fresh = state["fresh"]
            age = (done - 1 - state["birth"][fresh]).clamp_(min=1).to(torch.float32)
            real += float(gradient[fresh].square().sum(dtype=torch.float64))
            seeded += float((read_adam(state)[1][fresh] / (1 - torch.pow(beta2, age))).sum(dtype=torch.float64))
        ratio = real / seeded if seeded > 0 else 1.0
        for state, _ in found:
            fresh, (m, v) = state.pop("fresh"), read_adam(state)
            m[fresh] *= ratio**0.5
            v[fresh] *= ratio
            write_adam(state, m, v)

    def _arm(self, renew: bool = False) -> None:
        """Trackers exist during windows only, and are told whether they look. `renew`: make them from loaded state."""
        done = self.param_groups[0]["updates"]
        wanted = self._policy.moves and self.schedule.is_open(done)
        share = self.schedule.replaced(self.schedule.choice_after(done))
        for number, slot in enumerate(self._slots):
            watches, state = slot.layer.watches, self.state[slot.values]
            if wanted and (renew or slot.adapter not in watches):
                count = int(share * len(slot.values))
                tracker = self._policy.tracker(slot.layer, slot.adapter, count, self.config.slots)
                if renew and "watch" in state:
                    tracker.tensors = state["watch"]
                tracker.scale = self.param_groups[0]["scale"]
                state["watch"] = tracker.tensors
                watches[slot.adapter] = tracker
            elif not wanted:
                watches.pop(slot.adapter, None)
                state.pop("watch", None)
            if wanted:
                watches[slot.adapter].looks = self.schedule.looks(done, number)  # type: ignore[attr-defined]

    def _watched(self) -> Iterator[tuple[Slot, Tracker]]:
        for slot in self._slots:
            if slot.adapter in slot.layer.watches:
                yield slot, slot.layer.watches[slot.adapter]  # type: ignore[misc]

    def _scale(self) -> float | None:
        """What became of the gradients between backward and here: clipping, loss scale, nothing (1); None: not finite.

        Gradients are scaled as a whole, so sums over a layer's entries, before and after, are in that ratio.
        """
        watched = [(tracker.projection, slot.values.grad) for slot, tracker in self._watched()]
        if not watched:
            return 1.0
        before = average(torch.tensor([one for one, _ in watched], dtype=torch.float64))
        sums = [0.0 if grad is None else float(grad.sum(dtype=torch.float64)) for _, grad in watched]
        after = torch.tensor(sums, dtype=torch.float64)
        if not bool(before.isfinite().all() and after.isfinite().all()):
            return None
        size = float(before @ before)
        scale = float(before @ after) / size if size > 0 else 1.0
        return scale if scale > 0 and abs(scale - 1) > 1e-3 else 1.0

    def _check_gradients(self) -> None:
        """The first update must reach every layer; says why where it does not."""
        without = [slot.layer for slot in self._slots if slot.values.grad is None]
        if without:
            raise TrainingError(
                f"no gradient reached {len(without)} of {len(self._slots)} adapted layers, the first is "
                f"{without[0].name}: {_why(without[0], self.adapter)}",
                hint="leave these layers out of target_modules, or repair what cuts the gradient off",
            )


def _trained(model: nn.Module) -> tuple[str, SpielConfig]:
    configs = getattr(model, "peft_config", None) or {}
    names = [
        name
        for name, config in configs.items()
        if isinstance(config, SpielConfig)
        and any(layer.spiel_values[name].requires_grad for layer in layers_of(model, name))
    ]
    if len(names) != 1:
        raise TrainingError(
            f"{len(names)} trainable sparse adapters ({', '.join(names) or 'none'}); exactly one can be trained",
            hint="choose one by model.set_adapter; an adapter that was loaded needs is_trainable=True",
        )
    return names[0], configs[names[0]]


def _why(layer: Linear, adapter: str) -> str:
    if not layer.spiel_values[adapter].requires_grad:
        return "its values are frozen"
    if layer.disable_adapters or adapter not in layer.active_adapters:
        return "its adapter is not active"
    if layer.merged:
        return "its adapter is merged into the weight"
    if layer.calls == 0:
        return "it was never called in the forward pass"
    return "it was called, but its output does not reach the loss, or a layer above it has no backward pass"


def _copied(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().to(device)
    return {k: _copied(v, device) for k, v in value.items()} if isinstance(value, dict) else value
