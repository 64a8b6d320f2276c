"""How the neighbours vote, as visitors may choose it."""

from typing import Any, NamedTuple

from hf_knn import KnnConfig

from .uploads import SpaceError

WEIGHTINGS = ("softmax", "uniform", "inverse_distance", "rank")
MAX_K = 100
"""Neighbours that may vote, unless the model itself was tuned to more."""


class Settings(NamedTuple):
    """How the neighbours vote; None is what the model was tuned to.

    Attributes:
        k: neighbours.
        temperature: > 0, at most 10 or what the model was tuned to.
        knn_weight: λ, 0 (head alone) to 1 (neighbours alone).
        weighting: one of `WEIGHTINGS`.
    """

    k: int | None = None
    temperature: float | None = None
    knn_weight: float | None = None
    weighting: str | None = None


def checked(settings: Settings, config: KnnConfig) -> dict[str, Any]:
    """What was asked for, as values of the model's configuration.

    Args:
        settings: as they were sent.
        config: of the published model, whose own values are always allowed.

    Raises:
        SpaceError: for a value out of range.
    """
    k, temperature, weight, weighting = settings
    most, hottest = max(MAX_K, config.k), max(10.0, config.knn_temperature)
    if k is not None and not (float(k).is_integer() and 1 <= k <= most):
        raise SpaceError(f"Expected `k` to be a whole number from 1 to {most}, but got {k}.")
    if temperature is not None and not 0 < temperature <= hottest:
        raise SpaceError(
            f"Expected `temperature` to be in (0, {hottest:g}], but got {temperature}."
        )
    if weight is not None and not 0 <= weight <= 1:
        raise SpaceError(f"Expected `knn_weight` to be in [0, 1], but got {weight}.")
    if weighting is not None and weighting not in WEIGHTINGS:
        raise SpaceError(f"Expected `weighting` to be one of {', '.join(WEIGHTINGS)}.")
    named = {
        "k": None if k is None else int(k),
        "knn_temperature": temperature,
        "knn_weight": weight,
        "knn_weighting": weighting,
    }
    return {name: value for name, value in named.items() if value is not None}
