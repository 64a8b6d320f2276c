"""Models whose answers are known beforehand, and labelled rows to ask them about."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_knn import Datastore, KnnForImageClassification
from hf_knn.data.batches import content_of
from hf_knn.features.extract import ImageFeatures
from hf_knn.fit.assess import assess
from hf_knn.fit.report import Report

from .pictures import picture
from .tiny import tiny_model

WIDTH = 16


def places_of(labels: Sequence[int], noise: float, seed: int) -> Tensor:
    """[N, 16] rows about a place of each class; without noise the classes lie far apart."""
    places = torch.randn(1000, WIDTH, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    index = torch.tensor(labels, dtype=torch.int64)
    return places[index] + noise * torch.randn(len(index), WIDTH, generator=generator)


def known_model(
    names: Sequence[str], stored: Sequence[int], noise: float = 0.0, **config: Any
) -> KnnForImageClassification:
    """Answers by its neighbours alone: without noise, right wherever a class is stored.

    Args:
        names: of the classes.
        stored: labels of the rows; ids begin at 500.
        noise: of the rows.
        config: of the model.
    """
    values: dict[str, Any] = {"k": 3, "knn_weight": 1.0} | config
    model = tiny_model("vit", list(names), rows=0, **values)
    ids = torch.arange(500, 500 + len(stored))
    store = Datastore.from_features(
        places_of(stored, noise, 1), torch.tensor(stored), ids,
        paths=[f"stored/{names[label]}/{row}.png" for row, label in enumerate(stored)],
    )  # fmt: skip
    model.datastore = store
    return model


def with_prints(model: KnnForImageClassification) -> dict[int, Any]:
    """Gives each row the print of a picture of its own; returns the pictures by row id."""
    store: Any = model.datastore
    ids, labels = store.ids.tolist(), store.labels.tolist()
    pictures = {i: picture(label, i) for i, label in zip(ids, labels, strict=True)}
    prints = [np.frombuffer(content_of(pictures[i]), np.uint8) for i in ids]
    model.memory = model.memory.started_with(store, store.ids, torch.tensor(np.stack(prints)))
    return pictures


def rows_of(
    names: Sequence[str], labels: Sequence[int], *, looks: Sequence[int] = (), noise: float = 0.0
) -> ImageFeatures:
    """Rows of labels; those that look like another class are answered as that.

    Args:
        names: of the classes.
        labels: of the rows.
        looks: what each looks like; as it is labelled if empty.
        noise: of the rows.
    """
    count = len(labels)
    return ImageFeatures(
        # not quite what is stored, so that nothing is taken for a copy
        places_of(looks or labels, noise or 1e-3, 2), torch.tensor(labels), torch.arange(count),
        paths=[f"asked/{names[label]}/{row}.png" for row, label in enumerate(labels)],
    )  # fmt: skip


def report_of(
    model: KnnForImageClassification, rows: ImageFeatures, **options: Mapping[int, Any] | None
) -> Report:
    """What is measured on the CPU."""
    pictures: Any = options
    return assess(model, rows, torch.device("cpu"), **pictures)
