"""What somebody is asked about pictures, and what can be answered: values that any screen shows."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..model.classes import check_class_name


class Guess(NamedTuple):
    """What a picture may be.

    Attributes:
        label: of a class.
        probability: in [0, 1].
    """

    label: str
    probability: float


class Neighbour(NamedTuple):
    """A labelled picture that looks alike.

    Attributes:
        picture: where it lies; of a picture that only the checkpoint knows, the path that it has
            there, which is relative and may lead nowhere.
        label: of its class.
        similarity: as the datastore measures it, the larger the nearer.
        small: the bytes of a small WEBP file, of a picture that only the checkpoint knows, if it
            keeps one.
    """

    picture: Path
    label: str
    similarity: float
    small: bytes | None = None


@dataclass(frozen=True)
class Group:
    """Pictures that look alike: "name this group", all but those that do not belong.

    Attributes:
        number: of the question.
        pictures: the most typical one first; all are selected until somebody says otherwise.
        guess: what most of them are taken for; None before two classes have pictures.
    """

    number: int
    pictures: tuple[Path, ...]
    guess: Guess | None


@dataclass(frozen=True)
class Picture:
    """One picture: which class is it?

    Attributes:
        number: of the question.
        picture: where it lies.
        guesses: the most likely class first; empty before two classes have pictures.
        neighbours: the labelled pictures next to it, nearest first.
    """

    number: int
    picture: Path
    guesses: tuple[Guess, ...]
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True)
class Copies:
    """Pictures that show the same: keep one, or all of them.

    Attributes:
        number: of the question.
        pictures: two or more.
    """

    number: int
    pictures: tuple[Path, ...]


Question = Group | Picture | Copies


@dataclass(frozen=True)
class Named:
    """Pictures that are of one class; of a group, those that are not among them are asked later.

    Attributes:
        label: of the class; a new one makes it.
        pictures: of the question; empty means all of them.
    """

    label: str
    pictures: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """No answer: a picture is not asked again and gets no label, those of a group come one by one.

    Copies that are skipped are all kept.

    Attributes:
        pictures: of the question; empty means all of them.
    """

    pictures: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Kept:
    """Which of the copies stays; no file is touched, the others are left out of what is written.

    Attributes:
        picture: that stays.
        dropped: that are left out; empty means all the others.
    """

    picture: Path
    dropped: tuple[Path, ...] = ()


Answer = Named | Skipped | Kept


@dataclass(frozen=True)
class Progress:
    """How far somebody came.

    Attributes:
        labelled: pictures with a label, those that a checkpoint knew among them.
        skipped: pictures that were skipped.
        dropped: copies that are left out.
        left: pictures that have no answer.
        by_label: labelled pictures of each class, in the order of the classes.
    """

    labelled: int
    skipped: int
    dropped: int
    left: int
    by_label: dict[str, int]


def check_label(label: str) -> str:
    """Refuses what can name no class, or no folder of one.

    Args:
        label: as it was typed; space around it goes.

    Raises:
        ValueError: saying what is wrong with it.
    """
    name = check_class_name(label.strip())
    if name.startswith(".") or any(sign in name for sign in '/\\:*?"<>|') or name.endswith("."):
        raise ValueError(
            "Expected the name of a class to be one that a folder can have on every system, but "
            f'got {name!r}; leave out / \\ : * ? " < > | and a dot at either end.'
        )
    return name
