"""Whether float16 is enough for rows: asked after the normalisations that a search may use."""

import logging
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.config import Normalization
from ..core.learned import LearnedMap
from ..core.rows import RowParts
from ..core.search import Floats, normalize_rows

logger = logging.getLogger(__name__)

LARGEST_FLOAT16 = 6e4
SMALLEST_COSINE = 0.9999
"""Of a row and its cast, once both are normalised."""

_TURN = (2 * (1 - SMALLEST_COSINE)) ** 0.5
_FEW, _MANY = 0.01, 100
_BLOCK_ROWS, _CACHED_ROWS = 16_384, 512

TOO_COARSE = f"a value above {LARGEST_FLOAT16:g}, or a row that the cast turns once normalised"
"""What does not fit float16, for messages."""


class Centers(NamedTuple):
    """What centres rows, and what centres their casts: [D] float64 each."""

    exact: Floats
    cast: Floats

    @classmethod
    def of(cls, features: Tensor) -> "Centers":
        """The means of rows [N, D] and of their casts; zeros for none."""
        exact, cast = sums_of(features)
        return cls(exact / max(1, len(features)), cast / max(1, len(features)))

    @classmethod
    def fixed(cls, mean: Tensor) -> "Centers":
        """A mean [D] that centres both, whatever they are."""
        center = mean.double().numpy()
        return cls(center, center)

    @classmethod
    def of_added(cls, features: Tensor, mean: Tensor) -> "list[Centers]":
        """What centres rows [M, D] that come later: the mean [D] of those that are there.

        Many of them are neighbours of one another too, so that they are asked about their own.
        """
        return [cls.fixed(mean)] + ([cls.of(features)] if len(features) >= _MANY else [])


def sums_of(features: Tensor) -> tuple[Floats, Floats]:
    """The sums [D] float64 of rows [N, D] and of their casts."""
    exact, cast = np.zeros(features.shape[1]), np.zeros(features.shape[1])
    for block in features.split(_BLOCK_ROWS):
        exact += block.numpy().sum(axis=0, dtype=np.float64)
        fitting = block.clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16)  # others are float32 in any case
        cast += fitting.half().numpy().sum(axis=0, dtype=np.float64)
    return exact, cast


def fits_float16(features: Tensor, *centers: Centers, learned: LearnedMap | None = None) -> bool:
    """Whether rows can be stored as float16 without a search noticing much.

    Differences of rows count, whatever they have in common. So rows are compared with their casts
    about their mean, which is also what a distance goes by, and as they are; behind a learned map
    too, which can make much of little.

    Args:
        features: [N, D] float32 or float64.
        centers: of rows that they lie among, one or more.
        learned: that they will go through, or None.
    """
    kinds = [
        (center, kind, through)
        for through in {None, learned}
        for center, kind in [
            *((center, Normalization.L2_CENTERED) for center in centers),
            (centers[0], Normalization.L2),
        ]
    ]
    for block in features.split(_BLOCK_ROWS):
        if not len(block):
            continue
        if block.abs().max() > LARGEST_FLOAT16:
            return False
        every, halves = block.numpy(), block.half().numpy()
        for center, kind, through in kinds:
            rows, casts = every, halves
            if through is None:
                doubtful = _may_turn(rows, casts, center, kind)
                rows, casts = rows[doubtful], casts[doubtful]
            exact = normalize_rows(rows, center.exact, kind, through)
            cast = normalize_rows(casts, center.cast, kind, through)
            cosines = np.einsum("nd,nd->n", exact, cast)
            neither = ~exact.any(axis=1) & ~cast.any(axis=1)  # have a direction
            if not ((cosines >= SMALLEST_COSINE) | neither).all():
                return False
    return True


def _may_turn(
    rows: NDArray, casts: NDArray, center: Centers, normalization: str
) -> NDArray[np.bool_]:
    """Which rows [N, D] are so short, once centred, that their casts may lie in another direction.

    The sine of the turn is at most what the cast lost, as a part of the length; asked for half of
    what is allowed, so that rounding does not matter.
    """
    doubtful = np.ones(len(rows), bool)
    is_centred = normalization == Normalization.L2_CENTERED
    for start in range(0, len(rows), _CACHED_ROWS):
        part = slice(start, start + _CACHED_ROWS)
        apart = rows[part].astype(np.float64)
        lost = casts[part] - apart
        if is_centred:
            apart -= center.exact
            lost -= center.cast - center.exact
        most = (_TURN / 2) ** 2 * np.einsum("nd,nd->n", apart, apart)
        doubtful[part] = ~((np.einsum("nd,nd->n", lost, lost) <= most) & (most > 0))
    return doubtful


def to_storage(
    features: Tensor, dtype: torch.dtype, *centers: Centers, learned: LearnedMap | None = None
) -> Tensor:
    """Casts features once to the storage dtype; to float32 where float16 would lose too much.

    Args:
        features: [N, D] float32 or float64.
        dtype: the storage dtype so far.
        centers: see `fits_float16`.
        learned: likewise.
    """
    if dtype == torch.float16 and not fits_float16(features, *centers, learned=learned):
        dtype = widened()
    return features.to(dtype, copy=True)


def widened() -> torch.dtype:
    """The dtype for rows that do not fit float16, which is said."""
    logger.warning(
        "Some features do not fit float16 (%s); the datastore stores float32, twice the size.",
        TOO_COARSE,
    )
    return torch.float32


def warn_if_coarse(features: RowParts, mean: Tensor, learned: LearnedMap | None) -> None:
    """Says so if a new mean or map makes more of stored float16 rows than their cast allowed for.

    Args:
        features: [N, D] stored rows.
        mean: [D] that will centre them.
        learned: that they will go through, or None.
    """
    if features.dtype != torch.float16:
        return
    center, coarse = mean.double().numpy(), 0
    scale = np.ones(len(center))  # of the square of each value, on average
    if learned is not None:
        scale = learned.weight.double().square().sum(0).numpy()
    for start in range(0, len(features), _BLOCK_ROWS):
        rows = features[start : start + _BLOCK_ROWS]
        steps = np.spacing(np.abs(rows)).astype(np.float64)  # between neighbouring float16 values
        apart = rows.astype(np.float64) - center
        lost = np.square(steps) @ scale / 12  # on average, squared
        apart = apart if learned is None else learned.apply(apart)
        coarse += int((lost > _TURN**2 * np.einsum("nd,nd->n", apart, apart)).sum())
    if coarse > _FEW * len(features):
        logger.warning(
            "%d of %d rows lie so near to the new mean%s that float16, in which they were stored, "
            "may hold too little of what tells them apart; build the datastore again from the "
            "features, about this mean, for exact answers.", coarse, len(features),
            "" if learned is None else ", behind the learned map,",
        )  # fmt: skip
