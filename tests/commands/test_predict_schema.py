"""`hf-knn predict --json`: one schema with reasons and without."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import hf_knn
from support.pictures import write_folder
from support.tiny import tiny_model

from hf_knn import KnnForImageClassification

REASONS = {"answers", "margin", "typicality", "is_typical", "flip", "notices"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was taught two classes that it cannot tell apart, and their pictures."""
    root = tmp_path_factory.mktemp("schema")
    write_folder(root / "pictures", {"elk": 6})
    write_folder(root / "pictures", {"fox": 6}, 50)
    model = tiny_model("vit", k=4)
    files = sorted((root / "pictures").rglob("*.png"))
    paths = [str(file.relative_to(root / "pictures")) for file in files]
    model.teach(files, [file.parent.name for file in files], paths=paths)
    model.save_pretrained(root / "model")
    return root


def answers(made: Path, *options: object) -> list[dict[str, Any]]:
    files = [made / "pictures" / "elk" / "0.png", made / "pictures" / "fox" / "1.png"]
    done = hf_knn("predict", made / "model", *files, "--json", *options)
    assert done.exit_code == 0, done.output
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_reasons_are_added_to_the_same_objects(made: Path) -> None:
    plain, explained = answers(made), answers(made, "--explain")
    assert len(plain) == len(explained) == 2
    for without, answer in zip(plain, explained, strict=True):
        assert set(answer) - set(without) == REASONS
        for row in answer["neighbors"]:
            row.pop("share")
        assert {name: answer[name] for name in without} == without


def test_reasons_are_those_of_the_model(made: Path) -> None:
    model = KnnForImageClassification.from_pretrained(made / "model")
    wanted = model.explain(made / "pictures" / "elk" / "0.png")
    answer = answers(made, "--explain", "--neighbors", 4)[0]
    # two classes share the first place here: both ways choose the same one
    assert answer["answer"] == wanted.answer == answer["classes"][0]["label"]
    assert [row["share"] for row in answer["neighbors"]] == pytest.approx(
        [voter.share for voter in wanted.neighbors], abs=1e-6
    )
    assert [row["id"] for row in answer["neighbors"]] == [v.row_id for v in wanted.neighbors]
    assert answer["flip"]["row_ids"] == wanted.flip.row_ids
    assert answer["margin"] == pytest.approx(wanted.margin, abs=1e-6)


@pytest.mark.parametrize("reasons", [(), ("--explain",), ("--max-error", "0.1")])
def test_top_and_neighbors_hold_with_reasons_and_without(
    reasons: tuple[str, ...], made: Path, tmp_path: Path
) -> None:
    if "--max-error" in reasons:
        model = KnnForImageClassification.from_pretrained(made / "model")
        model.config.answer_thresholds = {"0.1": 1.0}
        model.save_pretrained(tmp_path / "model")
        (tmp_path / "pictures").symlink_to(made / "pictures")
        made = tmp_path
    for answer in answers(made, "--top", 2, "--neighbors", 3, *reasons):
        assert [len(answer["classes"]), len(answer["neighbors"])] == [2, 3]
    (answer, _) = answers(made, "--neighbors", 0, *reasons)
    assert [len(answer["classes"]), len(answer["neighbors"])] == [5, 0]
    text = hf_knn(
        "predict", made / "model", made / "pictures/elk/0.png", "--neighbors", 1, "--top", 1,
        *reasons,
    ).stdout  # fmt: skip
    assert text.count(".png") == 2  # the picture's own and one neighbour's


def test_a_page_and_json_together(made: Path, tmp_path: Path) -> None:
    page = tmp_path / "why.html"
    file = made / "pictures" / "elk" / "0.png"
    done = hf_knn("predict", made / "model", file, "--json", "--html", page, "--neighbors", 1)
    assert done.exit_code == 0, done.output
    (answer,) = json.loads(done.stdout)
    assert set(answer) > REASONS
    assert f"Written: {page}" in done.stderr
    assert page.read_text(encoding="utf-8").count("<figure") == 2  # itself and one neighbour


def test_without_a_datastore_the_schema_is_the_same(tmp_path: Path, made: Path) -> None:
    model = tiny_model("vit")
    model.datastore = None
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "pictures").symlink_to(made / "pictures")
    for reasons in ((), ("--explain",)):
        answer = answers(tmp_path, *reasons)[0]
        assert answer["neighbors"] == []
        assert {row["knn"] for row in answer["classes"]} == {None}
        assert (set(answer) > REASONS) == bool(reasons)
