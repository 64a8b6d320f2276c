"""Explanations against what the model says, and what they say of pictures of another kind."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pictures import picture, small_model
from support.tiny import LABELS, pixels, tiny_model
from training.test_trainer import CLASSES, cloud, probe

from hf_knn import Datastore, KnnForImageClassification, KnnTrainer


@pytest.fixture
def model() -> Any:
    return tiny_model("vit", k=5)


def test_an_explanation_says_what_the_model_says(model: Any) -> None:
    images = pixels(6)
    with torch.inference_mode():
        wanted = model(pixel_values=images, return_neighbors=True)
    for row, found in enumerate(model.explain(images)):
        assert (
            found.answer == LABELS[wanted.logits[row].argmax()] == next(iter(found.probabilities))
        )
        for said, logits in (
            (found.probabilities, wanted.logits),
            (found.head, wanted.head_logits.log_softmax(1)),
            (found.knn, wanted.knn_log_probs),
        ):
            assert [said[name] for name in LABELS] == pytest.approx(
                logits[row].exp().tolist(), abs=1e-6
            )
            assert list(said.values()) == sorted(said.values(), reverse=True)
        assert [voter.row_id for voter in found.neighbors] == wanted.neighbors.ids[row].tolist()
        assert sum(voter.share for voter in found.neighbors) == pytest.approx(1)
        by_class = dict.fromkeys(LABELS, 0.0)
        for voter in found.neighbors:
            by_class[voter.label] += voter.share
            assert voter.path == model.datastore.path_of(voter.row_id)
        assert by_class == pytest.approx(found.knn, abs=1e-6)
        first, second = sorted(by_class.values(), reverse=True)[:2]
        assert found.margin == pytest.approx(first - second, abs=1e-6)
        assert found.answers


def test_one_picture_has_one_explanation(model: Any) -> None:
    image = picture(0, 1, (32, 32))
    found = model.explain(image)
    assert found == model.explain([image])[0]
    model.train()
    assert model.explain(image) == found
    assert model.training
    with pytest.raises(ValueError, match="exactly one"):
        model.explain()
    with pytest.raises(ValueError, match="picture 0"):
        model.explain(b"nothing")
    with pytest.raises(ValueError, match="`level`"):
        model.explain(image, level=1.5)


def test_a_row_does_not_explain_itself(model: Any) -> None:
    store = model.datastore
    rows = store.features[:3].float()
    for row, found in enumerate(model.explain(features=rows, sample_ids=store.ids[:3])):
        assert int(store.ids[row]) not in [voter.row_id for voter in found.neighbors]


def test_without_neighbours_the_head_is_explained(model: Any) -> None:
    with_store = model.explain(pixels(2))
    model.datastore = model.datastore.subset([])
    for found, before in zip(model.explain(pixels(2)), with_store, strict=True):
        assert found.head == before.head
        assert (found.knn, found.neighbors, found.flip, found.typicality) == ({}, [], None, None)
    model.datastore = None
    assert model.explain(pixels(1))[0].is_typical


def test_false_alarms_are_as_many_as_said_and_strangers_are_found() -> None:
    model: Any = small_model(CLASSES, k=5)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 16, generator=generator) * 4
    labels = torch.arange(900) % 3
    rows = centres[labels] + torch.randn(900, 16, generator=generator)
    model.datastore = Datastore.from_features(rows[:600], labels[:600])
    found = model.explain(features=rows[600:])
    alarms = sum(not one.is_typical for one in found) / len(found)
    assert 0.02 < alarms < 0.09
    values = [one.typicality for one in found]
    assert 0.4 < sum(values) / len(values) < 0.6  # uniform
    strangers = torch.randn(50, 16, generator=generator) * 6
    assert sum(not one.is_typical for one in model.explain(features=strangers)) > 40
    assert sum(one.is_typical for one in model.explain(features=strangers, level=1e-6)) == 50
    model.teach(features=strangers, labels=["stranger"] * 50)
    again = model.explain(features=strangers + 0.1)
    assert sum(one.is_typical for one in again) > 40  # counted again


def test_it_abstains_at_an_error_rate_that_was_measured(tmp_path: Path) -> None:
    model: Any = small_model(CLASSES)
    trainer = KnnTrainer(model, probe(tmp_path), train_dataset=cloud(300))
    trainer.train()
    trainer.tune()
    rates = model.config.answer_thresholds
    assert set(rates) <= {"0.01", "0.02", "0.05", "0.1", "0.2"}
    rate = max(map(float, rates))
    model.save_pretrained(tmp_path / "model")
    loaded = KnnForImageClassification.from_pretrained(tmp_path / "model")
    assert loaded.config.answer_thresholds == rates
    queries = cloud(60).features * 0.8
    found = loaded.explain(features=queries, max_error=rate)
    for one in found:
        assert one.answers == (next(iter(one.probabilities.values())) >= rates[f"{rate:g}"])
    with pytest.raises(ValueError, match="error rates that a threshold was found for"):
        model.explain(features=queries, max_error=0.33)


def test_copies_and_pickles_leave_the_calibration_behind(model: Any) -> None:
    wanted = model.explain(pixels(2))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.calibration is None
        assert other.explain(pixels(2)) == wanted


def test_another_mean_counts_again(model: Any) -> None:
    model.explain(pixels(2))
    before = model.calibration
    model.explain(pixels(2))
    assert model.calibration is before
    model.datastore.recenter(model.datastore.mean + 1)
    found = model.explain(pixels(2))
    assert model.calibration is not before
    fresh = copy.deepcopy(model)
    assert fresh.explain(pixels(2)) == found
