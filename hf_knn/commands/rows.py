"""`hf-knn forget | relabel`: rows that are named by id, path, class or finding."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table

from ..checkup.examine import pictures_of, stored_copies
from ..checkup.findings import (
    STORED,
    Finding,
    Kind,
    Line,
    Pictures,
    harmless,
    in_order,
    kinds_of,
    read_csv,
)
from ..data.walk import nfc
from ..model.modeling import KnnForImageClassification
from ..model.receipts import Change, Receipt
from ..store.backend import RowStore
from .checks import watching
from .console import agreed, changing, console, escape, print_json, typed
from .memory import CLASSES_NAME, change_checkpoint, changed, say_receipt, store_of

_SHOWN = 20

Span = tuple[int, int]
"""The first and the last of some ids; both alike for one row."""

COPIES = (Kind.EXACT, Kind.NEAR)
"""What `forget` takes from a csv where no kinds are named: of these one is kept."""


@dataclass(frozen=True)
class Wanted:
    """What somebody asks to forget.

    Attributes:
        ids: rows by id; of a span of several, those that are stored.
        paths: of pictures, as `predict` and `inspect` show them.
        label: every row of a class.
        findings: a csv of findings.
        kinds: of the findings to take; empty takes `COPIES`.
    """

    ids: Sequence[Span] = ()
    paths: Sequence[str] = ()
    label: str | None = None
    findings: Path | None = None
    kinds: Sequence[str] = ()

    def check(self) -> None:
        """Refuses nothing, and several things that were hardly meant together.

        Raises:
            ValueError: saying what to pass.
        """
        ways = [bool(self.ids or self.paths), self.label is not None, self.findings is not None]
        if sum(ways) != 1:
            raise ValueError(
                "Expected what to forget: --ids or --path, or else --label, or else --from."
            )
        if self.kinds and self.findings is None:
            raise ValueError("Expected --kind with --from only; it says which findings to take.")


def forget_rows(
    checkpoint: Path, wanted: Wanted, recenter: bool, backup: Path | None, json_output: bool
) -> None:
    """Removes rows from a checkpoint.

    Args:
        checkpoint: a folder.
        wanted: which rows.
        recenter: make the mean that centres rows anew.
        backup: a folder for the rows, to be merged again; None keeps nothing.
        json_output: print the receipt as JSON.

    Raises:
        ValueError: for rows that are not there; nothing is changed.
    """
    wanted.check()
    kinds = kinds_of(wanted.kinds) or COPIES
    lines = None if wanted.findings is None else read_csv(wanted.findings)

    def change(model: KnnForImageClassification) -> Receipt:
        store, names = store_of(model, checkpoint), model.config.class_names
        if lines is not None:
            meant = lines_of_kinds(lines, kinds)
            ids = Stored(store, names).ids_of(meant)
            if not ids:
                return _nothing(model, Change.FORGET, "no row that the csv names is stored")
        elif wanted.label is not None:
            ids = _ids_of_class(store, names, wanted.label)
        else:
            ids = [*ids_in(store, wanted.ids), *_ids_of_paths(store, wanted.paths)]
        return forget_ids(model, ids, recenter, backup)

    change_checkpoint(checkpoint, change, json_output)
    if not json_output:
        say_what_is_left(checkpoint, backup)


def forget_duplicates(
    checkpoint: Path,
    root: Path | None,
    kinds: Sequence[str],
    yes: bool,
    recenter: bool,
    backup: Path | None,
    json_output: bool,
) -> None:
    """Keeps one of each group of stored copies, the one that was stored first.

    Copies under several labels stay: either may be the right one.

    Args:
        checkpoint: a folder.
        root: the folder of the pictures, to compare their pixels; None compares features.
        kinds: `COPIES`, or one of them; empty takes both.
        yes: do not ask.
        recenter: make the mean that centres rows anew.
        backup: a folder for the rows, to be merged again; None keeps nothing.
        json_output: print the receipt as JSON, with what was `kept` for each row.

    Raises:
        ValueError: if nobody can be asked, or the checkpoint was changed meanwhile; nothing is
            changed.
    """
    wanted = kinds_of(kinds) or [*COPIES]
    if not set(wanted) <= set(COPIES):
        raise ValueError(f"Expected --kind of {[*map(str, COPIES)]} with --duplicates.")
    if json_output and not yes:
        raise ValueError("Expected --yes with --json, since nobody can be asked then.")
    seen: list[tuple[Pictures, list[Finding], str]] = []

    def look(model: KnnForImageClassification) -> Receipt:
        store = store_of(model, checkpoint)
        pictures = pictures_of(store, model.config.class_names)
        with watching(not json_output) as watch:
            found = stored_copies(store, pictures, root, watch)
        seen.append((pictures, found, model.fingerprint_rows()))
        return _nothing(model, Change.FORGET, "no row is a copy of another one of its class")

    with changing(checkpoint) as folder:  # not held while somebody thinks about an answer
        receipt = changed(checkpoint, folder, look)
    pictures, found, state = seen[0]
    copies = [one for one in in_order(found) if one.kind in wanted]
    _say_copies(pictures, copies, sum(one.kind == Kind.CONFLICT for one in found))
    ids = [int(pictures.ids[one.picture]) for one in copies]
    if copies and not agreed(f"Forget {len(ids)} rows?", yes):
        console.print("Nothing was changed.")
        return

    def change(model: KnnForImageClassification) -> Receipt:
        if model.fingerprint_rows() != state:
            raise ValueError(
                f"Expected {checkpoint} as it was looked at, but its rows were changed meanwhile; "
                "call this command again."
            )
        return forget_ids(model, ids, recenter, backup)

    if copies:
        with changing(checkpoint) as folder:
            receipt = changed(checkpoint, folder, change)
    if json_output:
        kept = {str(row): int(pictures.ids[one.others[0]])
                for row, one in zip(ids, copies, strict=True)}  # fmt: skip
        print_json(asdict(receipt) | {"kept": kept})
        return
    say_receipt(receipt, json_output)
    if copies:
        say_what_is_left(checkpoint, backup)


def _say_copies(pictures: Pictures, copies: Sequence[Finding], conflicts: int) -> None:
    """Which rows are kept and which are to go, and why."""
    table = Table("keep", "forget", "label", "why", title="Of each group the first that was stored "
                  "is kept", title_justify="left")  # fmt: skip
    for one in copies[:_SHOWN]:
        kept, copy = (
            f"{pictures.ids[p]} {pictures.paths[p]}" for p in (one.others[0], one.picture)
        )
        table.add_row(*map(escape, (kept, copy, pictures.label_of(one.picture), one.detail)))
    if copies:
        console.print(table)
    if len(copies) > _SHOWN:
        console.print(f"… and {len(copies) - _SHOWN:,} more.")
    if conflicts:
        groups = "One group of copies has" if conflicts == 1 else f"{conflicts} groups have"
        console.print(
            f"{groups} several labels and stays as it is: decide on one with `hf-knn relabel`.",
            soft_wrap=True, highlight=False,
        )  # fmt: skip


def forget_ids(
    model: KnnForImageClassification, ids: Sequence[int], recenter: bool, backup: Path | None
) -> Receipt:
    """Removes rows from a model, and keeps them in a folder first, if there is one.

    Args:
        model: that is changed.
        ids: of rows, in any order, also several times.
        recenter: make the mean that centres rows anew.
        backup: a folder that is not there yet; None keeps nothing.

    Raises:
        ValueError: for rows that are not there, or a folder that is.
    """
    store = model.datastore
    assert store is not None  # whoever knows ids has seen it
    rows = torch.tensor(list(dict.fromkeys(ids)), dtype=torch.int64)
    if backup is not None:
        if backup.exists():
            raise ValueError(f"Expected {backup} not to exist yet; choose another folder.")
        store.subset(rows).save(backup)
        prints = model.memory.contents
        if prints is not None:
            prints.only(rows.tolist()).save(backup)
        text = json.dumps(model.config.class_names, ensure_ascii=False)
        (backup / CLASSES_NAME).write_text(text + "\n", encoding="utf-8")
    return model.forget(rows, recenter=recenter)


def say_what_is_left(checkpoint: Path, backup: Path | None) -> None:
    """Says where traces of forgotten rows are still, and how to bring them back.

    Args:
        checkpoint: a folder.
        backup: where they were kept; None for nowhere.
    """
    console.print(
        "Note: features that were computed on this machine are cached apart from the checkpoint; "
        f"[bold]{typed('cache', '--clear')}[/] removes them.",
        soft_wrap=True,
    )
    if backup is not None and backup.exists():
        again = typed("merge", checkpoint, backup)
        console.print(f"To bring the rows back: [bold]{again}[/]", soft_wrap=True)


def relabel_rows(
    checkpoint: Path,
    ids: Sequence[Span],
    label: str | None,
    findings: Path | None,
    json_output: bool,
) -> None:
    """Gives rows of a checkpoint other labels.

    Args:
        checkpoint: a folder.
        ids: rows by id; of a span of several, those that are stored.
        label: a class for them, or a new one.
        findings: a csv of findings: each row that has a suggested label there gets it.
        json_output: print the receipt as JSON.

    Raises:
        ValueError: for rows that are not there, or are no longer as the csv says; nothing is
            changed.
    """
    if findings is None and (not ids or label is None):
        raise ValueError("Expected rows and their new class: --ids and --label, or else --from.")
    if findings is not None and (ids or label is not None):
        raise ValueError("Expected --from alone; its csv names rows and labels (suggested_label).")
    lines = None if findings is None else [one for one in read_csv(findings) if one.suggested]

    def change(model: KnnForImageClassification) -> Receipt:
        store = store_of(model, checkpoint)
        if lines is None:
            assert label is not None
            rows = ids_in(store, ids)
            return model.relabel(rows, [label] * len(rows))
        moves = Stored(store, model.config.class_names).moves_of(lines)
        if not moves:
            return _nothing(model, Change.RELABEL, "no stored row has another suggested label")
        return model.relabel([*moves], [*moves.values()])

    change_checkpoint(checkpoint, change, json_output)


def lines_of_kinds(lines: Sequence[Line], kinds: Sequence[str]) -> list[Line]:
    """The lines of some kinds; says which others there are.

    Args:
        lines: of a csv.
        kinds: of findings.
    """
    others = Counter(line.kind for line in lines if line.kind not in kinds)
    if others:
        said = ", ".join(f"{count} {kind}" for kind, count in others.items())
        console.print(
            f"Left out: {escape(said)}. Name what to take with --kind.",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    return [line for line in lines if line.kind in kinds]


def ids_in(store: RowStore, spans: Sequence[Span]) -> list[int]:
    """The ids that are meant, each once.

    Args:
        store: the rows.
        spans: of ids; one id alone is meant whether it is stored or not, of several those that are.

    Raises:
        ValueError: if nothing is stored between two ends.
    """
    known, found = store.ids, dict[int, None]()
    for first, last in spans:
        if first == last:
            found[first] = None
            continue
        inside = known[(known >= first) & (known <= last)].sort().values.tolist()
        if not inside:
            raise ValueError(f"Expected rows with ids from {first} to {last}, but there are none.")
        found |= dict.fromkeys(inside)
    return [*found]


class Stored:
    """Rows of a datastore, as the lines of a csv name them.

    Args:
        store: the rows.
        names: of the classes.
    """

    def __init__(self, store: RowStore, names: Sequence[str]) -> None:
        self._paths = store.paths
        self._labels = [names[label] for label in store.labels.tolist()]
        self._places = {row: place for place, row in enumerate(store.ids.tolist())}
        self._names = names

    def ids_of(self, lines: Sequence[Line]) -> list[int]:
        """The rows that are stored still, of those that lines name.

        Args:
            lines: of a csv.

        Raises:
            ValueError: for lines about other pictures.
        """
        return [row for row, _ in self._found(lines)]

    def moves_of(self, lines: Sequence[Line]) -> dict[int, str]:
        """The new label of each row that is stored still and does not have it yet.

        Args:
            lines: of a csv, with suggested labels.

        Raises:
            ValueError: for lines about other pictures, for rows that got another label meanwhile,
                and for two suggestions for one row.
        """
        moves: dict[int, str] = {}
        by_cell = {harmless(name): name for name in self._names}
        for row, line in self._found(lines):
            wanted = by_cell.get(harmless(line.suggested), line.suggested)
            if moves.setdefault(row, wanted) != wanted:
                raise ValueError(
                    f"Expected one suggested label for each row, but row {row} has "
                    f"{moves[row]!r} and, in line {line.number}, {wanted!r}; delete one of them."
                )
            now = self._labels[self._places[row]]
            if now != wanted and harmless(now) != line.label:
                raise ValueError(
                    f"Expected the findings of this checkpoint as it is, but row {row} is labelled "
                    f"{now!r} now, not {line.label!r} as in line {line.number}; run "
                    "`hf-knn inspect` again."
                )
        return {row: label for row, label in moves.items()
                if self._labels[self._places[row]] != label}  # fmt: skip

    def _found(self, lines: Sequence[Line]) -> list[tuple[int, Line]]:
        found, gone = [], 0
        for line in lines:
            if line.split != STORED or line.sample_id is None:
                raise ValueError(
                    f"Expected findings about stored rows, but line {line.number} is about "
                    f"{line.path or line.split or 'a class'}; pass the csv of `hf-knn inspect`, "
                    "and delete lines without an id."
                )
            place = self._places.get(line.sample_id)
            if place is None:
                gone += 1
                continue
            self._check(line, place)
            found.append((line.sample_id, line))
        if gone:
            console.print(f"{gone} rows of the csv are not stored any more.", soft_wrap=True)
        return found

    def _check(self, line: Line, place: int) -> None:
        """Refuses a line about another picture: ids of two checkpoints are often the same."""
        path = "" if self._paths is None else harmless(self._paths[place])
        label = harmless(self._labels[place])
        if path != line.path or (not path and line.label != label and line.suggested != label):
            raise ValueError(
                f"Expected the findings of this checkpoint, but line {line.number} is about "
                f"{line.path or line.label!r}, and row {line.sample_id} is {path or label!r}; run "
                "`hf-knn inspect` again."
            )


def _ids_of_class(store: RowStore, names: Sequence[str], label: str) -> list[int]:
    numbers = {nfc(name): number for number, name in enumerate(names)}
    if nfc(label) not in numbers:
        raise ValueError(f"Expected one of the classes {names[:_SHOWN]}, but got {label!r}.")
    ids: list[int] = store.ids_labelled(numbers[nfc(label)]).tolist()
    return ids


def _ids_of_paths(store: RowStore, paths: Sequence[str]) -> list[int]:
    known = dict(zip(map(nfc, store.paths or []), store.ids.tolist(), strict=False))
    missing = [path for path in paths if nfc(path) not in known]
    if missing:
        raise ValueError(
            f"Expected paths that the datastore knows, but it does not know {missing[:3]}; they "
            "look like " + repr(next(iter(known), "nothing: it knows no paths")) + "."
        )
    return [known[nfc(path)] for path in paths]


def _nothing(model: KnnForImageClassification, action: Change, note: str) -> Receipt:
    store = model.datastore
    assert store is not None  # its rows were looked at
    return Receipt.nothing(action, len(store), model.fingerprint_rows(), [note])
