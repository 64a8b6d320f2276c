"""What Ctrl-C leaves: each command notes what stands when it is stopped, and how it goes on."""

import os
from collections.abc import Callable
from pathlib import Path

_standing: list[Callable[[], str]] = []
_further: list[Callable[[], list[str]]] = []

FEATURES_KEPT = "Features that were computed are kept, so that it goes faster now."


def begin() -> None:
    """Forgets what an earlier command of this process noted."""
    _standing.clear()
    _further.clear()


def stands(say: Callable[[], str] | str) -> None:
    """Notes something for somebody who stops the command.

    Args:
        say: a sentence, or what makes it when the command is stopped.
    """
    _standing.append(say if callable(say) else lambda: say)


def goes_on_with(options: Callable[[], list[str]]) -> None:
    """Notes options that the line needs besides, to go on.

    Args:
        options: names them when the command is stopped.
    """
    _further.append(options)


def stands_or_falls(folder: Path) -> None:
    """Notes a folder that is exchanged as a whole: when the command is stopped, whether it was.

    Args:
        folder: of a checkpoint, there or not.
    """
    before = _state(folder)

    def say() -> str:
        now = _state(folder)
        if now == before:
            return f"{folder} {'was not made yet' if now is None else 'is as it was'}."
        return f"{folder} holds the new version, whole: `hf-knn undo {folder}` takes it back."

    stands(say)


def sentence(line: str) -> str:
    """What is said when Ctrl-C has stopped the command.

    Args:
        line: as it was typed.
    """
    kept = " ".join(say() for say in _standing) or "Nothing was changed."
    more = [option for find in _further for option in find() if option not in line.split()]
    return f"Stopped. {kept}\nTo go on, or to begin again: {' '.join([line, *more])}"


def _state(folder: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino
