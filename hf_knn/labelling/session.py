"""A session of labelling: questions, answers that are kept at once, and what comes of them."""

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from ..checkup.examine import Watch, unwatched
from ..model.modeling import KnnForImageClassification
from .asking import Asking, groups_for
from .guesser import DEFAULT_BACKBONE, Guesser, Known
from .journal import JOURNAL_NAME, Journal
from .outcome import Outcome, Place, write_outcome
from .pool import Pool, open_pool
from .questions import (
    Answer,
    Copies,
    Group,
    Kept,
    Picture,
    Progress,
    Question,
    Skipped,
    check_label,
)
from .state import COPIES, GROUP, PICTURE, Record, State, state_of

NEIGHBOURS = 5
"""Shown with a picture."""

_KIND_OF: dict[type, str] = {Group: GROUP, Picture: PICTURE, Copies: COPIES}


class Session:
    """Asks about the pictures of a folder, one question at a time; several threads may use it.

    Every answer is on disk before the next question comes, and the model knows it: see `open`.

    Attributes:
        pool: the pictures.
        notes: what somebody should know before the first question, in sentences.
    """

    def __init__(
        self, pool: Pool, guesser: Guesser, journal: Journal, place: Place, source: str | Path,
        is_new: bool, labels: Sequence[str], groups: int | None,
    ) -> None:  # fmt: skip
        self.pool, self.notes = pool, list(pool.notes)
        self._guesser, self._journal, self._place = guesser, journal, place
        self._source, self._is_new = source, is_new
        self._given, self._lock, self._cleanup = tuple(labels), threading.RLock(), ExitStack()
        self._start = State(labels=guesser.stored())
        if self._start.labels:
            self.notes.append(
                f"{len(self._start.labels)} of {len(pool.names)} pictures are in the checkpoint "
                "already; they keep the label that they have there."
            )
        count = groups_for(len(pool.names)) if groups is None else groups
        # each with how many answers there were when it began
        self._askings = [(0, Asking(pool, guesser, self._start, count))]
        self._number, self._is_asked = 0, False
        self._question: Question | None = None
        self._before: list[Known | None] = []
        self._state, self._first = self._start, guesser.known
        self._replay()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        output: str | Path,
        *,
        model: str | Path | None = None,
        labels: Sequence[str] = (),
        backbone: str | None = None,
        groups: int | None = None,
        batch_size: int = 32,
        watch: Watch = unwatched,
        progress: bool = False,
    ) -> Self:
        """Begins to label a folder, or goes on where a session was left or killed.

        Args:
            folder: the pictures, in sub-folders or not; nothing in it is changed.
            output: a folder for the answers (`answers.jsonl`), what `finish` writes, and nothing
                else; or the name of a csv, beside which that folder lies (without its ending).
            model: a checkpoint that knows some classes; it stays as it is. None begins with none.
            labels: names of classes that are known to come, in the order of their keys.
            backbone: without a checkpoint, what makes features; None is dinov2-small.
            groups: how many groups are asked about first; None: one for 20 pictures, 20 at most.
            batch_size: pictures per forward pass.
            watch: told of the progress of what takes long.
            progress: show a bar while features are made.

        Returns:
            The session; close it, or use it as a context.

        Raises:
            ValueError: for a folder without pictures, a backbone beside a checkpoint, a bad label,
                an output of another session or one that another process has open.
            OSError: if something is not there or cannot be written.
        """
        if model is not None and backbone is not None:
            raise ValueError(
                "Expected a checkpoint or a backbone, but got both; a checkpoint has its backbone."
            )
        names = list(dict.fromkeys(map(check_label, labels)))
        place = Place.of(Path(output))
        place.home.mkdir(parents=True, exist_ok=True)
        root = Path(folder).resolve()
        source = backbone or DEFAULT_BACKBONE if model is None else model
        facts = {"folder": str(root), "model" if model else "backbone": _named(source)}
        with ExitStack() as cleanup:
            _lock(place.home, cleanup)
            journal = Journal(place.home / JOURNAL_NAME, facts)
            cleanup.callback(journal.close)
            opened = (
                Guesser.begin(str(source), names)
                if model is None
                else KnnForImageClassification.from_pretrained(source)
            )
            pool = open_pool(
                root, place.home, opened, batch_size=batch_size, watch=watch, progress=progress
            )
            guesser = Guesser(opened, pool, is_new=model is None)
            session = cls(pool, guesser, journal, place, source, model is None, names, groups)
            session._cleanup = cleanup.pop_all()
        return session

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the files; what was answered is kept."""
        self._cleanup.close()

    @property
    def output(self) -> Path:
        """The folder that the session writes into."""
        return self._place.home

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes so far: those that were given, of the checkpoint, and those that were named.

        None of them moves while a session runs, so that its key stays the same.
        """
        with self._lock:
            own = () if self._is_new else self._guesser.labels
            named = [record.label for record in self._journal.records if record.label is not None]
            return tuple(dict.fromkeys([*self._given, *own, *named]))

    def progress(self) -> Progress:
        """How far it is."""
        with self._lock:
            state, names = self._state, self.pool.names
            by_label = dict.fromkeys(self.labels, 0)
            for name in names:
                if name in state.labels and name not in state.dropped:
                    label = state.labels[name]
                    by_label[label] = by_label.get(label, 0) + 1
            left = sum(map(state.is_open, names))
            skipped = sum(name in state.skipped for name in names)
            dropped = sum(name in state.dropped for name in names)
            return Progress(sum(by_label.values()), skipped, dropped, left, by_label)

    def question(self) -> Question | None:
        """What is asked now; the same one until it is answered. None: there is nothing left."""
        with self._lock:
            if not self._is_asked:
                self._question, self._is_asked = self._ask(), True
            return self._question

    def suggestions(self, most: int) -> list[str]:
        """The most useful pictures, relative to the folder, in the order in which to ask.

        Args:
            most: how many.
        """
        with self._lock:
            return self._chosen(most)

    def answer(self, number: int, answer: Answer) -> None:
        """Keeps an answer, on disk, and teaches it.

        Args:
            number: of the question.
            answer: `Named`, `Skipped`, or `Kept` for copies.

        Raises:
            ValueError: for the number of another question, pictures that were not asked about, an
                answer of another kind, or a bad label; nothing is kept then.
            OSError: if it cannot be written; nothing is kept then.
        """
        with self._lock:
            question = self.question()
            if question is None or question.number != number:
                now = "none is left" if question is None else f"it is number {question.number} now"
                raise ValueError(
                    f"Expected an answer to the question that is asked, but got one to number "
                    f"{number}, and {now}; look at it again."
                )
            record = self._record_of(question, answer)
            self._journal.add(record)
            self._before.append(self._guesser.known)
            self._take(record)

    def undo(self) -> str:
        """Takes the last answer back, and what it taught; the same question comes again.

        Returns:
            What was taken back, in a sentence.

        Raises:
            ValueError: if nothing was answered.
            OSError: if it cannot be written.
        """
        with self._lock:
            if not self._journal.records:
                raise ValueError("Expected an answer to take back, but there is none yet.")
            record = self._journal.undo()
            count = len(self._journal.records)
            self._askings = [each for each in self._askings if each[0] <= count]
            known = self._before.pop()
            if known is not None:
                self._guesser.go_back(known)
                self._state = state_of(self._journal.records, self._start)
                self._asked_anew()
            else:
                self._replay()
            return _said(record)

    def finish(self, folders: str | None = None, with_model: bool = True) -> Outcome:
        """Writes a csv, if asked for a folder for each class, and a checkpoint.

        It may be called again after more answers; a checkpoint that is there is kept as its
        version before (`hf-knn undo`).

        Args:
            folders: `copy` or `link` also makes `pictures/LABEL/…`; no picture is ever moved.
            with_model: also make a checkpoint, if there are labels to learn from.

        Raises:
            ValueError: for another word, or if no picture has a label.
            OSError: if something cannot be written.
        """
        with self._lock:
            state = self._state
            labels = {
                name: state.labels[name]
                for name in self.pool.names
                if name in state.labels and name not in state.dropped
            }
            base = None if self._is_new else self._source
            backbone = str(self._source) if self._is_new else None
            taught = {name: label for name, label in labels.items()
                      if self._start.labels.get(name) != label}  # fmt: skip
            return write_outcome(
                self._place, self.pool, labels, taught, backbone, base, folders, with_model
            )

    # ---- inside ---------------------------------------------------------------------------------

    def _replay(self) -> None:
        """What the journal says, taught at once; to undo further than that is to do so again."""
        records = self._journal.records
        self._state = state_of(records, self._start)
        self._guesser.go_back(self._first)
        self._guesser.teach([pair for record in records for pair in self._lesson(record)])
        self._before = [None] * len(records)
        self._asked_anew()

    def _take(self, record: Record) -> None:
        self._guesser.teach(self._lesson(record))
        self._state = self._state.after(record)
        self._asked_anew()

    def _lesson(self, record: Record) -> list[tuple[str, str]]:
        if record.label is None:
            return []
        there = set(self.pool.names)
        return [(name, record.label) for name in record.pictures if name in there]

    def _asked_anew(self) -> None:
        self._number, self._question, self._is_asked = self._number + 1, None, False

    def _ask(self) -> Question | None:
        state, number = self._state, self._number
        group = self._askings[0][1].group(state)
        if group:
            guesses = self._guesser.guesses(group)
            return Group(number, self._paths(group), guesses[0] if guesses else None)
        copies = self._askings[0][1].copies(state)
        if copies:
            return Copies(number, self._paths(copies))
        chosen = self._chosen(1)
        if not chosen:
            return None
        return Picture(
            number, self.pool.path(chosen[0]), tuple(self._guesser.guesses(chosen)),
            tuple(self._guesser.neighbours(chosen[0], NEIGHBOURS)),
        )  # fmt: skip

    def _chosen(self, most: int) -> list[str]:
        """The most useful pictures, among a part of those that wait: the next part comes then."""
        while not (chosen := self._askings[-1][1].pictures(self._state, most)):
            if not any(map(self._state.is_open, self.pool.names)):
                return []
            begun = Asking(self.pool, self._guesser, self._state, 0)
            self._askings.append((len(self._journal.records), begun))
        return chosen

    def _paths(self, names: Sequence[str]) -> tuple[Path, ...]:
        return tuple(map(self.pool.path, names))

    def _record_of(self, question: Question, answer: Answer) -> Record:
        kind = _KIND_OF[type(question)]
        shown = (question.picture,) if isinstance(question, Picture) else question.pictures
        names = tuple(self._name(path) for path in shown)
        if isinstance(answer, Kept):
            if kind != COPIES:
                raise ValueError(f"Expected a name for the {kind}, but got which one to keep.")
            kept = self._among((answer.picture,), shown)
            dropped = self._among(answer.dropped, shown) or tuple(n for n in names if n not in kept)
            if kept[0] in dropped:
                raise ValueError("Expected one picture that stays, but it is to be left out too.")
            return Record(kind, kept, None, dropped, names)
        chosen = self._among(answer.pictures, shown) or names
        if isinstance(answer, Skipped):
            return Record(kind, names if kind == COPIES else chosen, None, (), names)
        if kind == COPIES:
            raise ValueError("Expected which of the copies to keep, but got a name.")
        return Record(kind, chosen, check_label(answer.label), (), names)

    def _among(self, paths: Sequence[Path], shown: Sequence[Path]) -> tuple[str, ...]:
        other = [path for path in paths if path not in shown]
        if other:
            raise ValueError(
                f"Expected pictures of the question, but {other[0]} is none of them; look at it "
                "again."
            )
        return tuple(map(self._name, dict.fromkeys(paths)))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.pool.folder).as_posix()


def _named(source: str | Path) -> str:
    """A folder by its whole path, an id as it is."""
    place = Path(source).expanduser()
    return str(place.resolve()) if place.exists() else str(source)


def _lock(home: Path, cleanup: ExitStack) -> None:
    place = home / ".lock"
    lock = FileLock(place, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"Expected {home} to be written by one session, but another one has it open; end that "
            "one, or name another folder with -o."
        ) from error
    cleanup.callback(lock.release)
    cleanup.callback(place.unlink, missing_ok=True)


def _said(record: Record) -> str:
    count = len(record.pictures)
    what = record.pictures[0] if count == 1 else f"{count} pictures"
    if record.kind == COPIES:
        return f"Taken back: which of {len(record.shown)} copies to keep."
    if record.label is not None:
        return f"Taken back: {what} as {record.label}."
    return f"Taken back: {what} skipped."
