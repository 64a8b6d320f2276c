"""A labelling session that learns nothing and asks in a fixed order, to test the page alone."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

from hf_knn.commands.label_ending import ending_of
from hf_knn.labelling.outcome import Outcome
from hf_knn.labelling.page import LabelPage
from hf_knn.labelling.questions import (
    Answer,
    Copies,
    Group,
    Guess,
    Kept,
    Named,
    Neighbour,
    Picture,
    Progress,
    Question,
    check_label,
)
from hf_knn.labelling.session import Session


@dataclass
class PlayedSession:
    """Copies first, then groups, then one picture at a time.

    Attributes:
        folder: that the pictures lie in.
        rest: pictures that are asked one by one.
        groups: pictures that are asked together.
        copies: pictures of which one is kept.
        names: classes that are known from the start.
    """

    folder: Path
    rest: Sequence[Path]
    groups: Sequence[Sequence[Path]] = ()
    copies: Sequence[Sequence[Path]] = ()
    names: tuple[str, ...] = ()
    answers: list[tuple[tuple[Path, ...], Answer]] = field(default_factory=list)
    asked: int = 0

    @property
    def pool(self) -> "PlayedSession":
        """Whoever asks for the pool asks for the folder."""
        return self

    def path(self, name: str) -> Path:
        return self.folder / name

    def suggestions(self, most: int) -> list[str]:
        left = [path for path in self.rest if path not in self._shown()]
        return [path.relative_to(self.folder).as_posix() for path in left[:most]]

    def finish(self, folders: str | None, with_model: bool) -> Outcome:
        if not self.named():
            raise ValueError("Expected at least one picture with a label, but none has one.")
        made = self.folder / "pictures" if folders else None
        model = self.folder / "model" if with_model else None
        return Outcome(self.folder / "labels.csv", len(self.named()), made, model, [])

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.names, *self.named().values()]))

    def named(self) -> dict[Path, str]:
        """The label of each picture that has one."""
        pairs = [(a.label, a.pictures) for _, a in self.answers if isinstance(a, Named)]
        return {path: label for label, paths in pairs for path in paths}

    def _shown(self) -> set[Path]:
        return {path for shown, _ in self.answers for path in shown}

    def _dropped(self) -> set[Path]:
        return {path for _, a in self.answers if isinstance(a, Kept) for path in a.dropped}

    def question(self) -> Question | None:
        shown, named, dropped = self._shown(), self.named(), self._dropped()
        for each in self.copies:
            if not shown.issuperset(each):
                return Copies(self.asked, tuple(each))
        for each in self.groups:
            if not shown.intersection(each):
                guess = Guess(self.labels[-1], 0.5) if self.labels else None
                return Group(self.asked, tuple(each), guess)
        single = {shown[0] for shown, _ in self.answers if len(shown) == 1}
        everything = [*self.rest, *(path for each in self.groups for path in each)]
        for path in everything:
            if path not in single and path not in named and path not in dropped:
                chances = [2.0**-place for place in range(1, len(self.labels) + 1)]
                guesses = tuple(map(Guess, reversed(self.labels), chances))
                near = [Neighbour(p, label, 0.9) for p, label in list(named.items())[-5:]]
                return Picture(self.asked, path, guesses, tuple(near))
        return None

    def answer(self, number: int, answer: Answer) -> None:
        question = self.question()
        assert question is not None
        assert number == question.number
        if isinstance(answer, Named):
            answer = Named(check_label(answer.label), answer.pictures)
        shown = (question.picture,) if isinstance(question, Picture) else question.pictures
        self.answers.append((shown, answer))
        self.asked += 1

    def undo(self) -> str:
        if not self.answers:
            raise ValueError("Expected an answer to undo, but there is none.")
        self.answers.pop()
        self.asked += 1
        return "The last answer was taken back."

    def progress(self) -> Progress:
        by_label = Counter(self.named().values())
        everything = {*self.rest, *(p for each in (*self.groups, *self.copies) for p in each)}
        skipped = self._shown() - set(self.named()) - self._dropped() - {
            path for shown, a in self.answers if len(shown) > 1 for path in shown
        }  # fmt: skip
        left = len(everything) - sum(by_label.values()) - len(skipped) - len(self._dropped())
        return Progress(sum(by_label.values()), len(skipped), len(self._dropped()), left, by_label)


def page_of(session: PlayedSession, finished: Callable[[], None] = lambda: None) -> LabelPage:
    """The page of a played session."""
    return LabelPage(cast(Session, session), partial(ending_of, folder=session.folder), finished)
