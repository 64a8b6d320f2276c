"""`hf-knn sort`: the pictures of a folder into a folder for each class, and back."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers.utils import logging as transformers_logging

from ..data.carrying import How
from ..data.journal import Move
from ..data.moving import Folder, Group, Rehearsal, open_folder, put_back
from ..data.sources import Picture, SourceRows
from ..data.walk import find_pictures
from ..features.answering import Answer, Answerer
from ..features.extract import FeatureStream, progress_bars
from .answering import KEPT, STRANGE_BELOW
from .console import (
    Terminal,
    as_called,
    command_line,
    console,
    escape,
    open_checkpoint,
    print_json,
    right,
    say_what_was_left_out,
    typed,
)
from .placing import (
    JOURNAL_NAME,
    NO_PROMISE,
    STRANGE_NAME,
    UNSURE_NAME,
    Place,
    Shelves,
    Tally,
    percent,
    promise_of,
)

_DONE = {How.COPY: "copied", How.MOVE: "moved", How.LINK: "linked"}
_OPTIONS = {How.COPY: (), How.MOVE: ("--move",), How.LINK: ("--link",)}


@dataclass(frozen=True)
class SortOptions:
    """What `hf-knn sort` was asked.

    Attributes:
        inbox: folder of the pictures.
        checkpoint: a folder or a Hub id.
        into: folder of the folders.
        how: copies, moves or links.
        max_error: share of the sorted pictures that may be wrong.
        dry_run: only say what would be done.
        json_output: print JSON.
    """

    inbox: Path
    checkpoint: str
    into: Path
    how: How = How.COPY
    max_error: float = 0.05
    dry_run: bool = False
    json_output: bool = False

    @property
    def words(self) -> list[object]:
        """Of the command without --dry-run."""
        rate = () if self.max_error == 0.05 else ("--max-error", f"{self.max_error:g}")
        words = ("sort", self.inbox, "--model", self.checkpoint, "--into", self.into)
        return [*words, *_OPTIONS[self.how], *rate]


def sort_pictures(options: SortOptions) -> None:
    """Sorts pictures by what a model answers; the same command goes on after a kill.

    Args:
        options: see `hf-knn sort --help`.

    Raises:
        ValueError: if there is no picture or none can be read, if the error rate cannot be
            promised, or if the folder is used by another command or has a damaged journal.
        OSError: if something is not there, or cannot be written.
    """
    inbox, into = options.inbox, options.into
    if into.resolve() == inbox.resolve():
        raise ValueError(
            f"Expected --into to be another folder than the pictures, but got {into} for both; "
            f"choose for example {inbox / 'sorted'}."
        )
    found = find_pictures(str(inbox), but=str(into), beside=True)
    say_what_was_left_out(found.notes)
    paths = [inbox.absolute() / path for path in found.pictures]
    beside = {
        inbox.absolute() / path: [inbox.absolute() / name for name in names]
        for path, names in found.beside.items()
    }
    if not paths and not (into / JOURNAL_NAME).is_file():
        raise ValueError(
            f"Expected pictures in {inbox}, but there are none; name the folder that they lie in."
        )
    _Run(options, paths, beside).go()


def take_back(into: Path, json_output: bool) -> None:
    """Puts every file back that was sorted into a folder, and removes copies and links.

    Args:
        into: the folder.
        json_output: print JSON.

    Raises:
        ValueError: for a folder without a journal, with a damaged one, or in use.
        OSError: if it cannot be read or written.
    """
    with progress_bars():
        found = put_back(into, JOURNAL_NAME, partial(_bar, json_output), "--into")
    moved = sum(move.how is How.MOVE for move in found.done)
    removed = len(found.done) - moved
    if json_output:
        print_json({
            "put_back": [str(move.source) for move in found.done if move.how is How.MOVE],
            "removed": [move.target for move in found.done if move.how is not How.MOVE],
            "left": [{"file": move.target, "reason": reason} for move, reason in found.left],
        })  # fmt: skip
        return
    said = [f"{_files(moved)} put back where they were."] if moved else []
    said += [f"{_files(removed)} removed that were copies or links."] if removed else []
    console.print(" ".join(said) or "Nothing was left to take back.")
    _say_left([(move.target, reason) for move, reason in found.left], "Not taken back")
    if found.left:
        again = typed("sort", "--undo", into)
        console.print(f"To try these again: [bold]{again}[/]", soft_wrap=True, highlight=False)


class _Run:
    """One call of the command.

    Args:
        options: what was asked.
        paths: of the pictures, whole.
        beside: of a picture, what goes with it.
    """

    def __init__(
        self, options: SortOptions, paths: Sequence[Path], beside: dict[Path, list[Path]]
    ) -> None:
        self.options, self.paths, self.beside = options, paths, beside
        self.model = open_checkpoint(options.checkpoint)
        tune = command_line("tune", options.checkpoint, "LABELLED_PICTURES")
        self.promise = promise_of(self.model.config, options.max_error, tune)
        self.shelves = Shelves(self.model.config.class_names, self.promise)
        self.tally = Tally()
        self.files: dict[str, tuple[str, Place]] = {}
        self.along = self.before = 0
        self.is_first = True
        self.left: list[tuple[str, str]] = []
        self.broken: list[tuple[str, str]] = []

    def go(self) -> None:
        """Sorts, or says what it would do."""
        options = self.options
        self._say_before()
        if options.dry_run:
            self._sort(Rehearsal(options.into, JOURNAL_NAME))
        else:
            with open_folder(options.into, JOURNAL_NAME, is_shared=True) as folder:
                try:
                    self._sort(folder)
                except BaseException:
                    self._say_kept(len(folder.journal.moves))
                    raise
        self._tell()

    def _sort(self, folder: Folder) -> None:
        self.is_first = not folder.journal.moves
        wanted = [path for path in self.paths if path not in folder.targets]
        missing = [path for path in wanted if not folder.has(path)]
        self.before = len(wanted) - len(missing)
        if self.before:
            console.print(f"Going on: {self.before} of {len(wanted)} pictures were sorted before.")
        missing = self._without_links(missing)
        if not missing:
            return
        rows = SourceRows([Picture(str(path), str(path)) for path in missing])
        stream = FeatureStream(self.model, rows)
        answerer = Answerer(self.model, None, explain=False, judge=True)
        with progress_bars(), transformers_logging.tqdm(
            total=len(missing), desc="Sorting", unit="img"
        ) as bar:  # fmt: skip
            for part in stream([*range(len(missing))]):
                answers = answerer(part)
                self._place(folder, missing, answers)
                bar.update(len(answers))

    def _place(self, folder: Folder, paths: Sequence[Path], answers: Sequence[Answer]) -> None:
        """Puts some pictures into their folders."""
        places: dict[Path, Place] = {}
        for answer in answers:
            path = paths[answer.number]
            if answer.error:
                self.broken.append((self._name(path), answer.error))
            else:
                places[path] = self.shelves.place_of(answer)
        moved = folder.take([self._group(path, place) for path, place in places.items()])
        for move in moved.done:
            place = places.get(move.source)
            if place is None:
                self.along += 1
                continue
            self.tally.see(place)
            if len(self.files) < KEPT or self.options.json_output:
                self.files[self._name(move.source)] = (move.target, place)
        self.left += [(self._name(move.source), reason) for move, reason in moved.left]

    def _group(self, path: Path, place: Place) -> Group:
        how, others = self.options.how, self.beside.get(path, [])
        if how is How.MOVE:
            others = [other for other in others if not other.is_symlink()]
        first, *rest = (
            Move(one, f"{place.folder}/{one.name}", place.why(), how) for one in (path, *others)
        )
        return Group(first, rest)

    def _without_links(self, paths: Sequence[Path]) -> list[Path]:
        """Only what lies in the inbox itself is moved away; what a link leads to is elsewhere's."""
        if self.options.how is not How.MOVE:
            return [*paths]
        root = self.options.inbox.absolute()
        real = Path(os.path.realpath(root))
        is_own: dict[Path, bool] = {}
        kept = []
        for path in paths:
            parent = path.parent
            if parent not in is_own:
                below = real / parent.relative_to(root)
                is_own[parent] = os.path.realpath(parent) == str(below)
            if path.is_symlink() or not is_own[parent]:
                self.left.append((self._name(path), "it is there by a link; copy or link it"))
            else:
                kept.append(path)
        return kept

    def _name(self, path: Path) -> str:
        """As the user would type it."""
        return str(self.options.inbox / path.relative_to(self.options.inbox.absolute()))

    # ---- words ----------------------------------------------------------------------------------

    def _say_before(self) -> None:
        promise, options = self.promise, self.options
        if promise.rate == NO_PROMISE:
            console.print("Sorted is by the best answer, however unsure; nothing is promised.")
        else:
            console.print(
                f"Sorted is what has a probability of at least {percent(promise.threshold)}: at "
                f"most {percent(promise.rate)} of that should be wrong, if the pictures are like "
                "those that the checkpoint was tuned on.", soft_wrap=True, highlight=False,
            )  # fmt: skip
        if promise.rate < options.max_error < NO_PROMISE:
            console.print(f"There is no threshold for {percent(options.max_error)} itself.")
        if self.model.changes and promise.rate != NO_PROMISE:
            remark = (
                "The checkpoint was taught or made to forget since its threshold was found; "
                "`hf-knn tune` finds it anew."
            )
            console.print(f"[yellow]{escape(as_called(remark))}[/]", soft_wrap=True)
        for label, folder in self.shelves.renamed().items():
            console.print(
                f"[yellow]Note:[/] the folder of the class {escape(repr(label))} is called "
                f"{escape(folder)}.", soft_wrap=True, highlight=False,
            )  # fmt: skip

    def _say_kept(self, count: int) -> None:
        """What a run that ends early leaves, and what one can do then."""
        undo = typed("sort", "--undo", self.options.into)
        Terminal(stderr=True).print(
            f"\nSorted until now: {_files(count)}. The same command goes on; {undo} takes all of "
            "it back." if count else "\nNothing was sorted.",
            soft_wrap=True, highlight=False,
        )  # fmt: skip

    def _tell(self) -> None:
        """What went where, what stayed, and what to type next."""
        options = self.options
        if self.broken and self.is_first and not (self.tally.pictures or self.left):
            first, reason = self.broken[0]
            raise ValueError(
                f"Expected at least one picture that can be read, but none of {len(self.broken)} "
                f"can; {first}: {reason}."
            )
        if options.json_output:
            print_json(self._document())
            return
        if options.dry_run:
            self._print_files()
        self._print_table()
        what = "would be" if options.dry_run else "were"
        count, done = self.tally.pictures, _DONE[options.how]
        said = [f"{count} pictures {what} {done} into {options.into}, {self.tally.sure} of them "
                "into folders of classes."]  # fmt: skip
        if self.along:
            said.append(f"{_files(self.along)} beside them under their names go along.")
        if not count:
            said = ["Nothing is left to sort."]
            said += ["To sort anew, take it back first."] if self.before else []
        console.print(escape(" ".join(said)), soft_wrap=True, highlight=False)
        _say_left(self.broken, "Stays, not readable")
        _say_left(self.left, "Stays")
        if options.how is How.LINK and count:
            console.print(f"The pictures themselves still lie in {escape(options.inbox)}: without "
                          "them the links lead nowhere.", soft_wrap=True)  # fmt: skip
        self._print_next()

    def _document(self) -> dict[str, Any]:
        options = self.options
        return {
            "into": str(options.into), "how": options.how, "dry_run": options.dry_run,
            "max_error": self.promise.rate, "threshold": self.promise.threshold,
            "folders": self.tally.as_json(),
            "files": {
                name: {"to": target, "answer": place.label, "probability": place.probability,
                       "p_value": place.typicality}
                for name, (target, place) in self.files.items()
            },
            "along": self.along,
            "broken": dict(self.broken), "left": dict(self.left),
        }  # fmt: skip

    def _print_files(self) -> None:
        table = Table("picture", "would go to", "since")
        for name, (target, place) in self.files.items():
            table.add_row(escape(name), escape(target), escape(place.why()))
        if self.files:
            console.print(table)
        rest = self.tally.pictures - len(self.files)
        if rest:
            console.print(f"… and {rest} more.")

    def _print_table(self) -> None:
        if not self.tally.pictures:
            return
        table = Table(
            "folder", right("pictures"), right("mean probability"),
            right("stored pictures that say so"),
        )  # fmt: skip
        for name, shelf in self.tally.in_order():
            table.add_row(
                escape(name), str(shelf.pictures), f"{shelf.probability / shelf.pictures:.1%}",
                shelf.voices(),
            )  # fmt: skip
        console.print(table)
        if {UNSURE_NAME, STRANGE_NAME} & {*self.tally.shelves}:
            console.print(
                f"{UNSURE_NAME}: below that probability; {STRANGE_NAME}: unlike anything seen, as "
                f"one of {1 / STRANGE_BELOW:.0f} ordinary pictures is.", highlight=False,
            )  # fmt: skip

    def _print_next(self) -> None:
        options = self.options
        if options.dry_run:
            words = [("Next", typed(*options.words))]
        else:
            look = options.into / UNSURE_NAME
            words = [("To take it back", typed("sort", "--undo", options.into))]
            if UNSURE_NAME in self.tally.shelves:
                words.append(("Next", typed("label", look, "--model", options.checkpoint)))
        for what, command in words:
            console.print(f"{what}: [bold]{command}[/]", soft_wrap=True, highlight=False)


def _bar(is_silent: bool, moves: Sequence[Move]) -> Iterator[Move]:
    yield from transformers_logging.tqdm(
        moves, desc="Taking back", unit="file", disable=is_silent or len(moves) < 2
    )


def _say_left(left: Sequence[tuple[str, str]], what: str) -> None:
    for name, reason in left[:KEPT]:
        console.print(f"[yellow]{what}:[/] {escape(name)}: {escape(reason)}.",
                      soft_wrap=True, highlight=False)  # fmt: skip
    if len(left) > KEPT:
        console.print(f"… and {len(left) - KEPT} more.")


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"
