"""`hf-knn label`: names for pictures that have none, with the keyboard, in a terminal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.table import Table

from ..labelling.keys import keys_of
from ..labelling.questions import (
    Answer,
    Copies,
    Group,
    Guess,
    Kept,
    Named,
    Picture,
    Question,
    Skipped,
)
from ..labelling.session import Session
from ..store.advice import install, needs
from .checks import watching
from .console import Terminal, console, escape, right, say_what_was_left_out
from .keyboard import END, ENTER, Keyboard
from .label_ending import ending_of, say_ending

_GUESSES = 3


@dataclass(frozen=True)
class LabelOptions:
    """What `hf-knn label` was asked; see its `--help`.

    Attributes:
        folder: of the pictures.
        output: a folder, or a csv.
        model: a checkpoint, or None.
        backbone: without a checkpoint; None is the default.
        labels: classes that are known to come.
        groups: how many groups are asked about first; None chooses.
        folders: `copy`, `link` or None.
        with_model: whether a checkpoint is made at the end.
        batch_size: pictures per forward pass.
    """

    folder: Path
    output: Path
    model: str | None = None
    backbone: str | None = None
    labels: Sequence[str] = ()
    groups: int | None = None
    folders: str | None = None
    with_model: bool = True
    batch_size: int = 32


def open_session(options: LabelOptions) -> Session:
    """Opens a session with progress bars, and says what there is to know.

    Args:
        options: of the command.

    Raises:
        ValueError: see `Session.open`.
        OSError: likewise.
    """
    with watching(True) as watch:
        session = Session.open(
            options.folder, options.output, model=options.model, labels=options.labels,
            backbone=options.backbone, groups=options.groups, batch_size=options.batch_size,
            watch=watch, progress=True,
        )  # fmt: skip
    say_what_was_left_out(session.notes)
    for row in session.pool.skipped:
        console.print(f"[yellow]Skipped[/] {escape(row.path)}: {escape(row.reason)}.")
    done = session.progress()
    if done.labelled or done.skipped or done.dropped:
        console.print(f"Going on: {_so_far(session)}", soft_wrap=True)
    return session


def label_in_terminal(options: LabelOptions) -> None:
    """Asks about pictures in the terminal until somebody has enough, then writes what came of it.

    Args:
        options: of the command.

    Raises:
        ValueError: see `Session.open` and `Session.finish`.
        OSError: likewise.
    """
    with open_session(options) as session:
        keyboard = Keyboard()
        try:
            Asked(session, keyboard).until_the_end()
        except KeyboardInterrupt:
            say_kept(session)
            raise
        outcome = session.finish(options.folders, options.with_model)
        say_ending(ending_of(outcome, session.pool.folder))


def label_on_page(
    options: LabelOptions, host: str | None, port: int | None, token: str | None, opens: bool
) -> None:
    """Asks about pictures on a page, until everything is written or somebody presses Ctrl-C.

    Args:
        options: of the command.
        host: see `label_page.PageOptions`.
        port: likewise.
        token: likewise.
        opens: likewise.

    Raises:
        typer.Exit: with 130, if somebody stopped it, who was told what is kept.
        ImportError: without what a server needs.
        ValueError: see `Session.open`; for a token that no header can carry.
        OSError: likewise; for a port that is taken.
    """
    modules = {name: name for name in ("pydantic", "starlette", "uvicorn")}
    needs(modules, "The page of hf-knn label (without --terminal)", install("serve"))
    from .label_page import PageOptions, Place, show_page

    place = Place.take(PageOptions(host, port, token, opens))
    with place.bound, open_session(options) as session:
        if not show_page(session, place, options.folders, options.with_model):
            say_kept(session)
            raise typer.Exit(130)  # as of a command that Ctrl-C stops


def say_kept(session: Session) -> None:
    """What somebody should know who stops in the middle."""
    Terminal(stderr=True).print(
        f"\nKept: {_so_far(session)} Every answer is in {escape(session.output)}; the same "
        "command goes on from there.", soft_wrap=True,
    )  # fmt: skip


class Asked:
    """The dialogue.

    Args:
        session: what is asked.
        keyboard: where answers come from.
    """

    def __init__(self, session: Session, keyboard: Keyboard) -> None:
        self._session, self._keyboard = session, keyboard
        self._left_out: set[int] = set()  # of the group that is shown
        self._is_over = False

    def until_the_end(self) -> None:
        """Asks until nothing is left, or somebody has enough."""
        shown = -1
        while not self._is_over:
            question = self._session.question()
            if question is None:
                console.print("Every picture has an answer.")
                return
            if question.number != shown:
                shown, self._left_out = question.number, set()
                console.print(f"\n{_so_far(self._session)}", soft_wrap=True)
                self._show(question)
            self._hear(question)

    # ---- what is shown --------------------------------------------------------------------------

    def _show(self, question: Question) -> None:
        if isinstance(question, Picture):
            self._show_picture(question)
        elif isinstance(question, Group):
            self._show_group(question)
        else:
            console.print(f"[bold]{len(question.pictures)} pictures show the same.[/] Keep one:")
            for number, path in enumerate(question.pictures, 1):
                console.print(f"  {number}  {self._name(path)}", soft_wrap=True, highlight=False)
        console.print(self._keys(question), soft_wrap=True, highlight=False)

    def _show_picture(self, question: Picture) -> None:
        console.print(f"[bold]{self._name(question.picture)}[/]", soft_wrap=True, highlight=False)
        if question.guesses:
            shares = ", ".join(map(_share, question.guesses[:_GUESSES]))
            console.print(f"Guess: {shares}", soft_wrap=True, highlight=False)
        if question.neighbours:
            table = Table("nearest", right("similarity"), "picture")
            for near in question.neighbours:
                table.add_row(
                    escape(near.label), f"{near.similarity:.3f}", self._name(near.picture)
                )
            console.print(table)

    def _show_group(self, question: Group) -> None:
        console.print(f"[bold]{len(question.pictures)} pictures look alike.[/] Name the group:")
        for number, path in enumerate(question.pictures, 1):
            mark = " " if number in self._left_out else "x"
            line = f"  \\[{mark}] {number:2d}  {self._name(path)}"
            console.print(line, soft_wrap=True, highlight=False)
        if question.guess is not None:
            console.print(f"Guess: {_share(question.guess)}", soft_wrap=True, highlight=False)

    def _keys(self, question: Question) -> str:
        if isinstance(question, Copies):
            last = min(9, len(question.pictures))
            words = [f"1 to {last} keep that one", "a keep all", "s skip"]
        else:
            guess = _guess_of(question)
            words = [] if guess is None else [f"Enter {escape(guess)}"]
            keys = zip(keys_of(self._session.labels), self._session.labels, strict=True)
            words += [f"{key} {escape(label)}" for key, label in keys if key is not None]
            words.append("n name a class")
            words += ["- leave some out", "a all again"] * isinstance(question, Group)
            words.append("s skip")
        return "[dim]" + " · ".join([*words, "u undo", "f finish"]) + "[/]"

    def _name(self, path: Path) -> str:
        folder = self._session.pool.folder
        return escape(path.relative_to(folder) if path.is_relative_to(folder) else path)

    # ---- what is heard --------------------------------------------------------------------------

    def _hear(self, question: Question) -> None:
        key = self._keyboard.key()
        common: dict[str, Callable[[], None]] = {
            END: self._end, "f": self._end, "u": self._undo,
            "s": lambda: self._answer(question, Skipped()),
        }  # fmt: skip
        if key in common:
            common[key]()
        elif isinstance(question, Copies):
            self._hear_copies(question, key)
        elif key == "n":
            self._hear_name(question)
        elif isinstance(question, Group) and key in ("-", "a"):
            self._hear_selection(question, key)
        else:
            label = _guess_of(question) if key == ENTER else self._label_of(key)
            if label is None:
                self._say_unknown(question, key)
            else:
                self._name_it(question, label)

    def _hear_copies(self, question: Copies, key: str) -> None:
        place = int(key) if key in "123456789" else 0
        if key == "a":
            self._answer(question, Skipped())
        elif 0 < place <= len(question.pictures):
            self._answer(question, Kept(question.pictures[place - 1]))
        else:
            self._say_unknown(question, key)

    def _hear_name(self, question: Picture | Group) -> None:
        name = self._keyboard.line("Name of the class: ")
        if name is None:
            self._end()
        elif name:
            self._name_it(question, name)
        else:
            console.print("Nothing was named.")

    def _hear_selection(self, question: Group, key: str) -> None:
        if key == "a":
            self._left_out = set()
        else:
            text = self._keyboard.line("Numbers to leave out, such as 2,5-7: ")
            if text is None:
                self._end()
                return
            try:
                self._left_out ^= _numbers(text, len(question.pictures))
            except ValueError as error:
                console.print(f"[yellow]{escape(error)}[/]")
        self._show_group(question)

    def _name_it(self, question: Picture | Group, label: str) -> None:
        chosen: tuple[Path, ...] = ()
        if isinstance(question, Group):
            chosen = tuple(
                path for number, path in enumerate(question.pictures, 1)
                if number not in self._left_out
            )  # fmt: skip
            if not chosen:
                console.print("Every picture is left out; press s to skip the group, or a.")
                return
        self._answer(question, Named(label, chosen))

    def _answer(self, question: Question, answer: Answer) -> None:
        try:
            self._session.answer(question.number, answer)
        except ValueError as error:  # a name that no class can have
            console.print(f"[yellow]{escape(error)}[/]", soft_wrap=True)

    def _undo(self) -> None:
        try:
            console.print(escape(self._session.undo()), soft_wrap=True, highlight=False)
        except ValueError as error:
            console.print(f"[yellow]{escape(error)}[/]", soft_wrap=True)

    def _end(self) -> None:
        self._is_over = True

    def _label_of(self, key: str) -> str | None:
        labels = self._session.labels
        known = {own: label for own, label in zip(keys_of(labels), labels, strict=True) if own}
        return known.get(key)

    def _say_unknown(self, question: Question, key: str) -> None:
        what = "Enter has no guess to take" if key == ENTER else f"{escape(key)} is no key here"
        console.print(f"[yellow]{what}.[/] {self._keys(question)}", soft_wrap=True, highlight=False)


def _guess_of(question: Question) -> str | None:
    if isinstance(question, Picture):
        return question.guesses[0].label if question.guesses else None
    if isinstance(question, Group):
        return None if question.guess is None else question.guess.label
    return None


def _share(guess: Guess) -> str:
    return f"{escape(guess.label)} {guess.probability:.1%}"


def _so_far(session: Session) -> str:
    done = session.progress()
    parts = [f"{done.labelled} labelled"]
    parts += [f"{done.skipped} skipped"] if done.skipped else []
    copies = "1 copy" if done.dropped == 1 else f"{done.dropped} copies"
    parts += [f"{copies} left out"] if done.dropped else []
    return ", ".join([*parts, f"{done.left} left"]) + "."


def _numbers(text: str, most: int) -> set[int]:
    """Numbers as they are typed: 2,5-7.

    Raises:
        ValueError: for others.
    """
    found: set[int] = set()
    for part in filter(None, text.replace(" ", ",").split(",")):
        first, _, last = part.partition("-")
        ends = [int(end) if end.isdecimal() else 0 for end in (first, last or first)]
        if not 1 <= ends[0] <= ends[1] <= most:
            raise ValueError(f"Expected numbers from 1 to {most}, such as 2,5-7, but got {part!r}.")
        found.update(range(ends[0], ends[1] + 1))
    return found
