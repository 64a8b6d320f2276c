"""What a trainer is given: rows that its model can learn, and arguments for a part of the work."""

import copy
from typing import Any

from torch import Tensor

from ..core.backbone import split_features
from ..core.config import Head, KnnConfig
from ..data.augmentation import EpochRows
from ..data.loading import fingerprint_of, groups_of, labels_of, prepare
from ..features.extract import ImageFeatures, extract_features
from ..model.checkpoint import made_by
from ..model.modeling import KnnForImageClassification
from ..store.datastore import Datastore
from .arguments import KnnTrainingArguments


def check_sources(
    train_dataset: Any, eval_dataset: Any, processor: Any, args: KnnTrainingArguments
) -> None:
    """Refuses pictures that nothing can turn into tensors, and features to train a backbone on.

    Raises:
        ValueError: saying what is missing.
    """
    for dataset in (train_dataset, eval_dataset):
        if processor is None and not isinstance(dataset, ImageFeatures | None):
            raise ValueError(
                "Expected `processing_class` to turn pictures into tensors, but got None and "
                "the model has no image processor."
            )
    if isinstance(train_dataset, ImageFeatures) and not args.freeze_backbone:
        raise ValueError(
            "Expected pictures to train a backbone on, but got features; pass the pictures, or "
            "set freeze_backbone=True."
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


def check_groups(rows: Any, column: str) -> None:
    """Refuses rows that do not say which of them belong together.

    Raises:
        ValueError: naming the column.
    """
    if not isinstance(rows, ImageFeatures):
        groups_of(rows, column)
    elif rows.groups is None:
        raise ValueError(
            f"Expected features with `groups` for group_by={column!r}, but got some without; pass "
            "`group_by` to extract_features too."
        )


def check_at_once(args: KnnTrainingArguments, head: str, resume: str | bool | None) -> None:
    """Refuses options that mean nothing where a head is fitted at once.

    Raises:
        ValueError: naming them.
    """
    if not args.freeze_backbone or resume:
        raise ValueError(
            "Expected `freeze_backbone` to be True and no checkpoint to resume from for a head "
            f"that is fitted at once (head={head!r}, probe_grid={args.probe_grid!r})."
        )
    if head == Head.RIDGE and (args.reweights or args.probe_grid is not None):
        raise ValueError(
            "Expected no `knn_loss_alpha`, `knn_loss_gamma` or `probe_grid` for a ridge head, "
            "which has no loss to weight and no rate to choose."
        )


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


def quiet_arguments(args: KnnTrainingArguments, folder: str) -> KnnTrainingArguments:
    """The same recipe without saving, evaluating or talking."""
    quiet = copy.copy(args)
    changes = {
        "output_dir": folder,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "push_to_hub": False,
        "load_best_model_at_end": False,
        "do_eval": False,
    }
    for name, value in changes.items():
        setattr(quiet, name, value)
    return quiet
