"""The rows that a trainer is given: checked, as features, as folds, and as a datastore."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.backbone import split_features
from ..core.config import KnnConfig
from ..data.augmentation import Augment, EpochRows
from ..data.loading import groups_of, labels_of, prepare
from ..data.places import fingerprint_of
from ..data.splits import Fold, stratified_folds
from ..features.extract import ImageFeatures, extract_features
from ..fit.measure import rows_but, stored_places
from ..fit.metric import MetricChoice, choose_metric
from ..model.checkpoint import made_by
from ..model.modeling import KnnForImageClassification
from ..store.datastore import Datastore
from ..store.kinds import FLAT
from .arguments import KnnTrainingArguments

logger = logging.getLogger(__name__)


def check_sources(
    train_dataset: Any, eval_dataset: Any, processor: Any, args: KnnTrainingArguments
) -> None:
    """Refuses pictures that nothing can turn into tensors, and features to train a backbone on.

    Raises:
        ValueError: saying what is missing.
    """
    if isinstance(train_dataset, dict):
        raise ValueError(
            f"Expected one training set, but got {list(train_dataset)}; pass one of them."
        )
    several = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    for rows in [train_dataset, *several]:
        if rows is None:
            continue
        _check_kind(rows)
        if processor is None and not isinstance(rows, ImageFeatures):
            raise ValueError(
                "Expected `processing_class` to turn pictures into tensors, but got None and "
                "the model has no image processor."
            )
    if isinstance(train_dataset, ImageFeatures) and not args.freeze_backbone:
        raise ValueError(
            "Expected pictures to train a backbone on, but got features; pass the pictures, or "
            "set freeze_backbone=True."
        )


def checked_model(
    given: object, args: KnnTrainingArguments, *, has_init: bool
) -> KnnForImageClassification:
    """A model that a trainer can train, and save whole.

    Args:
        given: the model, maybe from `model_init`.
        args: of the run.
        has_init: whether there is a `model_init`.

    Raises:
        ValueError: saying what is wrong and what to do.
    """
    if not isinstance(args, KnnTrainingArguments):
        raise ValueError(
            f"Expected `args` to be KnnTrainingArguments, but got {type(args).__name__}."
        )
    if args.include_for_metrics:
        raise ValueError(
            f"Expected `include_for_metrics` to be empty, but got {args.include_for_metrics}: "
            "`compute_metrics` gets the blend's logits and the labels."
        )
    adapters = [type(part) for part in _parts_of(given) if _is_adapter(part)]
    if adapters:
        raise ValueError(
            f"Expected a model without adapters, but got one with {adapters[0].__name__}, and a "
            "checkpoint holds whole weights. Train the last blocks with `trainable_blocks`, or "
            "train the adapters elsewhere, call `merge_and_unload()` and pass the merged backbone "
            "to `KnnForImageClassification.from_backbone`."
        )
    if not isinstance(given, KnnForImageClassification):
        name = "`model_init` to return" if has_init else "`model` to be"
        got = "None" if given is None else type(given).__name__
        raise ValueError(
            f"Expected {name} a KnnForImageClassification, but got {got}; make one with "
            "`KnnForImageClassification.from_backbone`, and leave wrapping it to the trainer."
        )
    return given


def _parts_of(given: object) -> list[nn.Module]:
    return list(given.modules()) if isinstance(given, nn.Module) else []


def _is_adapter(part: nn.Module) -> bool:
    """Whether a module is one of the package `peft`, which need not be installed."""
    return any(kind.__module__.split(".")[0] == "peft" for kind in type(part).__mro__)


def _check_kind(dataset: Any) -> None:
    """Refuses what is no table of rows that can be asked again, in any order."""
    if isinstance(dataset, ImageFeatures | EpochRows):
        return
    name = type(dataset).__name__
    if hasattr(dataset, "column_names") and not hasattr(dataset, "__len__"):
        raise ValueError(
            f"Expected pictures that can be asked again, but got a stream ({name}); load them "
            "without streaming=True, or take some: `Dataset.from_list(list(stream.take(5000)), "
            "features=stream.features)`."
        )
    if not hasattr(dataset, "column_names"):
        raise ValueError(
            f"Expected a `datasets.Dataset` with the columns image and label, or ImageFeatures, "
            f"but got {name}; for a folder or a csv take `hf_knn.load_splits`, for a dataset of "
            "torch `Dataset.from_list([{'image': image, 'label': label} for image, label in it])`."
        )


def check_groups(rows: Any, column: str | None) -> None:
    """Refuses rows that do not say which of them belong together.

    Args:
        rows: to train on, or None.
        column: that says it, if one was named.

    Raises:
        ValueError: naming the column.
    """
    if rows is None or column is None:
        return
    if not isinstance(rows, ImageFeatures):
        groups_of(rows, column)
    elif rows.groups is None:
        raise ValueError(
            f"Expected features with `groups` for group_by={column!r}, but got some without; pass "
            "`group_by` to extract_features too."
        )


def check_tunable(dataset: Any, args: KnnTrainingArguments) -> None:
    """Refuses to choose k, temperature and λ on several sets, or on rows that were trained on.

    Args:
        dataset: a validation set, or None.
        args: of the run.

    Raises:
        ValueError: saying what is missing.
    """
    if isinstance(dataset, dict):
        raise ValueError(
            f"Expected one validation set to tune on, but got {list(dataset)}; pass one."
        )
    if dataset is None and not args.freeze_backbone:
        raise ValueError(
            "Expected a validation set (`eval_dataset`) to tune a model whose backbone was "
            "trained, since it has seen every training picture, but got none."
        )


def checked_rows(dataset: Any, model: KnnForImageClassification) -> Any:
    """A prepared dataset, or several by name, whose labels the model has; None stays None.

    Raises:
        ValueError: for one without pictures or labels, or with labels the model does not have.
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: checked_rows(rows, model) for name, rows in dataset.items()}
    _check_kind(dataset)
    if len(dataset) and not isinstance(dataset, ImageFeatures):
        dataset = prepare(dataset, model.config.class_names)
    if len(dataset) == 0:
        raise ValueError("Expected a dataset with at least one picture, but it is empty.")
    labels = labels_in(dataset)
    if int(labels.max()) >= model.config.classes:
        raise ValueError(
            f"Expected labels below {model.config.classes}, the number of classes of the model, "
            f"but got {int(labels.max())}."
        )
    return dataset


def augment_of(
    transform: Callable[[Any], Any] | None,
    train_dataset: Any,
    processor: Any,
    args: KnnTrainingArguments,
) -> Augment | None:
    """What training pictures go through: the caller's transform, or the recipe of the arguments."""
    if transform is not None:
        return Augment(transform, args.seed)
    if args.freeze_backbone or train_dataset is None:
        return None
    return Augment.from_processor(args.augmentation, processor, args.seed)


def labels_in(dataset: Any) -> Tensor:
    """[N] int64 labels of pictures or of features."""
    if isinstance(dataset, EpochRows):
        dataset = dataset.rows
    return dataset.labels if isinstance(dataset, ImageFeatures) else labels_of(dataset)


class KnownFeatures:
    """Features of the pictures that a trainer has met; those of a frozen backbone are kept.

    Args:
        args: of the training.
    """

    def __init__(self, args: KnnTrainingArguments) -> None:
        self.args = args
        self._known: dict[str, ImageFeatures] = {}

    def of(self, dataset: Any, model: KnnForImageClassification, processor: Any) -> ImageFeatures:
        """Features of pictures by the weights as they are.

        Args:
            dataset: prepared pictures.
            model: with the backbone.
            processor: of the pictures.

        Raises:
            ValueError: see `extract_features`.
        """
        if isinstance(dataset, EpochRows):
            dataset = dataset.rows
        args, name = self.args, fingerprint_of(dataset)
        if name is not None:
            name = f"{name}|{made_by(model)}"
            if name in self._known:
                return self._known[name]
        features = extract_features(
            model,
            dataset,
            processor,
            batch_size=args.per_device_eval_batch_size,
            precision=args.feature_precision,
            backend=args.feature_backend,
            on_bad_image=args.on_bad_image,
            use_cache=args.feature_cache and args.freeze_backbone,
            progress=not args.disable_tqdm,
            group_by=args.group_by if args.group_by in dataset.column_names else None,
        )
        if args.freeze_backbone and name is not None:
            self._known[name] = features
        return features


def store_of(features: ImageFeatures, config: KnnConfig, args: KnnTrainingArguments) -> Datastore:
    """A datastore of rows, as the configuration compares them and the arguments index them."""
    _, store_part = split_features(features.features, config)
    return Datastore.from_features(
        store_part,
        features.labels,
        features.ids,
        metric=config.metric,
        normalization=config.normalization,
        index=args.knn_index,
        max_memory=args.knn_max_memory,
        paths=features.paths or None,
    )


def learn_metric(
    store: Datastore,
    features: ImageFeatures,
    config: KnnConfig,
    args: KnnTrainingArguments,
    known: MetricChoice | None,
) -> MetricChoice | None:
    """Gives a datastore a learned map, if one is asked for and kept; the configuration says so.

    Args:
        store: of the rows; changed in place.
        features: the rows.
        config: of the model; likewise.
        args: of the training.
        known: what was chosen for these rows before, or None.
    """
    config.learned_metric = False
    if not args.learn_metric:
        return None
    if known is None:
        folds = folds_of(features, args) if can_hold_out(features) else []
        known = choose_metric(
            split_features(features.features, config)[1], features.labels, config.classes, folds,
            partial(Datastore.from_features, metric=config.metric,
                    normalization=config.normalization, index=FLAT),
            groups=features.groups, weighting=config.knn_weighting, seed=args.seed,
            progress=not args.disable_tqdm,
        )  # fmt: skip
    config.learned_metric = known.give_to(store).learned_map is not None
    return known


def can_hold_out(features: ImageFeatures) -> bool:
    """Whether a class has two rows, or two groups, one of which can be held out."""
    owners = torch.arange(len(features)) if features.groups is None else features.groups
    classes = torch.stack([features.labels, owners]).unique(dim=1)[0]
    return bool((classes.bincount() > 1).any())


def unstored(features: ImageFeatures, model: KnnForImageClassification) -> ImageFeatures:
    """The pictures that a model does not have in its datastore; says how many it has.

    Raises:
        ValueError: if it has all of them.
    """
    stored = stored_places(model, features)
    if not len(stored):
        return features
    if len(stored) == len(features):
        raise ValueError(
            f"Expected pictures to choose k, temperature and λ on that are not stored in the "
            f"model, but all {len(features)} are: each is its own nearest neighbour; pass others."
        )
    logger.warning(
        "%d of these %d pictures are stored in the model, and nothing is chosen on them.",
        len(stored), len(features),
    )  # fmt: skip
    return features.select(rows_but(len(features), stored))


def folds_of(features: ImageFeatures, args: KnnTrainingArguments) -> list[Fold]:
    """Folds of the rows, in which what belongs together stays together.

    Raises:
        ValueError: if no class has two rows, or two groups.
    """
    return stratified_folds(features.labels, args.tune_folds, args.seed, features.groups)
