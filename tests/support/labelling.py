"""Sessions of labelling on features that are made up: no picture is opened, no file but theirs."""

from collections.abc import Sequence
from pathlib import Path

import torch

from hf_knn import KnnForImageClassification
from hf_knn.labelling import Copies, Group, Kept, Named, Picture, Session, Skipped
from hf_knn.labelling.guesser import Guesser
from hf_knn.labelling.journal import JOURNAL_NAME, Journal
from hf_knn.labelling.outcome import Place
from hf_knn.labelling.pool import Pool
from support.pictures import random_features, small_backbone

WORDS = ("ant", "bee", "cat")


def name_of(number: int) -> str:
    """Of a picture; its class is told by it."""
    return f"{WORDS[number % len(WORDS)]}/{number:03d}.png"


def word_of(path: Path) -> str:
    """The class of a picture."""
    return path.parent.name


def made_pool(folder: Path, count: int = 30, copies: Sequence[tuple[str, ...]] = ()) -> Pool:
    """Pictures in three clusters, whose files are small texts."""
    names = [name_of(number) for number in range(count)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    rows = random_features([number % len(WORDS) for number in range(count)], spread=0.5)
    contents = torch.zeros(count, 16, dtype=torch.uint8)
    contents[:, 0] = torch.arange(count)
    return Pool(folder.resolve(), names, rows.features, contents, [*copies], [], [])


def new_model() -> KnnForImageClassification:
    """One that knows nothing, with the width of the made-up features."""
    return Guesser.begin(small_backbone(), [])


def open_made(
    place: Path,
    *,
    groups: int = 2,
    count: int = 30,
    copies: Sequence[tuple[str, ...]] = (),
    model: KnnForImageClassification | None = None,
    pool: Pool | None = None,
) -> Session:
    """A session in a folder of a test; opened again, it goes on."""
    pool = pool or made_pool(place / "pictures", count, copies)
    home = place / "out"
    home.mkdir(exist_ok=True)
    guesser = Guesser(model or new_model(), pool, is_new=model is None)
    journal = Journal(home / JOURNAL_NAME, {"folder": str(pool.folder)})
    return Session(pool, guesser, journal, Place.of(home), "tiny", model is None, [], groups)


def answer_truly(session: Session) -> None:
    """Gives the right answer: of a group, to those that are like its first picture."""
    question = session.question()
    if isinstance(question, Picture):
        session.answer(question.number, Named(word_of(question.picture)))
    elif isinstance(question, Group):
        word = word_of(question.pictures[0])
        own = tuple(path for path in question.pictures if word_of(path) == word)
        session.answer(question.number, Named(word, own))
    elif isinstance(question, Copies):
        session.answer(question.number, Kept(question.pictures[0]))


def skip(session: Session) -> None:
    """Skips the question."""
    question = session.question()
    assert question is not None
    session.answer(question.number, Skipped())
