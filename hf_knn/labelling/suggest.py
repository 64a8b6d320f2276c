"""The next pictures to label, for other tools: in the order in which a session would ask."""

from pathlib import Path
from typing import NamedTuple

from ..model.modeling import KnnForImageClassification
from .asking import Asking
from .guesser import Guesser
from .pool import Pool, open_pool
from .questions import Guess
from .state import Record, State

_KIND = "picture"


class Suggestion(NamedTuple):
    """A picture that is worth a label.

    Attributes:
        name: its path relative to the folder, with `/`.
        guess: what the model takes it for; None if it knows nothing.
    """

    name: str
    guess: Guess | None


class Suggestions(NamedTuple):
    """What is worth a label.

    Attributes:
        pictures: the most useful one first.
        pool: all pictures that were looked at.
        known: how many of them the checkpoint has already, with a label.
    """

    pictures: list[Suggestion]
    pool: Pool
    known: int


def suggest(
    folder: str | Path,
    most: int,
    *,
    model: str | Path | None = None,
    backbone: str | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> Suggestions:
    """Chooses pictures to label, all at once: none of them teaches anything about the next.

    Args:
        folder: the pictures, in sub-folders or not.
        most: how many, >= 1.
        model: a checkpoint, whose own pictures are left out; None knows nothing.
        backbone: without a checkpoint, what makes features; None is dinov2-small.
        batch_size: pictures per forward pass.
        progress: show a bar while features are made.

    Raises:
        ValueError: for a folder without pictures, or a number below 1.
        OSError: if something is not there.
    """
    if most < 1:
        raise ValueError(f"Expected to suggest at least one picture, but got {most}.")
    opened = Guesser.begin(backbone, ()) if model is None else _checkpoint(model)
    pool = open_pool(
        Path(folder), None, opened, batch_size=batch_size, progress=progress, with_copies=False
    )
    guesser = Guesser(opened, pool, is_new=model is None)
    state = State(labels=guesser.stored())
    known, found = len(state.labels), list[str]()
    while len(found) < most:
        more = Asking(pool, guesser, state, 0).pictures(state, most - len(found))
        if not more:
            break
        found += more
        state = state.after(Record(_KIND, tuple(more)))
    pictures = [Suggestion(name, next(iter(guesser.guesses([name])), None)) for name in found]
    return Suggestions(pictures, pool, known)


def _checkpoint(place: str | Path) -> KnnForImageClassification:
    model: KnnForImageClassification = KnnForImageClassification.from_pretrained(place)
    return model
