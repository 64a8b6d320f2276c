"""A head trained on features without a loop, beside `KnnTrainer`."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pictures import small_model
from torch import Tensor

from hf_knn import KnnTrainer, KnnTrainingArguments
from hf_knn.core.backbone import KnnHead
from hf_knn.features.extract import ImageFeatures
from hf_knn.fit.recipe import HeadRecipe, train_head
from hf_knn.fit.weights import class_weights

DIM, CLASSES = 24, 5


def rows(count: int = 150, classes: int = CLASSES) -> ImageFeatures:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, DIM, generator=generator)
    features = 3 + 5 * (centres[labels] + torch.randn(count, DIM, generator=generator))
    return ImageFeatures(features, labels, torch.arange(count))


def by_trainer(head: KnnHead, features: ImageFeatures, folder: Path, **options: Any) -> KnnHead:
    model = small_model(CLASSES, backbone=None)
    model.config.feature_dim = DIM
    model.config.head_hidden_sizes = [layer.out_features for layer in head.hidden]
    model.config.head = "mlp" if len(head.hidden) else "linear"
    model.head = copy.deepcopy(head)
    arguments = KnnTrainingArguments(
        str(folder), freeze_backbone=True, logging_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    KnnTrainer(model, arguments, train_dataset=features).train()
    return model.head


def logits(head: KnnHead, features: Tensor) -> Tensor:
    with torch.no_grad():
        return head(features)


@pytest.mark.parametrize("hidden", [(), (16,)])
@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        ({}, HeadRecipe()),
        ({"num_train_epochs": 2.5, "per_device_train_batch_size": 64, "seed": 7},
         HeadRecipe(2.5, batch_size=64, seed=7)),
        ({"num_train_epochs": 8, "per_device_train_batch_size": 32, "learning_rate": 0.05,
          "weight_decay": 0.5, "label_smoothing_factor": 0.2, "max_grad_norm": 0.1},
         HeadRecipe(8, 0.05, 0.5, 32, 0.1, 0.2)),
    ],
    ids=["defaults", "part of an epoch", "others"],
)  # fmt: skip
def test_a_head_is_that_of_the_trainer(
    options: dict[str, Any], recipe: HeadRecipe, hidden: tuple[int, ...], tmp_path: Path
) -> None:
    features = rows()
    torch.manual_seed(1)
    start = KnnHead(DIM, CLASSES, hidden)
    wanted = by_trainer(start, features, tmp_path, **options)
    found = copy.deepcopy(start)
    train_head(found, features.features, features.labels, recipe)
    said, expected = (logits(head, features.features) for head in (found, wanted))
    assert torch.allclose(said, expected, rtol=0, atol=1e-4)
    untrained = copy.deepcopy(start)
    untrained.standardize(features.features)
    assert (logits(untrained, features.features) - expected).abs().max() > 0.1


def test_rows_weigh_as_in_the_loss_of_the_trainer(tmp_path: Path) -> None:
    features = rows()
    features.labels[features.labels == 3] = 0  # an unequal share
    torch.manual_seed(1)
    start = KnnHead(DIM, CLASSES)
    options = {"class_weights": "inverse", "num_train_epochs": 20}
    wanted = by_trainer(start, features, tmp_path, **options)
    weights = class_weights(features.labels, CLASSES, "inverse")[features.labels]
    plain = copy.deepcopy(start)
    train_head(start, features.features, features.labels, HeadRecipe(20), weights)
    train_head(plain, features.features, features.labels, HeadRecipe(20))
    said, expected, unweighted = (
        logits(head, features.features) for head in (start, wanted, plain)
    )
    assert torch.allclose(said, expected, rtol=0, atol=1e-4)
    assert (unweighted - expected).abs().max() > 0.02


def test_a_class_that_the_head_does_not_have_counts_nothing() -> None:
    features = rows(classes=CLASSES + 2)
    assert (features.labels >= CLASSES).any()
    torch.manual_seed(1)
    found = KnnHead(DIM, CLASSES)
    alone = copy.deepcopy(found)
    train_head(found, features.features, features.labels, HeadRecipe(5))
    # one batch holds all rows, so that those of other classes only move mean and scale
    known = features.labels < CLASSES
    kept = alone.standardize
    alone.standardize = lambda _: kept(features.features)  # type: ignore[method-assign]
    train_head(alone, features.features[known], features.labels[known], HeadRecipe(5))
    said, expected = (logits(head, features.features) for head in (found, alone))
    assert torch.allclose(said, expected, rtol=0, atol=1e-4)


def test_what_cannot_be_trained_is_refused() -> None:
    features = rows()
    head = KnnHead(DIM, CLASSES)
    with pytest.raises(ValueError, match="none"):
        train_head(head, features.features[:0], features.labels[:0], HeadRecipe())
    with pytest.raises(ValueError, match="`labels`"):
        train_head(head, features.features, features.labels - 1, HeadRecipe())
    with pytest.raises(FloatingPointError, match="step 1 "):
        train_head(head, features.features * torch.nan, features.labels, HeadRecipe())
