"""Caches that cannot be written: the work goes on in a folder of its own, and it is said."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support.commands import save_backbone
from support.pictures import write_folder

from hf_knn_cli import caches
from hf_knn_cli.caches import cache_places, can_write, prepare_caches

NOWHERE = "/proc/1/none"
ROOT = Path(__file__).parents[2]
linux_only = pytest.mark.skipif(not Path("/proc/1").is_dir(), reason="needs a place like /proc")


def test_places_are_those_of_the_libraries() -> None:
    from huggingface_hub import constants

    code = "from huggingface_hub import constants as c; print(c.HF_HUB_CACHE, c.HF_ASSETS_CACHE)"
    given = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    for extra in ({}, {"XDG_CACHE_HOME": "/x/cache"}, {"HF_HOME": "/x/hf"}, {"HF_HUB_CACHE": "/h"}):
        environment = given | extra
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        places = cache_places(environment)
        found = [str(places[name]) for name in ("HF_HUB_CACHE", "HF_ASSETS_CACHE")]
        assert found == done.stdout.split()
    assert constants.HF_HUB_CACHE  # the name is still there


def test_without_a_home_there_is_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda text: text)  # a user without an entry
    places = cache_places({})
    assert set(places.values()) == {None}
    assert cache_places({"HF_KNN_CACHE": "/k"})["HF_KNN_CACHE"] == Path("/k")


def test_a_place_is_tried_where_it_would_lie(tmp_path: Path) -> None:
    assert can_write(tmp_path / "not" / "yet" / "there")
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").touch()
    assert not can_write(tmp_path / "file")
    assert not can_write(tmp_path / "file" / "below")
    assert not can_write(None)


def test_a_full_disk_is_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None: ...

        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    assert not can_write(tmp_path / "somewhere")


@pytest.fixture
def blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that is a file, so that nothing can be made in it, for the super user neither."""
    home = tmp_path / "home"
    home.touch()
    for name in (*cache_places({}), "HF_HOME", "XDG_CACHE_HOME", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setenv(name, "set, so that it is restored")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(caches.atexit, "register", lambda *_: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return home


def test_each_cache_that_cannot_be_written_moves_and_no_other(
    blocked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_KNN_CACHE", str(tmp_path / "mine"))
    prepare_caches()
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert said.startswith(f"Note: nothing can be written in {blocked}/.cache/huggingface, ")
    assert "set HF_HOME and HF_KNN_CACHE" in said
    assert os.environ["HF_KNN_CACHE"] == str(tmp_path / "mine")
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "MPLCONFIGDIR"):
        place = Path(os.environ[name])
        assert place.is_relative_to(tmp_path)
        assert place.parent.is_dir()
        assert can_write(place)
    prepare_caches()
    assert capsys.readouterr().err == ""  # once


def test_a_hub_cache_that_can_only_be_read_is_used(
    blocked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    (shared / "models--org--name").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(shared))
    monkeypatch.setattr(
        caches, "can_write", lambda place: place is not None and not place.is_relative_to(shared)
    )
    prepare_caches()
    assert os.environ["HF_HUB_CACHE"] == str(shared)


def test_with_no_place_at_all_one_variable_is_named(
    blocked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere(prefix: str) -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "mkdtemp", nowhere)
    with pytest.raises(SystemExit) as left:
        prepare_caches()
    assert left.value.code == 1
    assert "set TMPDIR to a folder that can be written" in capsys.readouterr().err


@linux_only
@pytest.mark.slow
def test_a_container_of_another_user_trains(tmp_path: Path) -> None:
    """With a home, a cache and a configuration that cannot be made, in a process of its own."""
    backbone = save_backbone(tmp_path / "backbone")
    pictures = write_folder(tmp_path / "pictures", {"elk": 4, "fox": 4})
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "XDG_", "MPL"))}
    environment = kept | dict.fromkeys(("HOME", "HF_HOME", "XDG_CACHE_HOME"), NOWHERE)
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    # also a stream that knows no λ, no … and no picture of a bar
    environment |= {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = ["train", pictures, "-o", tmp_path / "model", "--backbone", backbone, "--epochs", 2]
    done = subprocess.run(
        [sys.executable, "-m", "hf_knn_cli", *map(str, command)], env=environment, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "train-report.json").is_file()
    assert done.stderr.count("Note: nothing can be written in") == 1
    assert "lambda = " in done.stdout
    assert not list(tmp_path.glob("hf-knn-caches-*"))  # gone with the end of the run
