"""The trainer against plain `transformers.Trainer`, formulas by hand, and its own checkpoints."""

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from support.oracles import as_numpy, blend_probs, similarity_matrix, vote_probs
from support.pictures import (
    NAMES,
    dataset_of,
    picture,
    random_features,
    small_backbone,
    small_model,
    small_processor,
    string_dataset,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import logging as transformers_logging

from hf_knn import (
    Datastore,
    KnnForImageClassification,
    KnnTrainer,
    KnnTrainingArguments,
    Neighbors,
    extract_features,
    tune,
)
from hf_knn.core.backbone import KnnHead
from hf_knn.data.batches import KnnCollator
from hf_knn.data.loading import prepare
from hf_knn.data.splits import split_rows, stratified_folds
from hf_knn.features.extract import ImageFeatures
from hf_knn.fit import measure as measure_module
from hf_knn.fit.blend import TEMPERATURES, default_grid
from hf_knn.fit.held_out import HeldOut, choose_cell
from hf_knn.fit.metrics import thresholds
from hf_knn.training.arguments import HEAD

CLASSES = NAMES[:3]
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "per_device_train_batch_size": 8,
    "num_train_epochs": 2,
    "learning_rate": 0.02,
    "weight_decay": 0.0,
    "seed": 42,
}


USUAL: dict[str, Any] = dict.fromkeys(HEAD._fields)
"""No rates, which a head in closed form refuses."""


def arguments(folder: Path, **options: Any) -> KnnTrainingArguments:
    return KnnTrainingArguments(str(folder / "run"), **QUIET | options)


def probe(folder: Path, **options: Any) -> KnnTrainingArguments:
    """Arguments of a run on cached features."""
    return arguments(folder, freeze_backbone=True, **options)


def cycle(count: int, classes: int = 3) -> list[int]:
    return [row % classes for row in range(count)]


def cloud(count: int = 60, seed: int = 0, classes: int = 3, **options: Any) -> ImageFeatures:
    """Features of classes that overlap."""
    return random_features(cycle(count, classes), seed=seed, **{"spread": 2.5} | options)


def pictures(count: int = 24, seed: int = 0, **options: Any) -> Any:
    return dataset_of(cycle(count), seed, names=CLASSES, **options)


def store_of(trainer: KnnTrainer) -> Datastore:
    store = trainer.model.datastore
    assert isinstance(store, Datastore)
    return store


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert found
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> set[str]:
    return {name for name, value in wanted.items() if not torch.equal(found[name], value)}


@contextmanager
def counting(model: KnnForImageClassification) -> Iterator[list[int]]:
    """The number of pictures in each forward pass of the backbone."""
    batches: list[int] = []

    def count(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        batches.append(len(kwargs["pixel_values"]))

    handle = model.backbone.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield batches
    finally:
        handle.remove()


# the plain loss


class PlainHead(nn.Module):
    """What a user without this package would train on the same features."""

    config = None  # Trainer asks for one when it smooths labels

    def __init__(self, head: KnnHead, features: Tensor) -> None:
        super().__init__()
        self.linear = copy.deepcopy(head.classifier)
        self.mean = features.double().mean(dim=0).float()
        self.scale = (
            (features.double() - features.double().mean(dim=0)).pow(2).mean().sqrt().float()
        )

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.linear((features - self.mean) / self.scale)
        if labels is None:  # Trainer keeps them for its own smoothed loss
            return {"logits": logits}
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def recording(trainer: Trainer) -> list[float]:
    """The loss of every batch that the trainer sees from now on."""
    losses: list[float] = []
    compute = trainer.compute_loss

    def compute_loss(*args: Any, **options: Any) -> Any:
        loss: Any = compute(*args, **options)
        losses.append(float(loss.detach()))
        return loss

    trainer.compute_loss = compute_loss  # type: ignore[method-assign]
    return losses


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.5},
        {"optim": "sgd", "lr_scheduler_type": "cosine", "warmup_steps": 3, "seed": 7},
    ],
)
def test_alpha_0_is_the_plain_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    features, model = cloud(44), small_model(CLASSES)
    plain_model = PlainHead(model.head, features.features)
    plain = Trainer(
        plain_model,
        TrainingArguments(str(tmp_path / "plain"), remove_unused_columns=False, **QUIET | options),
        train_dataset=features,
        data_collator=KnnCollator(None),
    )
    wanted = recording(plain)
    plain.train()
    trainer = KnnTrainer(model, probe(tmp_path, **options), train_dataset=features)
    found = recording(trainer)
    trainer.train()
    assert len(wanted) == 12  # five batches of 8 and one of 4, twice
    assert len(set(wanted)) == 12
    assert found == wanted
    assert torch.equal(model.head.classifier.weight, plain_model.linear.weight)
    assert torch.equal(model.head.classifier.bias, plain_model.linear.bias)


def test_alpha_0_with_label_smoothing_is_the_plain_trainer(tmp_path: Path) -> None:
    features, model = cloud(44), small_model(CLASSES)
    options = {"label_smoothing_factor": 0.2}
    plain_model = PlainHead(model.head, features.features)
    plain = Trainer(
        plain_model,
        TrainingArguments(str(tmp_path / "plain"), remove_unused_columns=False, **QUIET | options),
        train_dataset=features,
        data_collator=KnnCollator(None),
    )
    wanted = recording(plain)
    plain.train()
    trainer = KnnTrainer(model, probe(tmp_path, **options), train_dataset=features)
    found = recording(trainer)
    trainer.train()
    assert found == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(
        model.head.classifier.weight, plain_model.linear.weight, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    "augmentation", ["paper", pytest.param("flip", marks=pytest.mark.slow), "none"]
)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_fine_tuning_is_the_plain_trainer(augmentation: str, workers: int, tmp_path: Path) -> None:
    data = pictures()
    models = [small_model(CLASSES), small_model(CLASSES)]
    assert_same(tensors(models[0]), tensors(models[1]))
    options: dict[str, Any] = {"dataloader_num_workers": workers}
    own = arguments(tmp_path, augmentation=augmentation, **options)
    trainer = KnnTrainer(models[0], own, train_dataset=data)
    plain = Trainer(
        models[1],
        TrainingArguments(str(tmp_path / "p"), remove_unused_columns=False, **QUIET, **options),
        train_dataset=trainer.train_dataset,
        data_collator=trainer.data_collator,
    )
    wanted = recording(plain)
    plain.train()
    found = recording(trainer)
    trainer.train()
    assert len(found) == 6
    assert found == wanted
    assert_same(tensors(models[0]), tensors(models[1]))


# the reweighted loss


def with_duplicates() -> ImageFeatures:
    """30 rows in random order of ids; four rows lie on others, two of them of another class."""
    features = random_features(cycle(30), dim=16, spread=2.0)
    features.features[20:24] = features.features[:4]
    assert not any(features.labels[row] == features.labels[row - 20] for row in range(20, 24))
    features.features[24] = features.features[3]  # and one of its own class
    order = torch.randperm(900, generator=torch.Generator().manual_seed(4))
    features.ids = order[:30] + 100
    return features


def leave_one_out(features: ImageFeatures, k: int, temperature: float) -> Tensor:
    """log p_knn of each row's own label with that row taken out, a row at a time."""
    store = Datastore.from_features(features.features, features.labels, features.ids)
    similarities = similarity_matrix(store, features.features)
    found = []
    for row in range(len(features)):
        others = [other for other in range(len(features)) if other != row]
        others.sort(key=lambda other: (-similarities[row, other], int(features.ids[other])))
        nearest = others[:k]
        distances = 2 - 2 * similarities[row : row + 1, nearest]
        votes = vote_probs(
            distances.clip(0), features.labels[nearest].numpy()[None], 3, "softmax", temperature
        )
        with np.errstate(divide="ignore"):
            found.append(math.log(p) if (p := votes[0, features.labels[row]]) > 0 else -math.inf)
    return torch.tensor(found)


@cache
def best_k_and_temperature() -> tuple[int, float]:
    """By leave-one-out log-likelihood over the whole grid, p floored at 1e-12."""
    features, cells = with_duplicates(), []
    for k in default_grid(len(features), 3).k:
        k = min(k, len(features) - 1)
        for temperature in TEMPERATURES:
            own = leave_one_out(features, k, temperature).clamp_min(math.log(1e-12))
            cells.append((-round(float(own.mean()), 9), k, temperature))
    _, k, temperature = min(cells)
    return k, temperature


def test_k_and_temperature_of_the_loss_are_the_likeliest(tmp_path: Path) -> None:
    features = with_duplicates()
    k, temperature = best_k_and_temperature()
    assert 1 < k < 29
    trainer = KnnTrainer(
        small_model(CLASSES), probe(tmp_path, knn_loss_alpha=0.1), train_dataset=features
    )
    trainer.train()
    assert trainer.train_features is not None
    found = trainer.train_features.knn_log_probs
    assert found is not None
    wanted = leave_one_out(features, k, temperature)
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-4, atol=1e-5)
    assert (wanted < -2).any()
    assert (wanted > -0.4).any()
    config = trainer.model.config
    assert (config.k, config.knn_temperature) == (20, 0.14)  # those of the vote are another matter


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("normalize", ["none", "mean"])
@pytest.mark.parametrize(("alpha", "clamp"), [(0.3, 100.0), (2.0, 1.5)])
def test_the_reweighted_loss_by_hand(
    alpha: float, clamp: float, normalize: str, smoothing: float, tmp_path: Path
) -> None:
    features, model = with_duplicates(), small_model(CLASSES)
    seen: list[tuple[dict[str, Tensor], dict[str, Tensor], float]] = []

    class Spied(KnnTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            given = dict(inputs)
            loss = super().compute_loss(model, inputs, *args, **options)
            seen.append((given, tensors(self.model.head), float(loss.detach())))
            return loss

    options: dict[str, Any] = {"knn_loss_alpha": alpha, "knn_loss_clamp": clamp}
    options |= {"knn_loss_normalize": normalize, "label_smoothing_factor": smoothing}
    trainer = Spied(model, probe(tmp_path, **options), train_dataset=features)
    trainer.train()
    k, temperature = best_k_and_temperature()
    surprise = leave_one_out(features, k, temperature)
    row_of = {
        (row.numpy().tobytes(), int(label)): float(value)
        for row, label, value in zip(features.features, features.labels, surprise, strict=True)
    }
    assert len(seen) == 8
    clamped = 0
    # the mean is that of all rows, so that it does not depend on who is in a batch
    mean = sum(1 + alpha * min(-value, clamp) for value in surprise.tolist()) / len(surprise)
    for inputs, head, loss in seen:
        standard = (inputs["features"].double() - head["mean"]) / head["scale"]
        logits = standard @ head["classifier.weight"].double().T + head["classifier.bias"]
        factors: list[float] = []
        losses: list[float] = []
        for row, label, logit in zip(inputs["features"], inputs["labels"], logits, strict=True):
            own = min(-row_of[row.numpy().tobytes(), int(label)], clamp)
            clamped += own == clamp
            factors.append(1 + alpha * own)
            log_p = [float(value - logit.logsumexp(0)) for value in logit]
            losses.append(-(1 - smoothing) * log_p[int(label)] - smoothing * sum(log_p) / 3)
        if normalize == "mean":
            factors = [factor / mean for factor in factors]
        total = sum(a * b for a, b in zip(factors, losses, strict=True)) / len(losses)
        assert loss == pytest.approx(total, rel=2e-5)
    assert (clamped > 0) is (clamp == 1.5)


def test_features_are_scored_by_id_and_not_by_place(tmp_path: Path) -> None:
    # every row doubled under another id: each finds its double, of its own class
    features = cloud(20)
    doubled = features.select([*range(20), *range(20)])
    doubled.ids = torch.arange(40).flip(0)
    trainer = KnnTrainer(
        small_model(CLASSES), probe(tmp_path, knn_loss_alpha=1.0), train_dataset=doubled
    )
    trainer.train()
    assert trainer.train_features is not None
    own = trainer.train_features.knn_log_probs
    assert own is not None
    assert own.exp().min() > 0.99
    # and without the doubles each row is as surprising as it was
    single = KnnTrainer(
        small_model(CLASSES), probe(tmp_path, knn_loss_alpha=1.0), train_dataset=features
    )
    single.train()
    assert single.train_features is not None
    own = single.train_features.knn_log_probs
    assert own is not None
    assert own.exp().min() < 0.5


def test_the_loss_weights_change_what_is_learned(tmp_path: Path) -> None:
    weights = []
    for alpha in (0.0, 0.5):
        model = small_model(CLASSES)
        KnnTrainer(model, probe(tmp_path, knn_loss_alpha=alpha), train_dataset=cloud()).train()
        weights.append(model.head.classifier.weight.detach())
    assert not torch.allclose(weights[0], weights[1], atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_gradient_accumulation_changes_nothing(alpha: float, tmp_path: Path) -> None:
    found = []
    for batch, steps in ((24, 1), (8, 3), (4, 6)):
        model = small_model(CLASSES)
        options: dict[str, Any] = {"per_device_train_batch_size": batch}
        options |= {
            "gradient_accumulation_steps": steps,
            "optim": "sgd",
            "learning_rate": 0.3,
            "knn_loss_alpha": alpha,
        }
        trainer = KnnTrainer(model, probe(tmp_path, **options), train_dataset=cloud(48))
        trainer.train()
        assert trainer.state.global_step == 4
        found.append(model.head.classifier.weight.detach())
    start = small_model(CLASSES).head.classifier.weight.detach()
    assert not torch.allclose(found[0], start, atol=0.05)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


# features once


def test_rows_of_a_new_training_have_no_receipts_and_pictures_of_the_old(tmp_path: Path) -> None:
    trainer = KnnTrainer(small_model(CLASSES), probe(tmp_path), train_dataset=pictures())
    trainer.train()
    model = trainer.model
    model.forget(ids=[3])
    model.keep_thumbnails({0: picture(0, 0)})
    KnnTrainer(model, probe(tmp_path), train_dataset=pictures(seed=1)).train()
    assert (model.changes, model.thumbnails, len(store_of(trainer))) == ([], None, 24)
    with pytest.raises(ValueError, match="nothing was changed"):
        model.undo()


def test_the_store_tells_what_encoded_its_pictures(tmp_path: Path) -> None:
    trainer = KnnTrainer(small_model(CLASSES), probe(tmp_path), train_dataset=pictures())
    trainer.train()
    store_of(trainer).save(tmp_path / "store")
    assert Datastore.load(tmp_path / "store").source == {"backend": "torch"}


@pytest.mark.parametrize("epochs", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("cached", [True, False])
def test_each_training_picture_goes_through_the_backbone_once(
    epochs: int, cached: bool, tmp_path: Path, knn_cache: Path
) -> None:
    model = small_model(CLASSES)
    options: dict[str, Any] = {"num_train_epochs": epochs, "feature_cache": cached}
    options |= {"knn_loss_alpha": 0.1, "tune_folds": 2}
    trainer = KnnTrainer(model, probe(tmp_path, **options), train_dataset=pictures())
    with counting(model) as batches:
        trainer.train()
        trainer.tune()
        trainer.build_datastore()
        trainer.train()
    assert sum(batches) == 24
    assert knn_cache.exists() is cached
    again = small_model(CLASSES)
    with counting(again) as batches:
        KnnTrainer(again, probe(tmp_path, **options), train_dataset=pictures()).train()
    assert sum(batches) == (0 if cached else 24)


@pytest.mark.parametrize(
    "cached",
    [
        True,
        pytest.param(
            False,
        ),
    ],
)
def test_each_held_out_picture_goes_through_the_backbone_once(cached: bool, tmp_path: Path) -> None:
    model = small_model(CLASSES)
    options = {"num_train_epochs": 3, "eval_strategy": "epoch", "feature_cache": cached}
    trainer = KnnTrainer(
        model,
        probe(tmp_path, **options),
        train_dataset=pictures(),
        eval_dataset=pictures(12, seed=1),
    )
    with counting(model) as batches:
        trainer.train()
        trainer.evaluate()
        trainer.tune()
        trainer.evaluate()
    assert sum(batches) == 24 + 12


def test_pictures_and_their_features_train_alike(tmp_path: Path) -> None:
    data = pictures()
    features = extract_features(small_model(CLASSES), data, use_cache=False, progress=False)
    models = []
    for rows in (data, features):
        model = small_model(CLASSES)
        KnnTrainer(model, probe(tmp_path, knn_loss_alpha=0.1), train_dataset=rows).train()
        models.append(model)
    assert_same(tensors(models[0]), tensors(models[1]))
    stores = [model.datastore for model in models]
    assert stores[0] is not None
    assert stores[1] is not None
    assert torch.equal(stores[0].features, stores[1].features)
    assert stores[0].paths == stores[1].paths == features.paths


def test_a_probe_leaves_the_backbone_alone(tmp_path: Path) -> None:
    model = small_model(CLASSES)
    before = tensors(model.backbone)
    trainer = KnnTrainer(model, probe(tmp_path, tune_folds=2), train_dataset=pictures())
    trainer.train()
    trainer.tune()
    assert_same(tensors(model.backbone), before)
    assert not model.training  # else nobody asks the neighbours
    store = store_of(trainer)
    assert store.labels.tolist() == cycle(24)
    assert store.ids.tolist() == list(range(24))


def test_the_callers_features_are_left_alone(tmp_path: Path) -> None:
    features = cloud()
    options = probe(tmp_path, knn_loss_alpha=0.1)
    KnnTrainer(small_model(CLASSES), options, train_dataset=features).train()
    assert features.knn_log_probs is None


def test_a_probe_can_be_fine_tuned_afterwards(tmp_path: Path) -> None:
    model = small_model(CLASSES)
    KnnTrainer(model, probe(tmp_path), train_dataset=pictures()).train()
    before = tensors(model.backbone)
    KnnTrainer(model, arguments(tmp_path), train_dataset=pictures()).train()
    assert differing(tensors(model.backbone), before)


# evaluate


def expected_metrics(model: KnnForImageClassification, rows: ImageFeatures) -> dict[str, float]:
    """The documented numbers, from brute-force neighbours and plain probabilities."""
    store, config = model.datastore, model.config
    assert store is not None
    similarities = similarity_matrix(store, rows.features)
    labels = rows.labels.numpy()
    nearest = [
        sorted(range(len(store)), key=lambda j: (-s[j], int(store.ids[j]))) for s in similarities
    ]
    nearest_k = np.array(nearest)[:, : config.k]
    distances = (2 - 2 * np.take_along_axis(similarities, nearest_k, 1)).clip(0)
    knn = vote_probs(
        distances, store.labels.numpy()[nearest_k], config.classes, "softmax",
        config.knn_temperature,
    )  # fmt: skip
    with torch.no_grad():
        head = as_numpy(model.head(rows.features).double().softmax(1))
    voices = {"head": head, "knn": knn, "blend": blend_probs(head, knn, config.knn_weight)}
    found: dict[str, float] = {}
    for voice, probs in voices.items():
        right = probs.argmax(1) == labels
        own = np.maximum(probs[np.arange(len(labels)), labels], 1e-12)
        order = np.argsort(probs.max(1), kind="stable")
        bins = np.array_split(order, min(15, len(order)))
        gaps = [len(b) * abs(probs.max(1)[b].mean() - right[b].mean()) for b in bins]
        found[f"eval_{voice}_top1"] = right.mean()
        # fewer than five classes, so what counts is whether the label was given any probability
        found[f"eval_{voice}_top5"] = (probs[np.arange(len(labels)), labels] > 0).mean()
        found[f"eval_{voice}_mean_class"] = np.mean(
            [right[labels == c].mean() for c in set(labels)]
        )
        found[f"eval_{voice}_nll"] = -np.log(own).mean()
        found[f"eval_{voice}_ece"] = sum(gaps) / len(labels)
        if config.classes == 2:
            scores = np.log(np.maximum(probs, 1e-12)) @ [-1, 1]
            pairs = [(a, b) for a in scores[labels == 1] for b in scores[labels == 0]]
            found[f"eval_{voice}_auroc"] = np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs])
    found["eval_loss"] = found["eval_head_nll"]
    found["eval_accuracy"] = found["eval_blend_top1"]
    return found


STOCK = {"eval_runtime", "eval_samples_per_second", "epoch"}
"""What Trainer itself adds to metrics."""


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("knn_weight", [0.0, 0.4, 1.0])
def test_evaluate_gives_the_documented_numbers(
    classes: int, knn_weight: float, tmp_path: Path
) -> None:
    model = small_model(classes, knn_weight=knn_weight, k=7)
    trainer = KnnTrainer(model, probe(tmp_path), train_dataset=cloud(40, classes=classes))
    trainer.train()
    held_out = cloud(31, seed=5, classes=classes)
    before = tensors(model)
    found = trainer.evaluate(held_out)
    assert_same(tensors(model), before)
    wanted = expected_metrics(model, held_out)
    assert len(wanted) == (20 if classes == 2 else 17)
    others = {"eval_both_wrong", "eval_oracle", "eval_blend_gain", "eval_stored"}
    others |= {f"eval_{voice}_brier" for voice in ("head", "knn", "blend")}  # see test_metrics.py
    assert found.keys() - STOCK - others == wanted.keys()
    assert others <= found.keys()
    for name, value in wanted.items():
        # classes of equal votes may be ordered by the last bit in one place and tie in the other
        assert found[name] == pytest.approx(value, rel=1e-4, abs=2e-5), name
    assert found["eval_head_top1"] != found["eval_knn_top1"]
    same_as = {0.0: "head", 1.0: "knn"}.get(knn_weight)
    for name in ("top1", "top5", "nll", "ece", "mean_class"):
        if same_as:
            blended, pure = found[f"eval_blend_{name}"], found[f"eval_{same_as}_{name}"]
            assert blended == pytest.approx(pure, abs=1e-6)
    assert trainer.state.log_history[-1]["eval_blend_nll"] == found["eval_blend_nll"]


@pytest.mark.parametrize("knn_weight", [0.3, 1.0])
@pytest.mark.parametrize("blend_temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 3])
def test_a_class_without_a_vote_is_in_no_top_5(
    k: int, knn_weight: float, blend_temperature: float, tmp_path: Path
) -> None:
    model = small_model(9, knn_weight=knn_weight, k=k, blend_temperature=blend_temperature)
    trainer = KnnTrainer(model, probe(tmp_path), train_dataset=cloud(60, classes=9))
    trainer.train()
    held_out = cloud(60, seed=3, classes=9)
    found = trainer.evaluate(held_out)
    store = model.datastore
    assert store is not None
    voted = store.search(held_out.features, k).labels == held_out.labels.unsqueeze(1)
    assert found["eval_knn_top5"] == pytest.approx(float(voted.any(1).double().mean()))
    if k == 1:
        assert found["eval_knn_top5"] == found["eval_knn_top1"] < found["eval_head_top5"]
    if knn_weight == 1:
        assert found["eval_blend_top5"] == found["eval_knn_top5"]
    else:
        assert found["eval_blend_top5"] > found["eval_knn_top5"]


def test_evaluate_pictures_names_and_mode(tmp_path: Path) -> None:
    model = small_model(CLASSES)
    held_out = pictures(12, seed=1)
    trainer = KnnTrainer(model, probe(tmp_path), train_dataset=pictures(), eval_dataset=held_out)
    trainer.train()
    model.train()
    found = trainer.evaluate(metric_key_prefix="test")
    assert model.training
    assert all(name.startswith("test_") or name == "epoch" for name in found)
    features = extract_features(model, held_out, progress=False)
    wanted = expected_metrics(model, features)
    for name, value in wanted.items():
        assert found[name.replace("eval_", "test_")] == pytest.approx(value, rel=1e-4, abs=2e-5)
    with pytest.raises(ValueError, match="`eval_dataset` to evaluate on"):
        KnnTrainer(model, probe(tmp_path)).evaluate()


def test_a_class_taught_later_is_measured(tmp_path: Path) -> None:
    model = small_model(4, num_head_labels=3)
    trainer = KnnTrainer(model, probe(tmp_path), train_dataset=cloud(40))
    trainer.train()
    taught = random_features([3] * 8, seed=3, spread=0.3)
    store_of(trainer).add(taught.features, taught.labels)
    found = trainer.evaluate(random_features([3] * 5 + [0] * 5, seed=8, spread=0.3))
    assert found["eval_blend_top1"] == found["eval_knn_top1"] == 1
    assert found["eval_head_top1"] <= 0.5
    assert found["eval_head_nll"] > 10  # half the labels are none the head knows
    assert all(math.isfinite(value) for value in found.values())


def test_several_held_out_sets(tmp_path: Path) -> None:
    sets = {"near": cloud(12, seed=1), "far": cloud(12, seed=2)}
    trainer = KnnTrainer(
        small_model(CLASSES), probe(tmp_path), train_dataset=cloud(), eval_dataset=sets
    )
    trainer.train()
    found = trainer.evaluate()
    assert {"eval_near_accuracy", "eval_far_accuracy"} <= found.keys()


def test_several_held_out_sets_are_none_to_tune_on(tmp_path: Path) -> None:
    sets = {"near": cloud(12, seed=1), "far": cloud(12, seed=2)}
    trainer = KnnTrainer(
        small_model(CLASSES), probe(tmp_path), train_dataset=cloud(), eval_dataset=sets
    )
    trainer.train()
    with pytest.raises(ValueError, match=r"near.*far"):
        trainer.tune()
    assert trainer.tune(sets["near"]).k >= 1


# tune


def test_tune_on_a_validation_set(tmp_path: Path) -> None:
    model, held_out = small_model(CLASSES), cloud(60, seed=4)
    trainer = KnnTrainer(
        model, probe(tmp_path, num_train_epochs=8), train_dataset=cloud(60), eval_dataset=held_out
    )
    trainer.train()
    found = trainer.tune()
    # on one half; the other half sets thresholds
    half = (torch.randperm(60, generator=torch.Generator().manual_seed(0)) < 30).nonzero().flatten()
    chosen_on = held_out.select(half.numpy())
    assert found.rows == len(chosen_on) == 30
    with torch.no_grad():
        head = model.head(chosen_on.features).log_softmax(1)
    found_near = store_of(trainer).search(chosen_on.features, 512)
    grid = default_grid(60, 3)
    wanted = tune(found_near, head, chosen_on.labels, 3, "one_standard_error", grid=grid)
    assert found.criterion == "one_standard_error"
    assert found.table == wanted.table
    cell = (found.k, found.temperature, found.knn_weight)
    assert cell == (wanted.k, wanted.temperature, wanted.knn_weight)
    config = model.config
    assert (config.k, config.knn_temperature, config.knn_weight) == cell
    assert trainer.tune_result is found
    chosen = next(scored for scored in found.table if scored[:3] == cell)
    measured = trainer.evaluate(chosen_on)
    assert measured["eval_accuracy"] == pytest.approx(chosen.accuracy, abs=1e-6)
    assert measured["eval_blend_nll"] == pytest.approx(-chosen.log_likelihood, rel=1e-4)
    assert measured["eval_head_top1"] == pytest.approx(found.head.accuracy, abs=1e-6)


@pytest.mark.parametrize("criterion", ["accuracy", "mean_class", "log_likelihood"])
def test_the_criterion_is_passed_on(criterion: str, tmp_path: Path) -> None:
    held_out = cloud(45, seed=4)
    options: dict[str, Any] = {"train_dataset": cloud(45), "eval_dataset": held_out}
    trainer = KnnTrainer(small_model(CLASSES), probe(tmp_path, tune_criterion=criterion), **options)
    trainer.train()
    assert trainer.tune().criterion == criterion
    assert trainer.tune(criterion="one_standard_error").criterion == "one_standard_error"
    assert trainer.tune(cloud(30, seed=6)).table != trainer.tune(held_out).table


def test_folds_never_ask_about_what_they_have_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*cycle(40), 3, 4]  # two classes of a single row
    features = random_features(rows, spread=2.0)
    row_of = {row.numpy().tobytes(): number for number, row in enumerate(features.features)}
    assert len(row_of) == 42
    trainer = KnnTrainer(
        small_model(5),
        probe(tmp_path, tune_folds=3, knn_loss_alpha=0.2, num_train_epochs=6),
        train_dataset=features,
    )
    trainer.train()
    heads: list[KnnHead] = []
    first_weights: list[Tensor] = []
    learned: list[tuple[KnnHead, set[int]]] = []
    asked_heads: list[tuple[KnnHead, set[int]]] = []
    asked_stores: list[tuple[Datastore, set[int]]] = []
    forward, search = KnnHead.forward, Datastore.search

    def numbers(queries: Tensor) -> set[int]:
        return {row_of[row.numpy().tobytes()] for row in queries.detach()}

    def spied_forward(head: KnnHead, rows: Tensor) -> Tensor:
        if all(head is not other for other in heads):
            first_weights.append(head.classifier.weight.detach().clone())
        heads.append(head)  # keeps each alive, so that none takes the place of another
        (learned if head.training else asked_heads).append((head, numbers(rows)))
        return forward(head, rows)

    def spied_search(store: Datastore, queries: Tensor, k: int, exclude_ids: Any = None) -> Any:
        if exclude_ids is None:
            asked_stores.append((store, numbers(queries)))
        return search(store, queries, k, exclude_ids)

    monkeypatch.setattr(KnnHead, "forward", spied_forward)
    monkeypatch.setattr(Datastore, "search", spied_search)
    before, store = tensors(trainer.model), store_of(trainer)
    result = trainer.tune()
    assert len(asked_stores) == len(asked_heads) == 3
    for number, ((head, held_out), (fold_store, queries)) in enumerate(
        zip(asked_heads, asked_stores, strict=True)
    ):
        assert held_out == queries, number
        fitted = set().union(*(seen for other, seen in learned if other is head))
        assert fitted == set(range(42)) - held_out
        assert set(fold_store.ids.tolist()) == fitted
        part = features.features[sorted(fitted)]
        torch.testing.assert_close(
            fold_store.mean, part.half().float().mean(0), rtol=1e-3, atol=1e-3
        )
        torch.testing.assert_close(head.mean, part.mean(0), rtol=1e-4, atol=1e-5)
    # no fold starts from the head that has seen every row
    trained = trainer.model.head.classifier.weight
    assert len(first_weights) == 3
    assert trained.abs().max() > 0.2
    assert all(weight.abs().max() < 0.1 for weight in first_weights)
    everyone = sorted(number for _, held_out in asked_heads for number in held_out)
    assert everyone == list(range(40))  # each once, and the lone rows never
    # the model itself is as it was, but for what was chosen
    assert_same(tensors(trainer.model), before)
    assert trainer.model.datastore is store
    assert (trainer.model.config.k, trainer.model.config.knn_weight) == (
        result.k,
        result.knn_weight,
    )
    monkeypatch.undo()
    assert trainer.tune().table == result.table  # and the folds are the same each time


def test_folds_search_as_far_as_the_whole_would(tmp_path: Path) -> None:
    features = random_features(cycle(200, 10), spread=2.0)
    trainer = KnnTrainer(
        small_model(10), probe(tmp_path, num_train_epochs=1), train_dataset=features
    )
    trainer.train()
    result = trainer.tune()
    assert len({cell.temperature for cell in result.table}) == 22  # the fine grid
    assert max(cell.k for cell in result.table) == 160


def test_folds_do_not_depend_on_the_random_state_of_the_moment(tmp_path: Path) -> None:
    trainer = KnnTrainer(small_model(CLASSES), probe(tmp_path), train_dataset=cloud(30))
    trainer.train()
    tables = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        tables.append(trainer.tune().table)
    assert tables[0] == tables[1]


@pytest.mark.parametrize("shots", [1, 2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_few_labels_fix_k_and_temperature(shots: int, tmp_path: Path) -> None:
    model = small_model(CLASSES, k=3, knn_temperature=0.5, knn_weight=0.9, blend_temperature=2.0)
    trainer = KnnTrainer(model, probe(tmp_path), train_dataset=random_features([0, 1, 2] * shots))
    trainer.train()
    result = trainer.tune()
    held_out = 3 * shots if shots > 1 else 0
    assert result.has_few_labels
    assert (result.k, result.temperature) == (20, 0.14)
    config = model.config
    cell = (config.k, config.knn_temperature, config.knn_weight, config.blend_temperature)
    assert cell == (20, 0.14, result.knn_weight, 1.0)  # not clipped: the store may grow
    assert f"({result.rows} on these; 16 a class are wanted)" in result.say("on these")
    if shots < 3:
        assert (result.criterion, result.rows, result.knn_weight) == ("fixed", held_out, 0)
        assert "the head answers alone" in result.say("")
    else:
        assert (result.criterion, result.rows) == ("one_standard_error", held_out)
        assert [cell.knn_weight for cell in result.table] == [0.0, 0.1, 0.2, 0.3, 0.5]
        (k,) = {cell.k for cell in result.table}
        assert k <= min(20, 3 * shots - 1)  # who could vote in a fold
        assert "only what neighbours count is chosen" in result.say("")
    if shots > 1:
        # whoever names a criterion gets what it says
        named = trainer.tune(criterion="log_likelihood")
        assert named.criterion == "log_likelihood"
        assert named.score == max(cell.log_likelihood for cell in named.table)
        assert named.has_few_labels
        fixed = trainer.tune(criterion="fixed")
        assert (fixed.rows, fixed.score) == (held_out, fixed.fixed.accuracy)
        assert (fixed.k, fixed.temperature, fixed.knn_weight) == (20, 0.14, 0.5)
    else:
        assert math.isnan(result.score)
        assert config.answer_thresholds == {}
        with pytest.raises(ValueError, match=r"two pictures.*pass a validation set"):
            trainer.tune(criterion="accuracy")


def test_the_fixed_cell_as_a_criterion(tmp_path: Path) -> None:
    trainer = KnnTrainer(
        small_model(CLASSES), probe(tmp_path, tune_criterion="fixed"), train_dataset=cloud(60)
    )
    trainer.train()
    result = trainer.tune()
    assert (result.criterion, result.has_few_labels, result.rows) == ("fixed", False, 60)
    said = "20 neighbours vote (k = 20, temperature = 0.14) and count 50% beside the head (λ = 0.5)"
    assert result.say("") == f"Usual values, as asked for: {said}."


def test_tuning_shows_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainer = KnnTrainer(small_model(CLASSES), probe(tmp_path), train_dataset=cloud(60))
    trainer.train()
    capfd.readouterr()
    trainer.tune()
    assert "Asking" not in capfd.readouterr().err
    transformers_logging.enable_progress_bar()
    trainer.tune(progress=True)
    said = capfd.readouterr().err
    assert "Asking heads and neighbours: 100%" in said
    assert "Choosing k, temperature and λ: 100%" in said


@pytest.mark.slow
def test_thresholds_come_from_answers_that_their_rows_did_not_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Tensor]] = {"chosen": [], "told": []}

    def spied_choice(rows: HeldOut, *args: Any, **kwargs: Any):
        seen["chosen"].append(rows.labels)
        return choose_cell(rows, *args, **kwargs)

    def spied_thresholds(log_probs: Tensor, labels: Tensor, rates: Any) -> dict[str, float]:
        seen["told"].append(labels)
        return thresholds(log_probs, labels, rates)

    monkeypatch.setattr(measure_module, "choose_cell", spied_choice)
    monkeypatch.setattr(measure_module, "thresholds", spied_thresholds)
    rows = cloud(120)
    trainer = KnnTrainer(small_model(CLASSES), probe(tmp_path), train_dataset=rows)
    trainer.train()
    for options, chosen, told in (
        ({}, 60, 120),  # by halves
        ({"calibrate": True}, 60, 60),
        ({"criterion": "fixed"}, 120, 120),  # nothing was chosen
        ({"criterion": "fixed", "calibrate": True}, 60, 60),  # temperatures were
    ):
        trainer.tune(**options)
        assert (len(seen["chosen"][-1]), len(seen["told"][-1])) == (chosen, told), options


def test_halves_keep_groups_together() -> None:
    groups = torch.tensor([5, 5, 9, 9, 9, 2, 7, 7, 1, 3])
    near = Neighbors(torch.rand(10, 2), torch.zeros(10, 2).long(), torch.arange(20).view(10, 2))
    rows = HeldOut(near, torch.rand(10, 3), torch.arange(10), groups)
    first, second = rows.halves()
    assert sorted([*first.labels.tolist(), *second.labels.tolist()]) == list(range(10))
    assert first.groups is not None
    assert second.groups is not None
    assert not set(first.groups.tolist()) & set(second.groups.tolist())
    assert torch.equal(first.neighbors.ids, near.ids[first.labels])
    assert torch.equal(second.head_log_probs, rows.head_log_probs[second.labels])
    alone, nobody = rows.at(torch.tensor([0])).halves()
    assert (len(alone.labels), len(nobody.labels)) == (1, 0)


@pytest.mark.parametrize("count", [2, 3, 5, 40])
def test_stratified_folds(count: int) -> None:
    labels = torch.tensor([*cycle(31, 4), 9, 7, 7])
    folds = stratified_folds(labels, count, seed=1)
    assert len(folds) == min(count, 8)  # the largest class has 8 rows
    held = np.concatenate([fold.held_out for fold in folds])
    assert sorted(held) == sorted(set(range(34)) - {31})  # all but the lone 9
    for fold in folds:
        assert sorted([*fold.fitted, *fold.held_out]) == list(range(34))
        assert set(labels[fold.held_out].tolist()) <= set(labels[fold.fitted].tolist())
        for label in range(4):
            share = int((labels[fold.held_out] == label).sum())
            assert abs(share - int((labels == label).sum()) / len(folds)) < 1
    again, other = stratified_folds(labels, count, seed=1), stratified_folds(labels, count, seed=2)
    assert all(np.array_equal(a.held_out, b.held_out) for a, b in zip(folds, again, strict=True))
    assert not all(
        np.array_equal(a.held_out, b.held_out) for a, b in zip(folds, other, strict=True)
    )


def test_splitting_off_a_share() -> None:
    labels = torch.tensor([0] * 20 + [1] * 10 + [2] * 2 + [3])
    fold = split_rows(labels, 0.2, seed=3)
    held = labels[fold.held_out].tolist()
    assert [held.count(label) for label in range(4)] == [4, 2, 1, 0]
    assert sorted([*fold.fitted, *fold.held_out]) == list(range(33))
    assert np.array_equal(split_rows(labels, 0.2, seed=3).held_out, fold.held_out)
    assert not np.array_equal(split_rows(labels, 0.2, seed=4).held_out, fold.held_out)
    assert split_rows(labels, 0.99, seed=0).fitted.size >= 4  # a row of each class stays


# fine-tuning


def test_fine_tuning_builds_the_datastore_from_the_final_weights(
    tmp_path: Path, knn_cache: Path
) -> None:
    model, data = small_model(CLASSES), pictures()
    before = tensors(model)
    trainer = KnnTrainer(model, arguments(tmp_path), train_dataset=data)
    trainer.train()
    changed = differing(tensors(model), before)
    assert changed >= {name for name, _ in model.named_parameters()}
    store = store_of(trainer)
    final = extract_features(model, data, use_cache=False, progress=False)
    assert torch.equal(store.features, final.features.half())
    assert torch.equal(store.labels, final.labels)
    assert torch.equal(store.ids, final.ids)
    assert store.paths == final.paths
    assert not model.training
    assert not knn_cache.exists()  # weights of a moment are not worth keeping
    with pytest.raises(ValueError, match=r"validation set.*has seen every training picture"):
        trainer.tune()
    result = trainer.tune(pictures(12, seed=1))
    assert (model.config.k, model.config.knn_weight) == (result.k, result.knn_weight)


def test_evaluation_during_fine_tuning_uses_the_weights_of_the_moment(tmp_path: Path) -> None:
    held_out = pictures(12, seed=1)
    model = small_model(CLASSES)
    seen: list[tuple[Tensor, Tensor]] = []

    class Watching(TrainerCallback):
        def on_evaluate(self, *_: Any, **__: Any) -> None:
            assert model.datastore is not None
            now = extract_features(model, pictures(), use_cache=False, progress=False)
            seen.append((model.datastore.features, now.features.half()))

    trainer = KnnTrainer(
        model,
        arguments(tmp_path, eval_strategy="epoch", num_train_epochs=3),
        train_dataset=pictures(),
        eval_dataset=held_out,
        callbacks=[Watching()],
    )
    trainer.train()
    assert len(seen) == 3
    assert all(torch.equal(stored, now) for stored, now in seen)
    assert not torch.equal(seen[0][0], seen[2][0])
    logged = [entry for entry in trainer.state.log_history if "eval_knn_nll" in entry]
    assert len({entry["eval_knn_nll"] for entry in logged}) == 3


def test_a_broken_picture_in_training(tmp_path: Path) -> None:
    data = pictures(broken=[5])
    for options in (arguments(tmp_path), probe(tmp_path)):
        with pytest.raises(ValueError, match=r"cat/5\.png.*not a picture") as caught:
            KnnTrainer(small_model(CLASSES), options, train_dataset=data).train()
        assert "on_bad_image='skip'" in str(caught.value)
    for frozen in (True, False):
        options = arguments(tmp_path, freeze_backbone=frozen, on_bad_image="skip")
        trainer = KnnTrainer(small_model(CLASSES), options, train_dataset=data)
        losses = recording(trainer)
        trainer.train()
        assert len(losses) == 6
        assert all(math.isfinite(loss) for loss in losses)
        assert store_of(trainer).ids.tolist() == [*range(5), *range(6, 24)]
        assert trainer.train_features is not None
        assert [bad.path for bad in trainer.train_features.skipped] == ["cat/5.png"]


def test_the_collator() -> None:
    rows = [dict(row) for row in prepare(pictures(4, broken=[2]))]
    batch = KnnCollator(small_processor(), "skip")(rows)
    assert batch.keys() == {"pixel_values", "labels", "sample_ids"}
    assert batch["sample_ids"].tolist() == [0, 1, 3]
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    assert batch["labels"].tolist() == [0, 1, 0]
    assert batch["labels"].dtype == torch.int64
    with pytest.raises(ValueError, match=r"cat/2\.png \(sample id 2\) cannot: not a picture"):
        KnnCollator(small_processor())(rows)
    with pytest.raises(ValueError, match=r"cat/2\.png"):
        KnnCollator(small_processor(), "skip")(rows[2:3])  # nothing is left of this batch
    features = cloud(5)
    batch = KnnCollator(None)([features[row] for row in (3, 0)])
    assert torch.equal(batch["features"], features.features[[3, 0]])
    assert batch["labels"].tolist() == [0, 0]


def told(count: int) -> ImageFeatures:
    """Rows that tell all that a row can tell."""
    own = torch.arange(count) / -7
    return dataclasses.replace(cloud(count), gives_ids=True, knn_log_probs=own)


@pytest.mark.parametrize("collate", [KnnCollator(None), default_collate, default_data_collator])
def test_rows_fetched_at_once_are_the_rows_fetched_one_by_one(collate: Callable[..., Any]) -> None:
    features = told(20)
    rows = [17, 3, 0, 3]
    wanted = KnnCollator(None)([features[row] for row in rows])
    found = collate(features.__getitems__(rows))
    assert list(found) == list(wanted) == ["features", "labels", "sample_ids", "knn_log_probs"]
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == value.dtype
        assert found[name].is_contiguous()


def test_cached_features_are_fetched_batch_by_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[list[int]] = []
    fetch = ImageFeatures.__getitems__

    def counted(self: ImageFeatures, rows: list[int]) -> Any:
        fetched.append(list(rows))
        return fetch(self, rows)

    monkeypatch.setattr(ImageFeatures, "__getitems__", counted)
    monkeypatch.delattr(ImageFeatures, "__getitem__")  # no row is fetched by itself
    trainer = KnnTrainer(
        small_model(CLASSES), probe(tmp_path, knn_loss_alpha=0.1), train_dataset=cloud(60)
    )
    trainer.train()
    epochs = fetched[:8], fetched[8:]
    for batches in epochs:
        assert [len(rows) for rows in batches] == [8] * 7 + [4]
        assert sorted(row for rows in batches for row in rows) == list(range(60))
    assert epochs[0] != epochs[1]


# checkpoints


class Planted(KnnTrainer):
    """A trainer whose second evaluation is the best, whatever was learned."""

    losses = (0.7, 0.1, 0.9, 0.8)

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **options)
        if self.is_in_train:
            done = len([e for e in self.state.log_history if "eval_runtime" in e])
            metrics["eval_loss"] = self.losses[done - 1]
        return metrics


@pytest.mark.parametrize("frozen", [False, True])
def test_the_best_model_comes_back_whole(frozen: bool, tmp_path: Path) -> None:
    model = small_model(CLASSES)
    options = {"num_train_epochs": 4, "eval_strategy": "epoch", "save_strategy": "epoch"}
    trainer = Planted(
        model,
        arguments(tmp_path, freeze_backbone=frozen, load_best_model_at_end=True, **options),
        train_dataset=pictures(),
        eval_dataset=pictures(12, seed=1),
    )
    at_end: list[Tensor] = []

    class Watching(TrainerCallback):
        def on_train_end(self, *_: Any, **__: Any) -> None:
            at_end.append(store_of(trainer).features)

    trainer.add_callback(Watching())
    trainer.train()
    folder = tmp_path / "run"
    assert trainer.state.best_model_checkpoint == str(folder / "checkpoint-6")
    best, last = (
        KnnForImageClassification.from_pretrained(folder / f"checkpoint-{step}") for step in (6, 12)
    )
    assert_same(tensors(model), tensors(best))
    changed = differing(tensors(model), tensors(last))
    trained = {name for name, _ in model.named_parameters() if not frozen or "head" in name}
    assert changed >= trained
    assert len(trained) == (2 if frozen else len(list(model.parameters())))
    store = store_of(trainer)
    assert torch.equal(store.features, best.datastore.features)
    assert torch.equal(at_end[0], best.datastore.features)  # restored, before it is built again
    assert torch.equal(store.ids, best.datastore.ids)
    assert frozen or not torch.equal(store.features, last.datastore.features)
    assert not model.training


@pytest.mark.parametrize(
    "save",
    [pytest.param({"save_strategy": "epoch"}, marks=pytest.mark.slow), {"save_steps": 5}],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_resumed_run_ends_as_the_whole_one(
    frozen: bool, save: dict[str, Any], tmp_path: Path
) -> None:
    def trainer_of(seed: int) -> KnnTrainer:
        dropout = {"hidden_dropout_prob": 0.2, "num_hidden_layers": 2}
        options = {
            "save_strategy": "steps",
            "freeze_backbone": frozen,
            "num_train_epochs": 3,
        } | save
        return KnnTrainer(
            small_model(
                CLASSES, seed, backbone=small_backbone(seed if not frozen else 0, **dropout)
            ),
            arguments(tmp_path, knn_loss_alpha=0.1 if frozen else 0.0, **options),
            train_dataset=pictures(32),
            eval_dataset=pictures(12, seed=1),
        )

    whole = trainer_of(seed=0)
    whole.train()
    wanted, measured = tensors(whole.model), whole.evaluate()
    checkpoint = tmp_path / "run" / f"checkpoint-{save.get('save_steps', 4)}"
    assert checkpoint.is_dir()

    resumed = trainer_of(seed=5)  # other weights, all of which have to be replaced
    assert len(differing(tensors(resumed.model), wanted)) > len(wanted) / 2 or frozen
    saved = tensors(KnnForImageClassification.from_pretrained(checkpoint))
    at_start: list[set[str]] = []

    class Watching(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            at_start.append(differing(tensors(resumed.model), saved))

    resumed.add_callback(Watching())
    steps = recording(resumed)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert at_start == [set()]
    assert len(steps) == 12 - save.get("save_steps", 4)
    assert_same(tensors(resumed.model), wanted)
    assert torch.equal(store_of(resumed).features, store_of(whole).features)
    assert torch.equal(store_of(resumed).ids, store_of(whole).ids)
    again = resumed.evaluate()
    assert {name: again[name] for name in again if name not in STOCK} == {
        name: measured[name] for name in measured if name not in STOCK
    }


def test_fine_tuning_of_a_model_with_a_datastore_can_be_resumed(tmp_path: Path) -> None:
    model = small_model(CLASSES)
    KnnTrainer(model, arguments(tmp_path), train_dataset=pictures()).train()
    options = arguments(tmp_path, save_strategy="epoch")
    KnnTrainer(model, options, train_dataset=pictures()).train()
    resumed = KnnTrainer(small_model(CLASSES), options, train_dataset=pictures())
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same(tensors(resumed.model), tensors(model))


def test_a_checkpoint_between_evaluations_holds_no_datastore_of_other_weights(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 3, "num_train_epochs": 3}
    options |= {"save_strategy": "steps", "save_steps": 2}
    trainer = KnnTrainer(
        small_model(CLASSES),
        arguments(tmp_path, **options),
        train_dataset=pictures(),
        eval_dataset=pictures(12, seed=1),
    )
    trainer.train()
    found = {}
    for step in (2, 4, 6, 8):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        opened = KnnForImageClassification.from_pretrained(folder)  # refuses what is stale
        found[step] = opened.datastore is not None
        if opened.datastore is not None:
            now = extract_features(opened, pictures(), use_cache=False, progress=False)
            assert torch.equal(opened.datastore.features, now.features.half())
    assert found == {2: False, 4: False, 6: True, 8: False}


PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib"}


def test_a_saved_folder_opens_with_the_auto_classes_and_holds_no_pickle(tmp_path: Path) -> None:
    model = small_model(CLASSES)
    options = {"hub_token": "hf_secret_of_mine", "knn_loss_alpha": 0.05, "tune_folds": 2}
    trainer = KnnTrainer(model, probe(tmp_path, **options), train_dataset=pictures())
    trainer.train()
    trainer.tune()
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= names
    assert {"datastore.json", "training_args.json"} <= names
    for path in folder.rglob("*"):
        assert path.suffix not in PICKLES, path
        data = path.read_bytes()
        assert not data.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"PK"))
        assert b"hf_secret_of_mine" not in data
    written = json.loads((folder / "training_args.json").read_text())
    assert written["knn_loss_alpha"] == 0.05
    assert written["freeze_backbone"] is True
    pixel_values = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(pixel_values=pixel_values)
    for auto in (AutoModel, AutoModelForImageClassification):
        opened = auto.from_pretrained(folder)
        assert isinstance(opened, KnnForImageClassification)
        with torch.no_grad():
            found = opened(pixel_values=pixel_values)
        assert torch.equal(found.logits, wanted.logits)
        assert torch.equal(found.head_logits, wanted.head_logits)
        assert opened.config.knn_weight == model.config.knn_weight


def test_checkpoints_hold_the_whole_model(tmp_path: Path) -> None:
    model = small_model(CLASSES)
    trainer = KnnTrainer(model, probe(tmp_path, save_strategy="epoch"), train_dataset=pictures())
    trainer.train()
    for step in (3, 6):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        assert not (folder / "training_args.bin").exists()
        opened = AutoModel.from_pretrained(folder)
        assert opened.datastore is not None
        assert torch.equal(opened.datastore.features, store_of(trainer).features)
    assert_same(tensors(opened), tensors(model))


# refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"knn_loss_alpha": -0.1}, "`knn_loss_alpha` to be >= 0, but got -0.1"),
        ({"knn_loss_alpha": math.nan}, "`knn_loss_alpha` to be >= 0, but got nan"),
        ({"knn_loss_alpha": math.inf}, "`knn_loss_alpha` to be >= 0, but got inf"),
        ({"knn_loss_clamp": 0}, "`knn_loss_clamp` to be > 0, but got 0"),
        ({"knn_loss_clamp": math.nan}, "`knn_loss_clamp` to be > 0, but got nan"),
        ({"knn_loss_normalize": "sum"}, r"`knn_loss_normalize` to be one of .*'mean'.*'sum'"),
        ({"tune_criterion": "auc"}, r"`tune_criterion` to be one of .*'log_likelihood'.*'auc'"),
        ({"tune_folds": 1}, "`tune_folds` to be >= 2, but got 1"),
        ({"on_bad_image": "ignore"}, r"`on_bad_image` to be one of \['fail', 'skip'\]"),
        ({"feature_precision": "int8"}, r"`feature_precision` to be one of .*'bf16'.*'int8'"),
        ({"knn_loss_gamma": -1.0}, r"`knn_loss_gamma` to be >= 0"),
        ({"knn_refresh": "daily"}, r"`knn_refresh` to be 'epoch', 'never' or a number"),
        ({"knn_refresh": "0"}, r"`knn_refresh` to be 'epoch', 'never' or a number"),
        ({"knn_queries": "dead"}, r"`knn_queries` to be one of"),
        ({"class_weights": "some"}, r"`class_weights` to be one of"),
        ({"augmentation": "wild"}, r"`augmentation` to be one of"),
        ({"trainable_blocks": 1}, r"`trainable_blocks` to be >= 1, without freeze_backbone"),
        ({"freeze_backbone": False, "trainable_blocks": 0}, r"`trainable_blocks` to be >= 1"),
        ({"knn_max_memory": "much"}, r"`max_memory` to be like"),
        (
            {
                "freeze_backbone": False,
                "dataloader_persistent_workers": True,
                "dataloader_num_workers": 1,
            },
            "would repeat its augmentation",
        ),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **{"freeze_backbone": True} | options)


def test_good_arguments(tmp_path: Path) -> None:
    plain = KnnTrainingArguments(str(tmp_path))
    assert (plain.freeze_backbone, plain.knn_loss_alpha, plain.knn_loss_clamp) == (False, 0, 100)
    assert (plain.knn_loss_normalize, plain.tune_criterion, plain.tune_folds) == ("none", None, 5)
    assert (plain.on_bad_image, plain.feature_precision, plain.feature_cache) == (
        "fail",
        "fp32",
        True,
    )
    assert plain.remove_unused_columns is False
    for criterion in ("one_standard_error", "accuracy", "mean_class", "log_likelihood"):
        assert probe(tmp_path, tune_criterion=criterion).tune_criterion == criterion
    assert probe(tmp_path, knn_loss_clamp=math.inf, knn_loss_normalize="mean").knn_loss_clamp > 1e9


RECIPE = ("num_train_epochs", "learning_rate", "per_device_train_batch_size", "save_strategy")


def recipe_of(args: TrainingArguments) -> tuple[Any, ...]:
    return tuple(getattr(args, name) for name in RECIPE)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"freeze_backbone": True}, (60, 1e-3, 256, "no")),
        ({}, (10, 5e-5, 32, "steps")),
        ({"knn_loss_alpha": 0.1, "trainable_blocks": 1}, (10, 5e-5, 32, "steps")),
        ({"freeze_backbone": True, "num_train_epochs": 3}, (3, 1e-3, 256, "no")),
        ({"freeze_backbone": True, "learning_rate": 5e-5}, (60, 5e-5, 256, "no")),
        ({"freeze_backbone": True, "per_device_train_batch_size": 8}, (60, 1e-3, 8, "no")),
        ({"freeze_backbone": True, "save_strategy": "steps"}, (60, 1e-3, 256, "steps")),
        ({"freeze_backbone": True, "save_steps": 500}, (60, 1e-3, 256, "steps")),
        ({"freeze_backbone": True, "push_to_hub": True}, (60, 1e-3, 256, "steps")),
        ({"num_train_epochs": 0.5, "save_strategy": "no"}, (0.5, 5e-5, 32, "no")),
    ],
)
def test_what_is_not_given_suits_the_training(
    given: dict[str, Any], wanted: tuple[Any, ...], tmp_path: Path
) -> None:
    args = KnnTrainingArguments(str(tmp_path), report_to=[], **given)
    assert recipe_of(args) == wanted
    assert args.save_steps == 500
    plain = TrainingArguments(str(tmp_path), report_to=[])
    assert (args.seed, args.weight_decay) == (0, 0.1 if args.freeze_backbone else 0.0)
    others = ("lr_scheduler_type", "warmup_steps", "optim", "eval_strategy")
    assert [getattr(args, name) for name in others] == [getattr(plain, name) for name in others]
    # copies are what they were copied from
    assert recipe_of(dataclasses.replace(args, output_dir="other")) == wanted
    assert recipe_of(copy.deepcopy(args)) == wanted
    rebuilt = KnnTrainingArguments(**json.loads(json.dumps(args.to_dict())))
    assert rebuilt.to_dict() == args.to_dict()
    changed = dataclasses.replace(args, num_train_epochs=7)
    assert recipe_of(changed) == (7, *wanted[1:])


@pytest.mark.parametrize("way", ["command line", "dict", "json"])
def test_arguments_are_parsed_with_their_defaults(way: str, tmp_path: Path) -> None:
    parser = HfArgumentParser(cast(Any, KnnTrainingArguments))
    folder = str(tmp_path / "out")

    def parse(**given: Any) -> KnnTrainingArguments:
        given |= {"output_dir": folder, "report_to": "none"}
        if way == "command line":
            words = [part for name, value in given.items() for part in (f"--{name}", str(value))]
            return parser.parse_args_into_dataclasses(words)[0]
        if way == "dict":
            return parser.parse_dict(given)[0]
        path = tmp_path / "args.json"
        path.write_text(json.dumps(given))
        return parser.parse_json_file(str(path))[0]

    assert recipe_of(parse(freeze_backbone=True)) == (60, 1e-3, 256, "no")
    assert recipe_of(parse()) == (10, 5e-5, 32, "steps")
    typed = parse(
        num_train_epochs=3, learning_rate=5e-5, per_device_train_batch_size=8, save_strategy="epoch"
    )
    assert recipe_of(typed) == (3, 5e-5, 8, "epoch")
    assert [type(value) for value in recipe_of(typed)[1:3]] == [float, int]


def test_the_precision_of_features_is_passed_on(tmp_path: Path) -> None:
    model = small_model(CLASSES)
    trainer = KnnTrainer(model, probe(tmp_path, feature_precision="bf16"), train_dataset=pictures())
    trainer.train()
    assert trainer.train_features is not None
    wanted = extract_features(model, pictures(), precision="bf16", use_cache=False, progress=False)
    assert torch.equal(trainer.train_features.features, wanted.features)


@pytest.mark.parametrize("place", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("kind", ["pictures", "features"])
def test_labels_the_model_does_not_have(place: str, kind: str, tmp_path: Path) -> None:
    is_pictures = kind == "pictures"
    data: Any = dataset_of([0, 1, 4]) if is_pictures else random_features([0, 1, 4])
    message = r"labels below 3, .*but got 4|model's 3 classes, but got \['eel'\]"
    with pytest.raises(ValueError, match=message):
        KnnTrainer(small_model(CLASSES), probe(tmp_path), **{place: data})
    trainer = KnnTrainer(small_model(CLASSES), probe(tmp_path), train_dataset=cloud())
    with pytest.raises(ValueError, match=message):
        trainer.evaluate(data)


def test_tuning_on_labels_the_model_does_not_have(tmp_path: Path) -> None:
    trainer = KnnTrainer(small_model(CLASSES), probe(tmp_path), train_dataset=cloud())
    trainer.train()
    with pytest.raises(ValueError, match=r"labels below 3, .*but got 4"):
        trainer.tune(random_features([0, 1, 4]))


def test_named_labels_are_those_of_the_model(tmp_path: Path) -> None:
    trainer = KnnTrainer(
        small_model(CLASSES),
        probe(tmp_path, num_train_epochs=20),
        train_dataset=string_dataset(["ant", "bee", "cat"] * 8),
        eval_dataset=string_dataset(["ant", "cat"] * 6, seed=1),
    )
    trainer.train()
    assert trainer.evaluate()["eval_knn_top1"] == 1


def test_names_the_model_has_none_of(tmp_path: Path) -> None:
    trainer = KnnTrainer(small_model(CLASSES), probe(tmp_path), train_dataset=cloud())
    with pytest.raises(ValueError, match="dog"):
        trainer.evaluate(string_dataset(["dog", "eel"] * 3))


def test_labels_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows \[1\] have none"):
        KnnTrainer(small_model(CLASSES), probe(tmp_path), train_dataset=dataset_of([0, -1, 2]))


@pytest.mark.parametrize("place", ["train_dataset", "eval_dataset"])
def test_empty_datasets(place: str, tmp_path: Path) -> None:
    empties: list[Any] = [pictures().select([]), cloud().select([])]
    for empty in empties:
        with pytest.raises(ValueError, match="at least one picture"):
            KnnTrainer(small_model(CLASSES), probe(tmp_path), **{place: empty})
    trainer = KnnTrainer(small_model(CLASSES), probe(tmp_path), train_dataset=cloud())
    with pytest.raises(ValueError, match="at least one picture"):
        trainer.evaluate(empties[0])


def test_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`train_dataset` to train on"):
        KnnTrainer(small_model(CLASSES), probe(tmp_path)).train()


@pytest.mark.parametrize("call", [KnnTrainer.tune, KnnTrainer.build_datastore])
def test_nothing_to_build_or_tune_on(call: Callable[[KnnTrainer], Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset"):
        call(KnnTrainer(small_model(CLASSES), probe(tmp_path)))


def test_features_cannot_be_fine_tuned_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="freeze_backbone"):
        KnnTrainer(small_model(CLASSES), arguments(tmp_path), train_dataset=cloud())


def test_fine_tuning_without_a_processor(tmp_path: Path) -> None:
    model = small_model(CLASSES)
    model.image_processor = None
    with pytest.raises(ValueError, match="processing_class"):
        KnnTrainer(model, arguments(tmp_path), train_dataset=pictures()).train()


def test_a_single_row(tmp_path: Path) -> None:
    model = small_model(CLASSES)
    options = probe(tmp_path, knn_loss_alpha=0.1)
    trainer = KnnTrainer(model, options, train_dataset=random_features([1]))
    losses = recording(trainer)
    trainer.train()
    bias = small_model(CLASSES).head.classifier.bias.detach().unsqueeze(0)
    start = cross_entropy(bias, torch.tensor([1]))  # the lone row is the mean, so all zeros
    assert losses[0] == pytest.approx(float(start) * (1 + 0.1 * 100), rel=1e-4)  # the clamp
    assert trainer.evaluate(random_features([1, 1], seed=2))["eval_knn_top1"] == 1


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_predict_answers_pictures_with_the_blend(alpha: float, tmp_path: Path) -> None:
    options = {"num_train_epochs": 1, "augmentation": "none", "knn_loss_alpha": alpha}
    trainer = KnnTrainer(
        small_model(CLASSES), arguments(tmp_path, **options), train_dataset=pictures()
    )
    trainer.train()
    asked = pictures(30, seed=1)  # with ids that no training row has
    found: Any = trainer.predict(asked)
    rows = extract_features(trainer.model, asked, use_cache=False)
    with torch.no_grad():
        out = trainer.model(features=rows.features)
    np.testing.assert_allclose(found.predictions, out.logits.numpy(), atol=1e-4)
    assert found.label_ids.tolist() == rows.labels.tolist()
    wanted = cross_entropy(out.head_logits, rows.labels)
    assert found.metrics["test_loss"] == pytest.approx(float(wanted), abs=1e-4)
