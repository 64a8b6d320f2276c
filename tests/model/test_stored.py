"""Pictures that are stored already are known again: by their pixels, or by equal features."""

import copy
import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.pictures import encoded, picture, small_model
from support.tiny import tiny_model

from hf_knn import Datastore, KnnForImageClassification
from hf_knn.core.manifest import DatastoreError
from hf_knn.core.reading import CONTENTS_NAME
from hf_knn.data.batches import content_of
from hf_knn.model.contents import Contents
from hf_knn.model.stored import StoredOtherwiseError


def photo(label: int = 1, seed: int = 0) -> Image.Image:
    return picture(label, seed, (40, 30))


@pytest.fixture
def model() -> Any:
    """With pictures of two classes, taught one by one."""
    made: Any = tiny_model("vit", k=3)
    made.teach([photo(0), photo(0, 1), photo(1)], ["ant", "ant", "bee"])
    return made


def state_of(model: Any) -> tuple[Any, ...]:
    store, contents = model.datastore, model.memory.contents
    return (
        model.fingerprint_rows(), store.ids.tolist(), store.labels.tolist(), len(model.changes),
        list(model.config.class_names), contents.ids.tolist(), contents.prints.tolist(),
    )  # fmt: skip


def reopened(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return KnnForImageClassification.from_pretrained(folder)


def with_exif(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    return encoded(image, "PNG", exif=exif)


SAME = {
    "PIL image": lambda image, folder: image,
    "array": lambda image, folder: np.asarray(image),
    "PNG": lambda image, folder: encoded(image),
    "PNG of another level": lambda image, folder: encoded(image, compress_level=0),
    "lossless WEBP": lambda image, folder: encoded(image, "WEBP", lossless=True, exact=True),
    "BMP": lambda image, folder: encoded(image, "BMP"),
    "TIFF": lambda image, folder: encoded(image, "TIFF"),
    "with metadata": lambda image, folder: with_exif(image),
    "opaque RGBA": lambda image, folder: image.convert("RGBA"),
    "renamed": lambda image, folder: _written(image, folder / "another name.png"),
}


def _written(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path


@pytest.mark.parametrize("how", SAME)
def test_a_stored_picture_is_left_out_and_said(how: str, model: Any, tmp_path: Path) -> None:
    before = state_of(model)
    receipt = model.teach([SAME[how](photo(0), tmp_path)], ["ant"])
    assert state_of(model) == before, "nothing is changed"
    assert (receipt.action, receipt.ids, receipt.skipped) == ("teach", [], [0])
    assert (receipt.rows_before, receipt.rows_after, receipt.scope) == (43, 43, "nothing")
    assert "1 of 1 pictures are stored already" in receipt.notes[0]
    assert f"row {model.datastore.ids[-3]}" in receipt.notes[0]
    assert "--again" in receipt.notes[0]
    assert str(receipt).startswith("teach: nothing; 43 → 43 stored pictures")
    added = model.teach([SAME[how](photo(0), tmp_path)], ["ant"], again=True)
    assert (len(added.ids), added.skipped, len(model.datastore)) == (1, [], 44)


@pytest.mark.parametrize(
    "other",
    [
        photo(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        photo(0).crop((0, 0, 40, 29)),
        photo(0).resize((41, 30)),
        Image.frombytes("RGB", (30, 40), photo(0).tobytes()),
        Image.open(io.BytesIO(encoded(photo(0), "JPEG", quality=60))).convert("RGB"),
    ],
    ids=["mirrored", "cropped", "resized", "another shape of the same bytes", "recompressed"],
)
def test_another_picture_is_new(other: Image.Image, model: Any) -> None:
    receipt = model.teach([other], ["bee"])
    assert (len(receipt.ids), receipt.skipped) == (1, [])


def test_new_pictures_among_stored_ones_are_taught_alone(model: Any, tmp_path: Path) -> None:
    model.keep_thumbnails({int(model.datastore.ids[0]): photo(4)})
    images = [photo(0), photo(2, 5), photo(0, 1), photo(2, 6), photo(2, 5)]
    receipt = model.teach(
        images, ["ant", "cat", "ant", "cat", "cat"], ids=[901, 902, 903, 904, 905],
        paths=["a.png", "b.png", "c.png", "d.png", "e.png"],
    )  # fmt: skip
    assert (receipt.ids, receipt.labels) == ([902, 904], ["cat", "cat"])
    assert receipt.skipped == [0, 2, 4]
    assert "3 of 5 pictures" in receipt.notes[0]
    assert "e.png (as b.png)" in receipt.notes[0]
    assert model.datastore.paths_of([902, 904]) == ["b.png", "d.png"]
    assert model.thumbnails.get(904) != model.thumbnails.get(902)
    assert model.thumbnails.get(905) is None
    row = model.datastore.rows_of([904])
    alone: Any = tiny_model("vit", k=3)
    alone.teach([photo(2, 6)], ["cat"], ids=[904])
    wanted = alone.datastore.rows_of([904]).features
    assert np.allclose(row.features, wanted, rtol=2e-3, atol=2e-3)
    assert model.changes[-1] == receipt
    found = reopened(model, tmp_path / "model")
    assert found.changes[-1].skipped == [0, 2, 4]
    assert found.teach([photo(2, 6)], ["cat"]).skipped == [0]


def test_no_pictures_are_no_trouble(model: Any) -> None:
    assert model.teach([], []).ids == []
    nothing = torch.empty(0, 16, dtype=torch.uint8)
    features = torch.empty(0, model.config.feature_dim)
    assert model.teach(features=features, contents=nothing, labels=[]).skipped == []
    empty: Any = small_model()
    empty.datastore = Datastore.from_features(torch.empty(0, 16), torch.empty(0).long())
    assert len(empty.teach([photo(0), photo(0)], [0, 0]).ids) == 1


def test_another_label_is_refused_with_what_to_do(model: Any) -> None:
    before, row_id = state_of(model), int(model.datastore.ids[-1])
    with pytest.raises(StoredOtherwiseError, match="stored under another") as caught:
        model.teach([photo(3, 9), photo(1)], ["dog", "dog"], paths=["new.png", "old.png"])
    said = str(caught.value)
    assert f"old.png as 'bee' in row {row_id}, not 'dog'" in said
    assert f"model.relabel([{row_id}], ['dog'] * 1)" in said
    assert "relabel=True" in said
    assert caught.value.moves == {"dog": [row_id]}
    assert state_of(model) == before
    with pytest.raises(StoredOtherwiseError):
        model.teach([photo(1)], ["dog"], again=True)
    assert state_of(model) == before


@pytest.mark.parametrize("head", ["ridge", "linear"])
def test_relabel_does_both_and_undo_takes_both_back(head: str, tmp_path: Path) -> None:
    model: Any = tiny_model("vit", k=3, head=head) if head == "linear" else small_model(head=head)
    if head == "ridge":
        features = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
        model.datastore = Datastore.from_features(features, torch.arange(30) % 3)
    model.teach([photo(0), photo(1)], ["ant", "bee"])
    before, numbers = state_of(model), answers(model)
    row_id = int(model.datastore.ids[-1])
    receipt = model.teach([photo(0), photo(3, 9), photo(1)], ["ant", "fox", "owl"], relabel=True)
    assert (receipt.ids[0], receipt.old_labels) == (row_id, ["bee"])
    assert receipt.labels == ["owl", "fox"]
    assert receipt.skipped == [0, 2]
    assert "bee → owl" in str(receipt)
    assert "1 of fox" in str(receipt)
    assert set(receipt.new_classes) == {"fox", "owl"}
    names = model.config.class_names
    assert names[int(model.datastore.rows_of([row_id]).labels[0])] == "owl"
    taught = state_of(model)
    again = reopened(model, tmp_path / "model")
    assert state_of(again)[0] == taught[0]
    for one in (model, again):
        undone = one.undo()
        assert undone.action == "undo"
        assert state_of(one)[:3] == before[:3]
        assert state_of(one)[4:] == before[4:]
        torch.testing.assert_close(answers(one), numbers, rtol=1e-4, atol=1e-5)
    fresh = copy.deepcopy(model)
    fresh.relabel([row_id], ["owl"])
    fresh.teach([photo(3, 9)], ["fox"])
    model.teach([photo(3, 9), photo(1)], ["fox", "owl"], relabel=True)
    torch.testing.assert_close(
        answers(model).exp().sort().values, answers(fresh).exp().sort().values
    )


def answers(model: Any) -> torch.Tensor:
    width = model.config.feature_dim
    queries = torch.randn(5, width, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(features=queries).logits


def test_one_picture_with_two_labels_is_refused(model: Any) -> None:
    before = state_of(model)
    for options in ({}, {"again": True}, {"relabel": True}):
        with pytest.raises(ValueError, match="the same one comes twice") as caught:
            model.teach([photo(4), encoded(photo(4))], ["cat", "dog"], paths=["c", "d"], **options)
        assert "c as 'cat' and d as 'dog'" in str(caught.value)
    with pytest.raises(ValueError, match="comes twice"):  # though the store has it as well
        model.teach([photo(0), photo(0)], ["ant", "dog"])
    assert state_of(model) == before


def test_features_are_never_left_out_unless_they_say_of_what_picture(model: Any) -> None:
    row = model.datastore.rows_of(model.datastore.ids[-1:])
    features = torch.from_numpy(row.features).float()
    assert len(model.teach(features=features, labels=["dog"]).ids) == 1
    print_ = torch.tensor(list(content_of(photo(1))), dtype=torch.uint8)[None]
    with pytest.raises(StoredOtherwiseError):
        model.teach(features=features, contents=print_, labels=["cat"])
    for options in ({"again": True}, {"relabel": True}):
        with pytest.raises(ValueError, match="Expected pictures, or `contents`"):
            model.teach(features=features, labels=["dog"], **options)
    with pytest.raises(ValueError, match="`contents` with `features`"):
        model.teach([photo(1)], ["dog"], contents=print_)
    assert len(model.datastore.add(features, [0])) == 1


def test_rows_without_prints_are_known_by_equal_features(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    old: Any = KnnForImageClassification.from_pretrained(tmp_path / "model")
    old.memory = old.memory.started_with(old.datastore)
    receipt = old.teach([photo(1)], ["bee"])
    assert receipt.skipped == [0], "the same picture alone gives the same bits"
    assert "43 rows were stored without a print" in " ".join(receipt.notes)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_equal_features_are_those_that_would_be_stored(dtype: str) -> None:
    model: Any = tiny_model("vit", k=3, rows=0)
    features = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    features[0] *= 1e5 if dtype == "float32" else 1  # which float16 cannot hold
    model.datastore = Datastore.from_features(features, torch.zeros(20, dtype=torch.int64))
    assert model.datastore.dtype == dtype
    pictures = [photo(0, seed) for seed in range(3)]
    model.teach(pictures, ["ant"] * 3)
    stored = model.datastore.rows_of(model.datastore.ids[-3:])
    model.memory = model.memory.started_with(model.datastore)
    query = torch.from_numpy(stored.features).float()
    unknown = torch.arange(48, dtype=torch.uint8).reshape(3, 16)
    found = model.teach(features=query, contents=unknown, labels=["ant"] * 3)
    assert found.skipped == [0, 1, 2]
    near = query + query.abs().max() * 1e-2
    assert model.teach(features=near, contents=unknown, labels=["ant"] * 3).skipped == []


def test_prints_go_with_their_rows_and_come_back(model: Any, tmp_path: Path) -> None:
    ids = model.datastore.ids[-3:].tolist()
    assert model.memory.contents.ids.tolist() == ids
    gone = content_of(photo(0))
    model.save_pretrained(tmp_path / "model")
    assert gone in (tmp_path / "model" / CONTENTS_NAME).read_bytes()
    model.forget([ids[0]])
    assert model.memory.contents.ids.tolist() == ids[1:]
    model.undo()
    assert model.teach([photo(0)], ["ant"]).skipped == [0]
    model.forget([ids[0]])
    model.save_pretrained(tmp_path / "model")
    assert gone not in (tmp_path / "model" / CONTENTS_NAME).read_bytes()
    assert model.teach([photo(0)], ["ant"]).skipped == []
    model.relabel([ids[2]], ["cat"])
    assert model.teach([photo(1)], ["cat"]).skipped == [0]
    model.teach([photo(2, 7)], ["cat"])
    model.undo()
    assert model.teach([photo(2, 7)], ["cat"]).skipped == [], "what was undone is new again"


def test_a_print_is_not_believed_of_another_row(model: Any, tmp_path: Path) -> None:
    """Rows that are changed behind the model's back, with an id that is used again."""
    store, last = model.datastore, model.datastore.ids[-1:]
    store.remove(last)
    store.add(torch.randn(1, model.config.feature_dim), [1])
    assert torch.equal(store.ids[-1:], last)
    assert model.teach([photo(1)], ["dog"]).skipped == []
    model.undo()
    again = reopened(model, tmp_path / "model")
    assert again.teach([photo(1)], ["dog"]).skipped == []
    other: Any = tiny_model("vit", k=3)
    model.datastore = other.datastore
    assert model.teach([photo(0)], ["dog"]).skipped == []


def test_copies_of_a_model_share_prints_and_do_not_mix_them(model: Any) -> None:
    other = copy.deepcopy(model)
    assert other.memory.contents is model.memory.contents
    other.teach([photo(3, 3)], ["dog"])
    assert model.teach([photo(3, 3)], ["dog"]).skipped == []
    third = pickle.loads(pickle.dumps(other))
    assert third.teach([photo(3, 3), photo(0)], ["dog", "ant"]).skipped == [0, 1]


def test_merged_rows_bring_their_prints(model: Any) -> None:
    other: Any = tiny_model("vit", k=3)
    other.teach([photo(3, 8), photo(4, 8)], ["dog", "elk"])
    other.datastore.remove(other.datastore.ids[-1:])  # behind its back
    for contents, known in ((None, []), (other.memory.contents, [0])):
        into = copy.deepcopy(model)
        into.merge(other.datastore, other.config.class_names, contents)
        assert into.datastore.ids[-1] != other.datastore.ids[-1], "it was numbered anew"
        images = [photo(3, 8), photo(4, 8)]
        assert 1 not in into.teach(images, ["dog", "elk"]).skipped
        assert len(into.memory.contents) == len(model.memory.contents) + len(known) + 1


def test_the_file_is_bound_and_trusted_no_further(model: Any, tmp_path: Path) -> None:
    folder, plain = tmp_path / "model", tmp_path / "plain"
    model.save_pretrained(folder)
    tensors = load_file(folder / CONTENTS_NAME)
    assert sorted(tensors) == ["ids", "marks", "prints"]
    assert tensors["ids"].tolist() == sorted(model.memory.contents.ids.tolist())
    (folder / CONTENTS_NAME).write_bytes(b"damaged")
    with pytest.raises(DatastoreError, match=CONTENTS_NAME):
        KnnForImageClassification.from_pretrained(folder)
    # one that no manifest names is nobody's
    tiny_model("vit", k=3).save_pretrained(plain)
    save_file(tensors, plain / CONTENTS_NAME)
    opened: Any = KnnForImageClassification.from_pretrained(plain)
    assert opened.memory.contents is None
    assert opened.teach([photo(0)], ["dog"]).skipped == []
    opened.undo()
    opened.save_pretrained(plain)
    assert not (plain / CONTENTS_NAME).exists()


@pytest.mark.parametrize(
    "change",
    [
        {"ids": torch.tensor([1, 1, 2])},
        {"ids": torch.tensor([1.0, 2.0, 3.0])},
        {"marks": torch.tensor([1, 2])},
        {"prints": torch.zeros(3, 15, dtype=torch.uint8)},
        {"prints": torch.zeros(3, 16)},
        {"ids": torch.tensor([[1], [2], [3]])},
    ],
)
def test_a_file_of_a_stranger_that_is_none_is_refused(
    change: dict[str, torch.Tensor], model: Any, tmp_path: Path
) -> None:
    model.memory.contents.save(tmp_path)
    save_file(load_file(tmp_path / CONTENTS_NAME) | change, tmp_path / CONTENTS_NAME)
    with pytest.raises(DatastoreError, match="prints of stored pictures"):
        Contents.load(tmp_path / CONTENTS_NAME)


def test_hostile_prints_harm_nobody(model: Any, tmp_path: Path) -> None:
    """Any number in a well-formed file: rows that there are not, marks of nothing."""
    contents = model.memory.contents
    prints = np.frombuffer(content_of(photo(4, 4)) * 3, np.uint8).reshape(3, 16)
    strange = Contents(contents.ids + 10**12, contents.marks, prints)
    same = Contents(contents.ids, contents.marks * 0, prints)
    for one in (strange, same):
        model.memory = replace(model.memory, contents=one)
        assert model.teach([photo(4, 4), photo(2, 9)], ["dog", "cat"]).skipped == []
        model.undo()
    model.memory = replace(model.memory, contents=replace(contents, prints=prints))
    assert model.teach([photo(4, 4)], ["ant"]).skipped == [0], "a true mark is believed"


def test_a_picture_is_known_by_its_print_whatever_made_its_features(model: Any) -> None:
    """Another back end, another batch or a short dtype gives other last bits, or more."""
    prints = torch.tensor([list(content_of(photo(0))), list(content_of(photo(1)))])
    other = torch.randn(2, model.config.feature_dim, generator=torch.Generator().manual_seed(5))
    receipt = model.teach(features=other, contents=prints.byte(), labels=["ant", "bee"])
    assert receipt.skipped == [0, 1]
    # and one picture that comes twice is one, whatever made the second
    new = torch.tensor([list(content_of(photo(2, 50)))] * 2).byte()
    receipt = model.teach(features=other, contents=new, labels=["cat", "cat"])
    assert (len(receipt.ids), receipt.skipped) == (1, [1])
