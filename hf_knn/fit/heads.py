"""Heads from cached features without a training loop: closed form, and the best of many."""

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.backbone import KnnHead, split_features
from ..core.config import CLOSED_FORM, Kernel, KnnConfig
from ..core.votes import ClassWeighting
from ..data.augmentation import seeded
from ..features.extract import ImageFeatures
from ..model.closed_form import center_head, solve_head
from ..model.modeling import KnnForImageClassification
from ..store.backend import SearchBackend
from ..store.datastore import Datastore
from .closed import ClosedCell, fit_on_rows
from .grids import (
    PAPER_SELF_SUPERVISED,
    PAPER_SETTINGS,
    PAPER_SUPERVISED,
    ProbeConfig,
    ProbeGrid,
    ProbeSettings,
)
from .metric import learn_again
from .ridge import RidgeFit
from .sweep import ProbeChoice, ProbeHeads, ProbeScore, choose_probe, score_probes, train_probes
from .voices import OwnVotes

logger = logging.getLogger(__name__)

PROBE_GRIDS: dict[str, tuple[ProbeGrid, ProbeSettings]] = {
    "small": (
        ProbeGrid((0.3, 0.1, 0.03, 0.01), (0.0, 1e-4, 1e-3), (0.0, 0.1)),
        ProbeSettings(epochs=100, batch_size=512),
    ),
    "paper": (PAPER_SUPERVISED, PAPER_SETTINGS),
    "paper_self_supervised": (PAPER_SELF_SUPERVISED, PAPER_SETTINGS),
}
"""Learning rates, weight decays and alphas that `probe_grid` names, and how heads are trained."""


class Part(NamedTuple):
    """Rows to fit on and rows to choose on, with what the datastore of the former says of them."""

    fitted: ImageFeatures
    held_out: ImageFeatures
    votes: OwnVotes | None


def fit_closed_form(
    model: KnnForImageClassification,
    features: ImageFeatures,
    class_weighting: str = ClassWeighting.NONE,
    seed: int = 0,
    cell: ClosedCell | None = None,
) -> RidgeFit:
    """Solves a head in closed form and puts it into the model.

    On the rows as the datastore holds them, so that the head can follow every change of theirs; on
    `features` if the datastore pools differently.

    Args:
        model: with a `ridge`, `kernel` or `lda` head and the datastore of the same rows.
        features: N rows.
        class_weighting: see `RidgeState`.
        seed: of the random features of a kernel head.
        cell: what to fit it with; None chooses by leave-one-out.

    Returns:
        The fit, with its leave-one-out table.
    """
    config, head = model.config, model.head
    store = model.datastore
    assert store is not None
    rows, labels, mean = store.features, store.labels, store.mean
    if config.extra_dim:  # the datastore pools differently
        rows, _ = split_features(features.features, config)
        labels, mean = features.labels, rows.double().mean(dim=0)
    return _solve_anew(head, config, rows, labels, mean, class_weighting, seed, cell)


def _solve_anew(
    head: KnnHead, config: KnnConfig, rows: Tensor, labels: Tensor, mean: Tensor,
    class_weighting: str, seed: int, cell: ClosedCell | None = None,
) -> RidgeFit:  # fmt: skip
    """Chooses and solves a head, and notes in the configuration with what."""
    center_head(head, mean, config)
    cell, fit = fit_on_rows(
        head, config.head, rows, labels, config.head_classes, class_weighting, cell, seed
    )
    config.head_regularizer, config.head_temperature = fit.regularizer, fit.temperature
    config.head_class_weighting = str(class_weighting)
    if cell.map is not None:
        config.head_kernel = cell.map.kernel
    head.classifier = solve_head(fit.state, config, head)
    return fit


def refit(model: KnnForImageClassification) -> RidgeFit:
    """Makes a closed-form head anew from the rows that are stored, as training on them would.

    What was taught and forgotten since the training left regulariser, temperature, mean and, of a
    kernel head, the principal axes as they were, and a learned map: both voices are what a fit of
    all rows *with those* would be. This chooses them anew.
    k, temperature and λ of the blend stay; thresholds for `explain(max_error=…)` and numbers that
    were measured are gone, since they are of another head.

    Args:
        model: with a `ridge`, `kernel` or `lda` head; it is changed whole or not at all.

    Returns:
        The fit, with its leave-one-out table.

    Raises:
        ValueError: for another head, one that sees other features than the datastore holds, no
            rows, or rows on a server.
    """
    config, store = model.config, model.datastore
    if config.head not in CLOSED_FORM:
        raise ValueError(
            f"Expected a ridge, kernel or lda head to fit again, but got {config.head!r}; train it "
            "on pictures."
        )
    if config.extra_dim:
        raise ValueError(
            "Expected a head on the features that the datastore holds, but it pools differently "
            f"({config.pooling}, the datastore {config.store_pooling}); train it on pictures."
        )
    if not isinstance(store, Datastore) or not len(store):
        raise ValueError(
            "Expected a datastore with rows in the checkpoint itself, but got "
            f"{'none' if store is None else store}; bring them home with `to_datastore()`."
        )
    with store.changed() as fresh:
        fresh.recenter()
        learn_again(fresh)
    head = copy.deepcopy(model.head)
    fit = _solve_anew(
        head, config, fresh.features, fresh.labels, fresh.mean, config.head_class_weighting, seed=0
    )
    config.answer_thresholds = {}
    model.memory = replace(
        model.memory, head=head, rows=fresh, tally=None, measured=None, picture=None
    )
    return fit


def sweep(
    parts: Iterator[Part],
    model: KnnForImageClassification,
    grid: ProbeGrid | list[ProbeConfig],
    settings: ProbeSettings,
    progress: bool,
) -> ProbeChoice:
    """Trains every configuration on each part and chooses on the pooled rows that were held out.

    Args:
        parts: folds, or one part with a validation set.
        model: whose head has the widths.
        grid: the configurations.
        settings: what they share.
        progress: show a progress bar.

    Returns:
        The configuration that `choose_probe` takes.

    Raises:
        ValueError: if every configuration diverged.
    """
    pooled: list[ProbeScore] = []
    total = 0
    for part in parts:
        heads = _train(part.fitted, part.votes, model, grid, settings, progress)
        rows, _ = split_features(part.held_out.features, model.config)
        found = score_probes(heads, rows, part.held_out.labels)
        count = len(part.held_out)
        pooled = _pool(pooled, total, found, count)
        total += count
    return choose_probe(pooled, total)


def fit_probe(
    model: KnnForImageClassification,
    features: ImageFeatures,
    votes: OwnVotes | None,
    config: ProbeConfig,
    settings: ProbeSettings,
) -> None:
    """Trains one configuration on all rows and puts it into the model.

    Args:
        model: with a `linear` or `mlp` head.
        features: N rows.
        votes: leave-one-out votes on the rows, for an alpha or a gamma.
        config: of the head.
        settings: how it is trained.
    """
    copy_head(_train(features, votes, model, [config], settings, False), model.head)


def with_fresh_head(model: KnnForImageClassification, seed: int) -> KnnForImageClassification:
    """A copy of a model that shares its backbone and has learned nothing.

    Args:
        model: stays as it is.
        seed: of the new head's weights, whatever was drawn before.
    """
    fresh = copy.deepcopy(model, {id(model.backbone): model.backbone})
    fresh.head = _new_head(fresh, seed)
    return fresh


def put_fresh_head(model: KnnForImageClassification, kind: str, seed: int) -> None:
    """Gives a model a head of some kind that has learned nothing, for all classes that it has.

    Args:
        model: that is changed.
        kind: see `KnnConfig.head`.
        seed: of the head's weights, whatever was drawn before.
    """
    config = model.config
    config.head, config.head_hidden_sizes = str(kind), []
    config.head_kernel, config.head_features, config.head_components = str(Kernel.RBF), 0, 0
    config.head_regularizer, config.head_temperature = 0.0, 1.0
    config.head_class_weighting = str(ClassWeighting.NONE)
    config.num_head_labels, config.num_tuned_labels = config.classes, None
    config.fill_head()
    config.check()
    model.head = _new_head(model, seed)


def _new_head(model: KnnForImageClassification, seed: int) -> KnnHead:
    """As the configuration of a model says, where the model's head lies."""
    with seeded(seed):
        head = KnnHead.from_config(model.config)
        head.apply(model._init_weights)
    return head.to(model.head.mean)


def copy_head(heads: ProbeHeads, target: KnnHead) -> None:
    """Puts the only head of a collection into a model's.

    Args:
        heads: one head.
        target: of the same widths.
    """
    layers = [*target.hidden, target.classifier]
    with torch.no_grad():
        target.mean.copy_(heads.mean)
        target.scale.copy_(heads.scale)
        for layer, trained in zip(layers, heads.layers, strict=True):
            layer.weight.copy_(trained.weight[0])
            layer.bias.copy_(trained.bias[0])


def own_votes(
    store: Callable[[ImageFeatures], SearchBackend],
    features: ImageFeatures,
    model: KnnForImageClassification,
    grid: ProbeGrid | list[ProbeConfig],
) -> OwnVotes | None:
    """Leave-one-out votes where a configuration asks for them.

    Args:
        store: builds a datastore from rows.
        features: N rows.
        model: with their configuration.
        grid: the configurations.
    """
    configs = grid.configs() if isinstance(grid, ProbeGrid) else grid
    if not any(config.alpha or config.gamma for config in configs):
        return None
    return OwnVotes.of(store(features), features, model.config)


def _train(
    features: ImageFeatures,
    votes: OwnVotes | None,
    model: KnnForImageClassification,
    grid: ProbeGrid | list[ProbeConfig],
    settings: ProbeSettings,
    progress: bool,
) -> ProbeHeads:
    rows, _ = split_features(features.features, model.config)
    own: Tensor | None = None if votes is None else votes.at(features.ids)
    classes = model.config.head_classes
    return train_probes(rows, features.labels, classes, grid, settings, own, progress=progress)


def _pool(
    pooled: list[ProbeScore], rows: int, found: list[ProbeScore], count: int
) -> list[ProbeScore]:
    """Scores over the rows so far and `count` more."""
    if not pooled:
        return found
    share = count / (rows + count)
    return [
        ProbeScore(
            mine.config,
            (1 - share) * mine.accuracy + share * new.accuracy,
            (1 - share) * mine.log_likelihood + share * new.log_likelihood,
            mine.diverged or new.diverged,
        )
        for mine, new in zip(pooled, found, strict=True)
    ]
