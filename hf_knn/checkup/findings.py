"""What is wrong with pictures, one by one; its csv is written here, and read again."""

import csv
import io
from collections.abc import Iterable, Sequence
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

_SEPARATORS = ",;\t"
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Kind(StrEnum):
    """What can be wrong, the most urgent first; by this name the csv and the commands call it."""

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


OF_ONE_PICTURE = (
    Kind.BROKEN, Kind.UNREAD, Kind.NO_LABEL, Kind.CROSS_SPLIT, Kind.LABEL_ERROR, Kind.EXACT,
    Kind.NEAR, Kind.OUTLIER,
)  # fmt: skip
"""The kinds that say of one picture that it may have to go; the others leave a decision."""


def kinds_of(names: Iterable[str]) -> list[Kind]:
    """Kinds by their names, as commands take them.

    Args:
        names: of kinds `OF_ONE_PICTURE`.

    Raises:
        ValueError: for another word.
    """
    wanted = list(names)
    for name in wanted:
        if name not in OF_ONE_PICTURE:
            raise ValueError(
                f"Expected kinds of findings to be one of {[*map(str, OF_ONE_PICTURE)]}, but got "
                f"{name!r}."
            )
    return [Kind(name) for name in wanted]


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


def csv_line(finding: Finding, pictures: Pictures) -> str:
    """A finding as it stands in the csv, without the end of the line.

    Args:
        finding: about one of the pictures.
        pictures: what it is about.
    """
    return as_csv(_line(finding, pictures))


def as_csv(cells: Sequence[str]) -> str:
    """Cells in one line of a csv, without its end; line breaks in them become spaces."""
    file = io.StringIO()
    csv.writer(file, lineterminator="").writerow([" ".join(cell.splitlines()) for cell in cells])
    return file.getvalue()


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
    return [str(finding.kind), *map(harmless, cells)]


def harmless(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula, in UTF-8; compare it with cells of the csv.

    Args:
        cell: any text.
    """
    text = cell.encode("utf-8", "replace").decode()
    return f"'{text}" if text.startswith(_FORMULA) else text


@dataclass(frozen=True)
class Line:
    """One line of a csv of findings, as it was written or as somebody edited it.

    Attributes:
        number: of the line in the file, from 1.
        kind: what is wrong; any word.
        split: of the picture.
        sample_id: of the picture; None where a whole class is meant.
        path: where it lies, made harmless.
        label: that it had, made harmless.
        suggested: that it should have, as it is meant; empty for none.
    """

    number: int
    kind: str
    split: str
    sample_id: int | None
    path: str
    label: str
    suggested: str


_NEEDED = ("kind", "split", "sample_id", "path", "label", "suggested_label")


def read_csv(path: Path) -> list[Line]:
    """Reads a csv that `write_csv` wrote, also one that a spreadsheet or an editor saved again.

    Args:
        path: of the file, in UTF-8, its columns separated by commas, semicolons or tabs. Lines may
            be missing, be in another order, and have other suggested labels.

    Raises:
        ValueError: if it is no such file, with the line and what to do.
        OSError: if it cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Expected {path} to be a csv of findings in UTF-8, but it is not ({error.reason} in "
            f"byte {error.start}); save it as UTF-8."
        ) from error
    header = text.split("\n", 1)[0]
    separator = max(_SEPARATORS, key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    missing = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(
            f"Expected {path} to be a csv of findings, but it has no column {missing[0]!r}; pass "
            "the findings.csv that `hf-knn inspect` or `hf-knn doctor` wrote."
        )
    lines = []
    try:
        for cells in reader:
            if None in cells or None in cells.values():
                raise ValueError(
                    f"Expected {path} to have {len(reader.fieldnames or ())} cells a line, but "
                    f"line {reader.line_num} has another number; mend or delete it."
                )
            lines.append(_line_of(path, reader.line_num, cells))
    except csv.Error as error:
        raise ValueError(
            f"Expected {path} to be a csv, but the quotes of line {reader.line_num} do not close "
            f"({error}); mend them."
        ) from error
    return lines


def _line_of(path: Path, number: int, cells: dict[str, str]) -> Line:
    row = cells["sample_id"].strip()
    try:
        sample_id = int(row) if row else None
    except ValueError as error:
        raise ValueError(
            f"Expected a whole number as sample_id, but got {row!r} in line {number} of {path}; a "
            "spreadsheet rounds long numbers: let it read that column as text."
        ) from error
    suggested = cells["suggested_label"]
    if suggested.startswith("'") and suggested[1:].startswith(_FORMULA):
        suggested = suggested[1:]
    return Line(
        number, cells["kind"].strip(), cells["split"].strip(), sample_id, cells["path"],
        cells["label"], suggested,
    )  # fmt: skip
