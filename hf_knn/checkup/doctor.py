"""A check of labelled pictures before any training: from a source to what is wrong with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.keys import Broken, Print, prints_of
from ..data.loading import groups_of, ids_of, label_names, load_pictures, paths_of
from ..data.splits import few_rows
from ..features.extract import extract_features, progress_bars
from ..model.modeling import KnnForImageClassification
from .examine import Checkup, Watch, examine, unwatched
from .findings import Finding, Kind, Pictures


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


@dataclass(frozen=True)
class Source:
    """Labelled pictures of all splits.

    Attributes:
        parts: the rows of each split that have a label; all, where none has one.
        pictures: all rows that are looked at, split by split.
        places: [N] the row of each picture in the part of its split; -1 for one without a label.
        groups: [N] which belong together; None: each is its own.
    """

    parts: dict[str, Any]
    pictures: Pictures
    places: NDArray[np.int64]
    groups: NDArray[np.int64] | None

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
    fields: dict[str, list[Any]] = {
        name: [] for name in ("split", "row", "id", "path", "label", "place", "group")
    }
    names: list[str] = []
    splits, has_labels = load_pictures(options.pictures)
    for split, dataset in splits.items():
        names = label_names(dataset) if has_labels else []
        labels = _labels(dataset)
        if options.group_by is not None:
            groups_of(dataset, options.group_by)  # refuses a column that is not there
        rows = _chosen(labels, options.limit, options.seed)
        has_label = labels[rows] >= 0
        good = rows[has_label]
        parts[split] = dataset if len(good) == len(dataset) else dataset.select(good)
        places = np.full(len(rows), -1)
        places[has_label] = np.arange(len(good))
        paths, ids = paths_of(dataset), ids_of(dataset).numpy()
        fields["split"] += [split] * len(rows)
        fields["row"] += rows.tolist()
        fields["id"] += ids[rows].tolist()
        fields["path"] += [paths[row] for row in rows]
        fields["label"] += labels[rows].tolist() if has_labels else [-1] * len(rows)
        fields["place"] += places.tolist()
        fields["group"] += _group_values(dataset, options.group_by, rows, split)
    pictures = Pictures(
        fields["split"], np.array(fields["row"], np.int64), np.array(fields["id"], np.int64),
        fields["path"], np.array(fields["label"], np.int64), names,
    )  # fmt: skip
    return Source(parts, pictures, np.array(fields["place"], np.int64), _numbered(fields["group"]))


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
        prints = _prints(source, watch)
    checkup.findings += _unusable(pictures, prints)
    usable = [i for i, one in enumerate(prints) if isinstance(one, Print)]
    checkup.usable = np.array(usable, np.int64)
    with checkup.phase("features"):
        checkup.features = _features(source, options, checkup.usable)
    groups = None if source.groups is None else source.groups[checkup.usable]
    good = [one for one in prints if isinstance(one, Print)]
    examine(checkup, good, groups, options.seed, watch)
    return checkup


def _labels(dataset: Any) -> NDArray[np.int64]:
    """[N] with -1 for a missing label, which training refuses and a check reports."""
    values = np.asarray(dataset.with_format("numpy")["label"][:], dtype=np.float64)
    return np.nan_to_num(values, nan=-1).astype(np.int64)


def _chosen(labels: NDArray[np.int64], limit: int | None, seed: int) -> NDArray[np.int64]:
    if limit is None or limit >= len(labels):
        return np.arange(len(labels))
    return few_rows(torch.from_numpy(labels), limit / len(labels), seed)


def _group_values(
    dataset: Any, column: str | None, rows: NDArray[np.int64], split: str
) -> list[Any]:
    if column is None:
        return []
    values = dataset.with_format(None)[column][:]
    return [(split, int(row)) if values[row] is None else values[row] for row in rows]


def _numbered(values: Sequence[Any]) -> NDArray[np.int64] | None:
    if not values:
        return None
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], np.int64)


def _prints(source: Source, watch: Watch) -> list[Print | Broken | None]:
    """One per picture; None for one without a label."""
    done = watch("Decoding", int((source.places >= 0).sum()))
    by_split = {split: prints_of(part, done) for split, part in source.parts.items()}
    pairs = zip(source.pictures.splits, source.places.tolist(), strict=True)
    return [by_split[split][place] if place >= 0 else None for split, place in pairs]


def _unusable(pictures: Pictures, prints: Sequence[Print | Broken | None]) -> list[Finding]:
    found = []
    for number, one in enumerate(prints):
        if isinstance(one, Broken):
            found.append(Finding(Kind.BROKEN, number, 1.0, f"Cannot be used: {one.reason}."))
        elif one is None:
            found.append(Finding(Kind.NO_LABEL, number, 1.0, "Has no label: give it one."))
    return found


def _features(source: Source, options: DoctorOptions, usable: NDArray[np.int64]) -> torch.Tensor:
    """[M, D] features of the usable pictures, by the backbone that `train` would take."""
    if not len(usable):
        raise ValueError(
            f"Expected at least one picture that can be used, but none of "
            f"{len(source.pictures)} can; see hf_knn.data.decode for what is accepted."
        )
    names = list(source.pictures.label_names) or ["picture"]  # any will do for features
    model = KnnForImageClassification.from_backbone(options.backbone, names)
    table: dict[tuple[str, int], torch.Tensor] = {}
    for split, part in source.parts.items():
        if not any(source.pictures.splits[i] == split for i in usable):
            continue
        with progress_bars():
            found = extract_features(
                model, part, batch_size=options.batch_size, on_bad_image="skip"
            )
        bad = {row.row for row in found.skipped}
        places = [row for row in range(len(part)) if row not in bad]
        rows = zip(places, found.features, strict=True)
        table |= {(split, place): features for place, features in rows}
    pairs = [(source.pictures.splits[i], int(source.places[i])) for i in usable]
    return torch.stack([table[pair] for pair in pairs])
