"""What all commands of `hf-knn` share: messages, tables, errors that say what to do, and a lock."""

import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import IO, Any

import typer
from rich import markup
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Column
from transformers.utils import logging as transformers_logging

from hf_knn_cli.terminal import (
    HIDDEN,
    Guarded,
    as_called,
    called,
    clean,
    command_typed,
    is_utf8,
    let_go,
    one_line,
)

from ..data.loading import hide_progress_bars, read_labelled
from ..data.places import reading_of
from ..features.extract import ImageFeatures
from ..model.modeling import KnnForImageClassification
from ..store.folders import exclusive_lock, restore
from . import stopping
from .devices import move_to_device
from .errors import EXPECTED, sentence_of
from .itself import told_about_itself

VERBOSITY = "HF_KNN_VERBOSITY"
ADVICE = "Next:"


class Terminal(Console):
    """A console that sends no control character of a name or a text.

    Its own colours and moves are sent. A reader that goes away silences it: what a command does
    for its user is done all the same.

    Attributes:
        documents: what `--json` prints when the command has done its work.
        status_code: the exit code of a command that has done its work.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr)
        self.documents: list[object] = []
        self.status_code = 0

    @property
    def file(self) -> IO[str]:
        """Where it writes: a stream that is guarded from others, it needs no guard from."""
        stream = super().file
        return stream.bare if isinstance(stream, Guarded) else stream

    @file.setter
    def file(self, stream: IO[str]) -> None:
        self._file = stream

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Renders what is printed, every text of it cleaned before it is styled."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(clean(text), style)

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints, but for advice under `--quiet`: what begins with `Next:`."""
        if not (is_quiet() and objects and str(objects[0]).startswith(ADVICE)):
            super().print(*objects, **options)

    def status(self, status: RenderableType, **options: Any) -> Any:
        """Says what is done while it lasts; nothing under `--quiet`."""
        return nullcontext() if is_quiet() else super().status(status, **options)

    def on_broken_pipe(self) -> None:
        """Goes on silently."""
        self.quiet = True
        let_go(sys.stderr if self.stderr else sys.stdout)


def is_quiet() -> bool:
    """Whether `--quiet` is on: results, warnings and errors only."""
    return os.environ.get(VERBOSITY) == "quiet"


def is_verbose() -> bool:
    """Whether `--verbose` is on."""
    return os.environ.get(VERBOSITY) == "verbose"


console = Terminal()
right = partial(Column, justify="right")
"""A column of numbers in a table."""


def escape(text: object) -> str:
    """A name, a path or somebody else's sentence, for `console.print`: one line, no markup.

    Args:
        text: any; what it says as a string.
    """
    return markup.escape(one_line(text))


def escape_lines(text: str) -> str:
    """Likewise of several lines, which stay.

    Args:
        text: any.
    """
    return "\n".join(map(escape, text.splitlines()))


def open_checkpoint(name: str | Path) -> KnnForImageClassification:
    """Opens a checkpoint on the device of this command; whatever is wrong, the error names it.

    Args:
        name: a folder or a Hub id.

    Raises:
        ValueError: for settings that no model can be made of.
        OSError: if something is not there.
    """
    try:
        model: KnnForImageClassification = KnnForImageClassification.from_pretrained(name)
        move_to_device(model)
    except (AttributeError, TypeError, LookupError) as error:  # transformers believes its files
        raise ValueError(
            f"Expected {name} to be a checkpoint with settings that a model can be made of, but: "
            f"{error}; copy its JSON files again."
        ) from error
    return model


def typed(*words: object) -> str:
    """A command of `hf-knn` to type here, for `console.print`.

    Args:
        words: of the command line.
    """
    return escape(command_line(*words))


def command_line(*words: object) -> str:
    """The same as plain text.

    Args:
        words: of the command line.
    """
    return f"{called()} {shlex.join(map(str, words))}"


def run(command: Callable[..., None], *args: Any, json_output: bool = False) -> None:
    """Runs a command; an error a user can do something about becomes one message.

    Args:
        command: what to run.
        args: its arguments.
        json_output: whether stdout is for the document alone that the command hands to
            `print_json`; all else goes to stderr then.
    """
    hide_progress_bars()
    transformers_logging.disable_progress_bar()
    # a command says itself what a user should know; pymilvus logs the traceback of each retry
    quiet = {"hf_knn": logging.ERROR, "pymilvus": logging.CRITICAL}
    quiet["hf_knn.features.cache"] = logging.WARNING  # a disk that is full meanwhile
    quiet["hf_knn.data.decode"] = logging.WARNING  # a huge JPEG is read at a part of its size
    quiet["hf_knn.model.endpoint"] = logging.WARNING  # what a push takes away
    if is_verbose():
        quiet |= {"hf_knn": logging.INFO, "pymilvus": logging.WARNING}
    loggers = [logging.getLogger(name) for name in quiet]
    levels = [logger.level for logger in loggers]
    for logger, level in zip(loggers, quiet.values(), strict=True):
        logger.setLevel(level)
    console.documents.clear()
    stopping.begin()
    console.status_code = 0
    try:
        with (
            redirect_stdout(sys.stderr if json_output else sys.stdout),
            told_about_itself() if is_verbose() else nullcontext(),
        ):
            command(*args)
        for document in console.documents:
            _write_json(document)
        if console.status_code:
            raise typer.Exit(console.status_code)
    except typer.Exit:  # a RuntimeError
        raise
    except EXPECTED as error:
        if os.environ.get("HF_KNN_DEBUG"):
            raise
        say_error(sentence_of(error))
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        Terminal(stderr=True).print(
            escape_lines(as_called(stopping.sentence(command_typed()))), soft_wrap=True,
            highlight=False,
        )  # fmt: skip
        raise typer.Exit(130) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def say_error(sentence: str) -> None:
    """Prints what went wrong on stderr, in one line.

    Args:
        sentence: what, and what to do.
    """
    Terminal(stderr=True).print(
        f"[bold red]Error:[/] {escape(as_called(sentence))}", soft_wrap=True, highlight=False
    )


def agreed(question: str, yes: bool) -> bool:
    """Asks before something that cannot be taken back.

    Args:
        question: to answer with y or n.
        yes: it was answered on the command line, by `--yes`.

    Raises:
        ValueError: if nobody sits at the terminal.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise ValueError(
            "Expected somebody to ask, but the input is no terminal; pass --yes to do it."
        )
    try:
        return typer.confirm(as_called(question), err=True)
    except typer.Abort as error:  # the end of the input, or Ctrl-C
        raise KeyboardInterrupt from error


def print_json(value: object) -> None:
    """What `--json` prints instead of tables, when the command has done the rest of its work.

    Args:
        value: of dicts, lists, texts and numbers; one that is not finite becomes null.
    """
    console.documents.append(value)


def json_text(value: object, *, ascii_only: bool = False) -> str:
    """JSON that every parser takes and no terminal obeys.

    Args:
        value: see `print_json`.
        ascii_only: for a stream that is not UTF-8.
    """
    text = json.dumps(_finite(value), indent=2, ensure_ascii=ascii_only, allow_nan=False)
    # JSON escapes the first 32 controls alone; these only occur inside of strings
    return HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _write_json(value: object) -> None:
    try:
        sys.stdout.write(json_text(value, ascii_only=not is_utf8(sys.stdout)) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        let_go(sys.stdout)


def _finite(value: object) -> object:
    """JSON knows no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return [*map(_finite, value)] if isinstance(value, list | tuple) else value


@contextmanager
def changing(checkpoint: Path) -> Iterator[Path]:
    """Keeps others from writing a checkpoint while a command changes it.

    Args:
        checkpoint: a folder.

    Returns:
        A context that holds the lock; its value is the folder without links.

    Raises:
        ValueError: if it is no folder.
    """
    restore(checkpoint)
    if not checkpoint.is_dir():
        raise ValueError(
            f"Expected {checkpoint} to be a checkpoint folder, since it will be changed."
        )
    folder = checkpoint.resolve()
    stopping.stands_or_falls(folder)
    with exclusive_lock(folder):
        yield folder


def open_labelled(pictures: str, splits: str, needed: str = "") -> dict[str, Any]:
    """The labelled pictures of a command, by split; what was left out is said.

    Args:
        pictures: see `load_splits`.
        splits: `auto`, or `none` for folders that are called like splits and are classes.
        needed: a split that must have labels.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: for pictures that cannot be used, or come without labels.
    """
    found = read_labelled(pictures, reading_of(splits), needed)
    say_what_was_left_out(found.notes)
    return found.splits


def say_what_was_left_out(notes: Sequence[str]) -> None:
    """Prints what a loader noticed.

    Args:
        notes: in sentences.
    """
    for note in notes:
        console.print(f"[yellow]Note:[/] {escape(note)}", soft_wrap=True, highlight=False)


def say_what_was_skipped(rows: ImageFeatures) -> None:
    """Names each picture that could not be used.

    Args:
        rows: features of the others.
    """
    for row in rows.skipped:
        place = escape(row.path or f"row {row.row}")
        console.print(f"[yellow]Skipped[/] {place}: {escape(row.reason)}.")
