"""Voices of a model on rows that a trainer holds out, and which head is best there."""

from collections.abc import Callable

import torch

from ..core.backbone import split_features
from ..core.config import CLOSED_FORM, Head, KnnConfig
from ..features.extract import ImageFeatures
from ..fit.choice import HeadChoice, compare_heads, fit_of
from ..fit.closed import ClosedCell
from ..fit.held_out import Answer, Fit, HeldOut, LabelledRows, ask, widest
from ..fit.measure import ask_head
from ..fit.metric import MetricChoice
from ..model.modeling import KnnForImageClassification
from ..store.datastore import Datastore
from .arguments import KnnTrainingArguments
from .rows import can_hold_out, folds_of, store_of

Train = Callable[[ImageFeatures], KnnForImageClassification]
"""Trains a model anew on some rows."""


def choose_head(
    model: KnnForImageClassification,
    features: ImageFeatures,
    validation: ImageFeatures | None,
    args: KnnTrainingArguments,
    learned: MetricChoice | None = None,
) -> HeadChoice:
    """Compares heads on a validation set, else on folds; the datastore of a fold is its own.

    Args:
        model: with a datastore of all rows.
        features: all rows.
        validation: none of which is stored in the model; None: there is none.
        args: of the training.
        learned: gives the datastore of a fold its map; None: there is none.
    """
    config, whole = model.config, model.datastore
    assert isinstance(whole, Datastore)
    folds = folds_of(features, args) if validation is None and can_hold_out(features) else []
    return compare_heads(
        labelled(features, config),
        folds if validation is None else labelled(validation, config),
        config.classes,
        criterion=args.tune_criterion, metric=config.metric, normalization=config.normalization,
        weighting=config.knn_weighting, class_weighting=args.class_weights,
        store=lambda rows: _store(rows, config, args, learned) if validation is None else whole,
        seed=args.seed, device=args.device, progress=not args.disable_tqdm,
    )  # fmt: skip


def ask_on_folds(
    model: KnnForImageClassification,
    features: ImageFeatures,
    args: KnnTrainingArguments,
    train: Train,
    fixed: ClosedCell | None,
    learned: MetricChoice | None = None,
    progress: bool = False,
) -> HeldOut:
    """Asks a head of the model's kind about each row, made anew without the rows of its fold.

    Args:
        model: that has seen all rows.
        features: all rows.
        args: of the training.
        train: trains a model, for a head that only a trainer can train.
        fixed: what a head in closed form is fitted with, if that was chosen by nothing.
        learned: gives the datastore of a fold its map; None: one is trained where the model's has
            one.
        progress: show a progress bar.

    Raises:
        ValueError: if no class has two rows, or two groups.
    """
    config, folds = model.config, folds_of(features, args)
    if learned is None and config.learned_metric:
        learned = MetricChoice.kept(args.seed)
    k = widest(len(features), len(features), config.classes)
    answers = ask(
        labelled(features, config), folds, {config.head: _fit(config, args, train, fixed)},
        lambda rows: _store(rows, config, args, learned), k, progress,
    )  # fmt: skip
    return answers.of(config.head)


def by_itself(
    answers: HeldOut,
    model: KnnForImageClassification,
    validation: ImageFeatures | None,
    device: torch.device,
    softened: float,
) -> HeldOut:
    """What was said when heads were compared, on a validation set by the head that was trained.

    Args:
        answers: of a head like the model's.
        model: with the head.
        validation: what was asked about; None: folds, whose rows the model has seen.
        device: of the head.
        softened: what the logits of the model's head were divided by since it was trained.
    """
    if validation is None:
        return answers.softened(softened)
    rows = labelled(validation, model.config)
    return answers._replace(head_log_probs=ask_head(model, rows.head, device))


def labelled(features: ImageFeatures, config: KnnConfig) -> LabelledRows:
    """Features as heads and neighbours see them."""
    head, store = split_features(features.features, config)
    return LabelledRows(head, store, features.labels, features.groups, features.ids)


def _joined(rows: LabelledRows, config: KnnConfig) -> ImageFeatures:
    """The way back: pictures that nothing is known of but their features."""
    parts = (rows.head, rows.store) if config.extra_dim else (rows.head,)
    assert rows.ids is not None
    return ImageFeatures(torch.cat(parts, dim=1), rows.labels, rows.ids, groups=rows.groups)


def _store(
    rows: LabelledRows,
    config: KnnConfig,
    args: KnnTrainingArguments,
    learned: MetricChoice | None,
) -> Datastore:
    store = store_of(_joined(rows, config), config, args)
    return store if learned is None else learned.give_to(store)


def _fit(
    config: KnnConfig, args: KnnTrainingArguments, train: Train, fixed: ClosedCell | None
) -> Fit:
    knows_all = config.head_classes == config.classes
    is_plain = config.head == Head.LINEAR and knows_all and not args.of_descent
    if config.head in CLOSED_FORM or is_plain:
        return fit_of(
            config.head, config.head_classes, config.normalization, args.class_weights,
            args.seed, args.device, fixed,
        )  # fmt: skip

    def fit(rows: LabelledRows) -> Answer:
        trained = train(_joined(rows, config))

        def answer(head_part: torch.Tensor) -> torch.Tensor:
            return ask_head(trained, head_part, args.device)

        return answer

    return fit
