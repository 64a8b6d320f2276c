"""What is known after some answers, as one value: another answer makes another one.

Pictures are named by their paths relative to the folder, so that what was answered holds for a
folder that got more pictures since.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

GROUP, PICTURE, COPIES = "group", "picture", "copies"
KINDS = (GROUP, PICTURE, COPIES)


@dataclass(frozen=True)
class Record:
    """An answer as the journal keeps it.

    Attributes:
        kind: of the question: `group`, `picture` or `copies`.
        pictures: that were named, skipped, or kept.
        label: that they got; None: they were skipped, or it is about copies.
        dropped: copies that are left out.
        shown: all pictures of the question.
    """

    kind: str
    pictures: tuple[str, ...]
    label: str | None = None
    dropped: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """What a line of the journal says."""
        return {
            "kind": self.kind, "label": self.label, "pictures": list(self.pictures),
            "dropped": list(self.dropped), "shown": list(self.shown),
        }  # fmt: skip

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """Reads such a line.

        Raises:
            ValueError: if it is none.
        """
        lists = [entry.get(name) for name in ("pictures", "dropped", "shown")]
        kind, label = entry.get("kind"), entry.get("label")
        are_names = all(
            isinstance(each, list) and all(isinstance(name, str) for name in each)
            for each in lists
        )  # fmt: skip
        if kind not in KINDS or not are_names or not isinstance(label, str | None):
            raise ValueError(f"{entry!r:.200} is no answer")
        pictures, dropped, shown = (tuple(each or ()) for each in lists)
        return cls(str(kind), pictures, label, dropped, shown)


@dataclass(frozen=True)
class State:
    """What all answers come to.

    Attributes:
        labels: of the pictures that have one, in the order in which they got it.
        skipped: pictures that are not asked again.
        dropped: copies that are left out.
        settled: pictures whose copies were asked about.
        grouped: pictures that were in a group.
        groups: how many groups were asked.
    """

    labels: Mapping[str, str] = field(default_factory=dict)
    skipped: frozenset[str] = frozenset()
    dropped: frozenset[str] = frozenset()
    settled: frozenset[str] = frozenset()
    grouped: frozenset[str] = frozenset()
    groups: int = 0

    def after(self, record: Record) -> Self:
        """With one more answer.

        Args:
            record: of it.
        """
        if record.kind == COPIES:
            return self._after_copies(record)
        state = self
        if record.kind == GROUP:
            grouped = state.grouped.union(record.shown)
            state = replace(state, grouped=grouped, groups=state.groups + 1)
        if record.label is not None:
            named = dict.fromkeys(record.pictures, record.label)
            return replace(state, labels={**state.labels, **named})
        if record.kind == PICTURE:
            return replace(state, skipped=state.skipped.union(record.pictures))
        return state

    def _after_copies(self, record: Record) -> Self:
        """One is kept: it has the label that any of them had."""
        labels = dict(self.labels)
        own = [labels.pop(name) for name in record.dropped if name in labels]
        for name in record.pictures if record.dropped else ():
            labels |= {name: own[0]} if own and name not in labels else {}
        return replace(
            self, labels=labels, dropped=self.dropped.union(record.dropped),
            settled=self.settled.union(record.shown),
        )  # fmt: skip

    def is_open(self, name: str) -> bool:
        """Whether a picture waits for an answer."""
        return name not in self.labels and name not in self.skipped and name not in self.dropped


def state_of(records: Iterable[Record], start: State) -> State:
    """What answers come to, one after the other.

    Args:
        records: the oldest first.
        start: before the first of them.
    """
    for record in records:
        start = start.after(record)
    return start
