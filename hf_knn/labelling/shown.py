"""What the page is told: a question as plain JSON, in which pictures are numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..fit.html import plain
from .keys import keys_of
from .questions import Copies, Group, Picture, Progress, Question

Document = dict[str, Any]
"""What `json` writes."""


Source = Path | bytes
"""Of a picture: its file, or the content of a small one that a checkpoint keeps."""


class PictureNumbers:
    """Pictures by number, in the order in which they are first named.

    A page asks for a picture by its number alone, so it sees no file but those of the session.
    """

    def __init__(self) -> None:
        self._numbers: dict[Source, int] = {}
        self._sources: list[Source] = []

    def of(self, source: Source) -> int:
        """The number of a picture, which it keeps.

        Args:
            source: of the picture.
        """
        number = self._numbers.setdefault(source, len(self._sources))
        if number == len(self._sources):
            self._sources.append(source)
        return number

    def source(self, number: int) -> Source:
        """The picture with a number.

        Args:
            number: that `of` gave.

        Raises:
            ValueError: for a number that no picture has.
        """
        if not 0 <= number < len(self._sources):
            raise ValueError(f"Expected the number of a picture, but got {number}.")
        return self._sources[number]


class Next(NamedTuple):
    """A command to type, when everything was written.

    Attributes:
        what: it does.
        command: of a command line.
    """

    what: str
    command: str


@dataclass(frozen=True)
class Ending:
    """What is said when everything was written.

    Attributes:
        said: what and where, in sentences.
        commands: what to type next.
    """

    said: Sequence[str]
    commands: Sequence[Next]


def shown(
    question: Question | None,
    labels: Sequence[str],
    progress: Progress,
    folder: Path,
    numbers: PictureNumbers,
) -> Document:
    """What the page shows of a question.

    Args:
        question: None if every picture has an answer.
        labels: all classes, in order.
        progress: how far it is.
        folder: that the names of the pictures are relative to.
        numbers: of the pictures, to which those of this question are added.
    """

    def picture(path: Path, small: bytes | None = None) -> Document:
        """One that only a checkpoint knows has no file here, and its path leads nowhere."""
        source = path if path.is_absolute() else small
        number = None if source is None else numbers.of(source)
        return {"number": number, "name": _name_of(path, folder)}

    said: Document = {"kind": "done", "number": None, "pictures": [], "guesses": []}
    said |= {"neighbours": [], **_progress(progress, labels)}
    if question is None:
        return said
    said["number"] = question.number
    match question:
        case Group():
            said["kind"] = "group"
            said["pictures"] = [picture(path) for path in question.pictures]
            said["guesses"] = [question.guess._asdict()] if question.guess else []
        case Picture():
            said["kind"] = "picture"
            said["pictures"] = [picture(question.picture)]
            said["guesses"] = [guess._asdict() for guess in question.guesses]
            said["neighbours"] = [
                {
                    "picture": picture(near.picture, near.small),
                    "label": near.label, "similarity": near.similarity,
                }
                for near in question.neighbours
            ]  # fmt: skip
        case Copies():
            said["kind"] = "copies"
            said["pictures"] = [
                picture(path) | {"about": _size(path)} for path in question.pictures
            ]
    return said


def _progress(progress: Progress, labels: Sequence[str]) -> Document:
    counts: Mapping[str, int] = progress.by_label
    each = zip(labels, keys_of(labels), strict=True)
    return {
        "labels": [
            {"name": label, "key": key, "count": counts.get(label, 0)} for label, key in each
        ],
        "progress": {
            "labelled": progress.labelled, "skipped": progress.skipped,
            "dropped": progress.dropped, "left": progress.left,
        },
    }  # fmt: skip


def _name_of(path: Path, folder: Path) -> str:
    name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
    return plain(name)


def _size(path: Path) -> str:
    try:
        size = path.stat().st_size
    except OSError:
        return "the file is gone"
    return f"{size / 1000:,.0f} kB" if size >= 1000 else f"{size} bytes"
