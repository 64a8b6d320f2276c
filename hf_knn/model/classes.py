"""The classes of a model as one value.

A number never means another class while rows have it: a new class gets the next number, one without
rows keeps its own.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.config import KnnConfig
from ..data.walk import nfc

Label = str | int

_LONGEST_NAME = 200

_SHOWN = 20


@dataclass(frozen=True)
class Classes:
    """Names by number, and how many of them, the first ones, head and blend know.

    Attributes:
        names: in the order of their numbers.
        in_head: how many the head knows; see `KnnConfig.num_head_labels`.
        tuned: how many there were when the blend was tuned; see `KnnConfig.num_tuned_labels`.
    """

    names: tuple[str, ...] = ()
    in_head: int | None = None
    tuned: int | None = None

    @classmethod
    def of(cls, config: KnnConfig) -> "Classes":
        """Those of a configuration."""
        return cls(tuple(config.class_names), config.num_head_labels, config.num_tuned_labels)

    def write(self, config: KnnConfig) -> None:
        """Gives them to a configuration."""
        config.id2label = dict(enumerate(self.names))
        config.label2id = {name: number for number, name in enumerate(self.names)}
        config.num_head_labels, config.num_tuned_labels = self.in_head, self.tuned

    def number_of(self, label: Label) -> int:
        """The number of a class.

        Args:
            label: its name or number.

        Raises:
            ValueError: for another name or number.
        """
        if isinstance(label, str) and (number := self._numbers().get(nfc(label))) is not None:
            return number
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(self.names):
            return label
        raise ValueError(
            f"Expected a class that the model has, by name or number below {len(self.names)}, but "
            f"got {label!r}; its classes are {list(self.names[:_SHOWN])}."
        )

    def with_labels(self, labels: Sequence[Label] | Tensor, count: int) -> tuple["Classes", Tensor]:
        """The classes that labels name, of which new ones get the next numbers.

        For new ones the neighbours speak in full until the blend is tuned again.

        Args:
            labels: names or numbers.
            count: how many there must be.

        Returns:
            All classes, and the numbers [count] int64 of the labels.

        Raises:
            ValueError: for another number of labels, or a label that cannot be one.
        """
        wanted = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else list(labels)
        if isinstance(labels, str) or len(wanted) != count:
            raise ValueError(f"Expected one label per row ({count}), but got {labels!r:.200}.")
        known, names = self._numbers(), list(self.names)
        numbers = []
        for label in wanted:
            if isinstance(label, str) and nfc(label) not in known:
                known[nfc(label)] = len(names)
                names.append(check_class_name(nfc(label)))
            numbers.append(known[nfc(label)] if isinstance(label, str) else self.number_of(label))
        tuned = self.tuned
        if len(names) > len(self.names) and tuned is None:
            tuned = len(self.names)
        classes = Classes(tuple(names), self.in_head, tuned)
        return classes, torch.tensor(numbers, dtype=torch.int64)

    def _numbers(self) -> dict[str, int]:
        """By name, in the one form of Unicode in which names are compared."""
        return {nfc(name): number for number, name in enumerate(self.names)}

    def names_of(self, numbers: Tensor) -> list[str]:
        """The names of classes.

        Args:
            numbers: [M] int64.
        """
        return [self.names[number] for number in numbers.tolist()]

    def first(self, count: int) -> "Classes":
        """Without the last ones.

        Args:
            count: how many stay.
        """
        tuned = None if self.tuned == count else self.tuned
        return replace(self, names=self.names[:count], tuned=tuned)


def label_maps(labels: Sequence[str] | int) -> dict[str, Any]:
    """What a configuration says of class names.

    Args:
        labels: the names, or how many classes there are.

    Returns:
        `id2label` and `label2id`.

    Raises:
        ValueError: for doubled or empty names, or none.
    """
    if isinstance(labels, str):
        raise ValueError(f"Expected `labels` to be a list of names, but got the text {labels!r}.")
    names = [f"LABEL_{i}" for i in range(labels)] if isinstance(labels, int) else list(labels)
    if not names:
        raise ValueError("Expected `labels` to name at least one class, but got none.")
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError("Expected `labels` to be names, but got an empty one or a number.")
    doubled = sorted(name for name, count in Counter(names).items() if count > 1)
    if doubled:
        raise ValueError(f"Expected `labels` to be unique, but got some twice: {doubled[:10]}.")
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def check_class_name(name: str) -> str:
    """Refuses names that cannot be shown.

    Raises:
        ValueError: for an empty one, a very long one, or one with control characters.
    """
    if not name.strip() or len(name) > _LONGEST_NAME or not name.isprintable():
        raise ValueError(
            f"Expected the name of a class to be printable text of 1 to {_LONGEST_NAME} "
            f"characters, but got {name[:60]!r}."
        )
    return name
