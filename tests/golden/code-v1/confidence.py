"""Is a picture like what is known? A statement about pictures of the same kind as the rows."""

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


def typicality(nearest: float, calibration: Doubles) -> float:
    """A conformal p-value: how many known rows are as far from the others as a picture is.

    Valid if pictures and rows are exchangeable (Vovk et al., *Algorithmic Learning in a Random
    World*): at level 0.05, 5 % of the pictures of the known kind are called unlike anything seen.

    Args:
        nearest: similarity of a picture to its nearest row.
        calibration: [M] ascending similarities of stored rows to their nearest other row.

    Returns:
        In (0, 1].
    """
    as_far = int(np.searchsorted(calibration, nearest, side="right"))
    return (1 + as_far) / (1 + len(calibration))
