"""A check of labelled pictures before any training: from a source to what is wrong with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.keys import Broken, Print, prints_of
from ..data.loading import groups_of, ids_of, label_names, read_source
from ..data.places import paths_of, reading_of
from ..data.splits import few_rows
from ..features.extract import extract_features, progress_bars
from ..model.modeling import KnnForImageClassification
from .examine import Checkup, Watch, examine, unwatched
from .findings import Finding, Ints, Kind, Pictures


@dataclass(frozen=True)
class DoctorOptions:
    """The options of `hf-knn doctor`; see `hf-knn doctor --help`."""

    pictures: str
    output: Path
    backbone: str
    batch_size: int = 32
    limit: int | None = None
    group_by: str | None = None
    seed: int = 0
    json_output: bool = False
    splits: str = "auto"
    move_to: Path | None = None
    kinds: Sequence[str] = ()
    findings: Path | None = None
    fail_on: Sequence[str] = ()
    device: str = "cpu"


@dataclass(frozen=True)
class Source:
    """Labelled pictures of all splits.

    Attributes:
        parts: the rows of each split that have a label; all, where none has one.
        pictures: all rows that are looked at, split by split.
        places: [N] the row of each picture in the part of its split; -1 for one without a label.
        groups: [N] which belong together; None: each is its own.
        notes: what was left out, in sentences.
    """

    parts: dict[str, Any]
    pictures: Pictures
    places: Ints
    groups: Ints | None
    notes: list[str]

    def picture(self, number: int) -> Any:
        """The undecoded row of a picture: the part and the row in it."""
        return self.parts[self.pictures.splits[number]], int(self.places[number])


def open_source(options: DoctorOptions) -> Source:
    """Opens the pictures, of each split at most about `limit`.

    Args:
        options: see `hf-knn doctor --help`.

    Raises:
        FileNotFoundError: if a local source is not there.
        ValueError: if it holds no pictures, or no column to group by.
    """
    parts: dict[str, Any] = {}
    records: list[tuple[Any, ...]] = []
    names: list[str] = []
    found = read_source(options.pictures, reading_of(options.splits))
    has_labels = found.has_labels
    for name, dataset in found.splits.items():
        names = label_names(dataset) if has_labels else []
        labels = _labels_or_none(dataset)
        rows = np.arange(len(labels))
        if options.limit is not None and options.limit < len(rows):
            share = options.limit / len(rows)
            rows = few_rows(torch.from_numpy(labels), share, options.seed)
        has_label = labels[rows] >= 0
        good = rows[has_label]
        parts[name] = dataset if len(good) == len(dataset) else dataset.select(good)
        places = np.where(has_label, np.cumsum(has_label) - 1, -1).tolist()
        paths, ids = paths_of(dataset), ids_of(dataset).numpy()
        groups = _group_values(dataset, options.group_by, name)
        records += [
            (name, row, ids[row], paths[row], labels[row] if has_labels else -1, place,
             groups[row])
            for row, place in zip(rows.tolist(), places, strict=True)
        ]  # fmt: skip
    if not records:
        raise ValueError(f"Expected {options.pictures} to hold pictures, but it has none.")
    split, row, row_id, path, label, place, group = zip(*records, strict=True)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(group))}
    return Source(
        parts,
        Pictures(split, np.array(row), np.array(row_id), path, np.array(label), names),
        np.array(place),
        None if options.group_by is None else np.array([numbers[name] for name in group]),
        found.notes,
    )


def check_up(options: DoctorOptions, source: Source, watch: Watch = unwatched) -> Checkup:
    """Decodes all pictures, computes features and looks for everything.

    Args:
        options: see `hf-knn doctor --help`.
        source: from `open_source`.
        watch: told of the progress.

    Raises:
        ValueError: if no picture can be decoded.
        OSError: if the backbone cannot be found.
    """
    pictures = source.pictures
    checkup = Checkup(pictures, np.empty(0, np.int64), torch.empty(0, 0))
    with checkup.phase("decoding"):
        done = watch("Decoding", int((source.places >= 0).sum()))
        by_split = {split: prints_of(part, done) for split, part in source.parts.items()}
    prints: list[Print] = []
    usable = []
    for number, (split, place) in enumerate(zip(pictures.splits, source.places, strict=True)):
        one = by_split[split][place] if place >= 0 else None
        if isinstance(one, Print):
            prints.append(one)
            usable.append(number)
        elif isinstance(one, Broken):
            kind, detail = Kind.BROKEN, f"Cannot be used: {one.reason}."
            if one.is_unread:
                kind, detail = Kind.UNREAD, f"Is not read: {one.reason}."
            checkup.findings.append(Finding(kind, number, 1.0, detail))
        else:
            reason = "Has no label: give it one."
            checkup.findings.append(Finding(Kind.NO_LABEL, number, 1.0, reason))
    checkup.usable = np.array(usable, np.int64)
    with checkup.phase("features"):
        if not usable:
            raise ValueError(
                f"Expected at least one picture that can be used, but none of {len(pictures)} can; "
                f"the first, {pictures.name_of(0)}: {checkup.findings[0].detail}"
            )
        checkup.features = _features(source, options, checkup.usable)
    groups = None if source.groups is None else source.groups[checkup.usable]
    examine(checkup, prints, groups, options.seed, watch)
    return checkup


def _labels_or_none(dataset: Any) -> Ints:
    """[N] with -1 for a missing label, which training refuses and a check reports."""
    values = np.asarray(dataset.with_format("numpy")["label"][:], dtype=np.float64)
    return np.nan_to_num(values, nan=-1).astype(np.int64)


def _group_values(dataset: Any, column: str | None, split: str) -> list[Any]:
    """What says which group each row belongs to, in all splits alike; a missing one is its own."""
    if column is None:
        return [None] * len(dataset)
    groups_of(dataset, column)  # refuses a column that is not there
    values = dataset.with_format(None)[column][:]
    return [(split, row) if value is None else value for row, value in enumerate(values)]


def _features(source: Source, options: DoctorOptions, usable: Ints) -> Tensor:
    """[M, D] features of the usable pictures, by the backbone that `train` would take."""
    names = list(source.pictures.label_names) or ["picture"]  # any will do for features
    model = KnnForImageClassification.from_backbone(options.backbone, names)
    nn.Module.to(model, torch.device(options.device))
    splits = np.array(source.pictures.splits, dtype=object)
    found = []  # split by split, as the pictures are
    for split, part in source.parts.items():
        places = source.places[usable[splits[usable] == split]].tolist()
        if not places:
            continue
        with progress_bars():
            rows = extract_features(model, part, batch_size=options.batch_size, on_bad_image="skip")
        bad = {row.row for row in rows.skipped}
        readable = (place for place in range(len(part)) if place not in bad)
        row_of = {place: row for row, place in enumerate(readable)}
        found.append(rows.features[[row_of[place] for place in places]])
    return torch.cat(found)
