"""`hf-knn code`: is the code in a checkpoint that of the installed package?"""

import hashlib
import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from support.commands import hf_knn, wide_terminal  # noqa: F401
from support.golden import LEGACY_CODE, lay_out
from support.tiny import tiny_model

from hf_knn import __version__

CONFIGURATION, MODELING = "configuration_hf_knn.py", "modeling_hf_knn.py"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code") / "model"
    tiny_model("vit", rows=0).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refused(checkpoint: Path) -> str:
    """What is said of code that is not ours, in one line."""
    done = hf_knn("code", checkpoint)
    assert done.exit_code == 1
    assert done.stderr == ""
    assert f"The code of {checkpoint} is not that of the installed hf-knn" in done.stdout
    assert "Read it before you pass trust_remote_code=True" in done.stdout
    assert "save the checkpoint again with this package to replace it" in done.stdout
    return " ".join(done.stdout.split())


def name_code(path: Path, **named: Any) -> None:
    values = json.loads(path.read_text(encoding="utf-8")) | named
    path.write_text(json.dumps(values), encoding="utf-8")


def test_what_was_just_saved_is_the_same(checkpoint: Path) -> None:
    done = hf_knn("code", checkpoint)
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    start = f"The code of {checkpoint} is that of the installed hf-knn {__version__}: "
    assert said.startswith(start + CONFIGURATION)
    for name in (CONFIGURATION, MODELING):
        digest = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
        assert f"{name} (sha256 {digest})" in said


@pytest.mark.parametrize("change", [b"#", b"\r", b"\xff"])
def test_one_byte_that_changed_is_seen(checkpoint: Path, change: bytes) -> None:
    path = checkpoint / MODELING
    data = path.read_bytes()
    place = data.index(b"\n")
    path.write_bytes(data[:place] + change + data[place:])
    said = refused(checkpoint)
    assert f"- {MODELING} is not that of the installed package." in said
    assert CONFIGURATION not in said


def test_a_file_that_is_missing_is_named(checkpoint: Path) -> None:
    (checkpoint / CONFIGURATION).unlink()
    assert f"- {CONFIGURATION} is missing." in refused(checkpoint)


def test_the_51_files_of_the_first_version_are_called_by_name(tmp_path: Path) -> None:
    said = refused(lay_out("vit_cosine", tmp_path / "old"))
    assert len(LEGACY_CODE) == 51
    assert "51 files are named like those that hf-knn 0.1 wrote into a checkpoint." in said
    assert "config.json runs other code: configuration_knn, modeling_knn." in said


@pytest.mark.parametrize(
    ("name", "named", "module"),
    [
        ("config.json", {"auto_map": {"AutoModel": "mine.Model"}}, "mine"),
        (
            "config.json",
            {"auto_map": {"AutoModel": "org/other--modeling_hf_knn.KnnForImageClassification"}},
            "org/other--modeling_hf_knn",
        ),
        ("config.json", {"custom_pipelines": {"see": {"impl": "pipes.See"}}}, "pipes"),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "eyes.Eye"}}, "eyes"),
        (
            "preprocessor_config.json",
            {"parts": [{"auto_map": {"AutoImageProcessor": ["deep.Eye", None]}}]},
            "deep",
        ),
    ],
)
def test_code_of_others_beside_ours_is_seen(
    checkpoint: Path, name: str, named: dict[str, Any], module: str
) -> None:
    name_code(checkpoint / name, **named)
    assert f"- {name} runs other code: {module}." in refused(checkpoint)


def test_a_class_may_be_called_like_a_setting(checkpoint: Path) -> None:
    name_code(checkpoint / "config.json", id2label={"0": "auto_map", "1": "impl"})
    name_code(checkpoint / "config.json", label2id={"auto_map": 0, "impl": 1})
    assert hf_knn("code", checkpoint).exit_code == 0


@pytest.mark.parametrize("text", ["{", "[" * 100_000, " " * (17 * 2**20) + '{"auto_map": {}}'])
def test_what_cannot_be_read_is_not_taken_for_harmless(checkpoint: Path, text: str) -> None:
    (checkpoint / "preprocessor_config.json").write_text(text)
    said = refused(checkpoint)
    assert "preprocessor_config.json cannot be read, so nobody knows what code it names." in said


def test_the_names_of_many_classes_are_no_difference(checkpoint: Path) -> None:
    names = {str(number): f"class {number} of many" * 4 for number in range(21_000)}
    name_code(checkpoint / "config.json", id2label=names)
    assert (checkpoint / "config.json").stat().st_size > 2**20
    assert hf_knn("code", checkpoint).exit_code == 0


def test_what_is_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    done = hf_knn("code", tmp_path)
    assert done.exit_code == 1
    assert "to be a checkpoint, but it has no config.json" in " ".join(done.stderr.split())
    assert done.stdout == ""


def test_a_folder_has_no_revision(checkpoint: Path) -> None:
    done = hf_knn("code", checkpoint, "--revision", "main")
    assert done.exit_code == 1
    assert "no revision of a folder, but got 'main'" in " ".join(done.stderr.split())


def test_names_of_a_stranger_do_not_move_the_cursor(checkpoint: Path) -> None:
    hostile = "\x1b[2J\u202e[bold]evil[/]\x00\nmodule.Model"
    name_code(checkpoint / "config.json", auto_map={"AutoModel": hostile})
    done = hf_knn("code", checkpoint)
    assert done.exit_code == 1
    assert "[2J[bold]evil[/] module" in done.stdout
    shown = done.stdout.replace("\n", "")
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cf")]
