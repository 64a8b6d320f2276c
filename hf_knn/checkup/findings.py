"""What is wrong with a set of pictures, picture by picture, and how it is written to a csv."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

COLUMNS = (
    "kind", "split", "row", "sample_id", "path", "label", "suggested_label", "score", "detail",
    "other",
)  # fmt: skip
"""Of the csv."""

STORED = "datastore"
"""The split of rows that a datastore holds."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Kind(StrEnum):
    """What can be wrong, the most urgent first."""

    BROKEN = "broken"
    UNREAD = "not_read"
    NO_LABEL = "no_label"
    CROSS_SPLIT = "cross_split_duplicate"
    GROUP_ACROSS = "group_across_splits"
    CONFLICT = "label_conflict"
    LABEL_ERROR = "label_error"
    EXACT = "exact_duplicate"
    NEAR = "near_duplicate"
    OUTLIER = "outlier"
    LOOK_ALIKE = "look_alike_classes"
    IMBALANCE = "imbalance"


@dataclass(frozen=True)
class Pictures:
    """All pictures of all splits, numbered through.

    Attributes:
        splits: [N] the split of each.
        rows: [N] its row there.
        ids: [N] its sample id.
        paths: [N] where it lies; empty if unknown.
        labels: [N] int64; -1 for none.
        label_names: [C] the classes.
    """

    splits: Sequence[str]
    rows: Ints
    ids: Ints
    paths: Sequence[str]
    labels: Ints
    label_names: Sequence[str]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: Ints) -> "Pictures":
        """Some of the pictures, numbered anew."""
        return Pictures(
            [self.splits[i] for i in chosen], self.rows[chosen], self.ids[chosen],
            [self.paths[i] for i in chosen], self.labels[chosen], self.label_names,
        )  # fmt: skip

    def name_of(self, picture: int) -> str:
        """What a picture is called for a reader: its path, else split and row."""
        return self.paths[picture] or f"{self.splits[picture]} row {self.rows[picture]}"

    def label_of(self, picture: int) -> str:
        """The label of a picture as text; empty for none."""
        label = int(self.labels[picture])
        return str(self.label_names[label]) if label >= 0 else ""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: what.
        picture: its number among the pictures; -1 where a whole class is meant.
        score: from 0 to 1, higher is surer, to sort by within a kind.
        detail: one sentence for a reader.
        others: other pictures that have to do with it.
        suggested: the label it should perhaps have; -1 for none.
        label: the class that is meant where no picture is; -1 for none.
        split: the split that is meant where no picture is.
    """

    kind: Kind
    picture: int
    score: float
    detail: str
    others: tuple[int, ...] = ()
    suggested: int = -1
    label: int = -1
    split: str = ""


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """The most urgent kind first, the surest first within a kind."""
    kinds = list(Kind)
    return sorted(findings, key=lambda f: (kinds.index(f.kind), -f.score, f.picture, f.label))


def write_csv(path: Path, findings: Sequence[Finding], pictures: Pictures) -> None:
    """Writes one line per finding, the most urgent first.

    Args:
        path: the file; folders are made.
        findings: in any order.
        pictures: what they are about.

    Raises:
        OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(_line(finding, pictures) for finding in in_order(findings))


def _line(finding: Finding, pictures: Pictures) -> list[str]:
    one, label = finding.picture, finding.label
    place = [finding.split, "", "", ""]
    if one >= 0:
        label = int(pictures.labels[one])
        place = [
            pictures.splits[one], str(pictures.rows[one]), str(pictures.ids[one]),
            pictures.paths[one],
        ]  # fmt: skip
    labels = [str(pictures.label_names[n]) if n >= 0 else "" for n in (label, finding.suggested)]
    others = " | ".join(f"{pictures.splits[i]}:{pictures.name_of(i)}" for i in finding.others)
    cells = [*place, *labels, f"{finding.score:.4f}", finding.detail, others]
    return [str(finding.kind), *map(_harmless, cells)]


def _harmless(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula, in UTF-8."""
    text = cell.encode("utf-8", "replace").decode()
    return f"'{text}" if text.startswith(_FORMULA) else text
