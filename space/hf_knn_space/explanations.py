"""What an explanation says, in plain values."""

from collections.abc import Mapping
from typing import Any

from hf_knn import Explanation


def as_json(found: Explanation) -> dict[str, Any]:
    """An explanation in types that JSON has.

    Args:
        found: of one picture.
    """
    flip = None if found.flip is None else found.flip._asdict()
    return {
        "answer": found.answer,
        "probabilities": found.probabilities,
        "head": found.head,
        "knn": found.knn,
        "neighbors": [
            {
                "id": row.row_id, "label": row.label, "similarity": row.similarity,
                "share": row.share,
            }
            for row in found.neighbors
        ],
        "margin": found.margin,
        "flip": flip,
        "typicality": found.typicality,
        "is_typical": found.is_typical,
        "disagree": disagrees(found),
    }  # fmt: skip


def disagrees(found: Explanation) -> bool:
    """Whether head and neighbours alone would answer differently."""
    return bool(found.knn) and first(found.head)[0] != first(found.knn)[0]


def first(probabilities: Mapping[str, float]) -> tuple[str, float | str]:
    """The likeliest class and its probability; empty texts where there is none.

    Args:
        probabilities: most likely first.
    """
    return next(iter(probabilities.items()), ("", ""))
