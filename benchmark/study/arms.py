"""Ways to answer, and two of them as one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

from torch import Tensor

from hf_knn import blend_log_probs
from hf_knn.fit import ProbeConfig, ProbeScore, choose_probe

FLOOR = 1e-12


class Mix(NamedTuple):
    """What a blend is made of.

    Attributes:
        first: [T, C] log-probabilities.
        second: [T, C].
        weight: λ, that of the second.
    """

    first: Tensor
    second: Tensor
    weight: float


@dataclass(frozen=True)
class Arm:
    """What one way to answer says.

    Attributes:
        validation: [V, C] log-probabilities; None where there is nothing to choose on.
        test: [T, C].
        chosen: what was chosen on validation.
        mix: the two voices of a blend; None for a voice.
    """

    validation: Tensor | None
    test: Tensor
    chosen: dict[str, Any]
    mix: Mix | None = None


def mixed(first: Arm, second: Arm, weight: float) -> Arm:
    """Two voices, the second with some weight, as λ is of the neighbours."""
    validation = None
    if first.validation is not None and second.validation is not None:
        validation = blend_log_probs(first.validation, second.validation, weight)
    mix = Mix(first.test, second.test, weight)
    chosen = second.chosen | {"knn_weight": weight}
    return Arm(validation, blend_log_probs(first.test, second.test, weight), chosen, mix)


def blended(first: Arm, second: Arm, labels: Tensor) -> Arm:
    """Two voices, the weight of the second chosen on validation.

    Args:
        first: with validation.
        second: likewise.
        labels: [V].
    """
    assert first.validation is not None
    assert second.validation is not None
    weight = choose_weight(first.validation, second.validation, labels)
    return mixed(first, Arm(second.validation, second.test, {}), weight)


def pair_accuracies(
    voices: Mapping[str, Arm], validation_labels: Tensor, test_labels: Tensor
) -> dict[str, float]:
    """Test top-1 of every two voices as one: `first+second` to it.

    Args:
        voices: by name.
        validation_labels: [V], on which the weights are chosen.
        test_labels: [T].
    """
    found = {}
    for first, second in combinations(voices, 2):
        both = blended(voices[first], voices[second], validation_labels)
        hits = both.test.argmax(1) == test_labels
        found[f"{first}+{second}"] = float(hits.double().mean())
    return found


def choose_weight(first: Tensor, second: Tensor, labels: Tensor) -> float:
    """λ of a second voice, by the rule of `hf_knn.tune`.

    Args:
        first: [V, C] log-probabilities.
        second: [V, C].
        labels: [V].

    Returns:
        Of 0, 0.05 … 1 and of those within one standard error of the best accuracy, the likeliest;
        of equal ones the smallest.
    """
    weights = [step / 20 for step in range(21)]
    table = []
    for weight in weights:
        log_probs = blend_log_probs(first, second, weight)
        own = log_probs.gather(1, labels.unsqueeze(1)).double().clamp_min(math.log(FLOOR))
        hits = float((log_probs.argmax(1) == labels).double().mean())
        table.append(ProbeScore(ProbeConfig(weight), hits, float(own.mean()), diverged=False))
    return weights[choose_probe(table, len(labels)).best]
