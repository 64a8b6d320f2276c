"""No picture is judged by its own stored copy: evaluate, tune and train, as a user types them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.commands import hf_knn, save_backbone, wide_terminal  # noqa: F401
from support.pictures import write_folder
from support.tiny import tiny_model

from hf_knn import KnnForImageClassification

CLASSES = {"ant": 6, "bee": 6, "cat": 6}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pictures") / "known", CLASSES)


@pytest.fixture(scope="module")
def made(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "model"
    tiny_model("vit", k=5).save_pretrained(folder)
    done = hf_knn("teach", folder, pictures)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "new", {"ant": 3, "bee": 3}, seed=500)


@pytest.fixture
def mixed(pictures: Path, new: Path, tmp_path: Path) -> Path:
    """All that are stored, one of them renamed and one saved again, and six that are new."""
    mixed = Path(shutil.copytree(pictures, tmp_path / "mixed"))
    for path in new.rglob("*.png"):
        shutil.copy(path, mixed / path.parent.name / f"new-{path.name}")
    (mixed / "ant" / "0.png").rename(mixed / "ant" / "renamed.png")
    with Image.open(mixed / "cat" / "1.png") as image:
        image.save(mixed / "cat" / "1.png", compress_level=0)
    return mixed


def evaluated(*arguments: Any) -> dict[str, Any]:
    done = hf_knn("evaluate", *arguments, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def numbers(metrics: dict[str, Any], prefix: str) -> dict[str, float]:
    return {
        name.removeprefix(prefix): value
        for name, value in metrics.items()
        if name.startswith(prefix) and not name.endswith(("runtime", "_per_second"))
    }


def test_evaluate_counts_and_names_what_is_stored(made: Path, mixed: Path, new: Path) -> None:
    found, alone = evaluated(made, mixed), evaluated(made, new)
    assert found["eval_stored"] == 18
    assert sorted(found["stored_pictures"])[:3] == ["ant/1.png", "ant/2.png", "ant/3.png"]
    assert {"ant/renamed.png", "cat/1.png"} < set(found["stored_pictures"])
    assert not [name for name in found["stored_pictures"] if "new" in name]
    assert found["eval_knn_nll"] < found["eval_without_stored_knn_nll"]
    wanted = numbers(alone, "eval_")
    assert wanted.pop("stored") == 0
    others = numbers(found, "eval_without_stored_")
    assert others.keys() == wanted.keys()
    assert others == pytest.approx(wanted, abs=1e-4)
    assert alone["stored_pictures"] == []
    assert not numbers(alone, "eval_without_stored_")

    done = hf_knn("evaluate", made, mixed)
    said = " ".join(done.stdout.split())
    assert "18 of these 24 pictures are stored in the model" in said
    assert "ant/renamed.png" in said
    first, second = said.index("Without them: 24 pictures less 18"), said.index("With them: what")
    assert first < second
    assert "stored" not in hf_knn("evaluate", made, new).stdout


def test_pictures_that_are_all_stored_measure_nothing(made: Path, pictures: Path) -> None:
    found = evaluated(made, pictures)
    assert (found["eval_stored"], len(found["stored_pictures"])) == (18, 18)
    assert not numbers(found, "eval_without_stored_")
    said = " ".join(hf_knn("evaluate", made, pictures).stdout.split())
    assert "18 of these 18 pictures are stored" in said
    assert "No picture is left to measure it on" in said
    assert said.index("not what it can do") < said.index("100 % of 18 (at least 82 %)")
    assert "100.0" not in said
    assert "Together" not in said


def test_tune_chooses_on_the_others_only(folder: Path, made: Path, mixed: Path, new: Path) -> None:
    other = Path(shutil.copytree(made, folder.parent / "other"))
    done, alone = hf_knn("tune", folder, mixed), hf_knn("tune", other, new)
    assert done.exit_code == alone.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    assert "18 of these 24 pictures are stored in the model, and nothing is chosen on them" in said
    assert "(6 in these pictures" in said  # so few that all others are chosen on
    configs = [json.loads((place / "config.json").read_text()) for place in (folder, other)]
    assert configs[0] == configs[1]


def test_tune_refuses_pictures_that_are_all_stored(folder: Path, pictures: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    done = hf_knn("tune", folder, pictures)
    assert done.exit_code == 1
    assert "but all 18 are" in " ".join(done.output.split())
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_train_says_which_test_pictures_it_was_trained_on(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_folder(source / "train", {"ant": 12, "bee": 12})
    write_folder(source / "test", {"ant": 4, "bee": 4}, seed=900)
    shutil.copy(source / "train" / "ant" / "3.png", source / "test" / "ant" / "leaked.png")
    shutil.copy(source / "train" / "bee" / "5.png", source / "test" / "bee" / "leaked too.png")
    output = tmp_path / "model"
    backbone = save_backbone(tmp_path / "backbone", patch_size=4, layers=2)
    done = hf_knn("train", source, "--backbone", backbone, "-o", output, "--head", "ridge")
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    assert "2 of these 10 test pictures are stored in the model" in said
    assert "ant/leaked.png, " in said
    assert "bee/leaked too.png." in said
    assert "Without them: 10 test pictures less 2" in said
    metrics = json.loads((output / "report.json").read_text())["metrics"]
    assert metrics["eval_stored"] == 2
    model: Any = KnnForImageClassification.from_pretrained(output)
    measured = model.measured
    assert measured["rows"] == 8
    assert measured["metrics"]["eval_blend_top1"] == metrics["eval_without_stored_blend_top1"]
    assert "2 of 10 pictures are stored in the model and were left out." in measured["note"]
    assert "2 of 10 pictures are stored" in (output / "README.md").read_text()
    assert len(model.memory.contents) == len(model.datastore) == 24
