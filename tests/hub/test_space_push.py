"""`hf-knn demo --push`: a Space that holds all it needs."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download
from PIL import Image
from support.hub_server import Hub
from typer.testing import CliRunner

import hf_knn_cli

SPACE = "org/remembers"
BEGUN = {".gitattributes", "app.py", "README.md", "requirements.txt", "hf_knn", "hf_knn_space"}

_OPEN = """
from pathlib import Path
import hf_knn, hf_knn_space.opening
page = hf_knn_space.opening.open_page(Path(), None, None, None)
print(hf_knn.__file__, hf_knn_space.__file__, len(page.service.model.datastore), sep="|")
"""


def push(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(hf_knn_cli.app, ["demo", *arguments])


def tops(files: Iterable[str]) -> set[str]:
    """What one sees when one opens the files of the Space."""
    return {name.partition("/")[0] for name in files}


def test_a_folder_goes_along_in_one_commit(hub: Hub, model: Any, tmp_path: Path) -> None:
    model.keep_thumbnails({int(model.datastore.ids[0]): Image.new("RGB", (300, 200), "red")})
    model.save_pretrained(tmp_path / "model")
    done = push(str(tmp_path / "model"), "--push", SPACE, "--private")
    assert done.exit_code == 0, done.stderr
    assert "Pushed: http" in done.stdout
    assert "small pictures stay here; --thumbnails takes them" in " ".join(done.stdout.split())
    files = hub.files(SPACE, kind="space")
    assert "model/thumbnails.safetensors" not in files
    assert b"small copies of training pictures" not in files["model/README.md"]
    wanted = {"hf_knn/__init__.py", "hf_knn_space/__init__.py", "hf_knn_space/page/app.py"}
    wanted |= {"model/config.json", "model/datastore.json", "model/model.safetensors"}
    assert wanted <= set(files)
    assert tops(files) == BEGUN | {"model"}
    assert not [name for name in files if "__pycache__" in name]
    assert hub.repo(SPACE, "space").private


def test_the_small_pictures_of_a_checkpoint_go_along_when_asked(
    hub: Hub, model: Any, tmp_path: Path
) -> None:
    model.keep_thumbnails({int(model.datastore.ids[0]): Image.new("RGB", (300, 200), "red")})
    model.save_pretrained(tmp_path / "model")
    kept = (tmp_path / "model" / "thumbnails.safetensors").read_bytes()
    done = push(str(tmp_path / "model"), "--push", SPACE, "--thumbnails")
    assert done.exit_code == 0, done.stderr
    assert "whoever sees the Space sees them" in " ".join(done.stdout.split())
    files = hub.files(SPACE, kind="space")
    assert files["model/thumbnails.safetensors"] == kept
    assert b"small copies of training pictures" in files["model/README.md"]
    assert push("--thumbnails").exit_code == 2
    assert push(str(tmp_path / "model"), "--push", SPACE).exit_code == 0
    assert "model/thumbnails.safetensors" not in hub.files(SPACE, kind="space")


def test_small_pictures_go_along_when_asked(hub: Hub, model: Any, tmp_path: Path) -> None:
    import io
    import zipfile

    from hf_knn import Datastore

    store = model.datastore
    paths = [f"some/{row}.jpg" for row in range(len(store))]
    model.datastore = Datastore.from_features(store.features, store.labels, paths=paths)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "pictures" / "some").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    for path in paths[1:]:
        Image.new("RGB", (400, 300), "red").save(tmp_path / "pictures" / path, exif=exif)
    pictures = str(tmp_path / "pictures")
    done = push(str(tmp_path / "model"), "--push", SPACE, "--pictures", pictures)
    assert done.exit_code == 0, done.stderr
    data = hub.files(SPACE, kind="space")["pictures.zip"]
    assert b"where I live" not in data
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        assert file.namelist() == [f"{path}.webp" for path in paths[1:]]
        assert Image.open(io.BytesIO(file.read(f"{paths[1]}.webp"))).size == (192, 144)
    done = push(str(tmp_path / "model"), "--push", SPACE, "--pictures", str(tmp_path))
    assert done.exit_code == 1
    assert "0 of 40 found under" in " ".join(done.stderr.split())


def test_a_model_of_the_hub_is_named(hub: Hub, model: Any) -> None:
    model.push_to_hub("org/knn-tiny")
    done = push("org/knn-tiny", "--push", SPACE)
    assert done.exit_code == 0, done.stderr
    files = hub.files(SPACE, kind="space")
    assert files["model.txt"] == b"org/knn-tiny\n"
    assert b"models:\n  - org/knn-tiny\n" in files["README.md"]
    assert tops(files) == BEGUN | {"model.txt"}


def test_what_is_no_checkpoint_is_not_pushed(hub: Hub, tmp_path: Path) -> None:
    for arguments, message in [
        ((str(tmp_path), "--push", SPACE), "to be a checkpoint"),
        (("no-such-thing", "--push", SPACE), "to be a checkpoint folder or a Hub id"),
        (("--push", SPACE), "Expected a checkpoint"),
    ]:
        done = push(*arguments)
        assert done.exit_code == 1
        assert message in " ".join(done.stderr.split())
    assert not hub.repos


@pytest.mark.slow
def test_what_was_pushed_opens_without_the_package(hub: Hub, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    assert push(str(tmp_path / "model"), "--push", SPACE).exit_code == 0
    folder = Path(snapshot_download(SPACE, repo_type="space", local_dir=tmp_path / "space"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", _OPEN], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *places, rows = done.stdout.strip().splitlines()[-1].split("|")
    assert all(Path(place).is_relative_to(folder) for place in places)
    assert int(rows) == len(model.datastore)
