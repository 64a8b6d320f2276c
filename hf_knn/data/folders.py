"""Folders and lists of pictures: which file is of which split and class. Nothing is opened."""

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .tables import read_table
from .walk import METADATA_NAME, SPLIT_FOLDERS, Found, find_pictures, nfc, shown

SPLIT_NAMES = SPLIT_FOLDERS | {"training": "train", "dev": "validation"}
"""What a split is called in lists and datasets."""


class Rows(NamedTuple):
    """N pictures.

    Attributes:
        files: where each lies.
        paths: relative to the folder that was given, with `/` on every system.
        labels: in NFC; None for a missing one.
        columns: further cells by the name of their column; None for an empty one.
    """

    files: list[str]
    paths: list[str]
    labels: list[str | None]
    columns: dict[str, list[str | None]]

    def take(self, numbers: Sequence[int]) -> "Rows":
        """Some of them."""
        return Rows(
            [self.files[number] for number in numbers],
            [self.paths[number] for number in numbers],
            [self.labels[number] for number in numbers],
            {name: [cells[n] for n in numbers] for name, cells in self.columns.items()},
        )


class Layout(NamedTuple):
    """What a folder or a list says.

    Attributes:
        splits: by `train`, `validation` and `test`; without splits all is `train`.
        notes: what was left out or assumed, in sentences.
    """

    splits: dict[str, Rows]
    notes: list[str]


class _Listed(NamedTuple):
    """The pictures of a list, their splits, and whether it says labels."""

    rows: Rows
    splits: list[str] | None
    has_labels: bool


def read_folder(root: str | Path, splits: bool | None = None) -> Layout:
    """Reads a folder: the label is the top folder, below the folder of a split.

    A `metadata.csv` in the folder, or in that of a split, says which pictures there are, and their
    labels if it has such a column.

    Args:
        root: the folder.
        splits: whether folders called train, validation, valid, val and test are splits; None: if
            all that hold pictures are called so.

    Returns:
        The splits. Where there are no folders of classes, no picture has a label.

    Raises:
        ValueError: for a folder without pictures, or where some folders are called like splits and
            others are not.
        OSError: if a folder cannot be read.
    """
    place = os.path.abspath(root)
    found = find_pictures(place)
    notes = list(found.notes)
    if not found.pictures:
        said = "".join(f" {note}" for note in notes)
        raise ValueError(
            f"Expected {root} to hold one sub-folder of pictures per label, or a {METADATA_NAME}, "
            f"but there is no picture in it.{said}"
        )
    listed = _metadata(place, "", found, notes) or _Listed(_plain(place, found), None, False)
    if listed.splits is not None and splits is not False:
        by_column = _by_column(listed.rows, listed.splits, METADATA_NAME)
        parts = {name: ("", listed._replace(rows=rows)) for name, rows in by_column.items()}
    else:
        parts = dict(_by_folder(root, place, listed, splits, found, notes))
    prefixes = [prefix for prefix, _ in parts.values()]
    read = {METADATA_NAME, *(f"{prefix}{METADATA_NAME}" for prefix in prefixes)}
    unread = [path for path in found.metadata if path not in read]
    if unread:
        notes.append(
            f"{shown(unread)} {'was' if len(unread) == 1 else 'were'} left out: a {METADATA_NAME} "
            "counts in the folder itself or in that of a split."
        )
    rows = {
        name: part.rows if part.has_labels else _labelled(part.rows, prefix, notes)
        for name, (prefix, part) in parts.items()
    }
    return Layout(rows, [*notes, *_about_folders(found, prefixes)])


def read_list(path: Path, splits: bool | None = None) -> Layout:
    """Reads a list of pictures (see `hf_knn.data.tables`).

    Args:
        path: of the list.
        splits: False does not look at a column of splits.

    Raises:
        ValueError: for a list that cannot be read, a split of another name, or if none of its
            pictures is there.
    """
    notes: list[str] = []
    listed = _listed(path, os.path.dirname(os.path.abspath(path)), notes)
    if listed.splits is None or splits is False:
        return Layout({"train": listed.rows}, notes)
    return Layout(_by_column(listed.rows, listed.splits, str(path)), notes)


def read_under_label(place: Path, label: str) -> Layout:
    """One picture, or all below a folder, under one label.

    Args:
        place: a picture, or a folder.
        label: of all of them.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: for a folder without pictures.
    """
    if not place.exists():
        raise FileNotFoundError(
            f"Expected {place} to be a picture or a folder of pictures, but there is nothing there."
        )
    names, notes = [""], []
    if place.is_dir():
        found = find_pictures(str(place))
        names, notes = found.pictures, found.notes
    if not names:
        said = "".join(f" {note}" for note in notes)
        raise ValueError(f"Expected {place} to hold pictures, but there is none in it.{said}")
    files = [os.path.abspath(place / name) for name in names]
    # where a picture of one's own lies is nobody's business: its name will do
    rows = Rows(files, [os.path.basename(file) for file in files], [nfc(label)] * len(files), {})
    return Layout({"train": rows}, list(notes))


def whole_numbers(cells: Sequence[str | None], column: str) -> list[int]:
    """The cells of a column as numbers.

    Args:
        cells: as they were written.
        column: the name of it.

    Raises:
        ValueError: naming a cell that is none.
    """
    bad = [cell for cell in cells if not (cell or "").isdecimal()]
    if bad:
        raise ValueError(
            f"Expected whole numbers in the column {column}, but got {bad[0]!r}; rename the column "
            "if it means something else."
        )
    return [int(cell or 0) for cell in cells]


# ---- splits -------------------------------------------------------------------------------------


def _by_folder(
    root: str | Path, place: str, listed: _Listed, splits: bool | None, found: Found,
    notes: list[str],
) -> Iterator[tuple[str, tuple[str, _Listed]]]:  # fmt: skip
    """The pictures of each split, by the folder they lie in, and what their paths begin with."""
    by_top: dict[str, list[int]] = defaultdict(list)
    for number, path in enumerate(listed.rows.paths):
        by_top[path.split("/", 1)[0] if "/" in path else ""].append(number)
    beside = by_top.pop("", [])
    called = [top for top in by_top if top.casefold() in SPLIT_FOLDERS]
    others = [top for top in by_top if top not in called]
    if splits is False or (not called and not splits):
        yield "train", ("", listed)
        return
    if others or not called:
        raise ValueError(_either(root, called, others))
    if beside:
        left_out = [listed.rows.paths[number] for number in beside]
        notes.append(_beside(left_out, "the folders of the splits"))
    for name in dict.fromkeys(SPLIT_FOLDERS.values()):
        own = [top for top in called if SPLIT_FOLDERS[top.casefold()] == name]
        if len(own) > 1:
            raise ValueError(
                f"Expected one folder of {root} to be the split {name}, but got {shown(own)}; put "
                "them together, or pass --splits none (splits=False) if they are classes."
            )
        for top in own:
            rows = listed._replace(rows=listed.rows.take(by_top[top]))
            yield name, (f"{top}/", _metadata(place, top, found, notes) or rows)


def _either(root: str | Path, called: Sequence[str], others: Sequence[str]) -> str:
    """Why nobody can tell whether a folder is a split or a class."""
    if not called:
        return (
            f"Expected the folders of {root} to be called train, validation or test, but got "
            f"{shown(others) or 'none'}; rename them, or do not ask for splits."
        )
    like = "is called like a split" if len(called) == 1 else "are called like splits"
    rest = "is not" if len(others) == 1 else "are not"
    return (
        f"Expected all folders of {root} to be splits or all to be classes, but {shown(called)} "
        f"{like} and {shown(others)} {rest}. If all are classes, pass --splits none (Python: "
        f"splits=False). If {shown(called)} is a split of the pictures, move {shown(others)} into "
        "a split too, such as a folder train beside it."
    )


def _by_column(rows: Rows, cells: Sequence[str], source: str) -> dict[str, Rows]:
    """The pictures of each split, by what a list calls it."""
    numbers: dict[str, list[int]] = defaultdict(list)
    unknown: Counter[str] = Counter()
    for number, cell in enumerate(cells):
        name = SPLIT_NAMES.get(cell.strip().casefold())
        if name is None:
            unknown[cell] += 1
        else:
            numbers[name].append(number)
    if unknown:
        named = ", ".join(f"{cell!r} ({count} rows)" for cell, count in unknown.most_common(5))
        raise ValueError(
            f"Expected the column split of {source} to say train, validation (val, valid, dev) or "
            f"test, but got {named}; rename them, or pass --splits none (Python: splits=False) to "
            "take all rows as one."
        )
    order = dict.fromkeys(SPLIT_NAMES.values())
    return {name: rows.take(numbers[name]) for name in order if name in numbers}


# ---- labels -------------------------------------------------------------------------------------


def _labelled(rows: Rows, prefix: str, notes: list[str]) -> Rows:
    """Pictures with the folder below `prefix` as their label, if there are such folders."""
    tops = [_top(path, prefix) for path in rows.paths]
    beside = [number for number, top in enumerate(tops) if not top]
    if len(beside) == len(tops):
        return rows
    if beside:
        left_out = [rows.paths[number] for number in beside]
        notes.append(_beside(left_out, "the folders of the classes"))
        rows = rows.take([number for number, top in enumerate(tops) if top])
    return rows._replace(labels=[nfc(top) for top in tops if top])


def _top(path: str, prefix: str) -> str:
    """The first folder below `prefix`; empty for a picture that lies in none."""
    top, slash, _ = path[len(prefix) :].partition("/")
    return top if slash else ""


def _beside(pictures: Sequence[str], what: str) -> str:
    was = "was" if len(pictures) == 1 else "were"
    return f"{shown(pictures)} {was} left out: beside {what}, in none of them."


def _plain(place: str, found: Found) -> Rows:
    files = [os.path.join(place, path) for path in found.pictures]
    return Rows(files, found.pictures, [None] * len(files), {})


def _about_folders(found: Found, prefixes: Iterable[str]) -> Iterator[str]:
    """What one should know about folders of classes: empty, spelled alike, or split again."""
    filled = {parent for path in found.pictures for parent in _parents(path)}
    for prefix in prefixes:
        depth = prefix.count("/")
        level = [f for f in found.folders if f.startswith(prefix) and f.count("/") == depth]
        empty = [folder for folder in level if folder not in filled]
        if empty:
            yield f"There is no picture in {shown(empty)}."
        alike: dict[str, list[str]] = defaultdict(list)
        for folder in level:
            alike[nfc(folder)].append(folder)
        for name, folders in alike.items():
            if len(folders) > 1:
                yield f"{len(folders)} folders are called {name}, in other bytes: one class."
        below = [f for f in found.folders if f.startswith(prefix) and f.count("/") == depth + 1]
        inner = [f for f in below if f in filled and f.rsplit("/")[-1].casefold() in SPLIT_FOLDERS]
        if inner:
            yield f"{shown(inner)} are below a class and were read as parts of it, not as splits."
    if any(prefixes):
        tops = [f for f in found.folders if "/" not in f and f not in filled]
        if tops:
            yield f"There is no picture in {shown(tops)}."


def _parents(path: str) -> Iterator[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


# ---- lists --------------------------------------------------------------------------------------


def _metadata(place: str, top: str, found: Found, notes: list[str]) -> _Listed | None:
    """The pictures that a folder's `metadata.csv` names; None without one."""
    prefix = f"{top}/" if top else ""
    if f"{prefix}{METADATA_NAME}" not in found.metadata:
        return None
    listed = _listed(Path(place, top, METADATA_NAME), place, notes)
    known = set(listed.rows.paths)
    unnamed = [p for p in found.pictures if p.startswith(prefix) and p not in known]
    if unnamed:
        was = "was" if len(unnamed) == 1 else "were"
        notes.append(f"{shown(unnamed)} {was} left out: {prefix}{METADATA_NAME} does not name it.")
    return listed


def _listed(path: Path, root: str, notes: list[str]) -> _Listed:
    """The pictures of a list, with paths relative to `root`."""
    table = read_table(path)
    notes += table.notes
    home = os.path.dirname(os.path.abspath(path))
    wanted = [os.path.normpath(os.path.join(home, place)) for place in table.places]
    files = [_as_written(file) for file in wanted]
    missing = [place for place, file in zip(table.places, files, strict=True) if file is None]
    if len(missing) == len(files):
        raise ValueError(
            f"Expected the paths in {path} to exist, relative to its folder, but {missing[0]} does "
            "not; write them as they lie beside it."
        )
    if missing:
        notes.append(f"{len(missing)} pictures of {path.name} are not there: {shown(missing)}.")
    places = [file or wish for file, wish in zip(files, wanted, strict=True)]
    labels = [nfc(label) if label else None for label in table.labels or [""] * len(places)]
    columns: dict[str, list[str | None]] = {
        name: [cell or None for cell in cells] for name, cells in table.columns.items()
    }
    rows = Rows(places, _relative(places, root), labels, columns)
    return _Listed(rows, table.splits, table.labels is not None)


def _as_written(path: str) -> str | None:
    """A file that is there, in whatever form of Unicode its name was written; None without one."""
    if os.path.exists(path):
        return path
    if path.isascii():
        return None
    forms = (unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path))
    return next((form for form in forms if os.path.exists(form)), None)


def _relative(files: Sequence[str], root: str) -> list[str]:
    """Paths below `root`; if some lie outside it, below the folder that holds all."""
    start = os.path.join(root, "")
    if not all(file.startswith(start) for file in files):
        try:
            start = os.path.join(os.path.commonpath({os.path.dirname(f) for f in files}), "")
        except ValueError:  # on several drives
            return [os.path.basename(file) for file in files]
        if all(os.sep not in file[len(start) :] for file in files):  # one folder: it says the label
            start = os.path.join(os.path.dirname(start.rstrip(os.sep)), "")
    return [file[len(start) :].replace(os.sep, "/") for file in files]
