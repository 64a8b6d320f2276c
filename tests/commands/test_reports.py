"""`hf-knn train` and `hf-knn evaluate` write reports; nobody else gets them, and `forget` does."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.commands import hf_knn, save_backbone, wide_terminal  # noqa: F401
from support.pictures import write_folder
from support.tiny import all_files

from hf_knn import KnnForImageClassification
from hf_knn.commands.demo import build_space
from hf_knn.fit.intervals import share_of

NAMES = ("report.html", "report.json")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes that are told apart, but for one whose test pictures lie in another's folder."""
    source = tmp_path_factory.mktemp("source") / "pets"
    write_folder(source / "train", {"ant": 12, "bee": 12, "cat": 12})
    write_folder(source / "test", {"ant": 6, "bee": 6, "cat": 6}, seed=900)
    shutil.move(source / "test" / "cat" / "0.png", source / "test" / "ant" / "cat.png")
    return source


@pytest.fixture(scope="module")
def trained(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    place = tmp_path_factory.mktemp("trained")
    backbone = save_backbone(place / "backbone", patch_size=4, layers=2)
    options = ("--backbone", backbone, "-o", place / "model", "--head", "ridge", "--no-thumbnails")
    done = hf_knn("train", source, *options)
    assert done.exit_code == 0, done.output
    return place / "model", " ".join(done.stdout.split())


@pytest.fixture
def folder(trained: tuple[Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[0], tmp_path / "model"))


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    return found


def test_train_writes_a_report_and_names_it_as_the_next_thing_to_open(
    trained: tuple[Path, str],
) -> None:
    folder, said = trained
    assert f"Next: open {folder / 'report.html'}, then hf-knn predict" in said
    found = read(folder)
    assert found["pictures"] == 18
    mistakes = [each for each in found["wrong"] if each["path"] == "test/ant/cat.png"]
    assert [(each["label"], each["answer"]) for each in mistakes] == [("ant", "cat")]
    assert {near["label"] for near in mistakes[0]["neighbors"]} == {"cat"}
    page = (folder / "report.html").read_text("utf-8")
    shown = len(found["wrong"]) + sum(len(each["neighbors"]) for each in found["wrong"])
    assert page.count("<img ") == 1 + shown
    facts = json.loads((folder / "train-report.json").read_text("utf-8"))
    assert facts["rows"] == {"train": 36, "validation": 0, "test": 18}
    assert found["metrics"].items() <= facts["metrics"].items()
    right = 18 - len(found["wrong"])
    assert share_of(right, 18).say_share(18) in said
    assert re.search(r"Blend against head alone: .*18 pictures can show", said, re.IGNORECASE)


def test_a_training_without_test_pictures_leaves_no_report_of_another(
    source: Path, folder: Path
) -> None:
    options = ("--backbone", folder, "-o", folder, "--test-share", 0, "--overwrite")
    done = hf_knn("train", source / "train", *options)
    assert done.exit_code == 0, done.output
    assert not any((folder / name).exists() for name in NAMES)
    assert (folder / "train-report.json").is_file()
    assert "Next: hf-knn predict" in " ".join(done.stdout.split())
    assert hf_knn("undo", folder).exit_code == 0
    assert all((folder / name).is_file() for name in NAMES)
    assert read(folder)["pictures"] == 18


def test_forget_takes_the_reports_away_also_that_of_the_version_before(
    source: Path, folder: Path
) -> None:
    KnnForImageClassification.from_pretrained(folder).save_pretrained(folder, keep_replaced=True)
    for name in NAMES:
        shutil.copy(folder / ".before" / name, folder / name)
    done = hf_knn("forget", folder, "--path", "train/bee/3.png")
    assert done.exit_code == 0, done.output
    assert not [name for name in all_files(folder) if Path(name).name in NAMES]
    assert (folder / ".before" / "train-report.json").is_file()


def test_other_changes_leave_it_and_nobody_gets_it_along(folder: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "more", {"fox": 2})
    assert hf_knn("teach", folder, tmp_path / "more").exit_code == 0
    assert all((folder / name).is_file() for name in NAMES)
    build_space(tmp_path / "space", str(folder))
    found = [Path(name).name for name in all_files(tmp_path / "space" / "model")]
    assert not {*NAMES, "train-report.json"} & {*found}
    assert "datastore.json" in found
    manifest = (folder / "datastore.json").read_text("utf-8")
    assert "report" not in manifest
    model = KnnForImageClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")  # as a push does
    assert not [name for name in all_files(tmp_path / "saved") if "report" in name]


def test_evaluate_prints_intervals_and_hands_them_to_scripts(
    trained: tuple[Path, str], source: Path
) -> None:
    folder, _ = trained
    done = hf_knn("evaluate", folder, source)
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    assert "--report REPORT" in said
    found = json.loads(hf_knn("evaluate", folder, source, "--json").stdout)
    low, high = found["intervals"]["eval_blend_top1"]
    assert 0 < low < found["eval_blend_top1"] <= high <= 1
    right = round(18 * found["eval_blend_top1"])
    assert share_of(right, 18).say_share(18) in said
    assert {each["first"] for each in found["comparisons"]} == {"head", "knn"}
    assert found["reports"] == []
    assert found["intervals"] == {
        f"eval_{voice}_{name}": [number["low"], number["high"]]
        for voice, numbers in read(folder)["voices"].items()
        for name, number in numbers.items()
        if number["low"] is not None
    }
    assert "100.0" not in said


def test_evaluate_writes_a_report_where_it_is_told_to(
    trained: tuple[Path, str], source: Path, tmp_path: Path
) -> None:
    folder, _ = trained
    target, page = tmp_path / "new" / "report", tmp_path / "page.html"
    done = hf_knn("evaluate", folder, source, "--report", target, "--html", page, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["reports"] == [str(page), str(target / "report.html")]
    assert sorted(all_files(target)) == [*NAMES]
    assert page.read_text("utf-8") == (target / "report.html").read_text("utf-8")
    wanted, found = read(folder), read(target)
    assert found["wrong"] == wanted["wrong"]
    assert found["classes"] == wanted["classes"]
    # neighbours lie beside the pictures: their prints say so
    assert page.read_text("utf-8").count("<img ") == (folder / "report.html").read_text(
        "utf-8"
    ).count("<img ")


def test_neighbours_are_found_in_the_folder_that_is_named(
    trained: tuple[Path, str], source: Path, tmp_path: Path
) -> None:
    folder, _ = trained
    asked = Path(shutil.copytree(source / "test", tmp_path / "asked"))
    page = tmp_path / "page.html"
    done = hf_knn("evaluate", folder, asked, "--html", page)
    assert done.exit_code == 0, done.output
    assert f"Next: open {page}" in " ".join(done.stdout.split())
    text = page.read_text("utf-8")
    unseen = re.search(r"Stored pictures that are not at hand here: (\d+) of (\d+)\.", text)
    assert unseen
    assert unseen[1] == unseen[2]
    done = hf_knn("evaluate", folder, asked, "--html", page, "--pictures", source)
    assert done.exit_code == 0, done.output
    assert "not at hand" not in page.read_text("utf-8")
    done = hf_knn("evaluate", folder, asked, "--pictures", source)
    assert done.exit_code == 2
    assert "--html" in done.stderr


def test_a_place_that_cannot_be_a_report_is_refused_before_the_work(
    trained: tuple[Path, str], source: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    done = hf_knn("evaluate", trained[0], source, "--report", tmp_path / "file")
    assert done.exit_code == 1
    assert "to be a folder to write into, but it is a file" in " ".join(done.stderr.split())
