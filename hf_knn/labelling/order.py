"""Which picture to ask about next, so that few answers teach most.

All rules look at similarities ``k(x, y) = exp(-|x - y|^2 / s^2)`` of features of length 1 about
their mean. With L the pictures that are labelled and u(x) = 1 - (p_1 - p_2), one minus the margin
between the two likeliest classes, the next one has the largest

* `herding`: coverage ``mean_x max_{l in L + c} k(x, l)``, which is the typical picture of the
  largest part that none is labelled of: MaxHerding (Bae, Noh and Sutherland, *Generalized coverage
  for more robust low-budget active learning*, ECCV 2024, arXiv 2407.12212);
* `margin`: u(c), the one that the model is least sure of;
* `margin_density`: ``u(c) mean_x k(x, c)``, an unsure one of which there are many alike (Settles
  and Craven, EMNLP 2008, with the margin as uncertainty);
* `margin_gain`: u(c) times what c adds to the coverage;
* `uncertain_herding`: ``mean_x u(x) max_{l in L + c} k(x, l)``, coverage of what the model is
  unsure of (Bae, Oliveira and Sutherland, *Uncertainty herding*, arXiv 2412.20644).

`auto` is `herding` while labels are few, and `uncertain_herding` then, which was the best of them
in `benchmark/claims/labelling.py`.
Pictures that are taken one after another, without an answer in between, count as labelled for the
coverage and leave the model as it is.
"""

from collections.abc import Iterator, Sequence
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn import functional

WIDTH = 1.0
"""s of the similarities."""

FEW_LABELS = 1.0
"""Labels a class below which `auto` asks for typical pictures."""


class Rule(StrEnum):
    """See the module."""

    AUTO = "auto"
    HERDING = "herding"
    MARGIN = "margin"
    MARGIN_DENSITY = "margin_density"
    MARGIN_GAIN = "margin_gain"
    UNCERTAIN_HERDING = "uncertain_herding"


LATER = Rule.UNCERTAIN_HERDING
"""What `auto` is when there are some labels of each class."""


def similarities(features: Tensor, others: Tensor, mean: Tensor, width: float = WIDTH) -> Tensor:
    """[N, M] float32 in (0, 1]: how alike pictures are, see the module.

    Args:
        features: [N, D].
        others: [M, D].
        mean: [D], of all pictures.
        width: s > 0.
    """
    one, other = (
        functional.normalize((x.float() - mean.float()), dim=1) for x in (features, others)
    )
    squared = (2 - 2 * one @ other.T).clamp_(min=0)
    return squared.mul_(-1 / width**2).exp_()


def unsure_of(probabilities: Tensor) -> Tensor:
    """[N] in [0, 1]: one minus the margin between the two likeliest classes.

    Args:
        probabilities: [N, C]; of a single class, all are unsure.
    """
    if probabilities.shape[1] < 2:
        return torch.ones(len(probabilities))
    best = probabilities.float().topk(2, dim=1).values
    return 1 - (best[:, 0] - best[:, 1])


def rule_for(labels: int, classes: int, few: float = FEW_LABELS) -> Rule:
    """What `auto` means.

    Args:
        labels: how many pictures have one.
        classes: how many classes are known.
        few: labels a class below which typical pictures are asked for.
    """
    return Rule.HERDING if classes < 2 or labels < few * classes else LATER


def next_pictures(
    similar: Tensor,
    covered: Tensor,
    candidates: Sequence[int],
    rule: Rule,
    unsure: Tensor | None = None,
) -> Iterator[int]:
    """Candidates in the order in which to ask about them, none twice.

    Args:
        similar: [N, N] of the pictures, see `similarities`.
        covered: [N] the largest similarity of each to a labelled picture; 0 without any.
        candidates: numbers of pictures without a label.
        rule: but not `auto`, see `rule_for`.
        unsure: [N] of the pictures, see `unsure_of`; only `herding` needs none.

    Yields:
        Numbers of pictures; of equally good ones the first.

    Raises:
        ValueError: for a rule that needs to know how unsure the model is, and is not told.
    """
    if unsure is None:
        if rule != Rule.HERDING:
            raise ValueError(f"Expected `unsure` for the rule {rule}, but got None.")
        unsure = torch.ones(len(similar))
    covered, left = covered.clone(), torch.tensor(sorted(candidates), dtype=torch.int64)
    density = similar.mean(dim=1)  # which is symmetric
    weights = unsure if rule == Rule.UNCERTAIN_HERDING else torch.ones(len(similar))
    while len(left):
        scores = unsure[left]
        if rule == Rule.MARGIN_DENSITY:
            scores = scores * density[left]
        elif rule != Rule.MARGIN:
            gains = (similar[left] - covered).clamp_(min=0) @ weights
            scores = scores * gains if rule == Rule.MARGIN_GAIN else gains
        place = int(scores.argmax())
        chosen = int(left[place])
        yield chosen
        covered = torch.maximum(covered, similar[chosen])
        left = torch.cat([left[:place], left[place + 1 :]])
