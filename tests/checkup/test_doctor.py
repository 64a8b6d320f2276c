"""`hf-knn doctor` as a user types it: what was planted is found, and nothing in clean pictures."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import hf_knn, save_backbone, wide_terminal  # noqa: F401
from typer.testing import Result

HOSTILE = "<img src=x onerror=alert(1)>"
COLOURS = {"ant": (220, 40, 40), "bee": (230, 200, 30), "cat": (40, 90, 210)}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"))


def picture(name: str, seed: int) -> Image.Image:
    """Blurred noise on the colour of its class: no two are alike."""
    generator = np.random.default_rng([list(COLOURS).index(name), seed])
    noise = Image.fromarray(generator.integers(0, 256, (9, 9, 3)).astype(np.uint8))
    noise = noise.resize((96, 96), Image.Resampling.BICUBIC)
    return Image.blend(Image.new("RGB", (96, 96), COLOURS[name]), noise, 0.35)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "clean"
    for split, count in {"train": 24, "test": 8}.items():
        for name in COLOURS:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                shift = 0 if split == "train" else 1000
                picture(name, shift + i).save(folder / split / name / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def spoiled(clean, tmp_path_factory) -> Path:
    """A folder with one of everything, and a label that is markup."""
    folder = tmp_path_factory.mktemp("data") / "spoiled"
    shutil.copytree(clean, folder)
    train, test = folder / "train", folder / "test"
    (train / "ant" / "broken.png").write_bytes((train / "ant" / "000.png").read_bytes()[:90])
    with Image.open(train / "bee" / "001.png") as image:
        image.save(train / "bee" / "again.png", optimize=True, compress_level=1)
    with Image.open(test / "cat" / "002.png") as image:
        buffer = io.BytesIO()
        image.resize((64, 64)).save(buffer, "JPEG", quality=70)
        (train / "cat" / "copy.jpg").write_bytes(buffer.getvalue())
    with Image.open(train / "ant" / "003.png") as image:
        image.save(train / "cat" / "conflict.png")
    picture("bee", 555).save(train / "cat" / "wrong.png")
    (train / HOSTILE).mkdir()
    Image.new("RGB", (96, 96), (10, 120, 60)).save(train / HOSTILE / "one.png")
    return folder


@pytest.fixture(scope="module")
def checked(spoiled, backbone, tmp_path_factory) -> tuple[Path, Result]:
    """The report about the spoiled folder, which stays as it is."""
    output = tmp_path_factory.mktemp("report") / "out"
    before = {path: path.stat().st_mtime_ns for path in spoiled.rglob("*")}
    done = hf_knn("doctor", spoiled, "--backbone", backbone, "-o", output)
    assert done.exit_code == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in spoiled.rglob("*")} == before
    return output, done


def lines_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "findings.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def found(lines: list[dict[str, str]], kind: str) -> set[str]:
    return {Path(line["path"]).name for line in lines if line["kind"] == kind}


def test_everything_planted_is_found(checked):
    output, done = checked
    lines = lines_of(output)
    assert found(lines, "broken") == {"broken.png"}
    assert found(lines, "exact_duplicate") == {"again.png"}  # of a conflict either may be right
    assert found(lines, "cross_split_duplicate") == {"copy.jpg"}
    assert "wrong.png" in found(lines, "label_error")
    (conflict,) = [line for line in lines if line["kind"] == "label_conflict"]
    assert {"003.png", "conflict.png"} == {
        Path(conflict["path"]).name, Path(conflict["other"]).name
    }  # fmt: skip
    wrong = next(line for line in lines if line["path"].endswith("wrong.png"))
    assert (wrong["label"], wrong["suggested_label"]) == ("cat", "bee")
    small = [line for line in lines if line["kind"] == "imbalance"]
    assert [line["label"] for line in small] == [HOSTILE]
    assert "Duplicates across splits (1)" in done.stdout
    assert "findings.csv" in done.stdout
    assert "hf-knn train" in done.stdout
    assert "--backbone" in done.stdout


def test_what_is_merely_not_read_is_to_be_converted(backbone, tmp_path):
    folder, out = tmp_path / "mixed", tmp_path / "out"
    for name in COLOURS:
        (folder / name).mkdir(parents=True)
        for i in range(4):
            picture(name, i).save(folder / name / f"{i}.png")
    picture("ant", 7).save(folder / "ant" / "scan.tiff")
    picture("ant", 8).save(folder / "ant" / "web.avif")
    Image.new("1", (900, 900)).save(folder / "ant" / "large.png")
    heights = Image.fromarray(np.full((9, 9), 8e6, np.float32))
    heights.save(folder / "bee" / "heights.tif")
    (folder / "bee" / "half.tif").write_bytes(b"II*\0" + bytes(40))
    done = hf_knn(
        "doctor", folder, "--backbone", backbone, "-o", out, "--max-pixels", 500_000, "--json"
    )
    assert done.exit_code == 0, done.stderr
    lines = lines_of(out)
    assert found(lines, "not_read") == {"large.png", "heights.tif"}
    assert found(lines, "broken") == {"half.tif"}
    for line in lines:
        is_unread = line["kind"] == "not_read"
        assert any(word in line["detail"] for word in ("convert it", "smaller")) == is_unread
    answer = json.loads(done.stdout)
    assert (answer["counts"]["not_read"], answer["counts"]["broken"]) == (2, 1)
    (advice,) = [line for line in answer["first"] if "not read" in line]
    assert "(2): Convert them" in advice
    assert not any(word in advice.lower() for word in ("repair", "delete"))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "--max-pixels or --max-bytes may allow it" in page
    again = hf_knn("doctor", folder, "--backbone", backbone, "-o", out, "--json")
    assert json.loads(again.stdout)["counts"]["not_read"] == 1  # the limit is a higher one now


def test_nothing_that_is_read_says_what_to_do(backbone, tmp_path):
    Image.new("1", (900, 900)).save(tmp_path / "large.png")
    done = hf_knn("doctor", tmp_path, "--backbone", backbone, "--max-pixels", 9)
    assert done.exit_code == 1
    said = " ".join(done.stderr.split())
    assert (
        "large.png: Is not read: the picture has 900 x 900 pixels, more than 9; make it smaller"
        in said
    )


def test_the_page_shows_hostile_labels_as_text(checked):
    page = (checked[0] / "report.html").read_text(encoding="utf-8")
    assert HOSTILE not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert page.count('<img src="data:image/') == page.count("<img ")
    assert page.count("<img ") > 5


def test_clean_pictures_raise_no_alarm(clean, backbone, tmp_path):
    done = hf_knn("doctor", clean, "--backbone", backbone, "-o", tmp_path, "--json")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["pictures"] == 96
    assert sum(answer["counts"].values()) == 0
    assert answer["first"] == []
    assert set(answer["seconds"]) >= {"decoding", "features", "duplicates", "label errors"}
    assert lines_of(tmp_path) == []


def test_a_limit_takes_some_of_each_class_and_keeps_row_numbers(
    checked, spoiled, backbone, tmp_path
):
    done = hf_knn(
        "doctor", spoiled, "--backbone", backbone, "-o", tmp_path, "--limit", 30, "--json"
    )
    assert done.exit_code == 0, done.stderr
    assert 50 <= json.loads(done.stdout)["pictures"] <= 60
    rows = {(line["split"], line["path"]): line["row"] for line in lines_of(checked[0])}
    for line in lines_of(tmp_path):
        assert rows.get((line["split"], line["path"]), line["row"]) == line["row"]


def test_missing_labels_and_files_are_findings_not_the_end(clean, backbone, tmp_path):
    table = tmp_path / "labels.csv"
    names = [(name, i) for name in COLOURS for i in range(20)]
    lines = [f"{clean}/train/{name}/{i:03d}.png,{name},{i % 10}" for name, i in names]
    lines += [f"{clean}/train/ant/023.png,,90", f"{tmp_path}/nowhere.png,ant,91"]
    table.write_text("\n".join(["path,label,patient", *lines]) + "\n")
    done = hf_knn(
        "doctor", table, "--backbone", backbone, "-o", tmp_path / "out", "--group-by", "patient"
    )
    assert done.exit_code == 0, done.stderr
    assert found(lines_of(tmp_path / "out"), "no_label") == {"023.png"}
    assert found(lines_of(tmp_path / "out"), "broken") == {"nowhere.png"}


@pytest.mark.parametrize("kind", ["folder", "csv", "empty labels"])
def test_without_labels_the_rest_is_looked_for(kind, clean, backbone, tmp_path):
    """A copy, a broken file and a stranger are found, and what was left out is said."""
    folder = tmp_path / "plain"
    folder.mkdir()
    for name in COLOURS:
        for i in range(10):
            shutil.copy(clean / "train" / name / f"{i:03d}.png", folder / f"{name}{i}.png")
    shutil.copy(folder / "ant3.png", folder / "copy.png")
    (folder / "broken.png").write_bytes(b"no picture")
    source = folder
    if kind != "folder":
        source = tmp_path / "list.csv"
        columns = ("path", "") if kind == "csv" else ("path,label", ",")
        lines = [f"{path}{columns[1]}" for path in sorted(folder.iterdir())]
        source.write_text("\n".join([columns[0], *lines]) + "\n")
    out = tmp_path / "out"
    done = hf_knn("doctor", source, "--backbone", backbone, "-o", out, "--json")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    counts = {name: count for name, count in answer["counts"].items() if count}
    assert counts.pop("outlier", 0) <= 1
    assert counts == {"broken": 1, "exact_duplicate": 1}
    looked_for = {"broken", "not_read", "exact_duplicate", "near_duplicate", "outlier"}
    assert set(answer["counts"]) == looked_for  # a 0 would be good news
    assert answer["classes"] == 0
    assert "no labels" in answer["not_looked_at"][0]
    assert found(lines_of(out), "broken") == {"broken.png"}
    assert {line["label"] for line in lines_of(out)} == {""}
    assert "Label errors, label conflicts" in (out / "report.html").read_text(encoding="utf-8")


def test_a_column_that_is_not_there_is_named(clean, backbone, tmp_path):
    done = hf_knn("doctor", clean, "--backbone", backbone, "-o", tmp_path, "--group-by", "patient")
    assert done.exit_code == 1
    assert "'patient'" in done.stderr


def test_cells_are_no_formulas(tmp_path):
    from hf_knn.checkup.findings import Finding, Kind, Pictures, write_csv

    numbers = np.arange(1)
    table = Pictures(["train"], numbers, numbers, ["=HYPERLINK(1)"], numbers, ["@SUM"])
    write_csv(tmp_path / "findings.csv", [Finding(Kind.OUTLIER, 0, 0.5, "x")], table)
    (line,) = lines_of(tmp_path)
    assert line["path"] == "'=HYPERLINK(1)"
    assert line["label"] == "'@SUM"
