"""Losses of many policies for a search, most of which differ from one of them, the base, in a few blocks only.

Every block's input under the base is kept, so that a policy that agrees with it up to block k runs from there: with one
group of neighbouring blocks changed at a time, half of the work on average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...activation_sparsity.base import Policy
from ...activation_sparsity.method import Fitted
from ..hidden import HiddenStore
from .walk import Walk


class Trials:
    """The mean loss of a model's windows under the entries of a method; an `activation_sparsity.method.Evaluate`.

    `walk` is asked for when the first loss is. `names`: of every block, what entries it may have. `policy`: the policy
    of a method's entries. Entries agree when they are the same objects.
    """

    def __init__(
        self,
        walk: Callable[[], Walk],
        policy: Callable[[Sequence[Fitted]], Policy],
        names: Sequence[Sequence[str]],
        memory_bytes: int,
    ) -> None:
        self._walk, self._policy, self._names = walk, policy, names
        self._share = memory_bytes // (2 * len(names))
        self._base: Policy | None = None
        self._inputs: dict[int, HiddenStore] = {}

    def __call__(self, blocks: Sequence[Fitted], *, base: bool = False) -> float:
        """Mean cross-entropy of sparse positions; with `base`, what follows is compared with these entries."""
        policy = self._policy(blocks)
        if base:
            self.close()
            losses = self._walk().run(policy, reads=False, before=self._keep).losses
            self._base = policy
        else:
            first = self._first_change(policy)
            losses = self._walk().run(policy, reads=False, start=(first, self._inputs.get(first))).losses
        return sum(losses) / len(losses)

    def close(self) -> None:
        """Forget the base."""
        self._base = None
        for store in self._inputs.values():
            store.close()
        self._inputs.clear()

    def _keep(self, index: int, hidden: HiddenStore) -> None:
        if index:  # the first block's inputs are the walk's own
            self._inputs[index] = self._walk().copied(hidden, self._share)

    def _first_change(self, policy: Policy) -> int:
        """The first block whose entries are not the base's; the last block where there is none."""
        if self._base is None:
            return 0
        for index, names in enumerate(self._names):
            if any(
                mine.get(name) is not base.get(name)
                for mine, base in ((policy.linears, self._base.linears), (policy.mlps, self._base.mlps))
                for name in names
            ):
                return index
        return len(self._names) - 1
