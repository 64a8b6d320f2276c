"""Temperature scaling of head and blend, against scipy's minimiser."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from support.oracles import assert_same_store
from support.pictures import small_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from training.test_trainer import CLASSES, cloud, probe, store_of

from hf_knn import (
    KnnForImageClassification,
    KnnTrainer,
    KnnTrainingArguments,
    blend_log_probs,
    knn_log_probs,
)
from hf_knn.core.votes import floor_log_probs, soften


def best_temperature(log_probs: Tensor, labels: Tensor) -> float:
    def loss(log_temperature: float) -> float:
        return float(cross_entropy(log_probs.double() / np.exp(log_temperature), labels))

    found = minimize_scalar(loss, bounds=(-5, 5), method="bounded", options={"xatol": 1e-7})
    return float(np.exp(found.x))


def trained(folder: Path, **options: Any) -> KnnTrainer:
    """A head that is far too sure: it saw few rows for long."""
    values: dict[str, Any] = {"num_train_epochs": 60, "learning_rate": 0.1}
    trainer = KnnTrainer(
        small_model(CLASSES), probe(folder, **values | options), train_dataset=cloud(30),
        eval_dataset=cloud(90, seed=4),
    )  # fmt: skip
    trainer.train()
    return trainer


def test_head_and_blend_get_the_temperature_with_the_best_likelihood(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    model = trainer.model
    half = torch.randperm(90, generator=torch.Generator().manual_seed(0)) < 45
    held_out = cloud(90, seed=4).select(half.nonzero().flatten().numpy())  # what is chosen on
    with torch.no_grad():
        before = model.head(held_out.features).log_softmax(1)
    first = trainer.evaluate(held_out)
    found = trainer.tune(calibrate=True)
    temperature = best_temperature(before, held_out.labels)
    assert temperature > 1.2  # there was something to mend
    with torch.no_grad():
        after = model.head(held_out.features).log_softmax(1)
    torch.testing.assert_close(after, (before / temperature).log_softmax(1), atol=1e-4, rtol=1e-4)
    hits = store_of(trainer).search(held_out.features, found.k)
    votes = knn_log_probs(hits.similarities, hits.labels, 3, found.temperature)
    blend = floor_log_probs(blend_log_probs(after, votes, found.knn_weight))
    wanted = best_temperature(blend, held_out.labels)
    assert model.config.blend_temperature == pytest.approx(wanted, rel=1e-3)
    with torch.no_grad():
        logits = model(features=held_out.features).logits
    torch.testing.assert_close(
        logits, floor_log_probs((blend / wanted).log_softmax(1)), atol=1e-3, rtol=1e-3
    )
    measured = trainer.evaluate(held_out)
    assert measured["eval_head_nll"] < first["eval_head_nll"] - 0.01
    assert measured["eval_head_top1"] == first["eval_head_top1"]


def test_it_is_an_argument_too_and_is_undone_by_tuning_without(tmp_path: Path) -> None:
    trainer = trained(tmp_path, calibrate=True)
    trainer.tune()
    assert trainer.model.config.blend_temperature != 1
    trainer.tune(calibrate=False)
    assert trainer.model.config.blend_temperature == 1


def test_without_it_nothing_is_scaled(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    before = trainer.model.head.classifier.weight.clone()
    trainer.tune()
    assert torch.equal(trainer.model.head.classifier.weight, before)
    assert trainer.model.config.blend_temperature == 1


def test_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    trainer = trained(tmp_path, calibrate=True)
    trainer.tune()
    trainer.save_model(str(tmp_path / "model"))
    loaded = KnnForImageClassification.from_pretrained(tmp_path / "model")
    rows = cloud(20, seed=9).features
    with torch.no_grad():
        assert torch.equal(loaded(features=rows).logits, trainer.model(features=rows).logits)
    assert_same_store(loaded.datastore, store_of(trainer))


def test_softening_keeps_the_order_and_one_is_nothing() -> None:
    log_probs = torch.randn(20, 5).log_softmax(1)
    assert soften(log_probs, 1) is log_probs
    soft = soften(log_probs, 3.0)
    torch.testing.assert_close(soft.exp().sum(1), torch.ones(20))
    assert torch.equal(soft.argsort(1), log_probs.argsort(1))
    assert (soft.amax(1) < log_probs.amax(1)).all()


def test_impossible_classes_stay_finite() -> None:
    log_probs = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    for temperature in (0.1, 0.9, 50.0):
        assert soften(log_probs, temperature).isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match="`temperature`"):
        soften(torch.zeros(1, 2), temperature)
    model = small_model(CLASSES)
    model.config.blend_temperature = temperature
    with pytest.raises(ValueError, match="`blend_temperature`"):
        model.config.check()


def measured(trainer: KnnTrainer) -> dict[str, Any] | None:
    return trainer.model.measured


def test_numbers_of_another_model_are_not_kept(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    assert measured(trainer) is None
    found = trainer.evaluate(cloud(45, seed=6))
    kept = measured(trainer)
    assert kept is not None
    assert kept["rows"] == 45
    assert kept["metrics"]["eval_blend_top1"] == found["eval_blend_top1"]
    trainer.tune()
    assert measured(trainer) is None
    trainer.evaluate()
    kept = measured(trainer)
    assert kept is not None
    assert "chosen on the same pictures" in kept["note"]
    trainer.train()
    assert measured(trainer) is None


@pytest.mark.parametrize("head", ["linear", "ridge"])
def test_twice_on_folds_is_as_once(head: str, tmp_path: Path) -> None:
    args = KnnTrainingArguments(
        str(tmp_path), freeze_backbone=True, report_to=[], disable_tqdm=True, head=head
    )
    trainer = KnnTrainer(small_model(CLASSES), args, train_dataset=cloud(90))
    trainer.train()
    rows = cloud(20, seed=9).features
    trainer.tune(calibrate=True)
    temperature = trainer.model.config.head_temperature
    with torch.no_grad():
        once = trainer.model(features=rows).logits
    trainer.tune(calibrate=True)
    assert trainer.model.config.head_temperature == pytest.approx(temperature, rel=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            trainer.model(features=rows).logits, once, atol=1e-4, rtol=1e-4
        )  # fmt: skip
    if head == "ridge":  # which is made anew, as sharp as at first
        trainer.train()
        trainer.tune(calibrate=True)
        assert trainer.model.config.head_temperature == pytest.approx(temperature, rel=1e-5)
