"""Pictures that lie far from all others: another subject, a screenshot, a test card."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import median_abs_deviation  # type: ignore[import-untyped]

from .findings import Finding, Kind, Pictures

NEIGHBOR = 5
"""The distance to this neighbour is what counts; a lone pair of strangers is still far."""

LARGEST_DEVIATION = 4.0
"""In robust standard deviations of log distance; a normal tail beyond it holds 3 in 100,000."""

_FEWEST_OF_A_CLASS = 20
_SMALLEST_SPREAD = 0.02  # of log distance: where all distances are equal none is far


def deviations(distances: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """How far each row is from all others, compared with other rows.

    The smaller of two comparisons: with all rows, and with its class, which may be a scattered one.

    Args:
        distances: [N] > 0 to the k-th neighbour of any class, itself left out.
        labels: [N]; a class with fewer than 20 rows is compared with all rows only.

    Returns:
        [N] robust standard deviations of log distance above the median.
    """
    logs = np.log(np.maximum(distances, 1e-12))
    found = _robust(logs, logs)
    for label in np.unique(labels):
        rows = labels == label
        if rows.sum() >= _FEWEST_OF_A_CLASS:
            found[rows] = np.minimum(found[rows], _robust(logs[rows], logs[rows]))
    return found


def conformal_p_values(
    distances: NDArray[np.float64], labels: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The share of the other rows of its class that are as far, with the row itself counted.

    Args:
        distances: [N].
        labels: [N].

    Returns:
        [N] in (0, 1]: 1 / n of the class for its farthest row. Uniform where nothing is wrong, so
        it tells how rare a row is among its like and is no alarm by itself.
    """
    found = np.ones(len(distances))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        ordered = np.sort(distances[rows])
        as_far = len(rows) - np.searchsorted(ordered, distances[rows], side="left")
        found[rows] = as_far / len(rows)
    return found


def outlier_findings(distances: NDArray[np.float64], pictures: Pictures) -> list[Finding]:
    """The pictures that are far from all others.

    Args:
        distances: [N] to the k-th neighbour.
        pictures: the same N.
    """
    labels = pictures.labels
    far, rare = deviations(distances, labels), conformal_p_values(distances, labels)
    found = []
    for row in np.flatnonzero(far > LARGEST_DEVIATION).tolist():
        detail = (
            f"Far from all others: {far[row]:.1f} robust standard deviations, farther than "
            f"{1 - rare[row]:.0%} of {pictures.label_of(row) or 'the pictures'}. Does it belong?"
        )
        score = float(1 - LARGEST_DEVIATION / (2 * far[row]))
        found.append(Finding(Kind.OUTLIER, row, score, detail))
    return found


def _robust(values: NDArray[np.float64], among: NDArray[np.float64]) -> NDArray[np.float64]:
    spread = max(float(median_abs_deviation(among, scale="normal")), _SMALLEST_SPREAD)
    deviations: NDArray[np.float64] = (values - np.median(among)) / spread
    return deviations
