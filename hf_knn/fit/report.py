"""What a model is worth on labelled pictures, as one value that writes a page and JSON."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..model.card import VOICE_NAMES
from ..store.folders import written_whole
from ..store.hub import PAGE_NAME, REPORT_NAME
from .gallery import Gallery
from .intervals import SURENESS, Comparison, Number
from .measure import WITHOUT_STORED
from .report_page import findings, write_report

NOBODY = -1
"""The answer to a picture of which no voice knows any class."""


@dataclass(frozen=True)
class ClassRow:
    """How well one class is found.

    Attributes:
        label: its number.
        count: pictures of it.
        right: of these, answered right.
        recall: the share of these; NaN without a picture.
        answered: pictures that were answered as it.
        precision: the share of these that are of it; NaN if there are none.
        confused_with: the class that its pictures are most often taken for; None if for no other.
        confused: how often.
        rows: stored rows of it; None if nobody can tell.
    """

    label: int
    count: int
    right: int
    recall: Number
    answered: int
    precision: Number
    confused_with: int | None
    confused: int
    rows: int | None


@dataclass(frozen=True)
class Confusion:
    """How often pictures of one class are answered as one class.

    Attributes:
        label: of the pictures.
        answer: to them, `NOBODY` for none.
        count: pictures, > 0.
    """

    label: int
    answer: int
    count: int


@dataclass(frozen=True)
class Near:
    """A stored row next to a picture.

    Attributes:
        id: of the row.
        label: of the row.
        similarity: to the picture.
        path: where its picture lies; empty if unknown.
    """

    id: int
    label: int
    similarity: float
    path: str


@dataclass(frozen=True)
class Wrong:
    """A picture that is answered wrong.

    Attributes:
        id: sample id of the picture.
        path: where it lies; empty if unknown.
        label: what it is.
        answer: what the blend says, `NOBODY` for nothing.
        confidence: how sure it is, in [0, 1].
        label_confidence: what it gives the label.
        head: what the head alone says.
        knn: what the neighbours alone say; None without a datastore.
        neighbors: the nearest rows, nearest first.
    """

    id: int
    path: str
    label: int
    answer: int
    confidence: float
    label_confidence: float
    head: int
    knn: int | None
    neighbors: tuple[Near, ...]


@dataclass(frozen=True)
class Report:
    """What a model is worth on labelled pictures; from `KnnTrainer.report`.

    Pictures that are stored in the model are left out and counted, unless all of them are. What
    is said of classes and pictures is about the blend.

    Attributes:
        class_names: of the model; the numbers of classes below are places in it.
        count: N pictures that were measured.
        stored: pictures that are stored in the model.
        voices: `top1`, `top5`, `mean_class`, `nll`, `brier` and `ece` of `head`, `knn` and `blend`.
        with_stored: likewise with the stored pictures; empty if none was left out.
        comparisons: of the voices.
        classes: the worst found first, those without a picture last.
        confusion: the most frequent first, right answers too.
        wrong: the surest first.
        reliability: mean confidence, accuracy and number of pictures of each bin.
        chance_error: the calibration error that a calibrated model may have by chance.
        metrics: as `KnnTrainer.evaluate` names them.
        facts: what was measured: head, k, temperature, λ, rows, backbone.
        notes: what to know, in sentences.
        gallery: where its page takes pictures from.
    """

    class_names: tuple[str, ...]
    count: int
    stored: int
    voices: dict[str, dict[str, Number]]
    with_stored: dict[str, dict[str, Number]]
    comparisons: tuple[Comparison, ...]
    classes: tuple[ClassRow, ...]
    confusion: tuple[Confusion, ...]
    wrong: tuple[Wrong, ...]
    reliability: list[list[float]]
    chance_error: float
    metrics: dict[str, float]
    facts: dict[str, Any]
    notes: tuple[str, ...]
    gallery: Gallery = field(repr=False, compare=False)

    def name_of(self, label: int | None) -> str:
        """The name of a class; of none what stands for it.

        Args:
            label: its number, `NOBODY` or None.
        """
        return "(no answer)" if label in (None, NOBODY) else self.class_names[label]

    def intervals(self) -> dict[str, list[float]]:
        """The lower and the upper end of each interval, by the name of its number in `metrics`."""
        first = f"eval_{WITHOUT_STORED}" if self.with_stored else "eval_"
        sets = {first: self.voices, "eval_": self.with_stored or self.voices}
        return {
            f"{prefix}{voice}_{name}": [number.low, number.high]
            for prefix, voices in sets.items()
            for voice, numbers in voices.items()
            for name, number in numbers.items()
            if number.low is not None and number.high is not None
        }

    def as_dict(self) -> dict[str, Any]:
        """What `report.json` holds: classes by their names, null for what nobody knows."""
        return {
            "pictures": self.count,
            "stored": self.stored,
            "confidence_level": SURENESS,
            "voices": {voice: _plain(numbers) for voice, numbers in self.voices.items()},
            "comparisons": [
                _plain(each) | {"is_shown": each.is_shown, "says": each.say(VOICE_NAMES)}
                for each in self.comparisons
            ],
            "classes": [self._named(row, "label", "confused_with") for row in self.classes],
            "confusion": [self._named(cell, "label", "answer") for cell in self.confusion],
            "wrong": [
                self._named(each, "label", "answer", "head", "knn")
                | {"neighbors": [self._named(near, "label") for near in each.neighbors]}
                for each in self.wrong
            ],
            "reliability": self.reliability,
            "chance_calibration_error": self.chance_error,
            "metrics": _plain(self.metrics),
            "model": _plain(self.facts),
            "notes": list(self.notes),
            "findings": findings(self),
        }

    def save(self, folder: str | Path) -> Path:
        """Writes `report.html` and `report.json`.

        The page shows pictures that were given, and stored ones: share it only where you may share
        those.

        Args:
            folder: where to; made if needed.

        Returns:
            The path of the page.

        Raises:
            OSError: if they cannot be written.
        """
        target = Path(folder)
        page = self.write_page(target / PAGE_NAME)
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        with written_whole(target / REPORT_NAME) as temporary:
            temporary.write_bytes(text.encode("utf-8", "backslashreplace"))  # as JSON has it
        return page

    def write_page(self, path: str | Path) -> Path:
        """Writes the page alone.

        Args:
            path: the HTML file; folders are made.

        Returns:
            The path.

        Raises:
            OSError: if it cannot be written.
        """
        return write_report(self, Path(path))

    def _named(self, value: Any, *labels: str) -> dict[str, Any]:
        """A value as a dict, with names for the numbers of classes."""
        found = _plain(value)
        for key in labels:
            known = found[key] not in (None, NOBODY)
            found[key] = self.class_names[found[key]] if known else None
        return found


def _plain(value: Any) -> Any:
    """As JSON has it: null for NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [*map(_plain, value)]
    return _plain(asdict(value)) if hasattr(value, "__dataclass_fields__") else value
