"""`hf-knn predict --explain`, as a user types it."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.pictures import encoded, picture, write_folder
from support.tiny import LABELS, tiny_model
from typer.testing import CliRunner, Result

import hf_knn_cli
from hf_knn import KnnForImageClassification
from hf_knn.commands.predict import flip_text, notices

MARKUP = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was taught a folder of pictures, which lies beside it."""
    root = tmp_path_factory.mktemp("explain")
    write_folder(root / "pictures", {"elk": 6, "fox": 6})
    model: Any = tiny_model("vit", k=4)
    files = sorted((root / "pictures").rglob("*.png"))
    paths = [str(file.relative_to(root / "pictures")) for file in files]
    labels = [MARKUP if file.parent.name == "elk" else "fox" for file in files]
    model.teach(files, labels, paths=paths)
    model.config.answer_thresholds = {"0.1": 1.0}
    model.save_pretrained(root / "model")
    return root


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(hf_knn_cli.app, [str(argument) for argument in arguments])


def test_reasons_on_the_screen_are_those_of_the_model(made: Path) -> None:
    file = made / "pictures" / "elk" / "0.png"
    done = run("predict", made / "model", file, "--explain", "--neighbors", 3)
    assert done.exit_code == 0, done.output
    found = KnnForImageClassification.from_pretrained(made / "model").explain(file)
    said = " ".join(done.stdout.split())
    assert MARKUP in said
    assert f"{found.neighbors[0].share:.1%}" in said
    assert f"Margin of the vote: {found.margin:.1%}" in said
    assert flip_text(found) in said
    rows = json.loads(run("predict", made / "model", file, "--explain", "--json").stdout)
    assert rows[0]["answer"] == found.answer
    assert rows[0]["neighbors"][0]["path"] == "elk/0.png"
    assert rows[0]["flip"]["row_ids"] == found.flip.row_ids


def test_a_page_shows_pictures_and_names_as_text(made: Path, tmp_path: Path) -> None:
    files = sorted((made / "pictures" / "fox").glob("*.png"))[:2]
    page = tmp_path / "why" / "page.html"
    done = run(
        "predict", made / "model", *files, "--html", page, "--pictures", made / "pictures"
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    text = page.read_text(encoding="utf-8")
    assert "<img src=x" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert text.count("data:image/") > 4
    assert "http" not in text.replace("http-equiv", "")
    without = tmp_path / "bare.html"
    run("predict", made / "model", files[0], "--html", without)
    assert without.read_text(encoding="utf-8").count("data:image/") == 1  # its own only


def test_paths_that_lead_outside_are_not_shown(made: Path, tmp_path: Path) -> None:
    model = KnnForImageClassification.from_pretrained(made / "model")
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(picture(0, 7, (40, 40))))
    (tmp_path / "root").mkdir()
    model.forget(label="fox")
    model.teach([secret] * 9, ["spy"] * 9, paths=["../secret.png", str(secret), ""] * 3)
    model.save_pretrained(tmp_path / "model")
    page = tmp_path / "page.html"
    done = run(
        "predict", tmp_path / "model", secret, "--html", page, "--pictures", tmp_path / "root"
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert page.read_text(encoding="utf-8").count("data:image/") == 1


def test_it_abstains_when_asked(made: Path) -> None:
    file = made / "pictures" / "elk" / "0.png"
    said = run("predict", made / "model", file, "--max-error", 0.1).stdout
    assert "better ask somebody" in " ".join(said.split())
    assert "found before the model was taught" in " ".join(said.split())
    never = KnnForImageClassification.from_pretrained(made / "model")
    never.changes = []
    never.save_pretrained(made / "never")
    assert "before the model" not in run("predict", made / "never", file, "--max-error", 0.1).stdout
    done = run("predict", made / "model", file, "--max-error", 0.07)
    assert done.exit_code == 1
    assert "tune on held-out pictures" in " ".join(done.output.split())


def test_notices_name_disagreement_and_strangers(made: Path) -> None:
    model = KnnForImageClassification.from_pretrained(made / "model")
    found = model.explain([made / "pictures" / "elk" / "0.png"], level=0.999)
    (first,) = found
    said = " ".join(notices(first))
    head, knn = next(iter(first.head)), next(iter(first.knn))
    assert head in LABELS  # which never saw what was taught
    assert f"Head and neighbours disagree: {head} and {knn}." in said
    assert ("Unlike anything seen" in said) == (first.typicality < 0.999)


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (["--pictures", "{made}"], 2, "--html with --pictures"),
        (["--html", "x.html", "--pictures", "nowhere"], 1, "folder of the stored pictures"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: list[str], code: int, match: str, made: Path
) -> None:
    file = made / "pictures" / "elk" / "0.png"
    done = run("predict", made / "model", file, *(a.format(made=made) for a in arguments))
    assert done.exit_code == code
    assert match in " ".join(done.output.split())
