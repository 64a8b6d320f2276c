"""The order of questions against its definition, picture by picture, in float64 loops."""

import math

import pytest
import torch
from torch import Tensor

from hf_knn.labelling import Rule, next_pictures, rule_for, similarities, unsure_of

COUNT = 12


def kernel(features: Tensor) -> list[list[float]]:
    """exp(-|x - y|^2) of features of length 1 about their mean, one by one."""
    rows = features.double() - features.double().mean(dim=0)
    rows = rows / rows.norm(dim=1, keepdim=True)
    return [[math.exp(-float(((x - y) ** 2).sum())) for y in rows] for x in rows]


def coverage(k: list[list[float]], chosen: list[int], weights: list[float]) -> float:
    """The mean over all pictures of the largest similarity to a chosen one."""
    largest = [max((row[c] for c in chosen), default=0.0) for row in k]
    return sum(w * value for w, value in zip(weights, largest, strict=True)) / len(k)


def scored(
    k: list[list[float]], chosen: list[int], candidate: int, rule: Rule, unsure: list[float]
) -> float:
    if rule == Rule.MARGIN:
        return unsure[candidate]
    if rule == Rule.MARGIN_DENSITY:
        return unsure[candidate] * sum(row[candidate] for row in k) / len(k)
    weights = unsure if rule == Rule.UNCERTAIN_HERDING else [1.0] * len(k)
    gain = coverage(k, [*chosen, candidate], weights) - coverage(k, chosen, weights)
    return gain * unsure[candidate] if rule == Rule.MARGIN_GAIN else gain


@pytest.mark.parametrize("rule", [rule for rule in Rule if rule != Rule.AUTO])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_is_that_of_the_definition(rule: Rule, seed: int) -> None:
    torch.manual_seed(seed)
    features, unsure = torch.randn(COUNT, 4), torch.rand(COUNT)
    similar = similarities(features, features, features.mean(dim=0))
    labelled = [1, 5]
    k, candidates = kernel(features), [n for n in range(COUNT) if n not in labelled]
    assert torch.allclose(similar.double(), torch.tensor(k, dtype=torch.float64), atol=1e-6)
    covered = similar[labelled].amax(dim=0)
    found = list(next_pictures(similar, covered, candidates, rule, unsure))
    assert sorted(found) == candidates
    chosen, left = [*labelled], [*candidates]
    for one in found:
        scores = {c: scored(k, chosen, c, rule, unsure.tolist()) for c in left}
        assert scores[one] == pytest.approx(max(scores.values()), abs=1e-6)
        chosen.append(one)
        left.remove(one)


def test_the_first_picture_is_the_most_typical_one() -> None:
    angles = torch.tensor([-0.4, 0.0, 0.4, math.pi])  # the second is in the middle of three
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    similar = similarities(features, features, torch.zeros(2))
    order = list(next_pictures(similar, torch.zeros(4), range(4), Rule.HERDING))
    assert order[:2] == [1, 3]


def test_how_unsure() -> None:
    shares = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.7, 0.1]])
    assert unsure_of(shares).tolist() == pytest.approx([1.0, 0.0, 0.5])
    assert unsure_of(torch.ones(4, 1)).tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("labels", "classes", "wanted"),
    [
        (0, 0, Rule.HERDING),
        (9, 1, Rule.HERDING),
        (2, 3, Rule.HERDING),
        (3, 3, Rule.UNCERTAIN_HERDING),
    ],
)
def test_typical_ones_come_while_labels_are_few(labels: int, classes: int, wanted: Rule) -> None:
    assert rule_for(labels, classes) == wanted


def test_a_rule_that_has_to_know_says_so() -> None:
    with pytest.raises(ValueError, match="Expected `unsure` for the rule margin"):
        next(next_pictures(torch.eye(2), torch.zeros(2), [0, 1], Rule.MARGIN))
