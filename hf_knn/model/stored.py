"""Pictures that are stored already: found by print or by features, and told from new ones."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.backbone import split_features
from ..core.config import KnnConfig
from ..core.rows import Values
from ..store.backend import SearchBackend, as_row_store
from .classes import Label
from .contents import Contents, marks_of
from .memory import Memory
from .pictures import look_at, small_pictures

if TYPE_CHECKING:
    from .modeling import KnnForImageClassification

_ASKED_AT_ONCE = 1024
_NEAREST = 8
"""Stored rows next to a picture, among which one with the same features is."""

_NAMED = 5


class Lesson(NamedTuple):
    """Pictures, or rows of features, to be taught.

    Attributes:
        features: [M, D], as in `pooler_output`.
        labels: M names or numbers of classes.
        ids: [M] unused ids, or None.
        paths: where each picture lies, or None.
        contents: [M, 16] uint8, their prints; None if nobody knows them.
        thumbnails: M small WEBP files, or none.
    """

    features: Tensor
    labels: Sequence[Label]
    ids: Any = None
    paths: Sequence[str] | None = None
    contents: Tensor | None = None
    thumbnails: Sequence[bytes] = ()

    def part(self, places: Sequence[int]) -> "Lesson":
        """Some of the pictures.

        Args:
            places: of them.
        """
        index = torch.tensor(places, dtype=torch.int64)
        labels = np.asarray(self.labels, dtype=object).tolist()  # of an array they are numbers
        return Lesson(
            self.features[index],
            [labels[place] for place in places],
            None if self.ids is None else torch.as_tensor(self.ids)[index],
            None if self.paths is None else [self.paths[place] for place in places],
            None if self.contents is None else self.contents[index],
            [self.thumbnails[place] for place in places] if self.thumbnails else (),
        )


def lesson_of(
    model: "KnnForImageClassification",
    images: Any,
    labels: Sequence[Label],
    features: Tensor | None,
    contents: Tensor | None,
    ids: Values | None,
    paths: Sequence[str] | None,
) -> tuple[Lesson, list[str] | None]:
    """What `KnnForImageClassification.teach` was given.

    Returns:
        The lesson, and what its pictures are called in messages; None for rows of features.

    Raises:
        ValueError: unless there are images, or features with their contents or without.
    """
    if (images is None) == (features is None):
        raise ValueError("Expected exactly one of `images` and `features`.")
    if features is not None:
        lesson = Lesson(features, labels, ids, paths, contents)
        return lesson, None if contents is None else _named(None, paths, len(features))
    if contents is not None:
        raise ValueError("Expected `contents` with `features`, but got them with `images`.")
    small = [] if model.thumbnails is None else small_pictures(images)
    features, contents = look_at(model, images)
    names = _named(None if isinstance(images, Tensor) else images, paths, len(features))
    return Lesson(features, labels, ids, paths, contents, small), names


def _named(images: Any, paths: Sequence[str] | None, count: int) -> list[str]:
    given: Any = images if paths is None else paths
    if given is None or len(given) != count:
        given = [""] * count
    return [
        str(one) if isinstance(one, str | PurePath) and str(one) else f"picture {number}"
        for number, one in enumerate(given)
    ]


class StoredOtherwiseError(ValueError):
    """Pictures are stored already, under other labels than they come with.

    Attributes:
        problem: what is wrong, without what to do.
        moves: ids of the rows, by the label that their pictures come with.
    """

    def __init__(self, problem: str, moves: dict[str, list[int]]) -> None:
        calls = [
            f"model.relabel({ids[:_NAMED]}{', …' * (len(ids) > _NAMED)}, [{label!r}] * {len(ids)})"
            for label, ids in moves.items()
        ]
        super().__init__(
            f"{problem} Nothing was changed; {shown(calls, 3)} gives them the new label, and "
            "relabel=True does that and teaches the rest."
        )
        self.problem, self.moves = problem, moves


class Sorted(NamedTuple):
    """What is to be done with pictures.

    Attributes:
        taken: places of those that become rows.
        skipped: places of those that do not, since they are stored or come twice.
        moves: ids of stored rows that get another label, with its name.
        notes: what is to be said of it.
    """

    taken: list[int]
    skipped: list[int]
    moves: dict[int, str]
    notes: list[str]


def find_copies(
    store: SearchBackend,
    known: Contents | None,
    features: Tensor,
    prints: Tensor | None,
    nearest: Tensor | None = None,
) -> list[dict[int, int]]:
    """The rows that hold the same pictures: by their prints, or by features equal bit for bit.

    Args:
        store: N rows.
        known: prints of their pictures, where there are any.
        features: [M, D] of pictures, the part that is stored.
        prints: [M, 16] uint8 of the pictures, or None.
        nearest: [M, n] ids of the nearest rows, if they were searched for already.

    Returns:
        For each picture the ids of the rows, ascending, with their labels.
    """
    if not len(store):
        return [{} for _ in features]
    found: list[dict[int, int]] = []
    for part in torch.arange(len(features)).split(_ASKED_AT_ONCE):
        near = _search(store, features[part]) if nearest is None else nearest[part]
        same: list[list[tuple[int, int]]] = [[] for _ in part]
        if known is not None and prints is not None:
            same = known.rows_with(prints[part].numpy())
        found += _confirmed(store, features[part], same, near.tolist())
    return found


def _search(store: SearchBackend, features: Tensor) -> Tensor:
    fits = features.isfinite().all(dim=1, keepdim=True)  # else no row is the same anyway
    return store.search(torch.where(fits, features, 0), _NEAREST).ids


def _confirmed(
    store: SearchBackend,
    features: Tensor,
    same: list[list[tuple[int, int]]],
    nearest: list[list[int]],
) -> list[dict[int, int]]:
    """What of the candidates is true of the rows as they are stored now."""
    there = _present(store, {row_id for rows in same for row_id, _ in rows})
    wanted = sorted(there.union(*nearest))
    rows = store.rows_of(torch.tensor(wanted, dtype=torch.int64))
    place_of = {row_id: place for place, row_id in enumerate(wanted)}
    marks = marks_of(rows.features).tolist() if there else []
    with np.errstate(over="ignore"):  # what does not fit is no row's
        cast = features.detach().cpu().numpy().astype(rows.features.dtype)
    found = []
    for own, pairs, near in zip(cast, same, nearest, strict=True):
        ids = {i for i, mark in pairs if i in there and marks[place_of[i]] == mark}
        bits = own.tobytes()
        ids |= {i for i in near if rows.features[place_of[i]].tobytes() == bits}
        found.append({i: int(rows.labels[place_of[i]]) for i in sorted(ids)})
    return found


def _present(store: SearchBackend, ids: set[int]) -> set[int]:
    """Those that there are; all ids are listed only if some are gone."""
    if not ids:
        return ids
    try:
        store.rows_of(torch.tensor(sorted(ids), dtype=torch.int64))
    except ValueError:
        return ids.intersection(as_row_store(store).ids.tolist())
    return ids


def sort_out(
    memory: Memory,
    config: KnnConfig,
    lesson: Lesson,
    names: Sequence[str],
    again: bool,
    relabel: bool,
) -> Sorted:
    """Tells pictures that are new from those that are stored, or that come twice.

    Args:
        memory: with rows.
        config: of the model.
        lesson: M pictures.
        names: of the pictures, for messages.
        again: those that are stored with their label are taken once more.
        relabel: rows with another label get the one that the picture comes with.

    Raises:
        StoredOtherwiseError: for pictures stored under another label, without `relabel`.
        ValueError: for one picture that comes with two labels.
    """
    store = memory.rows
    assert store is not None
    count = len(lesson.features)
    for name, given in (("ids", lesson.ids), ("paths", lesson.paths)):
        if given is not None and len(given) != count:
            raise ValueError(f"Expected `{name}` of {count} pictures, but got {len(given)}.")
    classes, numbers = memory.classes.with_labels(lesson.labels, count)
    _, features = split_features(lesson.features, config)
    copies = find_copies(store, memory.contents, features, lesson.contents)
    cast = features.detach().cpu().to(getattr(torch, store.dtype)).numpy()
    first: dict[bytes | int, int] = {}
    taken: list[int] = []
    skipped: list[int] = []
    moves: dict[int, str] = {}
    said: list[str] = []
    labels = numbers.tolist()
    for place, (rows, label) in enumerate(zip(copies, labels, strict=True)):
        keys: list[bytes | int] = [*rows, b"features" + cast[place].tobytes()]
        if lesson.contents is not None:
            keys.append(b"print" + lesson.contents[place].numpy().tobytes())
        twin = next((first[key] for key in keys if key in first), None)
        if twin is not None and labels[twin] != label:
            raise ValueError(_two_labels(names, twin, place, classes.names, labels))
        for key in keys:
            first.setdefault(key, place)
        others = [row_id for row_id, other in rows.items() if other != label]
        is_stored = len(others) < len(rows)
        if relabel or not is_stored:
            moves.update(dict.fromkeys(others, classes.names[label]))
        if is_stored or (twin is not None and not rows):
            (taken if again else skipped).append(place)
            if not again:
                own = [f"row {row_id}" for row_id, other in rows.items() if other == label]
                said.append(f"{names[place]} ({own[0] if own else f'as {names[twin or 0]}'})")
        elif rows:
            skipped.append(place)
        else:
            taken.append(place)
    if moves and not relabel:
        raise _refusal(names, copies, moves, memory.classes.names)
    return Sorted(taken, skipped, moves, _notes(said, len(moves), count, memory))


def _notes(said: list[str], moved: int, count: int, memory: Memory) -> list[str]:
    notes = []
    if said:
        notes.append(
            f"{len(said)} of {count} pictures are stored already and were left out: "
            f"{shown(said)}; again=True (--again) adds them"
        )
    if moved:
        notes.append(f"stored rows that got the label of their picture: {moved}")
    assert memory.rows is not None
    unknown = len(memory.rows) - (0 if memory.contents is None else len(memory.contents))
    if unknown > 0:
        notes.append(
            f"{unknown:,} rows were stored without a print of their picture; copies of those are "
            "known by equal features only"
        )
    return notes


def shown(names: Sequence[str], most: int = _NAMED) -> str:
    """The first of some names, and how many more there are.

    Args:
        names: in their order.
        most: how many are named.
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def _two_labels(
    names: Sequence[str], first: int, second: int, classes: Sequence[str], labels: Sequence[int]
) -> str:
    ends = [f"{names[place]} as {classes[labels[place]]!r}" for place in (first, second)]
    return (
        f"Expected one label for a picture, but the same one comes twice: {' and '.join(ends)}; "
        "leave one of them out. Nothing was changed."
    )


def _refusal(
    names: Sequence[str],
    copies: Sequence[dict[int, int]],
    moves: dict[int, str],
    labels: Sequence[str],
) -> StoredOtherwiseError:
    by_label: dict[str, list[int]] = {}
    for row_id, label in sorted(moves.items()):
        by_label.setdefault(label, []).append(row_id)
    said = []
    for name, rows in zip(names, copies, strict=True):
        wrong = [row_id for row_id in rows if row_id in moves]
        if wrong:
            where = " and ".join(f"{labels[rows[row_id]]!r} in row {row_id}" for row_id in wrong)
            said.append(f"{name} as {where}, not {moves[wrong[0]]!r}")
    return StoredOtherwiseError(
        f"Expected pictures that are new or stored under the label that they come with, but "
        f"found {len(said)} stored under another one: {shown(said)}.",
        by_label,
    )
