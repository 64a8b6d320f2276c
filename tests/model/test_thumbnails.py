"""Small pictures in a checkpoint: only when asked for, never of a row that is gone."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.pictures import encoded, picture
from support.tiny import tiny_model
from typer.testing import CliRunner

import hf_knn_cli
from hf_knn import KnnForImageClassification
from hf_knn.core.manifest import DatastoreError
from hf_knn.core.reading import THUMBNAILS_NAME
from hf_knn.model.pictures import Thumbnails, small_webp


@pytest.fixture
def model() -> Any:
    made: Any = tiny_model("vit", k=4)
    ids = made.datastore.ids.tolist()
    made.keep_thumbnails({row: picture(row % 5, row, (300, 40 + row)) for row in ids[:-1]})
    return made


def bytes_of(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def reopened(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return KnnForImageClassification.from_pretrained(folder)


def test_a_checkpoint_has_none_unless_asked(tmp_path: Path) -> None:
    plain = tiny_model("vit")
    assert reopened(plain, tmp_path / "model").thumbnails is None
    assert not (tmp_path / "model" / THUMBNAILS_NAME).exists()


def test_they_are_small_without_metadata_and_survive_a_save(model: Any, tmp_path: Path) -> None:
    ids = model.datastore.ids.tolist()
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    model.keep_thumbnails({ids[-1]: encoded(picture(1, 7, (400, 300)), "JPEG", exif=exif)})
    found = reopened(model, tmp_path / "model")
    assert len(found.thumbnails) == len(ids)
    for row in ids:
        assert found.thumbnails.get(row) == model.thumbnails.get(row)
    with Image.open(io.BytesIO(found.thumbnails.get(ids[-1]))) as image:
        assert (image.format, max(image.size), len(image.getexif())) == ("WEBP", 192, 0)
    assert b"where I live" not in bytes_of(tmp_path / "model")
    assert copy.deepcopy(found).thumbnails is found.thumbnails
    again = reopened(found, tmp_path / "again")
    assert again.thumbnails.get(ids[0]) == found.thumbnails.get(ids[0])
    plain = KnnForImageClassification.from_pretrained(tmp_path / "model", load_datastore=False)
    assert plain.thumbnails is None
    found.keep_thumbnails(None)
    assert reopened(found, tmp_path / "model").thumbnails is None
    assert not (tmp_path / "model" / THUMBNAILS_NAME).exists()


@pytest.mark.parametrize("how", ["forget", "remove"])
def test_no_byte_of_a_forgotten_row_stays(how: str, model: Any, tmp_path: Path) -> None:
    ids = model.datastore.ids.tolist()
    gone, kept = model.thumbnails.get(ids[0]), model.thumbnails.get(ids[1])
    model.save_pretrained(tmp_path / "model")
    assert gone[30:] in bytes_of(tmp_path / "model")
    if how == "forget":
        model.forget([ids[0]])
        assert model.thumbnails.get(ids[0]) is None, "a new row may get its id"
    else:
        model.datastore.remove([ids[0]])
    model.save_pretrained(tmp_path / "model")
    stored = bytes_of(tmp_path / "model")
    assert gone[30:] not in stored
    assert kept[30:] in stored


def test_undo_brings_them_back(model: Any) -> None:
    ids = model.datastore.ids.tolist()
    before = model.thumbnails.get(ids[2])
    model.forget([ids[2]])
    model.undo()
    assert model.thumbnails.get(ids[2]) == before
    model.forget([ids[2]])
    model.teach(features=model.datastore.features[:1].float(), labels=[0], ids=[ids[2]])
    assert model.thumbnails.get(ids[2]) is None
    model.undo()
    model.undo()  # the last change that still stands
    assert model.thumbnails.get(ids[2]) == before
    assert model.memory.gone == ()


def test_a_taught_picture_is_kept_where_the_others_are(model: Any) -> None:
    before = len(model.thumbnails)
    taught = picture(1, 3, (300, 200))
    (row,) = model.teach([encoded(taught, "PNG")], [0]).ids
    assert model.thumbnails.get(row) == small_webp(taught)
    features = torch.zeros(1, model.config.feature_dim)
    (other,) = model.teach(features=features, labels=[0]).ids  # there is no picture
    assert model.thumbnails.get(other) is None
    model.undo()
    model.forget([row])
    assert len(model.thumbnails) == before
    plain: Any = tiny_model("vit")
    plain.teach([encoded(taught, "PNG")], [0])
    assert plain.thumbnails is None


def test_what_cannot_be_kept_changes_nothing(model: Any) -> None:
    before = model.thumbnails
    with pytest.raises(ValueError, match=r"does not have \[999999\]"):
        model.keep_thumbnails({999999: picture(0, 0)})
    with pytest.raises(ValueError, match="to be readable"):
        model.keep_thumbnails({int(model.datastore.ids[0]): b"nothing"})
    assert model.thumbnails is before
    for data in (b"", b"<svg/>", b"RIFF0000WEBP" + bytes(70_000)):
        with pytest.raises(ValueError, match="row 3 to be a WEBP"):
            Thumbnails({3: data})


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_file_is_named(damage: str, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / THUMBNAILS_NAME
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-9]), "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    with pytest.raises(DatastoreError, match=THUMBNAILS_NAME):
        KnnForImageClassification.from_pretrained(tmp_path / "model")
    plain = KnnForImageClassification.from_pretrained(tmp_path / "model", load_datastore=False)
    assert plain.datastore is None


def test_a_forged_file_is_refused(tmp_path: Path) -> None:
    Thumbnails({1: small_webp(picture(0, 0)), 4: small_webp(picture(1, 1))}).save(tmp_path)
    path = tmp_path / THUMBNAILS_NAME
    sound = load_file(path)
    changes = {
        "ids": [torch.tensor([1, 1]), torch.tensor([1]), torch.tensor([1.0, 4.0])],
        "ends": [sound["ends"].flip(0), sound["ends"] + 1, sound["ends"] * 0],
        "bytes": [sound["bytes"].flip(0), sound["bytes"][:-1]],
    }
    for name, values in changes.items():
        for value in values:
            save_file(sound | {name: value.contiguous()}, path)
            with pytest.raises(DatastoreError, match=THUMBNAILS_NAME):
                Thumbnails.load(path)
    save_file({"ids": sound["ids"]}, path)
    with pytest.raises(DatastoreError, match=THUMBNAILS_NAME):
        Thumbnails.load(path)


def test_pages_show_them_without_the_folder(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "asked.png").write_bytes(encoded(picture(0, 3, (32, 32))))
    page = tmp_path / "why.html"
    arguments = ["predict", str(tmp_path / "model"), str(tmp_path / "asked.png")]
    done = CliRunner().invoke(hf_knn_cli.app, [*arguments, "--html", str(page)])
    assert done.exit_code == 0, done.output
    assert page.read_text("utf-8").count("data:image/webp;base64,") >= 3
    done = CliRunner().invoke(
        hf_knn_cli.app, ["inspect", str(tmp_path / "model"), "--output", str(tmp_path / "found")]
    )
    assert done.exit_code == 0, done.output
    html = "".join(path.read_text("utf-8") for path in (tmp_path / "found").glob("*.html"))
    assert "small pictures from the checkpoint" in html
