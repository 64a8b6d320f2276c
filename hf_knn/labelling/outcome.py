"""What a session leaves: a csv, if asked for a folder for each class, and a checkpoint.

Files of a user are never moved or overwritten: a folder of classes is made of copies or links, and
what an earlier call made of pictures that have another label now goes only if it still is what
that call made.
"""

import csv
import filecmp
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

from ..core.plain_json import parse_json
from ..store.folders import fsync_path, rename_new, write_durably
from .lesson import teach_checkpoint, train_checkpoint
from .pool import Pool

COPY, LINK = "copy", "link"
FOLDER_NAME, MODEL_NAME, LIST_NAME = "pictures", "model", "labels.csv"
_MADE_NAME = "pictures.json"
_PART = ".hf-knn-copying"


@dataclass(frozen=True)
class Place:
    """Where a session writes.

    Attributes:
        home: the folder of all that is kept.
        csv: the list of pictures with their labels.
    """

    home: Path
    csv: Path

    @classmethod
    def of(cls, output: Path) -> Self:
        """By what somebody named: a folder, or a csv, beside which the folder lies.

        Raises:
            ValueError: for a folder that is a file, or a csv that is a folder.
        """
        is_csv = output.suffix.lower() == ".csv"
        home = output.with_suffix("") if is_csv else output
        if home.exists() and not home.is_dir():
            raise ValueError(f"Expected {home} to be a folder, but it is a file; name another one.")
        place = output if is_csv else home / LIST_NAME
        if place.is_dir():
            raise ValueError(f"Expected {place} to be a csv, but it is a folder; name another one.")
        return cls(home, place)


@dataclass(frozen=True)
class Outcome:
    """What was written.

    Attributes:
        csv: `path,label`, with paths relative to its folder.
        labelled: how many pictures it names.
        folder: with a folder for each class, or None.
        model: the checkpoint, or None.
        notes: what was not done and why, and what somebody should know, in sentences.
    """

    csv: Path
    labelled: int
    folder: Path | None
    model: Path | None
    notes: list[str]


def write_outcome(
    place: Place,
    pool: Pool,
    labels: Mapping[str, str],
    taught: Mapping[str, str],
    backbone: str | None,
    base: str | Path | None,
    folders: str | None,
    with_model: bool,
) -> Outcome:
    """Writes all of it.

    Args:
        place: where.
        pool: the pictures.
        labels: of the pictures that have one.
        taught: of them, those that a checkpoint did not know.
        backbone: to train on, without a checkpoint.
        base: the checkpoint to teach, or None.
        folders: `copy`, `link` or None.
        with_model: whether to make a checkpoint.

    Raises:
        ValueError: for another word, or without a label.
        OSError: if something cannot be written.
    """
    if folders not in (None, COPY, LINK):
        raise ValueError(
            f"Expected `folders` to be one of {[COPY, LINK]} or None, but got {folders!r}."
        )
    if not labels:
        raise ValueError(
            "Expected at least one picture with a label, but none has one; nothing was written."
        )
    notes: list[str] = []
    _write_csv(place.csv, pool, labels)
    folder = None
    if folders is not None:
        folder = place.home / FOLDER_NAME
        notes += _fill(folder, place.home / _MADE_NAME, pool, labels, folders)
    model = None
    if with_model:
        target = place.home / MODEL_NAME
        made = (
            teach_checkpoint(base, target, pool, taught)
            if base is not None
            else train_checkpoint(str(backbone), target, pool, labels)
        )
        model, notes = (target if made.is_made else None), [*notes, *made.notes]
    return Outcome(place.csv, len(labels), folder, model, notes)


def _write_csv(path: Path, pool: Pool, labels: Mapping[str, str]) -> None:
    """As `hf-knn train` reads it: cells are plain, since a label in another form is another one."""
    start = path.parent.resolve()

    def write(place: Path) -> None:
        with place.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", "label"])
            for name, label in labels.items():
                way = os.path.relpath(pool.path(name), start)
                writer.writerow([PurePosixPath(*Path(way).parts), label])

    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, write)


# ---- a folder for each class --------------------------------------------------------------------


def _fill(
    folder: Path, list_of_made: Path, pool: Pool, labels: Mapping[str, str], how: str
) -> list[str]:
    """Makes the folder hold these pictures; returns what was left alone."""
    made = _read_made(list_of_made)
    wanted = _targets(folder, labels, made)
    notes: list[str] = []
    # before the first file: what a kill leaves is known to be ours
    _write_made(list_of_made, {**made, **wanted})
    for target, name in made.items():
        if wanted.get(target) != name:
            notes += _take_away(folder / target, pool.path(name))
    for target, name in wanted.items():
        place, source = folder / target, pool.path(name)
        if _is_ours(place, source, how):
            continue
        if os.path.lexists(place) and not _is_ours(place, source):
            notes.append(_changed(place))
        else:
            _make(place, source, how)
    _write_made(list_of_made, wanted)
    for path in sorted(folder.glob("*")):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    return notes


def _targets(folder: Path, labels: Mapping[str, str], made: Mapping[str, str]) -> dict[str, str]:
    """Where each picture goes: under its own name, with a number if that is taken."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    kept = {(PurePosixPath(target).parent.name, name): target for target, name in made.items()}
    for name, label in labels.items():
        if (target := kept.get((label, name))) is not None:
            found[target] = name
            taken.add(target.casefold())
    placed = set(found.values())
    for name, label in labels.items():
        if name in placed:
            continue
        own, number = PurePosixPath(name), 1
        target = f"{label}/{own.name}"
        while target.casefold() in taken or (
            target not in made and os.path.lexists(folder / target)
        ):
            number += 1
            target = f"{label}/{own.stem} ({number}){own.suffix}"
        found[target] = name
        taken.add(target.casefold())
    return found


def _make(place: Path, source: Path, how: str) -> None:
    """One copy or link, whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.parent / _PART
    part.unlink(missing_ok=True)
    if how == LINK:
        part.symlink_to(source)
    else:
        shutil.copy2(source, part)
        fsync_path(part)
    place.unlink(missing_ok=True)  # a link that becomes a copy, or the other way round
    try:
        rename_new(part, place)
    finally:
        part.unlink(missing_ok=True)


def _is_ours(place: Path, source: Path, how: str | None = None) -> bool:
    """Whether a file is what was made of a picture; as a copy or link, if it is said which."""
    if place.is_symlink():
        return how != COPY and Path(os.readlink(place)) == source
    is_same = place.is_file() and source.is_file() and filecmp.cmp(place, source, shallow=False)
    return is_same and how != LINK


def _take_away(place: Path, source: Path) -> list[str]:
    """Removes what an earlier call made, unless it is something else now."""
    if not os.path.lexists(place):
        return []
    if not _is_ours(place, source):
        return [_changed(place)]
    place.unlink()
    return []


def _changed(place: Path) -> str:
    return f"{place} was changed since it was made, so it was left as it is."


def _read_made(path: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):
        data = parse_json(path.read_bytes(), path.name)
        if isinstance(data, dict):
            return {str(target): str(name) for target, name in data.items()}
    return {}


def _write_made(path: Path, made: Mapping[str, str]) -> None:
    text = json.dumps(made)
    write: Callable[[Path], object] = lambda place: place.write_text(text, encoding="ascii")  # noqa: E731
    write_durably(path, write)
