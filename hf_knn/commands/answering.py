"""What `hf-knn predict` says about each picture, and about all of them together."""

import heapq
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..features.answering import CLASSES, NEIGHBORS, Answer, order_of
from ..model.explain import Explanation
from .answers import Column, Row

STRANGE_BELOW = 0.05
"""The typicality below which a picture is unlike anything seen."""

UNSURE, STRANGE, DIVIDED = "not sure enough", "unlike anything seen", "head and neighbours disagree"

KEPT = 100
"""Pictures of a page, and lines of a table, at most."""


@dataclass(frozen=True)
class PredictOptions:
    """What `hf-knn predict` was asked.

    Attributes:
        top: classes shown per picture, >= 1; None is 5, and none in a file.
        neighbors: neighbours shown per picture, >= 0; None is 5, and 24 on a page.
        explain: also say why.
        page: an HTML file to write; None prints.
        pictures: folder that the stored paths are relative to; None shows no stored picture.
        max_error: error rate at which it abstains; None always answers.
        json_output: print JSON instead.
        output: a file for all answers; None prints.
        overwrite: replace the file that is there.
        split: which split of a dataset; None is all.
    """

    top: int | None = None
    neighbors: int | None = None
    explain: bool = False
    page: Path | None = None
    pictures: Path | None = None
    max_error: float | None = None
    json_output: bool = False
    output: Path | None = None
    overwrite: bool = False
    split: str | None = None

    @property
    def shown_classes(self) -> int:
        """How many on the screen, and in JSON."""
        return CLASSES if self.top is None else self.top

    @property
    def shown_neighbors(self) -> int:
        """How many on the screen, in JSON and in a file."""
        return NEIGHBORS if self.neighbors is None else self.neighbors

    @property
    def columns(self) -> list[Column]:
        """Of the file."""
        names = [
            ("path", "text"), ("answer", "text"), ("probability", "number"),
            ("head_answer", "text"), ("head_probability", "number"), ("knn_answer", "text"),
            ("knn_probability", "number"), ("nearest_ids", "ids"),
            ("nearest_similarities", "numbers"), ("p_value", "number"), ("abstained", "flag"),
        ]  # fmt: skip
        if self.top is not None:
            names += [("classes", "texts"), ("class_probabilities", "numbers")]
        if self.explain:
            names += [("margin", "number"), ("flip_ids", "ids"), ("flip_answer", "text")]
            names += [("notices", "texts")]
        return [Column(*each) for each in [*names, ("error", "text")]]


def row_of(answer: Answer, name: str, class_names: list[str], threshold: float) -> Row:
    """A row of the file with all columns that there can be, but for the reasons.

    Args:
        answer: to one picture.
        name: of the picture.
        class_names: of the model.
        threshold: the probability from which it answers.
    """
    if answer.error:
        return {"path": name, "error": answer.error}
    order = order_of(answer)
    probability = float(answer.blend[order[0]])
    row: Row = {
        "path": name,
        "answer": class_names[order[0]],
        "probability": probability,
        "nearest_ids": answer.ids,
        "nearest_similarities": answer.similarities,
        "p_value": answer.typicality,
        "abstained": probability < threshold,
        "classes": [class_names[each] for each in order],
        "class_probabilities": answer.blend[order].tolist(),
        "error": None,
    }
    for voice, shares in (("head", answer.head), ("knn", answer.knn)):
        best = None if shares is None else shares.max(-1)
        row[f"{voice}_answer"] = None if best is None else class_names[int(best.indices)]
        row[f"{voice}_probability"] = None if best is None else float(best.values)
    return row


def flip_text(explanation: Explanation) -> str:
    """What would change the answer, in a sentence."""
    flip = explanation.flip
    if flip is None:
        return (
            f"No set of up to {len(explanation.neighbors)} stored pictures was found without which "
            "the answer would be another one."
        )
    count = len(flip.row_ids)
    rows = "1 stored picture" if count == 1 else f"{count} stored pictures"
    least = "" if flip.is_smallest else " (a smaller set may do)"
    return f"Without {rows} the answer would be {flip.answer}{least}."


def cut(row: Row, options: PredictOptions) -> Row:
    """A row with the columns that were asked for, as long as they were asked for.

    Args:
        row: see `row_of`.
        options: what was asked.
    """
    lengths = dict.fromkeys(("classes", "class_probabilities"), options.shown_classes)
    lengths |= dict.fromkeys(("nearest_ids", "nearest_similarities"), options.shown_neighbors)
    found: Row = {column.name: row.get(column.name) for column in options.columns}
    for name, length in lengths.items():
        if found.get(name) is not None:
            found[name] = found[name][:length]
    return {name: _plain(value) for name, value in found.items()}


def doubts_of(row: Row) -> list[str]:
    """Why an answer should be looked at; empty if nothing speaks against it.

    Args:
        row: see `row_of`.
    """
    doubts = [UNSURE] if row["abstained"] else []
    if row["p_value"] is not None and row["p_value"] < STRANGE_BELOW:
        doubts.append(STRANGE)
    if row["knn_answer"] is not None and row["head_answer"] != row["knn_answer"]:
        doubts.append(DIVIDED)
    return doubts


@dataclass
class Counted:
    """What became of one class.

    Attributes:
        pictures: that were answered with it.
        doubtful: of them, that should be looked at.
        probability: the sum over all of them.
    """

    pictures: int = 0
    doubtful: int = 0
    probability: float = 0.0


@dataclass
class Summary:
    """All answers together, told one after the other in the order of the pictures.

    Attributes:
        classes: by answer.
        seen: pictures so far.
        broken: how many could not be read.
        first_broken: the first of them, and why.
        doubts: how many answers each reason to look at them concerns.
    """

    classes: dict[str, Counted] = field(default_factory=dict)
    seen: int = 0
    broken: int = 0
    first_broken: Row | None = None
    doubts: dict[str, int] = field(default_factory=dict)
    _least: list[tuple[float, int]] = field(default_factory=list)

    def see(self, row: Row) -> None:
        """Hears of the next one."""
        number, self.seen = self.seen, self.seen + 1
        if row["answer"] is None:
            self.broken += 1
            self.first_broken = self.first_broken or row
            return
        probability, doubts = row["probability"] or 0.0, doubts_of(row)
        counted = self.classes.setdefault(row["answer"], Counted())
        counted.pictures += 1
        counted.doubtful += bool(doubts)
        counted.probability += probability
        for doubt in doubts:
            self.doubts[doubt] = self.doubts.get(doubt, 0) + 1
        one = (-probability, -number)
        keep = heapq.heappush if len(self._least) < KEPT else heapq.heappushpop
        keep(self._least, one)

    @property
    def answered(self) -> int:
        """How many could be read."""
        return self.seen - self.broken

    @property
    def least_sure(self) -> list[int]:
        """The pictures with the lowest probability, 100 at most, in their order."""
        return sorted(-number for _, number in self._least)

    @property
    def most_doubtful(self) -> int:
        """The picture with the lowest probability of all that were answered, by its number."""
        return -max(self._least)[1]

    def as_json(self) -> dict[str, Any]:
        """For other programs."""
        classes = {
            name: {
                "pictures": one.pictures,
                "doubtful": one.doubtful,
                "mean_probability": one.probability / one.pictures,
            }
            for name, one in self.by_size()
        }
        counts = {"pictures": self.seen, "answered": self.answered, "broken": self.broken}
        return counts | {"doubts": self.doubts, "classes": classes}

    def by_size(self) -> list[tuple[str, Counted]]:
        """The classes, the largest first."""
        return sorted(self.classes.items(), key=lambda one: (-one[1].pictures, one[0]))


def _plain(value: Any) -> Any:
    """What is not finite is not known."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [*map(_plain, value)] if isinstance(value, list) else value
