"""What names a folder, a file or a repository, looked at before anything heavy is imported.

Each check is the callback of an argument or an option: it returns the place with `~` expanded, or
says in one sentence what it is instead, and what to do.
"""

import difflib
import glob
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from .backbones import Backbone, known_backbones
from .caches import can_write
from .terminal import as_called, one_line

T = TypeVar("T")

PICTURE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif",
    ".heic", ".heif",
}  # fmt: skip
_CONFIG, _ROWS = "config.json", "datastore.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/+")
_HUB_URL = re.compile(
    r"(?:https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/+|hf:/+)(?:(?:datasets|spaces|models)/+)?"
    r"([\w.-]+/[\w.-]+)"
)
_HUB_ID = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?")
_A_CHECKPOINT = "a checkpoint folder or a Hub id"
_ANSWERS = (".csv", ".jsonl", ".parquet")
_ORDER = "name the checkpoint first, then the pictures"


def fail(sentence: str) -> NoReturn:
    """Ends the command with one sentence on stderr.

    Args:
        sentence: what was expected, what came, and what to do.

    Raises:
        typer.Exit: with 1.
    """
    if os.environ.get("HF_KNN_DEBUG") and sys.exc_info()[0] is not None:
        traceback.print_exc()
    print(f"Error: {one_line(as_called(sentence))}", file=sys.stderr)
    raise typer.Exit(1)


def refuse(place: str | Path, wanted: str, instead: str) -> NoReturn:
    """Ends the command because of a place that is something else.

    Args:
        place: as it was typed.
        wanted: what it was to be.
        instead: what it is, and what to do.

    Raises:
        typer.Exit: with 1.
    """
    fail(f"Expected {place} to be {wanted}, but {instead}.")


def checkpoint(name: str | None) -> str | None:
    """A checkpoint to be opened: a folder or a Hub id; None stays None."""
    if name is None:
        return None
    place = _expanded(name, _A_CHECKPOINT)
    if os.path.exists(place):
        _check_checkpoint(Path(place))
        return place
    _check_name(place, _A_CHECKPOINT)
    _check_is_ours(_config_on_hub(place, _A_CHECKPOINT), place)
    return place


def checkpoint_folder(folder: Path) -> Path:
    """A checkpoint that will be changed or pushed: a folder."""
    wanted = "a checkpoint folder"
    place = _expanded(folder, wanted)
    if not os.path.exists(place):
        _refuse_missing(place, wanted, "the folder that `hf-knn train` wrote")
    _check_checkpoint(Path(place))
    return Path(place)


def rows_or_checkpoint(name: str) -> str:
    """A checkpoint, or a folder of stored rows alone, such as a backup."""
    place = _expanded(name, _A_CHECKPOINT)
    if Path(place, _ROWS).is_file() and not Path(place, _CONFIG).exists():
        return place
    return checkpoint(name) or place


def code_of(name: str) -> str:
    """A checkpoint whose code is looked at, which needs no weights; of any revision."""
    place = _expanded(name, _A_CHECKPOINT)
    if not os.path.exists(place):
        _check_name(place, _A_CHECKPOINT)
    return place


def pictures(name: str) -> str:
    """Pictures with or without labels: a folder, a file that lists them, or a Hub dataset id."""
    wanted = "a folder of pictures, a csv, a parquet file or a Hub dataset id"
    place = _expanded(name, wanted)
    if not os.path.exists(place):
        _check_name(place, wanted)
        _check_dataset(place, wanted)
    elif _is_picture(Path(place)):
        refuse(place, wanted, "it is one picture; name the folder above that of its class")
    elif _is_checkpoint(Path(place)):
        refuse(place, wanted, f"it is a checkpoint; {_ORDER}")
    return place


def pictures_if_named(name: str | None) -> str | None:
    """Pictures as above; None stays None."""
    return None if name is None else pictures(name)


def inbox(folder: Path | None) -> Path | None:
    """A folder of pictures to be sorted; None stays None."""
    if folder is None:
        return None
    wanted = "a folder of pictures"
    place = Path(_expanded(folder, wanted))
    if not place.exists():
        _refuse_missing(str(place), wanted, "the one that they lie in")
    if not place.is_dir():
        refuse(place, wanted, "it is a file; name the folder that it lies in")
    if _is_checkpoint(place):
        refuse(place, wanted, "it is a checkpoint; name that with --model")
    return place


def quarantine(folder: Path | None) -> Path | None:
    """A folder that files were moved into; None stays None."""
    return _filled(folder, "--move-to")


def sorted_folder(folder: Path | None) -> Path | None:
    """A folder that pictures were sorted into; None stays None."""
    return _filled(folder, "--into")


def _filled(folder: Path | None, option: str) -> Path | None:
    if folder is None:
        return None
    wanted = f"the folder that {option} named"
    place = _expanded(folder, wanted)
    if not os.path.exists(place):
        _refuse_missing(place, wanted, "the one that the files were moved into")
    return Path(place)


def local_pictures(place: Path) -> Path:
    """Pictures on this machine: a folder, one picture, or a file that lists them."""
    wanted = "a picture, a folder of pictures or a csv"
    found = _expanded(place, wanted)
    if not os.path.exists(found):
        _refuse_missing(found, wanted, "a place that is there")
    if _is_checkpoint(Path(found)):
        refuse(found, wanted, f"it is a checkpoint; {_ORDER}")
    return Path(found)


def picture_folder(folder: Path) -> Path:
    """A folder of pictures on this machine."""
    place = local_pictures(folder)
    if not place.is_dir():
        refuse(place, "a folder of pictures", "it is a file; name the folder that it lies in")
    return place


def picture_sources(sources: list[str]) -> list[str]:
    """Pictures to classify, by whatever names them: only here an address is one."""
    return [*map(_picture_source, sources)]


def _picture_source(source: str) -> str:
    wanted = "a picture to classify, or what names some"
    is_web = re.match(r"https?://[^/]", source, re.IGNORECASE)
    path = source.partition("?")[0].partition("#")[0]
    if is_web and (not _HUB_URL.match(source) or path.lower().endswith(tuple(PICTURE_SUFFIXES))):
        return source
    place = _expanded(source, wanted)
    if place == "-" or os.path.exists(place):
        if _is_checkpoint(Path(place)):
            refuse(place, wanted, "it is a checkpoint; name one checkpoint, and it first")
    elif glob.has_magic(place):
        if next(glob.iglob(place, recursive=True), None) is None:
            refuse(place, wanted, "nothing fits it; check the folder, and the ending of the names")
    else:
        _check_name(place, wanted)
        _check_dataset(place, wanted)
    return place


def answer_file(file: Path | None) -> Path | None:
    """A file for answers, of a kind that can be written; None stays None."""
    place = new_file(file)
    if place is not None and place.suffix.lower() not in _ANSWERS:
        refuse(place, "a file for answers", f"it ends in {place.suffix or 'nothing'}; end it in "
               f"{', '.join(_ANSWERS)}")  # fmt: skip
    return place


def stored_pictures(folder: Path | None) -> Path | None:
    """The folder that stored paths are relative to; None stays None."""
    if folder is None:
        return None
    wanted = "the folder of the stored pictures"
    place = _expanded(folder, wanted)
    if not os.path.exists(place):
        _refuse_missing(place, wanted, "the folder that the checkpoint was trained on")
    if not os.path.isdir(place):
        refuse(place, wanted, "it is a file; name the folder that the training was given")
    return Path(place)


def backbone(name: str) -> str:
    """What makes features: a short name, a Hub id, the name of a timm model or a folder."""
    wanted = "a backbone: a name that `hf-knn backbones` lists, a Hub id, a timm name or a folder"
    place = _expanded(name, wanted)
    known = None if os.path.exists(place) else known_backbones().get(place)
    if known is not None and known.is_offline:
        _check_package(known)
        return known.name
    place = place if known is None else known.place
    if os.path.isdir(place):
        if not Path(place, _CONFIG).is_file():
            refuse(place, wanted, f"it has no {_CONFIG}; name one that `save_pretrained` wrote")
    elif os.path.exists(place):
        refuse(place, wanted, "it is a file; name the folder of the model")
    else:
        near = difflib.get_close_matches(place, known_backbones(), 1, 0.75)
        wanted += f" (did you mean {near[0]}?)" if near and known is None else ""
        _check_name(place.removeprefix("hf-hub:"), wanted)
        if not place.startswith("hf-hub:"):
            _config_on_hub(place, wanted, place if "/" in place else f"timm/{place}")
    return place


def _check_package(known: Backbone) -> None:
    modules = {"timm": "timm", known.place.replace("-", "_"): known.place}
    missing = [package for module, package in modules.items() if find_spec(module) is None]
    if missing:
        from hf_knn.store.advice import install  # which knows how this one was installed

        fail(
            f"The backbone {known.name} needs {' and '.join(missing)}; run `{install('offline')}`."
        )


def backbone_if_named(name: str | None) -> str | None:
    """What makes features, as above; None stays None."""
    return None if name is None else backbone(name)


def repo_id(name: str | None) -> str | None:
    """A repository to push to; None stays None."""
    if name is None:
        return None
    wanted = "a repository of the Hub to push to, such as org/name"
    if os.path.isdir(_expanded(name, wanted)):
        refuse(name, wanted, "it is a folder here; name the checkpoint first, then the repository")
    if not _HUB_ID.fullmatch(name):
        refuse(name, wanted, "it cannot be a name there; use letters, digits, - and _")
    return name


def new_folder(folder: Path) -> Path:
    """A folder to write into, which may be there already."""
    wanted = "a folder to write into"
    place = _expanded(folder, wanted)
    if os.path.exists(place) and not os.path.isdir(place):
        refuse(place, wanted, "it is a file; choose another name")
    if not _is_text(place):
        refuse(place, wanted, "its name is not UTF-8; choose another one")
    _check_writable(Path(place))
    return Path(place)


def findings_csv(file: Path | None) -> Path | None:
    """A csv of findings to be read; None stays None. A folder means the one in it."""
    if file is None:
        return None
    wanted = "a findings.csv"
    place = _expanded(file, wanted)
    if os.path.isdir(place) and os.path.isfile(os.path.join(place, "findings.csv")):
        return Path(place, "findings.csv")
    if not os.path.exists(place):
        _refuse_missing(place, wanted, "what `hf-knn inspect` or `hf-knn doctor` wrote")
    if os.path.isdir(place):
        refuse(place, wanted, "it is a folder without one; name the csv")
    return Path(place)


def new_report(folder: Path | None) -> Path | None:
    """A folder to write a report into; None stays None."""
    return None if folder is None else new_folder(folder)


def new_place(folder: Path | None) -> Path | None:
    """A folder to make, which is not there yet; None stays None."""
    if folder is None:
        return None
    place = _expanded(folder, "a folder to make")
    if os.path.lexists(place):
        fail(f"Expected {place} not to exist yet; choose another folder.")
    _check_writable(Path(place))
    return Path(place)


def new_file(file: Path | None) -> Path | None:
    """A file to write; None stays None."""
    if file is None:
        return None
    place = _expanded(file, "a file to write")
    if os.path.isdir(place):
        refuse(place, "a file to write", "it is a folder; name a file in it")
    _check_writable(Path(place).parent)
    return Path(place)


CheckpointArgument = Annotated[
    str, typer.Argument(callback=checkpoint, help="A checkpoint folder or a Hub id.")
]
ChangedCheckpoint = Annotated[
    Path,
    typer.Argument(
        callback=checkpoint_folder,
        help="A checkpoint folder. It is changed as a whole, or not at all.",
    ),
]
ReportFolder = Annotated[
    Path,
    typer.Option(
        "--output", "-o", callback=new_folder, help="Folder for report.html and findings.csv."
    ),
]
"""Each declared once for all commands that take it."""


def _expanded(name: str | Path, wanted: str) -> str:
    text = str(name)
    if not text.strip() or "\0" in text:
        refuse(repr(text), wanted, "it names nothing")
    on_hub = _HUB_URL.match(text)
    if on_hub:
        refuse(text, wanted, f"it is an address; name it by its id: {on_hub[1]}")
    if text.startswith("file:"):
        refuse(text, wanted, "it is an address; name the path alone")
    if _URL.match(text):
        refuse(text, wanted, "it is an address; download it, and name where it lies")
    place = os.path.expanduser(text)
    _put_back(Path(place))
    return place


def _put_back(place: Path) -> None:
    """A folder that a save that was killed left hidden beside its place."""
    real = Path(os.path.realpath(place))
    if not real.exists() and real.with_name(f".{real.name}.old").is_dir():
        from hf_knn.store.folders import restore

        restore(real)


def _check_checkpoint(place: Path) -> None:
    if _is_picture(place):
        refuse(place, _A_CHECKPOINT, f"it is a picture; {_ORDER}")
    if not place.is_dir():
        refuse(place, _A_CHECKPOINT, "it is a file; name the folder that it lies in")
    config, wanted = place / _CONFIG, "a checkpoint"
    if not config.is_file():
        if (place / _ROWS).is_file():
            merge = f"`hf-knn merge CHECKPOINT {place}`"
            refuse(place, wanted, f"it holds rows alone and no model; {merge} adds them to one")
        refuse(place, wanted, f"it has no {_CONFIG}; name the folder that `hf-knn train` wrote, "
               "before the pictures")  # fmt: skip
    _check_is_ours(config, str(place))
    if not any((place / name).is_file() for name in _WEIGHTS):
        refuse(place, "a whole checkpoint", f"it has no {_WEIGHTS[0]}; copy all of its files, or "
               "train it again")  # fmt: skip


def _check_is_ours(config: Path, place: str) -> None:
    values: Any = None
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        refuse(place, "a checkpoint", f"its {_CONFIG} cannot be read ({error}); copy it again")
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != "hf_knn":
        refuse(
            place, "a k-NN checkpoint", f"it is a model of the kind {kind!r}; "
            f"`hf-knn train PICTURES --backbone {place}` makes one of it",
        )  # fmt: skip


def _check_name(name: str, wanted: str) -> None:
    """Refuses what is not here and cannot be the name of a repository."""
    suffix = Path(name).suffix.lower()
    is_file = suffix in PICTURE_SUFFIXES or suffix in (".csv", ".tsv", ".txt", ".parquet", ".zip")
    if is_file or not _HUB_ID.fullmatch(name):
        _refuse_missing(name, wanted, "a place that is there")


def _refuse_missing(place: str, wanted: str, instead: str) -> NoReturn:
    parent = next((path for path in Path(place).absolute().parents if path.exists()), Path.cwd())
    refuse(place, wanted, f"there is nothing there (looked in {parent}); {_similar(place)}name "
           f"{instead}")  # fmt: skip


def _similar(place: str) -> str:
    path = Path(place)
    try:
        names = [entry.name for entry in path.absolute().parent.iterdir()]
    except OSError:
        return ""
    found = difflib.get_close_matches(path.name, names, 1, 0.75)
    return f"did you mean {path.with_name(found[0])}? Else " if found else ""


def _config_on_hub(name: str, wanted: str, repository: str | None = None) -> Path:
    """Its config.json, from the Hub or from the cache; None: the repository is called as it is."""
    from huggingface_hub import hf_hub_download

    place = repository or name
    return Path(_ask_hub(name, wanted, "model", lambda: hf_hub_download(place, _CONFIG)))


def _check_dataset(name: str, wanted: str) -> None:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        own = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets")
        folder = Path(constants.HF_HUB_CACHE, "datasets--" + name.replace("/", "--"))
        if folder.is_dir() or Path(own, name.replace("/", "___")).is_dir():
            return
    _ask_hub(name, wanted, "dataset", lambda: HfApi().dataset_info(name))


def _ask_hub(name: str, wanted: str, kind: str, ask: Callable[[], T]) -> T:
    from huggingface_hub.errors import HTTPError

    try:
        return ask()
    except (OSError, ValueError, HTTPError) as error:
        refuse(name, wanted, f"there is nothing there, and {_reason(error, kind, name)}")


def _reason(error: Exception, kind: str, name: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return f"the {kind} on the Hub is gated; ask for access on its page and run: hf auth login"
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return (
            f"the Hub has no {kind} of that name (or it is private: hf auth login); "
            f"{_similar(name)}check the spelling"
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return f"what the Hub has under that name has no {_CONFIG}; name a {kind}"
    if constants.HF_HUB_OFFLINE:
        return (
            f"the cache of the Hub does not hold it either; {_similar(name)}check the spelling, or "
            "unset HF_HUB_OFFLINE to fetch it"
        )
    reason = "is not in the cache" if isinstance(error, LocalEntryNotFoundError) else str(error)
    return (
        f"the Hub cannot be asked ({one_line(reason)}); {_similar(name)}check the spelling and the "
        "network"
    )


def _check_writable(folder: Path) -> None:
    if not can_write(folder.absolute()):
        refuse(folder.absolute(), "a place that can be written", "it cannot be, or the disk is "
               "full; choose another one")  # fmt: skip


def _is_text(place: str) -> bool:
    return not any("\ud800" <= each <= "\udfff" for each in place)


def _is_picture(place: Path) -> bool:
    return place.suffix.lower() in PICTURE_SUFFIXES and place.is_file()


def _is_checkpoint(place: Path) -> bool:
    return (place / _CONFIG).is_file() and any((place / name).is_file() for name in _WEIGHTS)
