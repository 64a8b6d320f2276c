"""One key for each class: 1 to 9 first, then letters."""

from collections.abc import Sequence
from string import ascii_lowercase

RESERVED = "uasnf"
"""Letters that mean something else: undo, all, skip, name, finish."""


def keys_of(labels: Sequence[str]) -> list[str | None]:
    """The key of each class; a class keeps it when others come behind it.

    From the tenth on it is the first letter of the name that is free, else the first free one of
    the alphabet.

    Args:
        labels: names of the classes, in order.

    Returns:
        A digit or a small letter for each; None when none is left.
    """
    free = dict.fromkeys(letter for letter in ascii_lowercase if letter not in RESERVED)
    keys: list[str | None] = [*"123456789"[: len(labels)]]
    for label in labels[9:]:
        key = next((letter for letter in label.lower() if letter in free), next(iter(free), None))
        keys.append(key)
        if key is not None:
            del free[key]
    return keys
