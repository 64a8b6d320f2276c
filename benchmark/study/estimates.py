"""What a run will take, told before it starts: rough seconds and bytes of each cell."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from catalog.backbones import SCRATCH, Backbone, find_backbone
from catalog.tasks import Source, Task, find_task
from study.cells import Cell

CELL_SECONDS = {
    "knn": 2.6, "linear": 5.0, "complementarity": 0.1, "peers": 16.0, "lowdata": 4.4,
    "heads": 8.0, "lowdata_heads": 8.0, "lowdata_losses": 8.0,
    "robustness": 1.0, "finetune": 2.0,
}  # fmt: skip
"""Of 1,000 training pictures, 50 classes and features of 1,280 numbers, by one rank of two on 2
cores; those of the offline suite as `results/` has them."""

SCRATCH_SECONDS = 12.0
"""Of a training on 1,000 pictures from scratch; likewise."""

GPU_SPEEDUP = 40.0
_PICTURES = 10_000  # where nobody knows
_WIDTH, _CLASSES = 768, 50
_ARMS = {
    "peers": 28, "linear": 7, "knn": 5, "heads": 12, "lowdata": 5, "lowdata_heads": 12,
    "lowdata_losses": 5, "robustness": 5,
}  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """What some cells will take.

    Attributes:
        seconds: of one rank, without downloads; within a factor of three or so.
        megabytes: downloads, features and results.
    """

    seconds: float
    megabytes: float


def estimate(cells: Iterable[Cell], limit: int | None, streaming: bool | None) -> Estimate:
    """What cells will take when nothing is cached."""
    cells = list(cells)
    pairs = dict.fromkeys((cell.task, cell.backbone) for cell in cells)
    seconds = sum(seconds_of(cell, limit) for cell in cells)
    seconds += sum(feature_seconds(find_task(t), find_backbone(b), limit) for t, b in pairs)
    # protocols share what was trained on a split, but for few pictures, which are others
    splits = dict.fromkeys((c.task, c.backbone, c.seed) for c in cells if c.shots is None)
    seconds += sum(_training_seconds(find_task(t), find_backbone(b), limit) for t, b, _ in splits)
    megabytes = sum(_result_megabytes(cell, limit) for cell in cells)
    megabytes += sum(_feature_megabytes(find_task(t), find_backbone(b), limit) for t, b in pairs)
    for task in dict.fromkeys(task for task, _ in pairs):
        entry = find_task(task)
        streams = entry.streamed if streaming is None else streaming
        if entry.source is Source.HUB and not streams:
            megabytes += 2.2 * entry.megabytes  # the download, and Arrow files of the same size
    for name in dict.fromkeys(backbone for _, backbone in pairs):
        megabytes += find_backbone(name).megabytes
    return Estimate(seconds, megabytes)


def seconds_of(cell: Cell, limit: int | None) -> float:
    """Seconds of a cell alone: without features, and a training that protocols share."""
    task, backbone = find_task(cell.task), find_backbone(cell.backbone)
    rows = 0.5 * _pictures(task, limit) / 1_000
    width = (backbone.width or _WIDTH) / 1_280
    classes = (task.classes or _CLASSES) / 50
    scale = rows * (0.2 + 0.8 * width * classes)
    if cell.shots is not None:
        scale = min(scale, cell.shots * (task.classes or _CLASSES) / 1_000)
    seconds = CELL_SECONDS[cell.protocol] * max(0.05, scale)
    if cell.shots is not None:
        seconds += min(1.0, cell.shots / 16) * _training_seconds(task, backbone, limit)
    if cell.protocol in ("robustness", "finetune"):
        passes = 0.3 if cell.protocol == "robustness" else 90.0
        seconds += passes * feature_seconds(task, backbone, limit)
    return seconds


def feature_seconds(task: Task, backbone: Backbone, limit: int | None) -> float:
    """Seconds of all pictures once through the backbone."""
    if backbone.kind == SCRATCH:
        return 2.0
    rate = min(30.0, 1_300 / (backbone.megabytes or 40))
    if torch.cuda.is_available():
        rate *= GPU_SPEEDUP
    return _pictures(task, limit) / rate


def _training_seconds(task: Task, backbone: Backbone, limit: int | None) -> float:
    """Seconds of a small backbone's training on the training pictures of a split."""
    rows = 0.5 * _pictures(task, limit) / 1_000
    return SCRATCH_SECONDS * rows if backbone.kind == SCRATCH else 0.0


def check_disk(folder: Path, needed: float) -> None:
    """Tells before the start that a disk is too small.

    Args:
        folder: of the results; the nearest one that exists is asked.
        needed: megabytes.

    Raises:
        OSError: if there is less room.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e6
    if free < needed:
        raise OSError(
            f"Expected about {needed:,.0f} MB of free disk for this run, but {place} has "
            f"{free:,.0f} MB; do pass --stream, take fewer tasks, or choose another --output and "
            "HF_HOME."
        )


def _pictures(task: Task, limit: int | None) -> int:
    known = task.pictures or _PICTURES
    return known if limit is None else min(known, limit)


def _feature_megabytes(task: Task, backbone: Backbone, limit: int | None) -> float:
    return _pictures(task, limit) * (backbone.width or _WIDTH) * 4 / 1e6


def _result_megabytes(cell: Cell, limit: int | None) -> float:
    """Five bytes a picture and arm after compression, and per-class numbers."""
    task = find_task(cell.task)
    arms = _ARMS.get(cell.protocol, 4)
    return arms * (0.3 * _pictures(task, limit) * 6 + (task.classes or _CLASSES) * 22) / 1e6
