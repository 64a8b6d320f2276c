"""The model: what it answers, and what is left of a checkpoint after a fault."""

import contextlib
import copy
import json
import logging
import math
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from support.tiny import (
    LABELS,
    all_files,
    assert_same_rows,
    assert_same_tensors,
    perturb,
    pixels,
    processor,
    tensors,
    tiny_model,
    tiny_store,
)
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    pipeline,
)

from hf_knn import Datastore, KnnConfig, KnnForImageClassification
from hf_knn.core.manifest import DatastoreError, StaleDatastoreError
from hf_knn.model.before import is_checkpoint_file
from hf_knn.model.checkpoint import made_by
from hf_knn.store import folders as storage
from hf_knn.store.backend import RowStore

FLOOR = math.log(1e-12)
OPENERS = [KnnForImageClassification, AutoModelForImageClassification, AutoModel]

Fault = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def vit() -> KnnForImageClassification:
    """Shared and read only; tests that change a model build their own."""
    return tiny_model("vit")


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory, vit: KnnForImageClassification) -> Path:
    """Two checkpoints of the same architecture with other weights, rows and values."""
    root = tmp_path_factory.mktemp("templates")
    vit.save_pretrained(root / "this")
    other = tiny_model("vit", seed=7, k=7)
    assert other.image_processor is not None
    assert other.datastore is not None
    other.image_processor.image_mean = [0.1, 0.2, 0.3]
    other.datastore.digest = made_by(other)
    other.save_pretrained(root / "other")
    return root


@pytest.fixture
def folder(templates: Path, tmp_path: Path) -> Path:
    """A checkpoint of `vit` that the test may damage."""
    return Path(shutil.copytree(templates / "this", tmp_path / "checkpoint"))


def open_model(folder: Path, **options: Any) -> KnnForImageClassification:
    return KnnForImageClassification.from_pretrained(folder, **options)


def logits_of(model: Any, images: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=pixels(5, seed=9) if images is None else images).logits


def pictures(count: int = 3) -> list[Image.Image]:
    generator = random.Random(0)
    return [
        Image.frombytes("RGB", (40, 50), generator.randbytes(40 * 50 * 3)) for _ in range(count)
    ]


# ---- round trip ---------------------------------------------------------------------------------


@pytest.mark.parametrize("opener", OPENERS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("vit", {}),
        ("vit", {"pooling": "pooler", "metric": "l2", "normalization": "none"}),
        ("resnet", {"knn_pooling": "max", "k": 5, "knn_weight": 0.25}),
        ("timm_vit", {"num_head_labels": 2}),
    ],
)
def test_round_trip(family, values, opener, tmp_path):
    model = tiny_model(family, **values)
    if values.get("metric") == "l2":
        model.datastore = store_like(model.datastore, metric="l2", normalization="none")
    model.save_pretrained(tmp_path / "saved")
    found = opener.from_pretrained(tmp_path / "saved")
    assert type(found) is KnnForImageClassification
    assert not found.training
    assert_same_tensors(found, model)
    assert_same_rows(found.datastore, model.datastore)
    assert torch.equal(logits_of(found), logits_of(model))
    assert all(getattr(found.config, name) == value for name, value in values.items())
    assert found.image_processor.to_dict() == model.image_processor.to_dict()


def store_like(store: RowStore | None, **options: Any) -> Datastore:
    assert store is not None
    made = Datastore.from_features(
        store.features.float(), store.labels, store.ids, paths=store.paths, **options
    )
    made.digest = store.digest
    return made


def test_the_round_trip_would_notice_a_difference(vit, folder):
    """The comparisons above can fail: one weight, one row."""
    found = open_model(folder)
    with torch.no_grad():
        found.head.mean[0] += 1e-3
    with pytest.raises(AssertionError):
        assert_same_tensors(found, vit)
    assert not torch.equal(logits_of(found), logits_of(vit))
    assert found.datastore is not None
    found.datastore.remove(found.datastore.ids[:1])
    with pytest.raises(AssertionError):
        assert_same_rows(found.datastore, vit.datastore)


def test_nothing_is_missing_and_nothing_left_over(folder):
    loaded: Any = open_model(folder, output_loading_info=True)
    report = loaded[1]
    assert {name: list(report[name]) for name in ("missing_keys", "unexpected_keys")} == {
        "missing_keys": [],
        "unexpected_keys": [],
    }


def test_without_a_datastore(tmp_path):
    model = tiny_model("vit", rows=0)
    model.save_pretrained(tmp_path / "saved")
    assert not [name for name in all_files(tmp_path / "saved") if name.startswith("datastore-")]
    assert not (tmp_path / "saved" / "datastore.json").exists()
    found = open_model(tmp_path / "saved")
    assert found.datastore is None
    assert not found.config.has_datastore
    assert torch.equal(logits_of(found), logits_of(model))


def test_an_empty_datastore_survives(tmp_path):
    model = tiny_model("vit", rows=0)
    model.datastore = Datastore.from_features(torch.zeros(0, 16), [])
    model.save_pretrained(tmp_path / "saved")
    found = open_model(tmp_path / "saved")
    assert found.datastore is not None
    assert len(found.datastore) == 0
    assert torch.equal(logits_of(found), logits_of(model))


def test_a_model_without_processor(tmp_path):
    model = tiny_model("vit")
    model.image_processor = None
    assert model.datastore is not None
    model.datastore.digest = made_by(model)
    model.save_pretrained(tmp_path / "saved")
    assert open_model(tmp_path / "saved").image_processor is None


def test_only_the_main_process_saves(vit, tmp_path):
    vit.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_a_relative_folder_and_the_working_directory(vit, tmp_path, monkeypatch):
    """Saving over the folder one stands in must not leave one in a deleted folder."""
    monkeypatch.chdir(tmp_path)
    vit.save_pretrained("saved")
    monkeypatch.chdir(tmp_path / "saved")
    vit.save_pretrained(".")
    assert "config.json" in os.listdir(".")
    assert torch.equal(logits_of(open_model(Path("."))), logits_of(vit))


# ---- forward ------------------------------------------------------------------------------------


def test_logits_are_log_probabilities(vit):
    with torch.no_grad():
        output = vit(pixel_values=pixels(6, seed=3))
    assert output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits.exp().sum(1), torch.ones(6), rtol=0, atol=1e-5)
    assert output.logits.min() >= FLOOR - 1e-6


def test_logits_are_the_blend_by_hand(vit):
    with torch.no_grad():
        output = vit(pixel_values=pixels(6, seed=3))
    head = output.head_logits.double().softmax(1)
    wanted = 0.5 * output.knn_log_probs.double().exp() + 0.5 * head
    torch.testing.assert_close(output.logits.double().exp(), wanted, rtol=1e-5, atol=1e-6)
    assert (output.knn_log_probs.double().exp() - head).abs().max() > 0.1, "one voice only"


def test_lambda_zero_is_the_head():
    model = tiny_model("vit", knn_weight=0.0)
    with torch.no_grad():
        output = model(pixel_values=pixels(6))
    wanted = functional.log_softmax(output.head_logits, dim=1)
    torch.testing.assert_close(output.logits, wanted, rtol=0, atol=1e-6)


def test_lambda_one_is_the_neighbours():
    model = tiny_model("vit", knn_weight=1.0, k=3)
    with torch.no_grad():
        output = model(pixel_values=pixels(6))
    has_votes = output.knn_log_probs > FLOOR
    assert 0 < has_votes.sum() < has_votes.numel()
    torch.testing.assert_close(
        output.logits[has_votes], output.knn_log_probs[has_votes], rtol=0, atol=1e-6
    )
    assert torch.allclose(output.logits[~has_votes], torch.tensor(FLOOR))


@pytest.mark.parametrize("store", [None, "empty"])
def test_without_rows_the_model_is_its_head(store):
    model = tiny_model("vit", rows=0)
    if store:
        model.datastore = Datastore.from_features(torch.zeros(0, 16), [])
    with torch.no_grad():
        output = model(pixel_values=pixels(4), return_neighbors=True)
    assert torch.equal(output.logits, functional.log_softmax(output.head_logits, dim=1))
    assert (output.knn_log_probs, output.neighbors) == (None, None)


def test_training_never_searches(monkeypatch):
    model = tiny_model("vit")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("searched")

    monkeypatch.setattr(model.datastore, "search", refuse)
    with pytest.raises(AssertionError, match="searched"):
        model.eval()(pixel_values=pixels(4))
    output = model.train()(pixel_values=pixels(4), labels=torch.tensor([0, 1, 2, 3]))
    assert torch.equal(output.logits, functional.log_softmax(output.head_logits, dim=1))
    assert (output.knn_log_probs, output.neighbors) == (None, None)


def test_sample_ids_are_excluded():
    """An image of the datastore finds itself, and with its id everything but itself."""
    model = tiny_model("vit", k=1)
    store = model.datastore
    assert store is not None
    images = pixels(40, seed=100)[:6]
    with torch.no_grad():
        plain = model(pixel_values=images, return_neighbors=True)
        held_out = model(pixel_values=images, sample_ids=store.ids[:6], return_neighbors=True)
        none = model(pixel_values=images, sample_ids=torch.full((6,), -1), return_neighbors=True)
    assert plain.neighbors.ids[:, 0].tolist() == store.ids[:6].tolist()
    assert torch.equal(none.neighbors.ids, plain.neighbors.ids)
    for row in range(6):
        rest = copy.deepcopy(store)
        rest.remove(store.ids[row : row + 1])
        wanted = rest.search(plain.pooler_output[row : row + 1], k=1)
        assert held_out.neighbors.ids[row].tolist() == wanted.ids[0].tolist()
        assert held_out.neighbors.labels[row].tolist() == wanted.labels[0].tolist()
    assert not torch.equal(held_out.logits, plain.logits)


@pytest.mark.parametrize(
    ("family", "values"), [("vit", {}), ("resnet", {"knn_pooling": "max"}), ("vit", {"k": 500})]
)
def test_features_equal_pixels(family, values):
    model = tiny_model(family, **values)
    with torch.no_grad():
        seen = model(pixel_values=pixels(4), return_neighbors=True)
        cached = model(features=seen.pooler_output, return_neighbors=True)
    assert torch.equal(seen.logits, cached.logits)
    assert torch.equal(seen.head_logits, cached.head_logits)
    assert torch.equal(seen.knn_log_probs, cached.knn_log_probs)
    assert torch.equal(seen.neighbors.ids, cached.neighbors.ids)
    assert torch.equal(seen.pooler_output, cached.pooler_output)
    assert seen.neighbors.ids.shape == (4, min(values.get("k", 20), 40))


def test_votes_are_counted_in_the_metric_of_the_datastore():
    """Negative squared distances read as cosines would all be d = 2 - 2 s > 2."""
    values: dict[str, Any] = {"metric": "l2", "normalization": "l2", "knn_temperature": 0.5}
    cosine, l2 = (
        tiny_model("vit", knn_temperature=0.5, normalization="l2"),
        tiny_model("vit", **values),
    )
    cosine.datastore = store_like(cosine.datastore, normalization="l2")
    l2.datastore = store_like(l2.datastore, metric="l2", normalization="l2")
    with torch.no_grad():
        votes = [m(pixel_values=pixels(4)).knn_log_probs.exp() for m in (cosine, l2)]
    torch.testing.assert_close(*votes, rtol=0, atol=1e-5)
    assert len({round(float(value), 3) for value in votes[0].flatten()}) > 5


def test_head_and_datastore_see_their_own_pooling():
    """Two poolings: the head's answer moves with the first part only, the votes with the other."""
    model = tiny_model("resnet", knn_pooling="max")
    with torch.no_grad():
        features = model(pixel_values=pixels(4)).pooler_output
        swapped = torch.cat([features[:, :16].flip(0), features[:, 16:]], dim=1)
        before, after = model(features=features), model(features=swapped)
    assert features.shape == (4, 32)
    assert torch.equal(before.knn_log_probs, after.knn_log_probs)
    assert torch.equal(before.head_logits.flip(0), after.head_logits)
    assert not torch.equal(before.head_logits, after.head_logits)


def test_exactly_one_input_is_taken(vit):
    with pytest.raises(ValueError, match="exactly one of `pixel_values` and `features`"):
        vit()
    with pytest.raises(ValueError, match="exactly one of `pixel_values` and `features`"):
        vit(pixel_values=pixels(1), features=torch.zeros(1, 16))


def test_features_of_another_width_are_refused(vit):
    with pytest.raises(ValueError, match=r"\[B, 16\], but got \(2, 15\)"):
        vit(features=torch.zeros(2, 15))


def test_a_nan_feature_is_refused(vit):
    features = torch.ones(3, 16)
    features[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"rows \[1\] are not"):
        vit(features=features)


def taught_model() -> KnnForImageClassification:
    """The head knows ant and bee; the datastore also cat and dog."""
    model = tiny_model("vit", num_head_labels=2, knn_weight=0.3, k=6)
    assert model.datastore is not None
    assert set(model.datastore.labels.tolist()) == {0, 1, 2, 3}
    return model


def test_taught_classes_keep_their_votes():
    model = taught_model()
    with torch.no_grad():
        output = model(pixel_values=pixels(30, seed=4))
    assert output.head_logits.shape == (30, 2)
    assert output.logits.shape == (30, 4)
    votes, head = output.knn_log_probs.double().exp(), output.head_logits.double().softmax(1)
    q = votes[:, 2:].sum(1, keepdim=True)
    mixed = 0
    for row in range(30):
        wanted = torch.empty(4, dtype=torch.float64)
        wanted[2:] = votes[row, 2:]
        share = votes[row, :2] / (1 - q[row]) if q[row] < 1 - 1e-9 else head[row]
        wanted[:2] = (1 - q[row]) * (0.3 * share + 0.7 * head[row])
        torch.testing.assert_close(
            output.logits[row].double().exp(), wanted.clamp_min(1e-12), rtol=1e-4, atol=1e-6
        )
        mixed += int(0.01 < q[row] < 0.99)
    assert mixed >= 5, "too few rows with votes on both sides"


def test_taught_classes_without_rows_are_floored():
    model = taught_model()
    model.datastore = None
    with torch.no_grad():
        output = model(pixel_values=pixels(3))
    assert torch.allclose(output.logits[:, 2:], torch.tensor(FLOOR))
    assert torch.equal(output.logits[:, :2], functional.log_softmax(output.head_logits, dim=1))


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_the_cross_entropy_of_the_head(training):
    model = tiny_model("vit").train(training)
    labels = torch.tensor([0, 1, 2, 3, 1])
    output = model(pixel_values=pixels(5), labels=labels)
    assert torch.equal(output.loss, functional.cross_entropy(output.head_logits, labels))
    assert model(pixel_values=pixels(5)).loss is None


def test_the_loss_leaves_out_classes_the_head_does_not_have():
    model = taught_model()
    labels = torch.tensor([0, 3, 1, 2])
    output = model(pixel_values=pixels(4), labels=labels)
    wanted = functional.cross_entropy(output.head_logits[[0, 2]], labels[[0, 2]])
    torch.testing.assert_close(output.loss, wanted)
    only_taught = model(pixel_values=pixels(2), labels=torch.tensor([2, 3]))
    assert only_taught.loss.item() == 0


def test_a_label_that_no_class_has_is_refused(vit):
    with pytest.raises((ValueError, IndexError)):
        vit(pixel_values=pixels(2), labels=torch.tensor([0, 4]))


def test_a_negative_label_is_refused(vit):
    with pytest.raises((ValueError, IndexError)):
        vit(pixel_values=pixels(2), labels=torch.tensor([0, -1]))


def test_a_tuple_in_place_of_the_output(vit):
    options = {"pixel_values": pixels(2), "labels": torch.tensor([0, 1]), "return_neighbors": True}
    with torch.no_grad():
        whole, parts = vit(**options), vit(**options, return_dict=False)
    assert isinstance(parts, tuple)
    assert not isinstance(whole, tuple)
    fields = [whole.loss, whole.logits, whole.head_logits, whole.knn_log_probs]
    assert all(torch.equal(part, field) for part, field in zip(parts, fields, strict=False))
    assert torch.equal(parts[4].ids, whole.neighbors.ids)
    assert torch.equal(parts[5], whole.pooler_output)
    assert len(parts) == 6


def test_hidden_states_and_attentions_on_demand():
    model = tiny_model("vit")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        plain = model(pixel_values=pixels(2))
        full = model(pixel_values=pixels(2), output_hidden_states=True, output_attentions=True)
    assert (plain.hidden_states, plain.attentions) == (None, None)
    assert len(full.hidden_states) == 3
    assert [tuple(a.shape) for a in full.attentions] == [(2, 2, 17, 17)] * 2


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_gradients_reach_backbone_and_head(family):
    model = tiny_model(family).train()
    model(pixel_values=pixels(6), labels=torch.tensor([0, 1, 2, 3, 0, 1])).loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # softmax does not see the bias of a key: its gradient is rounding or 0
    assert [name for name in without if not name.endswith(("k_proj.bias", "key.bias"))] == []


def test_no_gradient_through_the_neighbours():
    model = tiny_model("vit", knn_weight=1.0)
    features = torch.randn(3, 16, requires_grad=True)
    output = model(features=features)
    assert not output.knn_log_probs.requires_grad


def test_gradient_checkpointing_gives_the_same_gradients():
    labels = torch.tensor([0, 1, 2, 3])
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("vit").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model(pixel_values=pixels(4), labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert len(gradients[0]) > 20
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, msg=name)


def test_a_deep_copy_shares_the_rows_and_nothing_else(vit):
    twin = copy.deepcopy(vit)
    assert twin.datastore is not vit.datastore
    assert twin.datastore.features.data_ptr() == vit.datastore.features.data_ptr()
    assert torch.equal(logits_of(twin), logits_of(vit))
    before = logits_of(vit)
    twin.datastore.remove(twin.datastore.ids[:20])
    perturb(twin, 5)
    assert len(vit.datastore) == 40
    assert torch.equal(logits_of(vit), before)
    assert not torch.equal(logits_of(twin), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_leaves_the_datastore_alone(dtype):
    model = tiny_model("vit")
    store, before = model.datastore, logits_of(model)
    assert store is not None
    kept = copy.deepcopy(store)
    model.to(dtype)
    assert model.datastore is store
    assert_same_rows(store, kept)
    assert not [name for name, _ in model.named_buffers() if "datastore" in name]
    after = logits_of(model, pixels(5, seed=9).to(dtype))
    assert after.dtype == torch.float32
    tolerance = 1e-4 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(after.exp(), before.exp(), rtol=0, atol=tolerance)
    with torch.no_grad():
        features = model(pixel_values=pixels(2).to(dtype)).pooler_output
        assert features.dtype == dtype
        model(features=features.float())  # cached features are float32 whatever the model is


def test_a_bfloat16_load(folder, vit):
    found = open_model(folder, dtype=torch.bfloat16)
    assert {value.dtype for value in tensors(found).values()} == {torch.bfloat16}
    assert_same_rows(found.datastore, vit.datastore)
    after = logits_of(found, pixels(5, seed=9).bfloat16())
    torch.testing.assert_close(after.exp(), logits_of(vit).exp(), rtol=0, atol=0.1)


def test_a_load_in_another_dtype_is_warned(folder, caplog):
    open_model(folder, dtype=torch.bfloat16)
    assert "bfloat16" in caplog.text


# ---- pipelines ----------------------------------------------------------------------------------


def test_the_stock_classification_pipeline_gives_the_blend(folder, vit):
    images = pictures()
    classify = pipeline("image-classification", model=str(folder), device="cpu")
    answers = classify(images, top_k=None)
    inputs = processor()(images, return_tensors="pt")
    with torch.no_grad():
        output = vit(**inputs)
    blend = 0.5 * output.knn_log_probs.exp() + 0.5 * output.head_logits.softmax(1)
    for answer, wanted in zip(answers, blend.tolist(), strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        assert scores == pytest.approx(dict(zip(LABELS, wanted, strict=True)), abs=1e-5)
    assert (output.knn_log_probs.exp() - output.head_logits.softmax(1)).abs().max() > 0.1


def test_the_stock_feature_pipeline_gives_the_features(folder, vit):
    extract = pipeline("image-feature-extraction", model=str(folder), device="cpu", pool=True)
    with torch.no_grad():
        wanted = vit(**processor()(pictures(), return_tensors="pt")).pooler_output
    for found, row in zip(extract(pictures()), wanted, strict=True):
        torch.testing.assert_close(torch.tensor(found).flatten(), row, rtol=0, atol=1e-5)


# ---- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 0}, "`k` to be a whole number >= 1, but got 0"),
        ({"k": -3}, "`k` to be a whole number >= 1, but got -3"),
        ({"knn_temperature": 0.0}, "`knn_temperature` to be > 0, but got 0"),
        ({"knn_temperature": -1.0}, "`knn_temperature` to be > 0, but got -1"),
        ({"knn_temperature": math.inf}, "`knn_temperature` to be > 0, but got inf"),
        ({"knn_temperature": math.nan}, "`knn_temperature` to be > 0, but got nan"),
        ({"knn_weight": -0.1}, r"`knn_weight` to be in \[0, 1\], but got -0.1"),
        ({"knn_weight": 1.1}, r"`knn_weight` to be in \[0, 1\], but got 1.1"),
        ({"knn_weight": math.nan}, r"`knn_weight` to be in \[0, 1\], but got nan"),
        ({"knn_weighting": "linear"}, "`knn_weighting` to be one of .*'linear'"),
        ({"pooling": "avg"}, "`pooling` to be one of .*'avg'"),
        ({"knn_pooling": "avg"}, "`knn_pooling` to be one of .*'avg'"),
        ({"metric": "euclid"}, "`metric` to be one of .*'euclid'"),
        ({"normalization": "l1"}, "`normalization` to be one of .*'l1'"),
        ({"normalization": "none"}, "`normalization` .* with metric='cosine'"),
        ({"head": "deep"}, "`head` to be one of .*'deep'"),
        ({"feature_dim": -1}, "`feature_dim` to be >= 0, but got -1"),
        ({"num_head_labels": 0}, r"`num_head_labels` to be in \[1, num_labels = 2\], but got 0"),
        ({"num_head_labels": 3}, r"`num_head_labels` to be in \[1, num_labels = 2\], but got 3"),
        ({"num_labels": 0}, r"num_labels = 0\], but got 0"),
        ({"backbone_config": {"model_type": "nowhere"}}, "model_type.*'nowhere'"),
    ],
)
def test_bad_values_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        KnnConfig(**values)


@pytest.mark.parametrize("k", [1.5, True, "3"])
def test_a_k_that_is_no_whole_number_is_refused(k):
    with pytest.raises(ValueError, match="`k`"):
        KnnConfig(k=k)


@pytest.mark.parametrize("names", [{0: "a", 5: "b"}, {0: "a", 1: "a"}], ids=["gap", "doubled"])
def test_class_names_with_a_gap_or_a_double_are_refused(names):
    with pytest.raises(ValueError, match="id2label"):
        KnnConfig(id2label=names)


def test_values_assigned_later_are_checked_when_saved(tmp_path):
    model = tiny_model("vit")
    model.config.knn_weight = 2.0
    with pytest.raises(ValueError, match="knn_weight"):
        model.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_configuration_round_trip(tmp_path):
    config = KnnConfig(
        backbone_config=ViTConfig(hidden_size=24),
        feature_dim=24,
        k=7,
        knn_temperature=0.03,
        knn_weight=0.25,
        knn_weighting="rank",
        pooling="mean",
        knn_pooling="max",
        metric="l2",
        normalization="none",
        num_head_labels=2,
        has_datastore=True,
        id2label={0: "a", 1: "b", 2: "c"},
        label2id={"a": 0, "b": 1, "c": 2},
    )
    config.save_pretrained(tmp_path)
    for found in (KnnConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(found) is KnnConfig
        assert found.to_dict() | {"_name_or_path": ""} == config.to_dict()
        assert isinstance(found.backbone_config, ViTConfig)
        assert found.backbone_config.hidden_size == 24
        assert (found.classes, found.head_classes, found.store_pooling) == (3, 2, "max")
    assert (KnnConfig().store_pooling, KnnConfig(pooling="max").store_pooling) == ("cls", "max")


def test_a_bare_configuration_is_fine_until_a_model_is_built():
    """transformers itself builds configurations without arguments."""
    config = KnnConfig()
    with pytest.raises(ValueError, match=r"from_backbone"):
        KnnForImageClassification(config)


# ---- damaged files ------------------------------------------------------------------------------


def file_of(folder: Path, kind: str) -> Path:
    """The file of a checkpoint that `kind` stands for; rows and mean may lie in one."""
    blobs = sorted(folder.glob("datastore-*.safetensors"), key=lambda path: path.stat().st_size)
    names = {"weights": "model.safetensors", "config": "config.json", "manifest": "datastore.json"}
    return {"rows": blobs[-1], "mean": blobs[0]}.get(kind) or folder / names[kind]


def truncate(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def remove(path: Path, other: Path) -> None:
    path.unlink()


def exchange(path: Path, other: Path) -> None:
    """The other checkpoint's file under this one's name."""
    path.write_bytes(other.read_bytes())


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


def flip_last_byte(path: Path, other: Path) -> None:
    """The last value of the last tensor; valid for every reader."""
    flip(path, 8 * path.stat().st_size - 8)


FAULTS: list[Fault] = [truncate, empty, lengthen, remove, exchange, flip_last_byte]
KINDS = ["weights", "config", "rows", "mean", "manifest"]
DAMAGE = [(kind, fault) for kind in KINDS for fault in FAULTS]
DAMAGE.remove(("manifest", lengthen))  # one more line end is still the same JSON


@pytest.mark.parametrize(("kind", "fault"), DAMAGE)
def test_damage_is_found_and_the_file_named(kind, fault, folder, templates):
    path = file_of(folder, kind)
    fault(path, file_of(templates / "other", kind))
    with pytest.raises((ValueError, OSError)) as caught:
        open_model(folder)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_found(kind, folder):
    """Random places; silent acceptance of any of them is a failure, whatever the class of error."""
    path = file_of(folder, kind)
    whole = path.read_bytes()
    positions = random.Random(kind).sample(range(8 * len(whole)), 80 if kind == "manifest" else 25)
    silent = []
    for position in positions:
        flip(path, position)
        try:
            open_model(folder)
            silent.append(position)
        except Exception:
            pass
        path.write_bytes(whole)
    open_model(folder)
    assert silent == []


@pytest.mark.parametrize("kind", ["rows", "mean", "manifest"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_plain_classifier_opens_beside_a_damaged_datastore(kind, fault, folder, templates, vit):
    fault(file_of(folder, kind), file_of(templates / "other", kind))
    found = open_model(folder, load_datastore=False)
    assert found.datastore is None
    assert_same_tensors(found, vit)


def test_the_plain_classifier_opens_beside_a_stale_datastore(folder, templates):
    exchange(folder / "model.safetensors", templates / "other" / "model.safetensors")
    found = open_model(folder, load_datastore=False)
    assert_same_tensors(found, open_model(templates / "other"))


def other_rows(**options: Any) -> Callable[[Datastore], Datastore]:
    return lambda store: store_like(store, **options)


def narrow(store: Datastore) -> Datastore:
    return Datastore.from_features(store.features[:, :15].float(), store.labels, store.ids)


def unknown_class(store: Datastore) -> Datastore:
    return Datastore.from_features(store.features.float(), store.labels + 1, store.ids)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(narrow, ["15", "16"], id="dim"),
        pytest.param(unknown_class, ["4"], id="labels"),
        pytest.param(other_rows(metric="l2"), ["l2", "cosine"], id="metric"),
        pytest.param(other_rows(normalization="l2"), ["l2", "l2_centered"], id="normalization"),
    ],
)
def test_a_datastore_that_disagrees_with_the_model_is_refused(change, words, tmp_path):
    model = tiny_model("vit")
    assert model.datastore is not None
    model.datastore = change(model.datastore)

    def save_and_open() -> None:
        model.save_pretrained(tmp_path / "saved")
        open_model(tmp_path / "saved")

    with pytest.raises(ValueError, match=r"datastore") as caught:
        save_and_open()
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_config_that_denies_the_datastore_beside_it_is_refused(folder, tmp_path):
    tiny_model("vit", rows=0).save_pretrained(tmp_path / "without")
    exchange(folder / "config.json", tmp_path / "without" / "config.json")
    with pytest.raises(DatastoreError, match=r"config\.json"):
        open_model(folder)


def test_a_config_that_promises_a_datastore_that_is_not_there_is_refused(tmp_path):
    tiny_model("vit", rows=0).save_pretrained(tmp_path / "saved")
    edit(tmp_path / "saved" / "config.json", has_datastore=True)
    with pytest.raises(DatastoreError, match=r"datastore\.json.*missing.*load_datastore=False"):
        open_model(tmp_path / "saved")


def test_the_code_of_a_pickle_does_not_run(folder, tmp_path):
    """Beside the weights it is not looked at; as the only weights it is an error."""
    ran = tmp_path / "ran"
    plant_pickle(folder / "pytorch_model.bin", ran)
    open_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(Exception, match=r"model\.safetensors|pytorch_model\.bin|[Ww]eights"):
        open_model(folder)
    assert not ran.exists()


def test_tensors_are_not_read_from_a_pickle(folder):
    """`weights_only` is a guard of torch's; ours is not to open the file at all."""
    state = open_model(folder, load_datastore=False).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        open_model(folder, load_datastore=False)


def plant_pickle(path: Path, ran: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    path.write_bytes(pickle.dumps(Payload()))


def test_code_named_by_the_processor_is_not_asked_about(folder, monkeypatch, tmp_path):
    """transformers may prompt on a terminal; opening ours never leads there."""
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit(
        folder / "preprocessor_config.json",
        image_processor_type="EvilProcessor",
        auto_map={"AutoImageProcessor": "evil.EvilProcessor"},
    )

    def answer(*args: Any) -> str:
        raise AssertionError("the user was asked")

    monkeypatch.setattr("builtins.input", answer)
    with pytest.raises(ValueError, match=r"trust_remote_code|processor settings"):
        open_model(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_named_by_the_config_is_ignored(key, tmp_path):
    tiny_model("vit", rows=0).save_pretrained(tmp_path / "saved")
    edit(tmp_path / "saved" / "config.json", **{key: "kernels-community/flash-attn2"})
    found = open_model(tmp_path / "saved")
    assert found.backbone.config._attn_implementation in ("sdpa", "eager")


def test_foreign_code_named_by_the_config_is_ignored(tmp_path):
    """With the package installed its own class answers for `hf_knn`, whatever auto_map says."""
    tiny_model("vit", rows=0).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForImageClassification")
    edit(tmp_path / "saved" / "config.json", auto_map=dict.fromkeys(names, "evil.Evil"))
    for opener in OPENERS:
        opened: Any = opener
        assert type(opened.from_pretrained(tmp_path / "saved")) is KnnForImageClassification
    assert not (tmp_path / "ran").exists()


# ---- stale datastores ---------------------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def new_weights(folder: Path, other: Path) -> None:
    exchange(folder / "model.safetensors", other / "model.safetensors")


def new_processor(folder: Path, other: Path) -> None:
    edit(folder / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])


def no_processor(folder: Path, other: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def new_pooling(folder: Path, other: Path) -> None:
    edit(folder / "config.json", pooling="mean")


def everything(folder: Path, other: Path) -> None:
    for change in (new_weights, new_processor, new_pooling):
        change(folder, other)


CHANGES = [
    (new_weights, "other weights"),
    (new_processor, "other processor settings"),
    (no_processor, "other processor settings"),
    (new_pooling, "other pooling"),
    (everything, "other weights, processor settings, pooling"),
]


@pytest.mark.parametrize(
    ("change", "what"), CHANGES, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_stale_datastore_is_refused_or_forced(change, what, folder, templates, vit, caplog):
    change(folder, templates / "other")
    with pytest.raises(StaleDatastoreError) as caught:
        open_model(folder)
    message = str(caught.value)
    promised = json.loads((folder / "datastore.json").read_text())["binding"]["fingerprint"]
    assert promised[:12] in message
    prints = [word for word in message.replace("…", " ").split() if is_hex(word)]
    assert len(prints) == len(set(prints)) == 2
    assert what in message
    assert "allow_stale=True" in message
    caplog.clear()
    found = open_model(folder, allow_stale=True)
    assert promised[:12] in caplog.text
    assert_same_rows(found.datastore, vit.datastore)
    logits_of(found)


def is_hex(word: str) -> bool:
    return len(word) == 12 and set(word) <= set("0123456789abcdef")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"knn_weight": 0.1}, id="blend"),
        pytest.param({"k": 3}, id="k"),
    ],
)
def test_a_changed_config_value_that_makes_no_features_is_still_found(change, folder):
    """The features are right, but the file is not the one that was saved."""
    edit(folder / "config.json", **change)
    with pytest.raises(DatastoreError, match=r"config\.json") as caught:
        open_model(folder)
    assert not isinstance(caught.value, StaleDatastoreError)


def test_another_processor_class_is_stale(folder, vit):
    """EfficientNet's divides by the deviation twice by default: same settings, other pixels."""
    edit(folder / "preprocessor_config.json", image_processor_type="EfficientNetImageProcessor")
    other = AutoImageProcessor.from_pretrained(folder)
    pair = [p(pictures(), return_tensors="pt").pixel_values for p in (vit.image_processor, other)]
    assert pair[0].shape == pair[1].shape
    assert (pair[0] - pair[1]).abs().max() > 0.1
    with pytest.raises(StaleDatastoreError, match="processor settings"):
        open_model(folder)


def test_trained_since_the_datastore_was_built(tmp_path, caplog):
    model = tiny_model("vit")
    perturb(model.backbone, 5)
    model.save_pretrained(tmp_path / "saved")
    assert "saved as stale" in caplog.text
    with pytest.raises(StaleDatastoreError, match="other weights"):
        open_model(tmp_path / "saved")
    caplog.clear()
    found = open_model(tmp_path / "saved", allow_stale=True)
    assert "does not fit" in caplog.text
    assert_same_rows(found.datastore, model.datastore)


def test_a_trained_head_leaves_the_datastore_fresh(tmp_path, caplog):
    model = tiny_model("vit")
    perturb(model.head, 5)
    model.save_pretrained(tmp_path / "saved")
    found = open_model(tmp_path / "saved")
    assert our_warnings(caplog) == []
    assert torch.equal(logits_of(found), logits_of(model))


def our_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("hf_knn") and record.levelno >= logging.WARNING
    ]


def test_rebuilt_after_training_is_fresh(tmp_path):
    model = tiny_model("vit")
    perturb(model.backbone, 5)
    model.datastore = tiny_store(model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(open_model(tmp_path / "saved")), logits_of(model))


def test_saved_again_after_loading_stays_fresh(folder, tmp_path, caplog, vit):
    for turn in range(2):
        found = open_model(folder)
        folder = tmp_path / f"again-{turn}"
        found.save_pretrained(folder)
    found = open_model(folder)
    assert our_warnings(caplog) == []
    assert_same_tensors(found, vit)
    assert_same_rows(found.datastore, vit.datastore)
    assert torch.equal(logits_of(found), logits_of(vit))


def test_trained_after_loading_is_stale(folder, tmp_path):
    found = open_model(folder)
    perturb(found.backbone, 5)
    found.save_pretrained(tmp_path / "again")
    with pytest.raises(StaleDatastoreError):
        open_model(tmp_path / "again")


def test_a_forced_stale_datastore_does_not_become_fresh_by_saving(folder, templates, tmp_path):
    new_weights(folder, templates / "other")
    found = open_model(folder, allow_stale=True)
    found.save_pretrained(tmp_path / "again")
    with pytest.raises(StaleDatastoreError):
        open_model(tmp_path / "again")


def with_other_mean(model: KnnForImageClassification) -> None:
    model.image_processor.image_mean = [0.1, 0.2, 0.3]


def with_other_pooling(model: KnnForImageClassification) -> None:
    model.config.pooling = "mean"


@pytest.mark.parametrize("change", [with_other_mean, with_other_pooling])
def test_another_processor_or_pooling_since_the_datastore_was_built_is_stale(
    change, folder, tmp_path
):
    found = open_model(folder)
    change(found)
    found.save_pretrained(tmp_path / "again")
    with pytest.raises(StaleDatastoreError):
        open_model(tmp_path / "again")


def test_a_cast_is_no_training(folder, tmp_path, caplog):
    found = open_model(folder)
    found.bfloat16().save_pretrained(tmp_path / "again")
    assert "another dtype" in caplog.text
    assert_same_tensors(open_model(tmp_path / "again"), found)


def test_trained_and_cast_is_stale(folder, tmp_path):
    found = open_model(folder)
    perturb(found.backbone, 5)
    found.bfloat16().save_pretrained(tmp_path / "again")
    with pytest.raises(StaleDatastoreError):
        open_model(tmp_path / "again")


# ---- replaced while it is read ------------------------------------------------------------------


@pytest.fixture
def after_weights(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What happens, one entry per load, between the reading of weights and datastore."""
    actions: list[Callable[[], None]] = []
    real: Any = PreTrainedModel.__dict__["from_pretrained"].__func__

    def load(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = real(cls, *args, **kwargs)
        if actions:
            actions.pop(0)()
        return loaded

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(load))
    return actions


def swapper(folder: Path, other: Path) -> Callable[[], None]:
    """Puts a copy of another checkpoint in place, in one step."""

    def swap() -> None:
        with storage.replaced_folder(folder, is_checkpoint_file) as staging:
            shutil.copytree(other, staging, dirs_exist_ok=True)

    return swap


def test_a_reader_starts_again_when_the_checkpoint_is_replaced(folder, templates, after_weights):
    wanted = open_model(templates / "other")
    after_weights.append(swapper(folder, templates / "other"))
    found = open_model(folder)
    assert after_weights == []
    assert_same_tensors(found, wanted)
    assert_same_rows(found.datastore, wanted.datastore)
    assert found.config.k == 7
    assert list(found.image_processor.image_mean) == [0.1, 0.2, 0.3]


def test_a_replacement_with_the_same_rows_is_seen(folder, tmp_path, after_weights):
    """Nothing of the old version is missing then, so only a look at the end can tell."""
    newer = open_model(folder)
    perturb(newer.head, 5)
    newer.save_pretrained(tmp_path / "newer")
    after_weights.append(swapper(folder, tmp_path / "newer"))
    assert_same_tensors(open_model(folder), newer)


def test_a_checkpoint_that_is_replaced_all_the_time_is_an_error(folder, templates, after_weights):
    for turn in range(9):
        after_weights.append(swapper(folder, templates / ("this" if turn % 2 else "other")))
    with pytest.raises((DatastoreError, OSError)):
        open_model(folder)


# ---- saving over a folder -----------------------------------------------------------------------


def test_foreign_files_stay_and_old_versions_go(folder, tmp_path):
    old_rows = file_of(folder, "rows").name
    ours = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    ours += [
        "pytorch_model.bin",
        "pytorch_model-00001-of-00003.bin",
        "datastore-0123456789ab.safetensors",
    ]
    for name in ours:
        (folder / name).write_text("old")
    foreign = ["README.md", "notes.txt", "runs/1/events.out", "runs/empty.log", ".gitattributes"]
    for name in foreign:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    (folder / "link").symlink_to("notes.txt")
    (folder / "hollow").mkdir()
    model = tiny_model("vit", seed=7)
    model.save_pretrained(folder)
    assert {name: (folder / name).read_text() for name in foreign} == {
        name: f"mine: {name}" for name in foreign
    }
    assert (folder / "link").is_symlink()
    assert (folder / "hollow").is_dir()
    assert [name for name in [*ours, old_rows] if (folder / name).exists()] == []
    assert torch.equal(logits_of(open_model(folder)), logits_of(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_a_foreign_script_stays(tmp_path):
    model = tiny_model("vit", rows=0)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "train_knn.py").write_text("mine")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "train_knn.py").read_text() == "mine"


def test_the_datastore_of_an_older_version_goes(folder):
    model = tiny_model("vit", rows=0)
    model.save_pretrained(folder)
    assert [name for name in all_files(folder) if name.startswith("datastore.j")] == []
    assert [name for name in all_files(folder) if name.startswith("datastore-")] == []
    assert not (folder / "datastore.faiss").exists()
    assert open_model(folder).datastore is None


def test_unchanged_rows_are_hard_linked(folder):
    before = file_of(folder, "rows").stat()
    found = open_model(folder)
    perturb(found.head, 5)
    found.save_pretrained(folder)
    after = file_of(folder, "rows").stat()
    assert (after.st_ino, after.st_dev) == (before.st_ino, before.st_dev)


def test_a_damaged_blob_is_not_linked_into_the_next_version(folder, vit):
    """The rows in memory are whole, those on disk went bad meanwhile."""
    found = open_model(folder)
    flip_last_byte(file_of(folder, "rows"), folder)
    found.save_pretrained(folder)
    assert_same_rows(open_model(folder).datastore, vit.datastore)


def test_every_file_has_the_default_mode(folder):
    probe = folder / "probe"
    probe.touch()
    modes = {name: oct((folder / name).stat().st_mode) for name in all_files(folder)}
    assert modes == dict.fromkeys(modes, oct(probe.stat().st_mode))


def test_a_file_in_the_way_is_refused(vit, tmp_path):
    (tmp_path / "saved").write_text("a file")
    with pytest.raises(OSError, match=r"saved.*file"):
        vit.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved").read_text() == "a file"


def test_a_symlink_to_a_folder_is_followed(vit, folder, tmp_path):
    (tmp_path / "latest").symlink_to(folder)
    tiny_model("vit", seed=7).save_pretrained(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert torch.equal(logits_of(open_model(tmp_path / "latest")), logits_of(open_model(folder)))
    assert not torch.equal(logits_of(open_model(folder)), logits_of(vit))


def test_sharded_weights(vit, tmp_path, caplog):
    saved = tmp_path / "saved"
    vit.save_pretrained(saved, max_shard_size="8KB")
    shards = sorted(path.name for path in saved.glob("model-*.safetensors"))
    assert len(shards) >= 3
    assert not (saved / "model.safetensors").exists()
    found = open_model(saved)
    assert_same_tensors(found, vit)
    assert_same_rows(found.datastore, vit.datastore)
    assert torch.equal(logits_of(found), logits_of(vit))
    assert our_warnings(caplog) == []
    names = {
        file["name"]
        for file in json.loads((saved / "datastore.json").read_text())["binding"]["files"]
    }
    assert names >= {"config.json", *shards}
    found.save_pretrained(saved)
    assert sorted(path.name for path in saved.glob("model[.-]*")) == ["model.safetensors"]
    assert_same_tensors(open_model(saved), vit)


@pytest.mark.parametrize("shard", [0, 1, -1])
def test_a_damaged_shard_is_found(shard, vit, tmp_path):
    vit.save_pretrained(tmp_path / "saved", max_shard_size="8KB")
    path = sorted((tmp_path / "saved").glob("model-*.safetensors"))[shard]
    flip_last_byte(path, path)
    with pytest.raises(DatastoreError, match=r"other weights|" + path.name):
        open_model(tmp_path / "saved")


def test_a_damaged_shard_index_is_found(vit, tmp_path):
    """An index that forgets a tensor: transformers fills it with noise and only warns."""
    vit.save_pretrained(tmp_path / "saved", max_shard_size="8KB")
    index = tmp_path / "saved" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    shard = values["weight_map"]["head.classifier.weight"]
    values["weight_map"] = {k: v for k, v in values["weight_map"].items() if v != shard}
    index.write_text(json.dumps(values))
    with pytest.raises(Exception, match=r"index\.json"):
        open_model(tmp_path / "saved")


def test_one_canonical_fingerprint_for_any_sharding(vit, folder, tmp_path):
    vit.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    prints = [
        json.loads((place / "datastore.json").read_text())["binding"]["fingerprint"]
        for place in (folder, tmp_path / "shards")
    ]
    assert prints[0] == prints[1]
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert sum(name.startswith("backbone.") for name in file.keys()) > 20  # noqa: SIM118


# ---- kills and full disks -----------------------------------------------------------------------


def versions() -> list[KnnForImageClassification]:
    """Two versions that differ in every file."""
    made = [tiny_model("vit", seed=seed, k=5 + seed) for seed in (0, 1)]
    made[1].image_processor.image_mean = [0.1, 0.2, 0.3]
    made[1].datastore = tiny_store(made[1], seed=1)
    assert made[1].datastore is not None
    made[1].datastore.digest = made_by(made[1])
    return made


def which_version(folder: Path, wanted: list[KnnForImageClassification]) -> int:
    """The version a folder holds, all of it; a mixture is an error."""
    found = open_model(folder)
    number = found.config.k - 5
    assert_same_tensors(found, wanted[number])
    assert_same_rows(found.datastore, wanted[number].datastore)
    assert list(found.image_processor.image_mean) == list(wanted[number].image_processor.image_mean)
    assert (folder / "notes.txt").read_text() == "mine"
    return number


def in_child(work: Callable[[int], None]) -> tuple[int, int]:
    """Forks this warm process to do some work; returns its id and a pipe it writes to."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    status = 1
    try:
        os.close(reader)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        torch.set_num_threads(1)
        work(writer)
        status = 0
    finally:
        os._exit(status)


def count_file_events(before_each: Callable[[int], None]) -> None:
    """Calls back before each change of the file system that Python makes, with its number."""
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        writes = (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes or event in ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"):
            count += 1
            before_each(count)

    sys.addaudithook(hook)


class MixtureError(Exception):
    """A kill left a folder that is neither of the two versions."""


def kill_saves(folder: Path, kills: int) -> None:
    """Kills saves at random moments and before random file operations; checks what is left."""
    wanted = versions()
    wanted[0].save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    name, generator, seen = folder.name, random.Random(0), [0, 0]
    allowed = {name, f".{name}.staging", f".{name}.lock", f"..{name}.staging.lock"}

    def count_work(writer: int) -> None:
        counted: list[int] = []
        count_file_events(counted.append)
        started = time.perf_counter()
        wanted[0].save_pretrained(folder)
        os.write(writer, f"{len(counted)} {time.perf_counter() - started}".encode())

    child, reader = in_child(count_work)
    os.waitpid(child, 0)
    events_text, seconds_text = os.read(reader, 100).decode().split()
    events, seconds = int(events_text), float(seconds_text)
    os.close(reader)
    assert events > 15  # a save writes about ten files, two of them code
    killed = 0

    for turn in range(kills):
        current = which_version(folder, wanted)
        by_event = generator.randrange(1, events + 1) if turn % 2 else 0

        def save_other(writer: int, current: int = current, by_event: int = by_event) -> None:
            if by_event:
                count_file_events(lambda n: os.kill(os.getpid(), 9) if n == by_event else None)
            os.write(writer, b"!")
            wanted[1 - current].save_pretrained(folder)

        child, reader = in_child(save_other)
        assert os.read(reader, 1) == b"!"
        if not by_event:
            time.sleep(generator.uniform(0, 1.2 * seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(reader)
        killed += os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        assert {path.name for path in folder.parent.iterdir()} <= allowed
        try:
            after = which_version(folder, wanted)
        except Exception as error:
            raise MixtureError(f"after kill {turn}") from error
        seen[int(after != current)] += 1
    wanted[0].save_pretrained(folder)
    assert which_version(folder, wanted) == 0
    assert {path.name for path in folder.parent.iterdir()} == {name}
    assert killed > kills // 2, "most saves ended before they were killed"
    assert seen[0] > 0, "no kill came before the commit point"


def test_killed_saves_leave_one_whole_version(tmp_path):
    kill_saves(tmp_path / "saved", 15)


@pytest.mark.faults
@pytest.mark.slow
def test_many_killed_saves_leave_one_whole_version(tmp_path):
    kill_saves(tmp_path / "saved", 100)


def test_the_kill_test_would_notice_a_naive_save(tmp_path, monkeypatch):
    """Saving in place instead of beside: a kill in the middle must be seen as a mixture."""

    @contextlib.contextmanager
    def in_place(folder: Path, is_owned: Callable[[str], bool]) -> Iterator[Path]:
        yield folder

    monkeypatch.setattr("hf_knn.model.checkpoint.replaced_folder", in_place)
    with pytest.raises(MixtureError):
        kill_saves(tmp_path / "saved", 60)


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_version(tmp_path):
    """A limit on the size of a file makes each write beyond it fail, as a full disk does."""
    wanted = versions()
    folder = tmp_path / "saved"
    wanted[0].save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    sizes = {name: (folder / name).stat().st_size for name in all_files(folder)}
    limits = sorted({0, 100, *sizes.values()})[:-1]
    assert "model.safetensors" in sizes
    outcomes = []
    for limit in limits:

        def save(writer: int, limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                wanted[1].save_pretrained(folder)
                os.write(writer, b"saved")
            except OSError as error:
                os.write(writer, f"OSError {error}".encode())

        child, reader = in_child(save)
        os.waitpid(child, 0)
        outcomes.append(os.read(reader, 4000).decode())
        os.close(reader)
        assert which_version(folder, wanted) == 0
    assert [text for text in outcomes if not text.startswith("OSError")] == []
    assert [text for text in outcomes if str(folder) not in text or "intact" not in text] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_an_error_while_saving_leaves_the_old_version(folder, vit, monkeypatch, tmp_path):
    """Some disks say only at the flush that they are full."""

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=r"No space left on device.*intact"):
        tiny_model("vit", seed=7).save_pretrained(folder)
    assert torch.equal(logits_of(open_model(folder)), logits_of(vit))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_two_renames_where_folders_cannot_be_exchanged(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "exchange", lambda first, second: False)
    (folder / "notes.txt").write_text("mine")
    model = tiny_model("vit", seed=7)
    model.save_pretrained(folder)
    assert torch.equal(logits_of(open_model(folder)), logits_of(model))
    assert (folder / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_a_failed_second_rename_brings_the_old_version_back(folder, vit, monkeypatch):
    monkeypatch.setattr(storage, "exchange", lambda first, second: False)
    real, calls = os.rename, []

    def rename(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"):
        tiny_model("vit", seed=7).save_pretrained(folder)
    assert torch.equal(logits_of(open_model(folder)), logits_of(vit))


def test_a_save_after_a_kill_between_two_renames_finds_the_old_version(folder, tmp_path):
    """Where folders cannot be exchanged there is a moment without the folder."""
    (folder / "notes.txt").write_text("mine")

    def work(writer: int) -> None:
        storage.exchange = lambda first, second: False
        count_file_events(lambda _: kill_self() if not folder.exists() else None)
        tiny_model("vit", seed=7).save_pretrained(folder)

    child, reader = in_child(work)
    os.close(reader)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not folder.exists(), "the kill came at another moment"
    tiny_model("vit", seed=8).save_pretrained(folder)
    assert (folder / "notes.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---- the card -----------------------------------------------------------------------------------


def test_a_save_writes_the_card_of_what_there_is(folder):
    card = folder / "README.md"
    assert "40 rows of 16 values" in card.read_text()
    model = open_model(folder)
    assert model.datastore is not None
    model.forget(ids=model.datastore.ids[:1])
    model.save_pretrained(folder)
    assert "39 rows of 16 values" in card.read_text()
    assert card.read_text().count("## Datastore") == 1


def test_own_words_in_a_card_survive_a_save(folder, vit):
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nOf my garden.\n")
    vit.save_pretrained(folder)
    assert card.read_text().endswith("Of my garden.\n")


@pytest.mark.parametrize("content", [b"\xff{}", b"[]", b"null", b"{"])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_settings_that_are_no_json_object_are_refused_by_name(content, name, folder):
    (folder / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=name.replace(".", r"\.")):
        open_model(folder)


@pytest.mark.parametrize("values", [{"feature_dim": "a"}, {"backbone_config": 5}])
def test_a_configuration_of_other_types_is_refused_by_name(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        KnnConfig(**values)


def test_weights_that_are_handed_over_need_no_place():
    model = tiny_model("vit")
    found = KnnForImageClassification.from_pretrained(
        None, config=copy.deepcopy(model.config), state_dict=model.state_dict()
    )
    assert all(torch.equal(found.state_dict()[n], v) for n, v in model.state_dict().items())
