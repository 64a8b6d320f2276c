"""Folders as people have them, through the commands: what is said, refused, and stored."""

import json
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from support.commands import hf_knn
from support.pictures import small_backbone, small_processor, write_folder

from hf_knn import KnnForImageClassification


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    small_backbone().save_pretrained(folder)
    small_processor().save_pretrained(folder)
    return folder


def train(pictures: Path, backbone: Path, output: Path, *options: str) -> Any:
    return hf_knn(
        "train", pictures, "--backbone", backbone, "-o", output, "--head", "ridge", *options
    )


@pytest.fixture(scope="module")
def trained(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model beside `pets`, the pictures in train and test that it was made of."""
    root = tmp_path_factory.mktemp("trained")
    for split in ("train", "test"):
        for deep in ("2023", "2024"):
            for name in ("ant", "bee"):
                write_folder(root / "pets" / split / name, {deep: 6}, seed=len(split + deep))
    done = train(root / "pets", backbone, root / "model")
    assert done.exit_code == 0, done.output
    return root


def said(done: Any) -> str:
    return " ".join(done.output.split())


def test_the_label_is_the_top_folder_and_paths_keep_all_parts(trained: Path) -> None:
    model = KnnForImageClassification.from_pretrained(trained / "model")
    assert model.config.class_names == ["ant", "bee"]
    assert model.datastore is not None
    assert len(model.datastore) == 24  # of train; the test pictures are not stored
    paths = model.datastore.paths or []
    assert "train/ant/2023/0.png" in paths
    assert all((trained / "pets" / path).is_file() for path in paths)


@pytest.mark.parametrize(
    ("folders", "options", "reason"),
    [
        (["bus", "car", "train"], [], "train is called like a split and bus, car are not"),
        (["dog"], [], "at least two classes to tell apart, but all pictures of"),
        (["pets/cat", "pets/dog"], [], "if cat, dog are the classes, pass the folder"),
        (["train", "test"], [], "--splits none reads them as classes"),
        (["test/cat", "test/dog"], [], "has the splits ['test'] only"),
    ],
)
def test_what_is_refused_in_a_sentence(
    folders: list[str], options: list[str], reason: str, backbone: Path, tmp_path: Path
) -> None:
    for folder in folders:
        write_folder(tmp_path / "a" / Path(folder).parent, {Path(folder).name: 4})
    done = train(tmp_path / "a", backbone, tmp_path / "model", *options)
    assert done.exit_code == 1
    assert reason in said(done)
    assert str(tmp_path / "a") in said(done)
    assert not (tmp_path / "model").exists()


def test_a_class_called_train_is_one_with_an_option(backbone: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "a", {"bus": 6, "car": 6, "train": 6})
    (tmp_path / "a" / "car" / "x.jxl").write_bytes(b"x")
    done = train(tmp_path / "a", backbone, tmp_path / "model", "--splits", "none")
    assert done.exit_code == 0, done.output
    assert "1 .jxl in car was left out: convert it to PNG or JPEG" in said(done)
    report = json.loads((tmp_path / "model" / "train-report.json").read_text(encoding="utf-8"))
    assert report["options"]["splits"] == "none"
    names = KnnForImageClassification.from_pretrained(tmp_path / "model").config.class_names
    assert names == ["bus", "car", "train"]
    for command in ("evaluate", "doctor"):
        more = ["-o", tmp_path / "out", "--backbone", backbone] if command == "doctor" else []
        place = [tmp_path / "model"] if command == "evaluate" else []
        refused = hf_knn(command, *place, tmp_path / "a", *more)
        assert "train is called like a split" in said(refused)
        again = hf_knn(command, *place, tmp_path / "a", "--splits", "none", *more)
        assert again.exit_code == 0, again.output
        assert "hf-knn train" not in said(again) or "--splits none" in said(again)


def test_evaluate_takes_the_split_that_was_asked_for_or_none(trained: Path) -> None:
    done = hf_knn("evaluate", trained / "model", trained / "pets", "--json")
    assert done.exit_code == 0, done.output
    other = hf_knn("evaluate", trained / "model", trained / "pets", "--split", "val")
    assert other.exit_code == 1
    assert "a split 'validation', but" in said(other)
    only = hf_knn("evaluate", trained / "model", trained / "pets" / "test", "--split", "test")
    assert only.exit_code == 1  # it has one split, which is no test split
    assert "['train']" in said(only)


def test_evaluate_does_not_take_training_pictures_for_a_test_without_labels(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "pets" / "train", tmp_path / "a" / "train")
    write_folder(tmp_path / "a", {"test": 3})
    done = hf_knn("evaluate", trained / "model", tmp_path / "a")
    assert done.exit_code == 1
    assert "3 pictures of test lie in no folders of classes" in said(done)


def test_teach_says_which_splits_it_leaves_out(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "model", tmp_path / "model")
    write_folder(tmp_path / "more" / "train", {"eel": 3})
    write_folder(tmp_path / "more" / "val", {"eel": 2}, seed=50)
    done = hf_knn("teach", tmp_path / "model", tmp_path / "more")
    assert done.exit_code == 0, done.output
    assert "Only the split train is taught; left out: validation (2 pictures)." in said(done)
    model = KnnForImageClassification.from_pretrained(tmp_path / "model")
    assert model.config.class_names == ["ant", "bee", "eel"]


def test_a_class_is_taught_and_forgotten_in_either_form_of_unicode(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "model", tmp_path / "model")
    composed, decomposed = (unicodedata.normalize(form, "käfer") for form in ("NFC", "NFD"))
    write_folder(tmp_path / "a", {"cat": 2})
    write_folder(tmp_path / "b", {"dog": 2})
    for folder, label in (("a/cat", decomposed), ("b", composed)):  # b has a folder below
        done = hf_knn("teach", tmp_path / "model", tmp_path / folder, "--label", label)
        assert done.exit_code == 0, done.output
    model = KnnForImageClassification.from_pretrained(tmp_path / "model")
    assert model.config.class_names == ["ant", "bee", composed]
    done = hf_knn("forget", tmp_path / "model", "--label", decomposed)
    assert done.exit_code == 0, done.output
    model = KnnForImageClassification.from_pretrained(tmp_path / "model")
    assert model.datastore is not None
    assert len(model.datastore) == 24


@pytest.mark.parametrize("given", ["pets", "pets/train", "flat"])
def test_stored_pictures_are_found_below_splits_and_without(
    given: str, trained: Path, tmp_path: Path
) -> None:
    root = trained / given
    if given == "flat":
        root = tmp_path / "flat"
        shutil.copytree(trained / "pets" / "train", root)
    picture = trained / "pets" / "test" / "ant" / "2023" / "0.png"
    page = tmp_path / "page.html"
    done = hf_knn("predict", trained / "model", picture, "--html", page, "--pictures", root)
    assert done.exit_code == 0, done.output
    assert "found under" not in said(done)
    text = page.read_text(encoding="utf-8")
    assert text.count("<img ") > 1
    assert 'class="empty"' not in text
    looked = hf_knn("inspect", trained / "model", "-o", tmp_path / "out", "--pictures", root)
    assert looked.exit_code == 0, looked.output
    assert "Pixels" not in said(looked)


def test_a_folder_without_the_stored_pictures_is_said_and_no_frame_is_drawn(
    trained: Path, tmp_path: Path
) -> None:
    write_folder(tmp_path / "other", {"cat": 3})
    picture = trained / "pets" / "test" / "ant" / "2023" / "0.png"
    page = tmp_path / "page.html"
    done = hf_knn(
        "predict", trained / "model", picture, "--html", page, "--pictures", tmp_path / "other"
    )
    assert done.exit_code == 0, done.output
    assert re.search(rf"0 of \d+ found under {tmp_path / 'other'}", said(done))
    text = page.read_text(encoding="utf-8")
    assert re.search(r"0 of \d+ found under", text)
    assert 'class="empty"' not in text
    assert "train/ant/2023" in text
    looked = hf_knn(
        "inspect", trained / "model", "-o", tmp_path / "out", "--pictures", tmp_path / "other"
    )
    assert looked.exit_code == 1
    assert f"0 of 24 found under {tmp_path / 'other'}" in said(looked)


def test_where_some_are_missing_their_number_is_said(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "pets" / "train" / "ant", tmp_path / "part" / "ant")
    looked = hf_knn(
        "inspect", trained / "model", "-o", tmp_path / "out", "--pictures", tmp_path / "part"
    )
    assert looked.exit_code == 0, looked.output
    assert f"12 of 24 found under {tmp_path / 'part'}" in said(looked)
