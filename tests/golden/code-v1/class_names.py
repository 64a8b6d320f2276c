"""Names and numbers of a model's classes, which grow as new ones are taught."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Label = str | int


def number_of(model: Any, label: Label) -> int:
    """The number of a class that a model has.

    Raises:
        ValueError: for another name or number.
    """
    names = model.config.class_names
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return label
    raise ValueError(
        f"Expected a class that the model has, by name or number below {len(names)}, but got "
        f"{label!r}; its classes are {names[:20]}."
    )


def numbers_of(model: Any, labels: Sequence[Label], count: int) -> tuple[Tensor, list[str]]:
    """[M] class numbers, and the names of those that are new.

    Raises:
        ValueError: for another number of labels than `count`, or a label that cannot be one.
    """
    values: Any = labels
    wanted = values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)
    if isinstance(labels, str) or len(wanted) != count:
        raise ValueError(f"Expected one label per row ({count}), but got {labels!r:.200}.")
    known = {name: number for number, name in enumerate(model.config.class_names)}
    first, numbers = len(known), []
    for label in wanted:
        if isinstance(label, str) and label not in known:
            known[check_class_name(label)] = len(known)
        numbers.append(known[label] if isinstance(label, str) else number_of(model, label))
    return torch.tensor(numbers, dtype=torch.int64), list(known)[first:]


def check_class_name(name: str) -> str:
    """Refuses names that cannot be shown.

    Raises:
        ValueError: for an empty one, a very long one, or one with control characters.
    """
    if not name.strip() or len(name) > 200 or not name.isprintable():
        raise ValueError(
            f"Expected the name of a class to be printable text of 1 to 200 characters, but got "
            f"{name[:60]!r}."
        )
    return name


def append_classes(config: Any, names: Sequence[str]) -> None:
    """Appends classes, for which the neighbours speak in full until the blend is tuned again."""
    if names and config.num_tuned_labels is None:
        config.num_tuned_labels = config.classes
    name_classes(config, [*config.class_names, *names])


def name_classes(config: Any, names: Sequence[str]) -> None:
    """Gives the classes these names, in the order of their numbers."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
