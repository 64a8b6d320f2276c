"""The picture files below a folder, found without opening one, and what was left out."""

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..core.manifest import MANIFEST_NAME
from .decode import PICTURE_SUFFIXES

SPLIT_FOLDERS = {
    "train": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "test": "test",
}  # fmt: skip
"""Folders that are splits, in small letters."""

METADATA_NAME = "metadata.csv"
"""Says which picture of its folder has which label."""

_CHECKPOINT, _REPORT = "as a checkpoint", "as a report of hf-knn"
_OURS = (
    ({CONFIG_NAME, SAFE_WEIGHTS_NAME}, _CHECKPOINT),
    ({CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME}, _CHECKPOINT),
    ({MANIFEST_NAME}, "as a datastore"),
    ({"model.onnx", "classify.py"}, "as an exported model"),
    ({"report.html", "findings.csv"}, _REPORT),
    ({"answers.jsonl", "labels.csv"}, "as what `hf-knn label` wrote"),
)
"""Folders that the commands write, by the files in them."""

_UNREAD = {f"metadata.{ending}" for ending in ("jsonl", "parquet")}
"""What else `datasets` would read labels from."""

_SYSTEM_FOLDERS = {
    "__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found",
    ".ipynb_checkpoints", ".thumbnails", ".git", ".svn", ".cache", ".idea", ".vscode", ".before",
    ".venv", ".trash", ".trashes", ".spotlight-v100", ".fseventsd", ".dropbox.cache",
}  # fmt: skip
_SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
"""What operating systems and tools leave behind: never anybody's pictures, so nothing is said."""

_CONVERT = "convert them to PNG or JPEG"
_ADVICE = {
    "unpack them": "zip tar gz tgz bz2 xz 7z rar",
    "save single frames of them as pictures": "mp4 m4v mov avi mkv webm",
    "pass the file itself if it says which picture has which label": "csv tsv",
    _CONVERT: (
        "avif heic heif hif tif tiff jxl jp2 j2k psd svg eps ai pdf xcf ico tga pcx ppm pgm pbm "
        "pnm exr hdr dcm raw dng nef cr2 cr3 arw orf rw2 raf"
    ),
}
_ADVICE_OF = {
    f".{ending}": words for words, endings in _ADVICE.items() for ending in endings.split()
}
_PICTURES = frozenset(PICTURE_SUFFIXES)
_SHOWN = 5


@dataclass
class Found:
    """What lies below a folder.

    Attributes:
        pictures: paths relative to the folder, with `/`, in the same order on every system.
        folders: of the folders that were looked into, likewise.
        metadata: of the files called `metadata.csv`, likewise.
        notes: what was left out and why, in sentences.
        beside: of a picture, the files beside it that are called like it, if asked for.
    """

    pictures: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    beside: dict[str, list[str]] = field(default_factory=dict)


class _Place(NamedTuple):
    """A folder on the way down, and the identities of those above it."""

    name: str
    above: tuple[tuple[int, int], ...]


def find_pictures(root: str, *, but: str | None = None, beside: bool = False) -> Found:
    """Lists the pictures below a folder, by their names alone.

    Links to folders are followed. Hidden folders, what systems and tools leave behind and what
    the commands of this package write are left out.

    Args:
        root: the folder.
        but: a folder below it that is not looked into.
        beside: also list what lies beside a picture under its name; it is not called left out.

    Returns:
        Pictures and folders, and what was left out.

    Raises:
        ValueError: for a link that leads back to a folder above it, or a folder whose name is not
            UTF-8, naming it; or if `root` is an output of this package.
        OSError: if a folder cannot be read.
    """
    found = Found()
    left_out: dict[str, Counter[str]] = defaultdict(Counter)
    said: dict[str, list[str]] = defaultdict(list)
    stack = [_Place("", ())]
    without = None if but is None else os.path.realpath(but)
    while stack:
        place = stack.pop()
        if without is not None and os.path.realpath(os.path.join(root, place.name)) == without:
            continue
        entries = _entries(os.path.join(root, place.name))
        is_ours = _ours({entry.name for entry in entries})
        if is_ours == _CHECKPOINT and not place.name:
            raise ValueError(f"Expected {root} to be a folder of pictures, but it is a checkpoint.")
        if is_ours and place.name:  # a report may have been written beside the classes
            said[is_ours].append(place.name)
            continue
        state = os.stat(os.path.join(root, place.name))
        here = (state.st_dev, state.st_ino)
        if here[1] and here in place.above:  # some network drives number nothing
            raise ValueError(
                f"Expected {root} to hold each folder once, but {place.name} is a link back to a "
                "folder above it; remove the link."
            )
        if place.name:
            found.folders.append(place.name)
        kinds = {entry.name: _kind_of(entry) for entry in entries}
        owners = _owners(kinds) if beside else {}
        for name, kind in kinds.items():
            path = f"{place.name}/{name}" if place.name else name
            if name in owners:
                owner = f"{place.name}/{owners[name]}" if place.name else owners[name]
                found.beside.setdefault(owner, []).append(path)
            elif kind == "folder":
                if not _is_utf8(name):
                    raise ValueError(
                        f"Expected names in UTF-8 below {root}, but got the folder "
                        f"{os.fsencode(path)!r}; rename it, for example with convmv."
                    )
                stack.append(_Place(path, (*place.above, here)))
            elif kind == "picture":
                found.pictures.append(path)
            elif kind == "metadata":
                found.metadata.append(path)
            elif kind.startswith("."):
                left_out[kind[1:]][place.name] += 1
            elif kind:
                said[kind].append(ascii(path) if not _is_utf8(path) else path)
    for paths in (found.pictures, found.folders, found.metadata):
        paths.sort(key=_order)
    found.notes += list(_sentences(left_out, said))
    return found


class StoredPictures:
    """The pictures of a folder, by the paths that a datastore keeps.

    A path is also found below the folder of a split (`train/dog/a.png` where `dog/a.png` is
    stored), without it, and in another form of Unicode.

    Args:
        root: the folder that the paths are relative to.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._listed: dict[str, str] | None = None

    def find(self, path: str) -> Path | None:
        """The file of a stored path; None if there is none.

        Nothing outside the folder is found but what links in it lead to: a stranger may have
        written the path.

        Args:
            path: with `/`; empty for an unknown one.

        Raises:
            ValueError: for a folder that cannot be listed, see `find_pictures`.
            OSError: likewise.
        """
        if not path or "\0" in path:
            return None
        place = (self._root / path).resolve()
        if place.is_relative_to(self._root) and place.is_file():
            return place
        listed = self._listed = self._listed or self._list()
        found = listed.get(nfc(path)) or listed.get(nfc(path.replace("\\", "/")))
        if found is None and (split := split_of(path)):
            own = SPLIT_FOLDERS.get(self._root.name.casefold(), split)
            found = listed.get(nfc(path.partition("/")[2])) if own == split else None
        return None if found is None else self._root / found

    def _list(self) -> dict[str, str]:
        """The pictures by their paths, and without the folder of a split: training first."""
        pictures = find_pictures(str(self._root)).pictures
        listed = {nfc(path): path for path in pictures}
        for split in dict.fromkeys(SPLIT_FOLDERS.values()):
            for path in pictures:
                if split_of(path) == split:
                    listed.setdefault(nfc(path.partition("/")[2]), path)
        return listed


def split_of(path: str) -> str:
    """The split of a path by its top folder; empty if it is called otherwise."""
    return SPLIT_FOLDERS.get(path.partition("/")[0].casefold(), "") if "/" in path else ""


def nfc(text: str) -> str:
    """A name as it is compared: systems write the same accented letter in different bytes."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def shown(names: Iterable[str], most: int = _SHOWN) -> str:
    """The first of some names, and how many more there are.

    Args:
        names: in any order.
        most: how many are named.
    """
    listed = sorted(names, key=_order)
    more = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {more} more" if more > 0 else "")


def _order(path: str) -> tuple[str, str]:
    return nfc(path), path


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _ours(names: set[str]) -> str | None:
    """What a folder is, if a command of this package wrote it."""
    return next((words for marks, words in _OURS if marks <= names), None)


def _kind_of(entry: os.DirEntry[str]) -> str:
    """`folder`, `picture`, `metadata`, nothing, `.` and an ending, or why it was left out."""
    name = entry.name
    folded = name.casefold()
    if folded in _SYSTEM_FOLDERS or folded in _SYSTEM_FILES or name.startswith("._"):
        return ""
    ending = os.path.splitext(folded)[1].strip()
    is_picture = ending in _PICTURES
    try:
        is_folder = entry.is_dir()
        is_there = is_folder or entry.is_file()
    except OSError:  # a link to itself
        is_folder = is_there = False
    if not is_there:
        return "as a link to nothing" if entry.is_symlink() else "as no file"
    if name.startswith("."):
        return "as hidden" if is_folder or is_picture else ""
    if is_folder:
        return "folder"
    if is_picture:
        return "picture" if _is_utf8(name) else "for a name that is not UTF-8 (rename it)"
    if name in _UNREAD:
        return f"since only {METADATA_NAME} is read"
    return "metadata" if name == METADATA_NAME else f".{ending}"


def _owners(kinds: dict[str, str]) -> dict[str, str]:
    """Which files belong to which pictures of a folder: `a.jpg.xmp` and `a.xmp` to `a.jpg`.

    The latter only where no other picture has the stem.
    """
    by_stem: dict[str, list[str]] = defaultdict(list)
    for name, kind in kinds.items():
        if kind == "picture":
            by_stem[os.path.splitext(name)[0]].append(name)
    owners = {}
    for name, kind in kinds.items():
        if not kind.startswith(".") or kind == ".":
            continue
        stem = os.path.splitext(name)[0]
        if kinds.get(stem) == "picture":
            owners[name] = stem
        elif len(by_stem.get(stem, ())) == 1:
            owners[name] = by_stem[stem][0]
    return owners


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _sentences(left_out: dict[str, Counter[str]], said: dict[str, list[str]]) -> Iterator[str]:
    for reason, paths in sorted(said.items()):
        yield f"Left out {reason}: {shown(paths)}."
    for ending, folders in sorted(left_out.items()):
        count = sum(folders.values())
        what = f"{count} {ending}" if ending else f"{count} without an ending"
        was = "was" if count == 1 else "were"
        advice = _advice(ending)
        if count == 1:
            advice = advice.replace("they are no pictures", "it is no picture")
            advice = advice.replace("them", "it").replace("their", "its")
        yield f"{what} {_where(list(folders))} {was} left out: {advice}."


def _where(folders: Sequence[str]) -> str:
    names = [name or "the folder itself" for name in folders]
    few = len(names) <= _SHOWN
    return f"in {shown(names)}" if few else f"in {len(names)} folders, such as {min(names)},"


def _advice(ending: str) -> str:
    if not ending:
        return "give them the ending of their format, such as .jpg"
    return _ADVICE_OF.get(ending, "they are no pictures")
