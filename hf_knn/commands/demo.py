"""`hf-knn demo`: the page around a checkpoint, here or as a Space of the Hub."""

import re
import shutil
import tempfile
import zipfile
from importlib.resources import files
from pathlib import Path

import typer
from huggingface_hub import HfApi

from ..checkup.examine import check_root, open_picture, pictures_of
from ..core.manifest import MANIFEST_NAME
from ..core.reading import THUMBNAILS_NAME
from ..data.walk import StoredPictures
from ..features.backends import check_backend
from ..model.card import THUMBNAILS_NOTE, leave_thumbnails
from ..model.pictures import small_webp
from ..store.advice import install, needs
from ..store.datastore import Datastore
from ..store.hub import CARD_NAME, KEPT_TO_ONESELF
from .console import console, escape
from .stopping import stands
from .use import PUSH_STANDS

_PICTURES = "pictures.zip"
_GO_ALONG = "The checkpoint's small pictures go along; whoever sees the Space sees them."
_LEFT_OUT = shutil.ignore_patterns("__pycache__")
_KEPT = shutil.ignore_patterns(*KEPT_TO_ONESELF, "runs")
"""What of a checkpoint folder is nobody's business: earlier versions, logs, places on a disk."""


def show_demo(
    checkpoint: str | None, port: int | None, pictures: Path | None, backend: str | None = None
) -> None:
    """Starts the page and waits until it is closed.

    Args:
        checkpoint: a folder or a Hub id; None builds a small model.
        port: of the server; None takes a free one.
        pictures: the folder that the checkpoint was trained on.
        backend: what makes features; None takes `$HF_KNN_BACKEND`, else `torch`.

    Raises:
        ImportError: without gradio, or the backend.
        ValueError: for a backend that there is not.
        typer.Exit: with the status of the page, if it ends with an error, which it has said.
    """
    needs({"gradio": "gradio"}, "hf-knn demo", install("space"))
    given = {"port": port, "pictures": pictures, "backend": backend and check_backend(backend)}
    arguments = [] if checkpoint is None else [checkpoint]
    for name, value in given.items():
        arguments += [] if value is None else [f"--{name}", str(value)]
    from hf_knn_space import main  # it stands on this package, not below it

    try:  # in this process: what ends it, a signal too, ends the server
        status = main(arguments)
    except KeyboardInterrupt:  # how one closes it
        return
    if status:
        raise typer.Exit(status)


def push_space(
    checkpoint: str | None,
    repo_id: str,
    private: bool,
    pictures: Path | None,
    thumbnails: bool = False,
) -> None:
    """Pushes the page as a Space, in one commit, with the package and a checkpoint of a folder.

    Args:
        checkpoint: a folder, whose files go along, or a Hub id, which the Space opens.
        repo_id: `org/name` of the Space; made if it is not there.
        private: whether a Space that is made is private.
        pictures: the folder that the checkpoint was trained on, of which small pictures go along
            for everybody to see; None shows plain tiles.
        thumbnails: take the small pictures along that the checkpoint keeps.

    Raises:
        ValueError: without a checkpoint, or for a folder without its pictures.
        OSError: if the Hub refuses.
    """
    if checkpoint is None:
        raise ValueError("Expected a checkpoint to push the Space with; pass a folder or a Hub id.")
    stands(PUSH_STANDS)
    api = HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "space"
        build_space(folder, checkpoint, thumbnails)
        if (folder / "model" / THUMBNAILS_NAME).is_file():
            console.print(_GO_ALONG)
        elif Path(checkpoint, THUMBNAILS_NAME).is_file():
            console.print("The checkpoint's small pictures stay here; --thumbnails takes them "
                          "along, for whoever sees the Space.")  # fmt: skip
        if pictures is not None:
            count = pack_pictures(folder / _PICTURES, checkpoint, pictures)
            console.print(f"{count} small pictures go along; whoever sees the Space sees them.")
        api.create_repo(
            repo_id, repo_type="space", space_sdk="gradio", exist_ok=True, private=private or None
        )
        commit = api.upload_folder(
            repo_id=repo_id, repo_type="space", folder_path=folder, commit_message="Upload Space",
            delete_patterns=[f"model/{THUMBNAILS_NAME}"],  # of an earlier push, unless it is here
        )  # fmt: skip
    console.print(f"Pushed: {escape(commit.commit_url)}", soft_wrap=True)


def build_space(folder: Path, checkpoint: str, thumbnails: bool = False) -> None:
    """Puts together what a Space needs.

    Args:
        folder: which is made.
        checkpoint: a folder or a Hub id.
        thumbnails: whether small pictures in the folder go along.

    Raises:
        ValueError: for a folder that is no checkpoint with a datastore, or a text that is no id.
    """
    from hf_knn_space.files import begin_space  # it stands on this package, not below it

    begin_space(folder)
    shutil.copytree(str(files("hf_knn")), folder / "hf_knn", ignore=_LEFT_OUT)
    if Path(checkpoint).is_dir():
        missing = [n for n in ("config.json", MANIFEST_NAME) if not Path(checkpoint, n).is_file()]
        if missing:
            raise ValueError(f"Expected {checkpoint} to be a checkpoint, but it has no {missing}.")
        shutil.copytree(checkpoint, folder / "model", ignore=_KEPT)
        if not thumbnails:
            leave_thumbnails(folder / "model")
            _say_no_pictures(folder / "model" / CARD_NAME)
        return
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint):
        raise ValueError(
            f"Expected a checkpoint folder or a Hub id such as org/name, but got {checkpoint!r}."
        )
    (folder / "model.txt").write_text(checkpoint + "\n", encoding="utf-8")
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    card.write_text(text.replace("models: []", f"models:\n  - {checkpoint}", 1), encoding="utf-8")


def _say_no_pictures(card: Path) -> None:
    """Takes the sentence out of a card that speaks of small pictures."""
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        card.write_text(text.replace(THUMBNAILS_NOTE, ""), encoding="utf-8")


def pack_pictures(target: Path, checkpoint: str, pictures: Path) -> int:
    """Small copies of the stored pictures, without their metadata, in one file.

    Args:
        target: the zip file; a picture is named after its path.
        checkpoint: a folder or a Hub id with a datastore.
        pictures: the folder that its paths are relative to.

    Returns:
        How many were found.

    Raises:
        ValueError: if none was found, or the checkpoint holds no rows.
    """
    store = Datastore.from_pretrained(checkpoint)
    stored = StoredPictures(pictures)
    check_root(stored, pictures, pictures_of(store, []))
    count = 0
    with zipfile.ZipFile(target, "w") as file:  # stored: WEBP cannot be packed further
        for path in dict.fromkeys(store.paths or []):
            image = open_picture(stored, path)
            if image is not None:
                file.writestr(f"{path}.webp", small_webp(image))
                count += 1
    return count
