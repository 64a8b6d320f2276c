"""Heads in closed form that follow the rows of the datastore, to what a fit of them would be.

That is a fit with the same regulariser, temperature and mean, and for a kernel head the same
principal axes; `hf_knn.fit.refit` chooses them anew. A head is solved on the rows as the datastore
holds them (cast once to the storage dtype). All it depends on is in a checkpoint, so the sums of
`RidgeState` can be made again at any time and are never stored.
"""

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from ..core.backbone import KnnHead
from ..core.config import CLOSED_FORM, Head, KnnConfig, Normalization
from ..core.votes import ClassWeighting
from ..store.backend import RowStore
from .ridge import RidgeState

IMPOSSIBLE = -1e4
"""Logit of a class without rows: its probability is 0 in float32."""

_ROWS = 1024
_LONG = 1e11  # numbers that are added up: from here on it takes seconds, and a bar is shown


def follows_rows(config: KnnConfig) -> bool:
    """Whether the head changes exactly with the datastore.

    It does if it is in closed form on the features that the datastore holds, and its regulariser is
    known.
    """
    has_rows = config.extra_dim == 0 and config.head in CLOSED_FORM
    return has_rows and config.head_regularizer > 0


def check_weighting(head: str, class_weighting: str) -> None:
    """Refuses class weights for a kernel head, which would keep a Gram matrix for each class.

    Raises:
        ValueError: saying what to do.
    """
    if head == Head.KERNEL and class_weighting != ClassWeighting.NONE:
        raise ValueError(
            f"Expected `class_weights` to be 'none' for a kernel head, but got "
            f"{class_weighting!r}; leave it out, or take a ridge, lda or linear head."
        )


def center_head(head: KnnHead, mean: Tensor, config: KnnConfig) -> None:
    """Makes a closed-form head see features as a datastore of that mean [D] does."""
    head.scale.fill_(1.0)
    head.mean.zero_()
    if config.normalization == Normalization.L2_CENTERED:
        head.mean.copy_(mean)


def prepare_rows(head: KnnHead, features: Tensor) -> Tensor:
    """[N, D] stored raw rows as the classifier of a head sees them, [N, R + D] float64."""
    return head.prepared(features.to(head.mean.device, torch.float64)).cpu()


def empty_state(head: KnnHead, config: KnnConfig) -> RidgeState:
    """Sums over no rows, for a head of that kind."""
    weighting = config.head_class_weighting
    if config.head == Head.LDA:  # whose classes weigh in the prior alone
        weighting = str(ClassWeighting.NONE)
    return RidgeState(head.classifier.in_features, config.head_classes, weighting)


def sum_rows(store: RowStore, head: KnnHead, config: KnnConfig) -> RidgeState:
    """The sums over all rows of a datastore, in blocks; a bar is shown where it takes long.

    Args:
        store: the rows.
        head: a head in closed form, as which they are seen.
        config: how many classes there are, and how rows of each are weighted.
    """
    state = empty_state(head, config)
    is_short = len(store) * state.dim**2 < _LONG
    with transformers_logging.tqdm(
        total=len(store), desc="Summing up the rows for the head", unit=" rows", disable=is_short
    ) as bar:
        for rows in store.blocks():
            features, labels = torch.from_numpy(rows.features), torch.from_numpy(rows.labels)
            parts = zip(features.split(_ROWS), labels.split(_ROWS), strict=True)
            for some, theirs in parts:
                state.add(prepare_rows(head, some), theirs)
                bar.update(len(some))
    state.prepare(config.head_regularizer)
    return state


def solve_state(state: RidgeState, config: KnnConfig) -> tuple[Tensor, Tensor]:
    """Weight [C, F] and bias [C] of the head of a configuration, before its temperature."""
    if config.head == Head.LDA:
        return state.solve_discriminants(config.head_regularizer, config.head_class_weighting)
    return state.solve(config.head_regularizer)


def solve_head(state: RidgeState, config: KnnConfig, like: KnnHead) -> nn.Linear:
    """The classifier of the rows in a state.

    Args:
        state: of C classes.
        config: with the kind of head, regulariser and temperature.
        like: the head it is for.

    Returns:
        A layer [C, F] of the head's dtype and device.
    """
    weight, bias = solve_state(state, config)
    old = like.classifier.weight
    layer = nn.utils.skip_init(
        nn.Linear, state.dim, state.num_labels, dtype=old.dtype, device=old.device
    )
    with torch.no_grad():
        layer.weight.copy_(weight / config.head_temperature)
        layer.bias.copy_((bias / config.head_temperature).clamp(min=IMPOSSIBLE))
    return layer.requires_grad_(old.requires_grad).train(like.training)
