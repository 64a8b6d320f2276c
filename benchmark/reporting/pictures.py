"""Galleries: pictures where the blend repairs the head's answer, and where it breaks it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from hf_knn.checkup import thumbnail
from reporting.cells import Cell, Results, Setting
from reporting.document import Block, Gallery, Heading, Text, Tile
from reporting.statistics import Ints
from reporting.words import arm_name

MOST = 6
"""Pictures of each kind."""

_LOCAL = ("offline", "imagefolder")


class Picture(NamedTuple):
    """A row of a task.

    Attributes:
        image: decoded.
        label: number of its class.
    """

    image: Image.Image
    label: int


class PicturesMissingError(LookupError):
    """A task's pictures cannot be shown; the message says why."""


Source = Callable[[str, Sequence[int]], list[Picture]]
"""From a task and ids of rows to these rows; raises `PicturesMissingError`."""


def local_pictures(limit: int | None = None) -> Source:
    """Rows of tasks that need no network: drawn from installed packages, or in a folder.

    Args:
        limit: of the run, which chooses among a task's rows.
    """

    def source(task: str, ids: Sequence[int]) -> list[Picture]:
        try:
            from catalog.loading import load_task  # needs packages that a report does without
            from catalog.tasks import find_task

            if find_task(task).source not in _LOCAL:
                raise PicturesMissingError("the task's pictures are not on this machine")
            rows = load_task(task, limit=limit).rows
        except (ModuleNotFoundError, FileNotFoundError) as error:
            raise PicturesMissingError(str(error)) from error
        if ids and max(ids) >= len(rows):
            raise PicturesMissingError(f"row {max(ids)} was asked for, the task has {len(rows)}")
        return [Picture(rows[int(row)]["image"], int(rows[int(row)]["label"])) for row in ids]

    return source


def galleries(results: Results, source: Source | None) -> list[Block]:
    """Successes and failures of one cell per task: the best head, the first seed.

    Args:
        results: of a run.
        source: gives the pictures; None leaves them out.
    """
    blocks: list[Block] = []
    for task, cell in _chosen_cells(results).items():
        blocks += _of_cell(task, cell, source)
    return blocks


def _chosen_cells(results: Results) -> dict[str, Cell]:
    best: dict[str, tuple[float, Cell]] = {}
    for cells in results.settings("knn").values():
        cell = cells[0]
        if {"head", "blend"} <= cell.arms.keys():
            score = float(np.mean([c.arms["head"]["test"]["top1"] for c in cells]))
            if score > best.get(cell.setting.task, (-1.0, cell))[0]:
                best[cell.setting.task] = (score, cell)
    return {task: cell for task, (_, cell) in best.items()}


def pick(cell: Cell, good: bool, most: int = MOST) -> Ints:
    """Places of test items that the blend repaired, or broke; where it moved most first.

    Args:
        cell: with the arms `head` and `blend`.
        good: repaired ones, else broken ones.
        most: how many.
    """
    head, blend = cell.correct("head"), cell.correct("blend")
    places = np.flatnonzero(blend & ~head if good else head & ~blend)
    moved = cell.arrays["true/blend"][places] - cell.arrays["true/head"][places]
    return places[np.argsort(-moved if good else moved, kind="stable")][:most]


def _of_cell(task: str, cell: Cell, source: Source | None) -> list[Block]:
    head, blend = cell.correct("head"), cell.correct("blend")
    repaired, broken = int((blend & ~head).sum()), int((head & ~blend).sum())
    text = (
        f"Split {cell.seed}: of {len(head)} test items the blend repairs {repaired} answers of "
        f"the head and breaks {broken}."
    )
    blocks: list[Block] = [Heading(" · ".join(cell.setting.pair)), Text(text)]
    if source is None:
        return [*blocks, Text("Pictures were not asked for.", soft=True)]
    chosen = [(place, good) for good in (True, False) for place in pick(cell, good)]
    try:
        pictures = _pictures(task, cell, [place for place, _ in chosen], source)
    except PicturesMissingError as error:
        return [*blocks, Text(f"Pictures are left out: {error}.", soft=True)]
    tiles = [
        _tile(cell, int(place), good, picture)
        for (place, good), picture in zip(chosen, pictures, strict=True)
    ]
    for good, words in ((True, "Repaired by the blend:"), (False, "Broken by the blend:")):
        some = [tile for tile in tiles if tile.good == good]
        blocks += [Text(words), Gallery(some)] if some else []
    if tiles:
        about = cell.document["task"]
        words = f"Pictures: {about.get('title') or task}. Licence: {about.get('licence')}."
        blocks.append(Text(words, soft=True))
    return blocks


def _pictures(task: str, cell: Cell, places: list[int], source: Source) -> list[Picture]:
    ids = [int(cell.arrays["ids"][place]) for place in places]
    pictures = source(task, ids)
    for number, place, picture in zip(ids, places, pictures, strict=True):
        label = int(cell.arrays["labels"][place])
        if picture.label != label:
            raise PicturesMissingError(
                f"row {number} is of class {picture.label} in the task as it is loaded now, but "
                f"was of class {label} in the run"
            )
    return pictures


def _tile(cell: Cell, place: int, good: bool, picture: Picture) -> Tile:
    names = cell.document["task"].get("label_names") or []
    arrays = cell.arrays

    def named(label: int) -> str:
        return str(names[label]) if 0 <= label < len(names) else f"class {label}"

    lines = [
        f"{arm_name(arm)}: {named(int(arrays[f'predicted/{arm}'][place]))} "
        f"({float(arrays[f'confidence/{arm}'][place]):.0%})"
        for arm in ("head", "knn", "blend")
        if f"predicted/{arm}" in arrays
    ]
    title = named(int(arrays["labels"][place]))
    name = f"picture-{_safe(cell.setting)}-{int(arrays['ids'][place])}"
    return Tile(name, thumbnail(picture.image), title, lines, good)


def _safe(setting: Setting) -> str:
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in "-".join(setting.pair))
