"""Into which folder a picture goes that a model has answered, and how many went into each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..core.config import KnnConfig
from ..data.moving import LOCK_NAME
from ..data.naming import folder_names
from ..features.answering import Answer, order_of
from .answering import STRANGE_BELOW

UNSURE_NAME, STRANGE_NAME = "unsure", "strange"

JOURNAL_NAME = "sort-journal.jsonl"
"""Of a folder that pictures were sorted into."""

NO_PROMISE = 1.0
"""The error rate that every answer keeps."""


class Promise(NamedTuple):
    """From which probability on answers are given.

    Attributes:
        rate: of errors that it keeps; at most what was asked for.
        threshold: the probability.
    """

    rate: float
    threshold: float


def promise_of(config: KnnConfig, max_error: float, tune: str) -> Promise:
    """The threshold that keeps an error rate; where there is none for it, that of a lower one.

    Args:
        config: of the model.
        max_error: the rate, in (0, 1]; 1 promises nothing.
        tune: the command that finds thresholds.

    Raises:
        ValueError: if none is kept, saying which are, and what to do.
    """
    if not 0 < max_error <= 1:
        raise ValueError(
            f"Expected --max-error to be above 0 and at most 1, but got {max_error:g}; 0.05 lets "
            "one of twenty sorted pictures be wrong."
        )
    if max_error == NO_PROMISE:
        return Promise(NO_PROMISE, 0.0)
    known = {float(rate): threshold for rate, threshold in config.answer_thresholds.items()}
    kept = [rate for rate in known if rate <= max_error]
    if kept:
        return Promise(max(kept), known[max(kept)])
    least = min(known, default=None)
    can = "nothing" if least is None else f"{percent(least)} (--max-error {least:g})"
    raise ValueError(
        f"Expected a checkpoint that can promise at most {percent(max_error)} of wrong answers, "
        f"but it was tuned on too few labelled pictures for that: it can promise {can}; `{tune}` "
        "counts on more pictures, best some hundreds that it has not seen, and --max-error 1 sorts "
        "every picture without a promise."
    )


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.3g} %"


class Place(NamedTuple):
    """Where a picture goes.

    Attributes:
        folder: relative to the folder of all.
        label: the best answer, whatever the folder.
        probability: of that answer.
        saying: how many of the stored pictures that were asked have that label; None if none were.
        asked: how many were asked.
        typicality: see `Explanation`.
    """

    folder: str
    label: str
    probability: float
    saying: int | None
    asked: int
    typicality: float | None

    def why(self) -> str:
        """Why it goes there, in words."""
        best = f"{self.label} {self.probability:.1%}"
        if self.folder == STRANGE_NAME and self.typicality is not None:
            return f"unlike anything seen (typicality {self.typicality:.1%}); best guess {best}"
        return f"not sure enough; best guess {best}" if self.folder == UNSURE_NAME else best


class Shelves:
    """The folders of a model's classes.

    Args:
        labels: names of the classes, in their order.
        promise: from when on it is sure.

    Attributes:
        folders: of the classes, in their order.
    """

    def __init__(self, labels: list[str], promise: Promise) -> None:
        self._labels, self._promise = labels, promise
        reserved = (UNSURE_NAME, STRANGE_NAME, JOURNAL_NAME, LOCK_NAME)
        self.folders = folder_names(labels, reserved)

    def renamed(self) -> Mapping[str, str]:
        """The classes whose folder is called otherwise."""
        pairs = zip(self._labels, self.folders, strict=True)
        return {label: folder for label, folder in pairs if label != folder}

    def place_of(self, answer: Answer) -> Place:
        """Where a picture goes that could be read.

        Args:
            answer: to it, with its typicality if that is known.
        """
        best = order_of(answer)[0]
        probability, typicality = float(answer.blend[best]), answer.typicality
        folder = self.folders[best]
        if typicality is not None and typicality < STRANGE_BELOW:
            folder = STRANGE_NAME
        elif probability < self._promise.threshold:
            folder = UNSURE_NAME
        saying = None if answer.knn is None else answer.labels.count(best)
        return Place(
            folder, self._labels[best], probability, saying, len(answer.labels), typicality
        )  # fmt: skip


@dataclass
class Shelf:
    """What went into one folder.

    Attributes:
        pictures: how many.
        probability: of their best answers, summed up.
        saying: stored pictures that say so, likewise.
        asked: stored pictures that were asked, likewise.
    """

    pictures: int = 0
    probability: float = 0.0
    saying: int = 0
    asked: int = 0

    def voices(self) -> str:
        """How many of the stored pictures say so, on average."""
        if not self.asked:
            return "-"
        count = self.pictures
        return f"{self.saying / count:.1f} of {self.asked / count:.3g}"


@dataclass
class Tally:
    """How many went where.

    Attributes:
        shelves: by folder.
    """

    shelves: dict[str, Shelf] = field(default_factory=dict)

    def see(self, place: Place) -> None:
        """Counts one more."""
        shelf = self.shelves.setdefault(place.folder, Shelf())
        shelf.pictures += 1
        shelf.probability += place.probability
        shelf.saying += place.saying or 0
        shelf.asked += place.asked

    @property
    def pictures(self) -> int:
        """All of them."""
        return sum(shelf.pictures for shelf in self.shelves.values())

    @property
    def sure(self) -> int:
        """Those in folders of classes."""
        others = (UNSURE_NAME, STRANGE_NAME)
        return sum(one.pictures for name, one in self.shelves.items() if name not in others)

    def in_order(self) -> list[tuple[str, Shelf]]:
        """Classes, the largest first, and what is not sorted at the end."""
        last = {UNSURE_NAME: 1, STRANGE_NAME: 2}
        return sorted(
            self.shelves.items(), key=lambda one: (last.get(one[0], 0), -one[1].pictures, one[0])
        )

    def as_json(self) -> dict[str, Any]:
        """For other programs, by folder."""
        return {
            name: {
                "pictures": shelf.pictures,
                "mean_probability": shelf.probability / shelf.pictures,
                "stored_saying_so": shelf.saying / shelf.pictures if shelf.asked else None,
                "stored_asked": shelf.asked / shelf.pictures if shelf.asked else None,
            }
            for name, shelf in self.in_order()
        }
