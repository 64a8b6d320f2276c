"""A trainer learns a metric for the datastore, and tunes with maps of the folds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.pictures import random_features, small_model

from hf_knn import Datastore, KnnForImageClassification, KnnTrainer, KnnTrainingArguments
from hf_knn.features.extract import ImageFeatures
from hf_knn.fit import metric

CLASSES = ["ant", "bee", "cat"]
QUIET: dict[str, Any] = {
    "use_cpu": True, "disable_tqdm": True, "report_to": "none", "logging_strategy": "no",
    "freeze_backbone": True, "feature_cache": False,
}  # fmt: skip


def hidden(rows: int = 90, width: int = 0, seed: int = 0) -> ImageFeatures:
    """Classes that few directions tell apart, under noise that neighbours drown in."""
    features = random_features([row % 3 for row in range(rows)], seed=seed, spread=1.0)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(features.features.shape, generator=generator)
    values[:, 0] = 0.1 * values[:, 0] + (torch.arange(rows) % 3).float() - 1
    values[:, 1:] *= 3
    return ImageFeatures(values, features.labels, features.ids)


def trained(
    folder: Path, features: ImageFeatures, head: str | None = "linear", **options: Any
) -> KnnTrainer:
    model = small_model(CLASSES)
    given = QUIET | {"learn_metric": True, "head": head} | options
    if head in ("linear", "mlp"):
        given["num_train_epochs"] = 2
    trainer = KnnTrainer(
        model, KnnTrainingArguments(str(folder / "run"), **given), train_dataset=features
    )
    trainer.train()
    return trainer


def store_of(trainer: KnnTrainer) -> Datastore:
    store = trainer.model.datastore
    assert isinstance(store, Datastore)
    return store


SLOWER = [pytest.param(head, marks=pytest.mark.slow) for head in ("linear", "mlp")]


@pytest.mark.parametrize("head", ["ridge", "lda", "kernel", "auto", *SLOWER])
def test_kept_whatever_the_head(head: str, tmp_path: Path) -> None:
    trainer = trained(tmp_path, hidden(), head)
    choice, store = trainer.metric_choice, store_of(trainer)
    assert choice is not None
    assert choice.is_kept
    assert store.learned_map is not None
    assert trainer.model.config.learned_metric
    result = trainer.tune()
    assert 0 <= result.knn_weight <= 1
    trainer.model.save_pretrained(tmp_path / "model")
    opened = KnnForImageClassification.from_pretrained(tmp_path / "model").datastore
    assert opened is not None
    assert torch.equal(opened.learned_map.weight, store.learned_map.weight)


def test_not_kept_is_as_without_the_option(tmp_path: Path) -> None:
    features = random_features([row % 3 for row in range(60)], seed=1, spread=0.01)
    trainer = trained(tmp_path, features)
    assert trainer.metric_choice is not None
    assert not trainer.metric_choice.is_kept
    plain = trained(tmp_path, features, learn_metric=False)
    assert plain.metric_choice is None
    for one in (trainer, plain):
        one.tune()
        one.model.save_pretrained(tmp_path / str(one.args.learn_metric))
    names = [
        {path.name: path.read_bytes() for path in (tmp_path / str(kept)).glob("*")
         if path.name != "README.md"} for kept in (True, False)
    ]  # fmt: skip
    assert names[0] == names[1]


def test_folds_are_asked_with_maps_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row is among those that the map of its fold was trained on."""
    features = hidden()
    trainer = trained(tmp_path, features)
    trained_on: list[Datastore] = []
    searched: list[tuple[Datastore, torch.Tensor]] = []
    search, give = Datastore.search, metric.MetricChoice.give_to

    def note(store: Datastore, queries: Any, *args: Any, **options: Any) -> Any:
        searched.append((store, torch.as_tensor(queries)))
        return search(store, queries, *args, **options)

    def noted(choice: metric.MetricChoice, store: Datastore) -> Datastore:
        trained_on.append(store)
        return give(choice, store)

    monkeypatch.setattr(Datastore, "search", note)
    monkeypatch.setattr(metric.MetricChoice, "give_to", noted)
    trainer.tune()
    assert len(searched) == 5
    asked = 0
    for store, queries in searched:
        assert any(store is one for one in trained_on)
        assert store.learned_map is not None
        assert len(store) < 90
        apart = (store.features.float()[None] - queries.float()[:, None]).abs().amax(2).amin(1)
        assert bool((apart > 0.01).all())
        asked += len(queries)
    assert asked == 90


@pytest.mark.slow
def test_a_loaded_model_is_tuned_with_maps_of_its_folds(tmp_path: Path) -> None:
    features = hidden()
    first = trained(tmp_path, features)
    wanted = first.tune()
    first.model.save_pretrained(tmp_path / "model")
    model = KnnForImageClassification.from_pretrained(tmp_path / "model")
    args = KnnTrainingArguments(str(tmp_path / "run"), **QUIET, head="linear")
    again = KnnTrainer(model, args, train_dataset=features)
    assert again.tune().best_knn.accuracy == pytest.approx(wanted.best_knn.accuracy, abs=0.05)
    assert model.config.learned_metric


def test_training_again_without_it_takes_it_away(tmp_path: Path) -> None:
    trainer = trained(tmp_path, hidden())
    trainer.args.learn_metric = False
    trainer.train()
    assert store_of(trainer).learned_map is None
    assert not trainer.model.config.learned_metric
    trainer.model.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    "options", [{"freeze_backbone": False}, {"knn_loss_alpha": 1.0}, {"knn_loss_gamma": 1.0}]
)
def test_it_goes_with_a_frozen_backbone_and_a_plain_loss(options: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="with `learn_metric`"):
        KnnTrainingArguments(str(tmp_path), **QUIET | {"learn_metric": True} | options)


def test_one_picture_a_class_leaves_it_out(tmp_path: Path) -> None:
    trainer = trained(tmp_path, hidden(3), "ridge")
    assert trainer.metric_choice is not None
    assert not trainer.metric_choice.is_kept
    assert "no row could be held out" in trainer.metric_choice.say()
