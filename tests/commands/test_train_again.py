"""`hf-knn train` onto a checkpoint that is there: refused, replaced and said, or taken back."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import hf_knn, save_backbone, wide_terminal  # noqa: F401
from support.pictures import encoded, picture, write_folder
from support.tiny import all_files
from typer.testing import Result

from hf_knn import Datastore, KnnForImageClassification
from hf_knn.commands import train as training
from hf_knn.commands.demo import build_space
from hf_knn.data.keys import hash_of_pictures
from hf_knn.data.loading import load_splits
from hf_knn.model.before import BEFORE_NAME

CLASSES = {"ant": 6, "bee": 6}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pictures") / "pets", CLASSES)


@pytest.fixture(scope="module")
def made(backbone: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "model"
    done = train(pictures, output, "--backbone", backbone)
    assert done.exit_code == 0, done.output
    assert "Replaced" not in done.stdout
    return output


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.fixture
def fox(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "new", {"fox": 3}, seed=70)


def train(pictures: Path, output: Path, *options: object) -> Result:
    return hf_knn("train", pictures, "-o", output, "--epochs", 1, *options)


def in_one_line(done: Result) -> str:
    return " ".join(done.output.split())


def opened(folder: Path) -> Any:
    return KnnForImageClassification.from_pretrained(folder)


def rows_in(folder: Path) -> Datastore:
    store = opened(folder).datastore
    assert isinstance(store, Datastore)
    return store


def content_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in all_files(folder)}


@pytest.fixture
def no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes long must not begin."""
    monkeypatch.setattr(
        KnnForImageClassification, "from_backbone", lambda *_, **__: pytest.fail("it went on")
    )


@pytest.mark.usefixtures("no_backbone")
def test_a_taught_model_is_refused_before_any_picture_is_read(
    folder: Path, pictures: Path, backbone: Path, fox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hf_knn("teach", folder, fox).exit_code == 0
    before = content_of(folder)
    monkeypatch.setattr(training, "open_labelled", lambda *_, **__: pytest.fail("it went on"))
    done = train(pictures, folder, "--backbone", backbone)
    assert done.exit_code == 1
    said = in_one_line(done)
    assert "3 pictures were taught" in said
    assert "3 of fox" in said
    assert "--overwrite" in said
    assert content_of(folder) == before


def test_a_command_puts_a_checkpoint_back_that_a_kill_left_hidden(folder: Path) -> None:
    """Between two renames, where folders cannot be exchanged in one step."""
    rows = len(rows_in(folder))
    for command in (
        ("undo", folder),
        ("relabel", folder, "--ids", "123456", "--label", "x"),
        ("evaluate", folder, "nowhere"),
        ("predict", folder, "nowhere.png"),
    ):
        folder.rename(folder.parent / ".model.old")
        done = hf_knn(*command)
        assert done.exit_code != 0  # what they are asked for cannot be done
        assert (folder / "datastore.json").is_file(), done.output
    assert len(rows_in(folder)) == rows


def renamed(folder: Path) -> None:
    (folder / "bee").rename(folder / "wasp")


def with_one_more(folder: Path) -> None:
    (folder / "bee" / "more.png").write_bytes(encoded(picture(1, 99)))


def with_one_less(folder: Path) -> None:
    (folder / "bee" / "0.png").unlink()


def with_another_content(folder: Path) -> None:
    path = folder / "bee" / "0.png"
    data, status = path.read_bytes(), path.stat()
    path.write_bytes(data[:-20] + bytes(20))  # as long, and as old
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def with_two_swapped(folder: Path) -> None:
    first, second = folder / "ant" / "0.png", folder / "bee" / "0.png"
    first.rename(folder / "ant" / "1x.png")
    second.rename(first)
    (folder / "ant" / "1x.png").rename(second)


@pytest.mark.usefixtures("no_backbone")
@pytest.mark.parametrize(
    "change", [renamed, with_one_more, with_one_less, with_another_content, with_two_swapped]
)
def test_other_pictures_are_refused_before_the_backbone_runs(
    folder: Path, pictures: Path, backbone: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    other = Path(shutil.copytree(pictures, tmp_path / "pets"))
    change(other)
    before = content_of(folder)
    done = train(other, folder, "--backbone", backbone)
    assert done.exit_code == 1
    assert "rows of pets, trained on other pictures; pass --overwrite" in in_one_line(done)
    assert content_of(folder) == before


@pytest.mark.usefixtures("no_backbone")
def test_somebody_elses_model_is_refused(backbone: Path, pictures: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(backbone, tmp_path / "vit"))
    before = content_of(model)
    done = train(pictures, model, "--backbone", backbone)
    assert done.exit_code == 1
    assert "a model that `hf-knn train` did not make" in in_one_line(done)
    assert content_of(model) == before


def test_the_same_pictures_are_the_same_wherever_they_lie(pictures: Path, tmp_path: Path) -> None:
    wanted = hash_of_pictures(load_splits(pictures))
    other = Path(shutil.copytree(pictures, tmp_path / "elsewhere" / "pets"))
    (other / "ant" / "0.png").rename(other / "ant" / "zero.png")
    assert hash_of_pictures(load_splits(other)) == wanted
    lines = [f"{path},{path.parent.name}" for path in sorted(other.rglob("*.png"))]
    (tmp_path / "rows.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    assert hash_of_pictures(load_splits(tmp_path / "rows.csv")) == wanted
    splits = load_splits(pictures)
    in_memory = {"all": splits["train"].map(lambda row: row, keep_in_memory=True)}
    assert hash_of_pictures(in_memory) == wanted
    halves = splits["train"].train_test_split(0.5, seed=0)
    assert hash_of_pictures(halves) == wanted
    assert hash_of_pictures({"train": halves["train"]}) != wanted


def test_the_same_pictures_with_other_options_replace_it_and_undo_brings_it_back(
    folder: Path, pictures: Path, backbone: Path, tmp_path: Path
) -> None:
    (folder / "notes.txt").write_text("mine")
    first, count = opened(folder), len(rows_in(folder))
    elsewhere = Path(shutil.copytree(pictures, tmp_path / "copied" / "pets"))
    options = ("--seed", 3, "--head", "mlp", "--hidden", 8)
    done = train(elsewhere, folder, "--backbone", backbone, *options)
    assert done.exit_code == 0, done.output
    said = in_one_line(done)
    assert f"Replaced what was there ({count} rows of pets)." in said
    assert f"`hf-knn undo {folder}` brings it back." in said
    second = opened(folder)
    assert (first.config.head, second.config.head) == ("linear", "mlp")
    report = (folder / "report.json").read_text()
    done = hf_knn("undo", folder)
    assert done.exit_code == 0, done.output
    assert "undo of a training" in done.stdout
    found = opened(folder)
    assert found.fingerprint_rows() == first.fingerprint_rows()
    assert found.config.head == "linear"
    assert (folder / "report.json").read_text() != report
    assert hf_knn("undo", folder).exit_code == 0
    assert opened(folder).fingerprint_rows() == second.fingerprint_rows()
    assert (folder / "report.json").read_text() == report
    assert (folder / "notes.txt").read_text() == "mine"


def test_overwrite_replaces_a_taught_model_and_undo_goes_step_by_step(
    folder: Path, pictures: Path, backbone: Path, fox: Path
) -> None:
    before = opened(folder).fingerprint_rows()
    owl = fox.parent / "owl.png"
    owl.write_bytes(encoded(picture(4, 90)))
    assert hf_knn("teach", folder, fox).exit_code == 0
    taught = opened(folder).fingerprint_rows()
    done = train(pictures, folder, "--backbone", backbone, "--overwrite")
    assert done.exit_code == 0, done.output
    trained = opened(folder)
    assert trained.config.class_names == ["ant", "bee"]
    assert hf_knn("teach", folder, owl, "--label", "owl").exit_code == 0
    assert hf_knn("undo", folder).exit_code == 0  # of what was taught last
    assert opened(folder).fingerprint_rows() == trained.fingerprint_rows()
    done = hf_knn("undo", folder)
    assert done.exit_code == 0, done.output
    assert "in which 3 pictures were taught" in in_one_line(done)
    assert opened(folder).fingerprint_rows() == taught
    assert hf_knn("teach", folder, owl, "--label", "owl").exit_code == 0
    assert hf_knn("undo", folder).exit_code == 0
    assert opened(folder).fingerprint_rows() == taught
    assert taught != before
    assert hf_knn("undo", folder).exit_code == 0
    assert opened(folder).fingerprint_rows() == trained.fingerprint_rows()


@pytest.mark.parametrize("is_same_backbone", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_is_forgotten_is_erased_in_the_version_before_by_its_picture(
    folder: Path, pictures: Path, backbone: Path, tmp_path: Path, is_same_backbone: bool
) -> None:
    first = rows_in(folder)
    if not is_same_backbone:
        torch.manual_seed(9)
        backbone = save_backbone(tmp_path / "other", layers=2)
    assert train(pictures, folder, "--backbone", backbone).exit_code == 0
    second = rows_in(folder)
    path = second.paths_of(second.ids[:1])[0]
    row, earlier = int(second.ids[0]), first.ids[(first.paths or []).index(path)].reshape(1)
    raws = [first.rows_of(earlier).features, second.rows_of([row]).features]
    done = hf_knn("forget", folder, "--path", path)
    assert done.exit_code == 0, done.output
    assert "erased in the version before the last training too: 1 of its rows" in in_one_line(done)
    found = content_of(folder)
    assert any(name.startswith(BEFORE_NAME) for name in found)
    assert not any(raw.tobytes() in data for data in found.values() for raw in raws)
    assert not any(path.encode() in data for data in found.values())
    done = hf_knn("undo", folder)
    assert done.exit_code == 1
    assert "--training" in in_one_line(done)
    assert hf_knn("undo", folder, "--training").exit_code == 0
    assert len(rows_in(folder)) == len(first) - 1
    assert path not in (rows_in(folder).paths or [])
    assert hf_knn("undo", folder).exit_code == 0
    assert path not in (rows_in(folder).paths or [])


def test_a_space_takes_the_version_along_that_is_there_and_no_other(
    folder: Path, tmp_path: Path
) -> None:
    opened(folder).save_pretrained(folder, keep_replaced=True)
    for name in ("report.json", "runs/log", ".push-1/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{tmp_path}")
    build_space(tmp_path / "space", str(folder))
    found = set(all_files(tmp_path / "space" / "model"))
    assert {"config.json", "datastore.json", "model.safetensors", "README.md"} <= found
    assert not [n for n in found if n[0] == "." or n.startswith(("report", "runs"))]


def test_what_is_taught_while_a_training_runs_is_not_lost(
    folder: Path, pictures: Path, backbone: Path, fox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = training._save

    def later(*arguments: object) -> object:
        assert hf_knn("teach", folder, fox).exit_code == 0
        return save(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "_save", later)
    done = train(pictures, folder, "--backbone", backbone)
    assert done.exit_code == 1
    assert "3 pictures were taught" in in_one_line(done)
    assert "fox" in opened(folder).config.class_names
    assert not (folder / BEFORE_NAME).exists()


def test_a_damaged_checkpoint_is_replaced_when_asked(
    folder: Path, pictures: Path, backbone: Path
) -> None:
    (folder / "datastore.json").write_text("{")
    again = partial(train, pictures, folder, "--backbone", backbone)
    done = again()
    assert done.exit_code == 1
    assert "it cannot be opened" in in_one_line(done)
    assert again("--overwrite").exit_code == 0
    assert len(rows_in(folder)) > 0
    done = hf_knn("undo", folder)
    assert done.exit_code == 1
    assert len(rows_in(folder)) > 0
