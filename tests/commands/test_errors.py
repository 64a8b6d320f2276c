"""Errors that files, networks and machines of others make, as sentences."""

import errno
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from support.commands import hf_knn
from support.pictures import write_folder
from support.tiny import tiny_model

from hf_knn.commands.console import run
from hf_knn.commands.errors import EXPECTED, sentence_of


def of_hub(kind: type[Exception]) -> Exception:
    """An error of the Hub, which wants a whole response."""
    error = kind.__new__(kind)
    error.args = ("401 for https://huggingface.co/org/x",)
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "a smaller --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "a smaller --batch-size"),
        (MemoryError(), "not enough memory: MemoryError; "),
        (RuntimeError("shapes differ"), "RuntimeError: shapes differ. The same line with --debug"),
        (KeyError("x"), "KeyError: 'x'. The same line with --debug"),
        (OSError(errno.ENOSPC, "No space left", "/a/b"), "/a/b: No space left; make room there"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "/a: Permission denied; choose"),
        (OSError(errno.EROFS, "Read-only file system", "/a"), "HF_KNN_CACHE for features"),
        (FileNotFoundError(2, "No usable temporary directory found in ['/t']"), "set TMPDIR"),
        (FileNotFoundError(2, "No such file or directory", "/a"), "/a: No such file or directory."),
        (SafetensorError("header too small"), "damaged or not whole: header too small; fetch"),
        (zipfile.BadZipFile("no zip"), "damaged or not whole"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad start"), "save it as UTF-8"),
        (StrictDataclassError("Field 'k'"), "config.json is not what it has to be: Field 'k'"),
        (HTTPError("name not known"), "the Hub cannot be reached: name not known; check"),
        (OfflineModeIsEnabled("offline"), "unset HF_HUB_OFFLINE"),
        (LocalEntryNotFoundError("not cached"), "unset HF_HUB_OFFLINE"),
        (of_hub(GatedRepoError), "Ask for access"),
        (of_hub(RepositoryNotFoundError), "hf auth login"),
        (ValueError(), "ValueError."),
        (ValueError("Expected x to be y, but got z"), "Expected x to be y, but got z"),
        (ValueError("one of " + "model, " * 500), "model, …."),
    ],
)
def test_an_error_says_what_to_do(error: Exception, said: str) -> None:
    assert isinstance(error, EXPECTED)
    found = sentence_of(error)
    assert said.replace("model, …", "…") in found
    assert len(found) < 700


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    for error in (AssertionError("a bug"), TypeError("a bug"), AttributeError("a bug")):
        with pytest.raises(type(error), match="a bug"):
            run(raising(error))


def test_debug_keeps_every_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_KNN_DEBUG", "1")
    with pytest.raises(OSError, match="gone"):
        run(raising(OSError("gone")))


def test_an_interruption_says_what_was_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as left:
        run(raising(KeyboardInterrupt()))
    assert left.value.exit_code == 130
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "Stopped. Nothing was changed."
    assert said[1].startswith("To go on, or to begin again: hf-knn")


def test_an_exit_keeps_its_status() -> None:
    with pytest.raises(typer.Exit) as left:  # a RuntimeError
        run(raising(typer.Exit(3)))
    assert left.value.exit_code == 3


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", ('"id2label": {', '"id2label": [{"0": 1}], "other": {')),
        ("config.json", ('"dtype": "float32"', '"dtype": "float99"')),
        ("preprocessor_config.json", None),
    ],
)
def test_settings_no_model_can_be_made_of(
    file: str, change: tuple[str, str] | None, tmp_path: Path
) -> None:
    pictures = write_folder(tmp_path / "pictures", {"elk": 1})
    model = tiny_model("vit")
    model.datastore = None  # whose manifest would find the change
    model.save_pretrained(tmp_path / "model")
    place = tmp_path / "model" / file
    text = "[]" if change is None else place.read_text(encoding="utf-8").replace(*change, 1)
    place.write_text(text, encoding="utf-8")
    done = hf_knn("predict", tmp_path / "model", pictures / "elk" / "0.png")
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit), done.exception
    assert f"Expected {tmp_path / 'model'} to be a checkpoint with settings" in done.stderr
