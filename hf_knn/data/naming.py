"""Names that every file system takes, and that nothing has yet."""

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from .walk import nfc

MOST_BYTES = 255
"""Of a name, on the usual file systems."""

_MOST_OF_FOLDER = 200
_NOT_IN_NAMES = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]')
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(?=\.|$)", re.IGNORECASE)
"""What Windows takes for a device, with any ending."""


class FreeNames:
    """Names in a folder that no file there has, also none that differs by case alone.

    Args:
        folder: need not be there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._taken: dict[str, set[str]] = {}

    def of(self, targets: Sequence[str]) -> list[str]:
        """The targets, all with the same number behind the stem where one of them is taken.

        Args:
            targets: of files that belong together, relative to the folder, with `/`; each begins
                with the stem of the first.
        """
        first = PurePosixPath(targets[0])
        place, stem = first.parent, first.stem
        taken = self._taken_in(place)
        endings = [PurePosixPath(target).name.removeprefix(stem) for target in targets]
        names, number = [stem + ending for ending in endings], 1
        while any(_folded(name) in taken for name in names):
            number += 1
            names = [_shortened(stem, f" ({number}){ending}") for ending in endings]
        taken.update(map(_folded, names))
        return [str(place / name) for name in names]

    def _taken_in(self, place: PurePosixPath) -> set[str]:
        known = self._taken.get(str(place))
        if known is None:
            folder = self._folder / place
            names = os.listdir(folder) if folder.is_dir() else []
            known = self._taken[str(place)] = {*map(_folded, names)}
        return known


def folder_names(labels: Iterable[str], reserved: Iterable[str]) -> list[str]:
    """A folder for each class: its name, as far as that can be the name of a folder anywhere.

    Of two that are equal but for case, or would be, the later one gets a number, so that a class
    that comes later changes none of the others.

    Args:
        labels: names of classes, in their order.
        reserved: names that none may have.
    """
    taken = {*map(_folded, reserved)}
    names = []
    for label in labels:
        plain = name = _as_folder(label)
        number = 1
        while _folded(name) in taken:
            number += 1
            name = _shortened(plain, f" ({number})", _MOST_OF_FOLDER)
        taken.add(_folded(name))
        names.append(name)
    return names


def _as_folder(label: str) -> str:
    name = _NOT_IN_NAMES.sub("_", nfc(label)).strip()
    if name.startswith("."):  # hidden, or the folder itself or above
        name = "_" + name[1:]
    trimmed = name.rstrip(". ")  # which Windows leaves out
    name = trimmed + "_" * (len(name) > len(trimmed))
    name = _DEVICES.sub(r"\1_", name, count=1) if _DEVICES.match(name) else name
    return _shortened(name, "", _MOST_OF_FOLDER) or "_"


def _shortened(stem: str, ending: str, most: int = MOST_BYTES) -> str:
    """Stem and ending, without the end of a stem that is too long."""
    room = most - len(os.fsencode(ending))
    while len(os.fsencode(stem)) > room:
        stem = stem[:-1]
    return stem + ending


def _folded(name: str) -> str:
    """As a file system that ignores case compares names."""
    return unicodedata.normalize("NFC", nfc(name).casefold())
