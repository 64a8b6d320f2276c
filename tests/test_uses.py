"""A model in the places where models of transformers are used."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from support.tiny import LABELS, pixels, tiny_model
from transformers import AutoModel, pipeline

from hf_knn import (
    Datastore,
    KnnForImageClassification,
    KnnImageClassificationPipeline,
    datastore_as_dataset,
)
from hf_knn.core.manifest import DatastoreError


def pictures(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("uses") / "model"
    tiny_model("vit", k=6).save_pretrained(place)
    return place


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_pipeline_that_names_neighbours(batch_size: int, folder: Path) -> None:
    classify: Any = pipeline(
        "image-classification", model=str(folder), pipeline_class=KnnImageClassificationPipeline
    )
    images = pictures(5)
    answers = classify(images, top_k=2, neighbors=4, batch_size=batch_size)
    model = KnnForImageClassification.from_pretrained(folder)
    inputs = model.image_processor(images=images, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**inputs, return_neighbors=True)
    for row, answer in enumerate(answers):
        best = wanted.logits[row].exp().topk(2)
        assert [entry["label"] for entry in answer["scores"]] == [LABELS[c] for c in best.indices]
        assert [e["score"] for e in answer["scores"]] == pytest.approx(best.values.tolist(), 1e-4)
        ids = [entry["id"] for entry in answer["neighbors"]]
        assert ids == wanted.neighbors.ids[row, :4].tolist()
        near = [entry["similarity"] for entry in answer["neighbors"]]
        assert near == pytest.approx(wanted.neighbors.similarities[row, :4].tolist(), abs=1e-5)
        labels = wanted.neighbors.labels[row, :4].tolist()
        assert [entry["label"] for entry in answer["neighbors"]] == [LABELS[c] for c in labels]
    with pytest.raises(ValueError, match="`neighbors`"):
        classify(images[0], neighbors=-1)
    classify.model.datastore = None
    assert classify(images[0])["neighbors"] == []


def test_the_feature_pipeline_gives_the_features(folder: Path) -> None:
    extract: Any = pipeline("image-feature-extraction", model=str(folder))
    (image,) = pictures(1)
    model = KnnForImageClassification.from_pretrained(folder)
    inputs = model.image_processor(images=[image], return_tensors="pt")
    with torch.no_grad():
        wanted = model(**inputs).pooler_output
    found = torch.tensor(extract(image, pool=True))
    torch.testing.assert_close(found.reshape(1, -1), wanted, atol=1e-5, rtol=1e-4)


def test_a_cast_of_the_model_leaves_the_datastore_alone(folder: Path) -> None:
    plain = KnnForImageClassification.from_pretrained(folder)
    cast = KnnForImageClassification.from_pretrained(folder, dtype=torch.bfloat16)
    assert cast.dtype == torch.bfloat16
    assert cast.datastore.features.dtype == plain.datastore.features.dtype == torch.float16
    assert torch.equal(cast.datastore.features, plain.datastore.features)
    with torch.no_grad():
        pair = [m(pixel_values=pixels(6).to(m.dtype)).logits for m in (cast, plain)]
    assert pair[0].dtype == torch.float32
    torch.testing.assert_close(pair[0].exp(), pair[1].exp(), atol=0.15, rtol=0)
    moved = plain.to("cpu", torch.float64)
    assert moved.datastore.features.dtype == torch.float16


def test_a_device_map(folder: Path) -> None:
    model = AutoModel.from_pretrained(folder, device_map="auto")
    plain = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        pair = [m(pixel_values=pixels(4).to(m.device)).logits.cpu() for m in (model, plain)]
    torch.testing.assert_close(*pair)


def test_copies_and_pickles_answer_alike_and_share_rows(folder: Path) -> None:
    model = KnnForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        wanted = model(pixel_values=pixels(4)).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(pixel_values=pixels(4)).logits, wanted)
            assert len(other.datastore) == len(model.datastore)
    other = copy.deepcopy(model)
    other.datastore.remove(other.datastore.ids[:3])
    assert len(other.datastore) == len(model.datastore) - 3


def test_a_pickle_names_the_place_of_rows_that_lie_on_disk(folder: Path, tmp_path: Path) -> None:
    store = Datastore.from_features(torch.randn(2000, 32), torch.zeros(2000, dtype=torch.int64))
    queries = torch.randn(7, 32)
    wanted = store.search(queries, 5)
    assert len(pickle.dumps(store)) > store.features.nbytes
    store.save(tmp_path)
    opened = Datastore.load(tmp_path)
    text = pickle.dumps(opened)
    assert len(text) < 20_000
    for field, expected in zip(pickle.loads(text).search(queries, 5), wanted, strict=True):
        assert torch.equal(field, expected)
    opened.remove([3])
    assert len(pickle.dumps(opened)) > store.features.nbytes  # it has moved on
    assert len(pickle.loads(pickle.dumps(opened))) == 1999
    opened.save(tmp_path)
    with pytest.raises(DatastoreError, match="was changed"):
        pickle.loads(text)


@pytest.mark.slow
def test_torch_compile_answers_alike(folder: Path) -> None:
    model = KnnForImageClassification.from_pretrained(folder)
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert torch.equal(
            compiled(pixel_values=pixels(4)).logits, model(pixel_values=pixels(4)).logits
        )


def test_batches_of_a_dataset(folder: Path) -> None:
    model = KnnForImageClassification.from_pretrained(folder)
    rows = Dataset.from_dict({"image": pictures(7)})

    def classify(batch: dict[str, Any]) -> dict[str, Any]:
        inputs = model.image_processor(images=batch["image"], return_tensors="pt")
        with torch.no_grad():
            return {"label": model(**inputs).logits.argmax(1).tolist()}

    found = rows.map(classify, batched=True, batch_size=3)["label"][:]
    inputs = model.image_processor(images=pictures(7), return_tensors="pt")
    with torch.no_grad():
        assert found == model(**inputs).logits.argmax(1).tolist()


def test_a_datastore_as_a_dataset(tmp_path: Path) -> None:
    images = pictures(5)
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    features = torch.randn(5, 8)
    paths = [f"{number}.png" for number in range(5)]
    store = Datastore.from_features(features, [0, 1, 2, 1, 0], [7, 3, 5, 11, 2], paths=paths)
    rows = datastore_as_dataset(store, LABELS, tmp_path)
    assert rows["id"][:] == store.ids.tolist()
    assert rows.features["label"].names == LABELS
    assert rows["label"][:] == store.labels.tolist()
    assert rows["path"][:] == paths
    torch.testing.assert_close(torch.tensor(rows["embedding"][:]), store.features.float())
    assert np.array_equal(np.asarray(rows[3]["image"]), np.asarray(images[3]))
    plain = datastore_as_dataset(store)
    assert plain.column_names == ["id", "label", "embedding", "path"]
    again = Datastore.from_features(
        torch.tensor(rows["embedding"][:]), rows["label"][:], rows["id"][:]
    )
    assert torch.equal(again.features, store.features)
    with pytest.raises(ValueError, match="`root`"):
        datastore_as_dataset(store, LABELS, tmp_path / "elsewhere")
    nameless = Datastore.from_features(features, [0, 1, 2, 1, 0])
    with pytest.raises(ValueError, match="no paths"):
        datastore_as_dataset(nameless, root=tmp_path)
