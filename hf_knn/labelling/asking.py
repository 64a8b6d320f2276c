"""Which question comes next: first groups, then copies, then one picture at a time."""

from functools import cached_property

import torch
from torch import Tensor

from .guesser import Guesser
from .order import Rule, next_pictures, rule_for, similarities, unsure_of
from .pool import Pool, sample_of
from .state import State

SAMPLE = 2000
"""Pictures among which questions are chosen; of more, a part that is always the same."""

GROUP_SIZE = 20
_SMALLEST_GROUP = 3
_MOST_GROUPS = 20
_PICTURES_A_GROUP = 20
"""One group is asked about for so many pictures."""


def groups_for(count: int) -> int:
    """How many groups are asked about first, unless somebody says another number.

    Args:
        count: of the pictures.
    """
    return min(_MOST_GROUPS, count // _PICTURES_A_GROUP)


class Asking:
    """Chooses what to ask.

    Args:
        pool: the pictures.
        guesser: what is known of them.
        start: before the first answer.
        groups: how many are asked about first.
    """

    def __init__(self, pool: Pool, guesser: Guesser, start: State, groups: int) -> None:
        self._pool, self._guesser, self._start, self._count = pool, guesser, start, groups
        waiting = [name for name in pool.names if start.is_open(name)]
        self._names = [waiting[number] for number in sample_of(len(waiting), SAMPLE).tolist()]
        self._known_before = guesser.nearest_features(self._names) if self._names else None

    def group(self, state: State) -> list[str]:
        """The next pictures that look alike and wait for an answer; empty if there are no more."""
        if state.groups >= self._count:
            return []
        for names in self._groups:
            left = [n for n in names if state.is_open(n) and n not in state.grouped]
            if len(left) >= _SMALLEST_GROUP:
                return left
        return []

    def copies(self, state: State) -> list[str]:
        """The next pictures that show the same; empty if there are no more."""
        for names in self._pool.copies:
            left = [name for name in names if name not in state.dropped]
            is_new = state.settled.isdisjoint(names)
            if is_new and len(left) > 1 and any(name not in self._start.labels for name in left):
                return left
        return []

    def pictures(self, state: State, most: int) -> list[str]:
        """The most useful pictures, in the order in which to ask about them.

        Args:
            state: what is known.
            most: how many.
        """
        waiting = [number for number, name in enumerate(self._names) if state.is_open(name)]
        if not waiting:
            return []
        counted = self._guesser.rows, len(self._guesser.labels)
        rule = rule_for(*counted) if counted[0] else Rule.HERDING
        unsure = None
        if rule != Rule.HERDING:
            unsure = unsure_of(self._guesser.probabilities(self._names))
        order = next_pictures(self._similar, self._covered(state), waiting, rule, unsure)
        return [self._names[number] for number, _ in zip(order, range(most), strict=False)]

    @cached_property
    def _features(self) -> Tensor:
        return self._guesser.store_features(self._names)

    @cached_property
    def _similar(self) -> Tensor:
        """[N, N] of the sample."""
        return similarities(self._features, self._features, self._guesser.mean)

    @cached_property
    def _covered_before(self) -> Tensor:
        """[N] how near each is to a picture that a checkpoint knows."""
        if self._known_before is None:
            return torch.zeros(len(self._names))
        return similarities(self._features, self._known_before, self._guesser.mean).diagonal()

    def _covered(self, state: State) -> Tensor:
        """[N] how near each is to one that was answered, skipped ones among them."""
        answered = [number for number, n in enumerate(self._names) if not state.is_open(n)]
        if not answered:
            return self._covered_before
        return torch.maximum(self._covered_before, self._similar[answered].amax(dim=0))

    @cached_property
    def _groups(self) -> list[list[str]]:
        """Each picture with the centre that it is nearest to; of these, the nearer half."""
        copies = {name for names in self._pool.copies for name in names[1:]}
        numbers = [number for number, name in enumerate(self._names) if name not in copies]
        if not numbers or self._count < 1:
            return []
        order = next_pictures(self._similar, self._covered_before, numbers, Rule.HERDING)
        centres = [number for number, _ in zip(order, range(self._count), strict=False)]
        near = self._similar[numbers][:, centres]  # [M, G]
        best = near.max(dim=1)
        found = []
        for place in range(len(centres)):
            own = (best.indices == place).nonzero().flatten()
            nearest = own[best.values[own].argsort(descending=True, stable=True)]
            kept = nearest[: min(GROUP_SIZE, (len(own) + 1) // 2)].tolist()
            found.append([self._names[numbers[number]] for number in kept])
        return found
