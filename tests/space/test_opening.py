"""How the demo is started, and what lies beside app.py."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.space_app import PER_CLASS, published, write_picture

pytest.importorskip("gradio")
from hf_knn_space.opening import open_page
from hf_knn_space.page.benchmark import find_report
from hf_knn_space.pictures import FolderPictures, NoPictures, ZipPictures

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("started", [["-m", "hf_knn_space"], [str(ROOT / "space" / "app.py")]])
def test_it_says_how_to_start_it(started, tmp_path):
    done = subprocess.run(
        [sys.executable, *started, "--help"],
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "--pictures" in done.stdout


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """The folder of app.py, with all that may lie in it."""
    folder = tmp_path / "space"
    for name in ("model", "examples", "results"):
        (folder / name).mkdir(parents=True)
    published(tmp_path / "pictures").save_pretrained(folder / "model")
    write_picture(folder / "examples" / "a.png", 1)
    (folder / "results" / "report.html").write_text("results", "utf-8")
    with zipfile.ZipFile(folder / "pictures.zip", "w") as file:
        file.writestr("ant/0.png.webp", b"small")
    return folder


def test_what_lies_beside_app_py_is_found(beside, tmp_path):
    page = open_page(beside, None, None, None)
    assert len(page.service.model.datastore) == 3 * PER_CLASS
    assert page.samples == [str(beside / "examples" / "a.png")]
    assert isinstance(page.pictures, ZipPictures)
    assert page.picture_of("", [0])(0) == b"small"
    assert find_report(beside) == beside / "results" / "report.html"


def test_what_is_named_comes_first(beside, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_KNN_RESULTS", str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.md").write_text("others", "utf-8")
    (beside / "model").rename(tmp_path / "model")
    (beside / "model.txt").write_text("org/nowhere\n", "utf-8")
    page = open_page(beside, str(tmp_path / "model"), str(tmp_path / "pictures"), None)
    assert isinstance(page.pictures, FolderPictures)
    assert find_report(beside) == tmp_path / "other" / "report.md"
    with pytest.raises(OSError, match=r"org/nowhere|connect"):
        open_page(beside, None, "none", None)


def test_nothing_is_looked_for_where_there_is_no_app_py(beside, monkeypatch):
    monkeypatch.chdir(beside)
    page = open_page(None, str(beside / "model"), None, None)
    assert page.samples == []
    assert isinstance(page.pictures, NoPictures)
    assert find_report(None) != beside / "results" / "report.html"
