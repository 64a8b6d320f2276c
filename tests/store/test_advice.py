"""What messages say to install, in a clone, from an index and elsewhere."""

import json
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from hf_knn.store import advice


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    advice._source.cache_clear()
    yield
    advice._source.cache_clear()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "my clone"
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    return folder


def installed_from(monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any] | None) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if origin is None else json.dumps(origin)

    monkeypatch.setattr(advice, "distribution", lambda name: Installed())
    monkeypatch.setattr(advice, "_pip", lambda: "pip install")


def test_in_a_clone(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed_from(monkeypatch, {"url": clone.as_uri(), "dir_info": {"editable": True}})
    monkeypatch.chdir(clone.parent)
    assert advice.install("onnx") == f"pip install -e '{clone}[onnx]'"
    monkeypatch.chdir(clone)
    assert advice.install("cpu", "milvus") == "pip install -e '.[cpu,milvus]'"


def test_from_an_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed_from(monkeypatch, None)
    monkeypatch.setattr(advice, "_CLONE", tmp_path)
    assert advice.install("onnx") == "pip install 'hf-knn[onnx]'"


@pytest.mark.parametrize(
    ("origin", "place"),
    [
        ({"url": "https://g.it/x.git", "vcs_info": {"vcs": "git"}}, "git+https://g.it/x.git"),
        ({"url": "file:///x/hf_knn.whl", "archive_info": {}}, "file:///x/hf_knn.whl"),
    ],
)
def test_from_elsewhere(origin: Any, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed_from(monkeypatch, origin)
    assert advice.install("space") == f"pip install 'hf-knn[space] @ {place}'"


def test_sources_that_were_not_installed(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed_from(monkeypatch, None)

    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(advice, "distribution", missing)
    monkeypatch.setattr(advice, "_CLONE", clone)
    assert advice.install("onnx") == f"pip install -e '{clone}[onnx]'"


def test_a_folder_that_is_gone_is_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed_from(monkeypatch, {"url": (tmp_path / "gone").as_uri(), "dir_info": {}})
    monkeypatch.setattr(advice, "_CLONE", tmp_path)
    assert advice.install("onnx") == "pip install 'hf-knn[onnx]'"


def test_the_pip_is_that_of_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(advice.shutil, "which", lambda name: "/elsewhere/bin/pip")
    assert advice.install_package("x") == "bin/python -m pip install x"
    monkeypatch.setattr(advice.shutil, "which", lambda name: str(tmp_path / "bin" / "pip"))
    assert advice.install_package("x") == "pip install x"


def test_what_is_missing_is_named_with_the_command() -> None:
    advice.needs({"json": "json"}, "A page", "pip install json")
    with pytest.raises(ImportError, match=r"^A page needs no-such-package; run `pip install x`\.$"):
        advice.needs({"json": "json", "no_such": "no-such-package"}, "A page", "pip install x")
