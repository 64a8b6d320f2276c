"""A ridge head that follows the rows of the datastore, to what a fit of them would be.

The head is solved on the rows as the datastore holds them (cast once to the storage dtype), about
the datastore's mean. Rows, mean, regulariser and temperature are all in a checkpoint, so the sums
of `RidgeState` can be made again at any time and are never stored.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .configuration_knn import Head, KnnConfig, Normalization
from .heads import KnnHead
from .ridge_state import RidgeState

IMPOSSIBLE = -1e4
"""Logit of a class without rows: its probability is 0 in float32."""


def follows_rows(config: KnnConfig) -> bool:
    """Whether the head changes exactly with the datastore.

    It does if it is a ridge head on the features that the datastore holds, and its regulariser is
    known.
    """
    has_rows = config.extra_dim == 0 and config.head == Head.RIDGE
    return has_rows and config.head_regularizer > 0


def center_head(head: KnnHead, mean: Tensor, config: KnnConfig) -> None:
    """Makes a ridge head see features as a datastore of that mean [D] does."""
    head.scale.fill_(1.0)
    head.mean.zero_()
    if config.normalization == Normalization.L2_CENTERED:
        head.mean.copy_(mean)


def prepare_rows(head: KnnHead, features: Tensor) -> Tensor:
    """[N, D] stored raw rows as a ridge head sees them, float64."""
    return head.prepared(features.to(head.mean.device, torch.float64)).cpu()


def sum_rows(model: Any) -> RidgeState:
    """The sums over all rows of a model's datastore, as its ridge head sees them, in blocks."""
    config, store = model.config, model.datastore
    state = RidgeState(store.dim, config.head_classes, config.head_class_weighting)
    for rows in store.blocks():
        features, labels = torch.from_numpy(rows.features), torch.from_numpy(rows.labels)
        state.add(prepare_rows(model.head, features), labels)
    return state


def solve_head(state: RidgeState, config: KnnConfig, like: KnnHead) -> nn.Linear:
    """The classifier of the rows in a state.

    Args:
        state: of C classes.
        config: with regulariser and temperature.
        like: the head it is for.

    Returns:
        A layer [C, D] of the head's dtype and device.
    """
    weight, bias = state.solve(config.head_regularizer)
    old = like.classifier.weight
    layer = nn.Linear(state.dim, state.num_labels, dtype=old.dtype, device=old.device)
    with torch.no_grad():
        layer.weight.copy_(weight / config.head_temperature)
        layer.bias.copy_((bias / config.head_temperature).clamp(min=IMPOSSIBLE))
    return layer.requires_grad_(old.requires_grad)
