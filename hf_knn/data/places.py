"""Where pictures lie and came from: sources, stored paths, and what files were read."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .batches import IMAGE, LABEL, PATH, SAMPLE_ID
from .keys import name_of_file
from .tables import is_table
from .walk import split_of

_HUB_ID = re.compile(r"[\w-]+|[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_COMMIT = re.compile(r"^hf://datasets/[^@]+@([0-9a-f]{40})/")


def find_local(source: str | Path) -> Path | None:
    """The folder or file that a source is, of a kind that is read; None for a Hub id.

    Raises:
        FileNotFoundError: for what is neither, with what to do.
        ValueError: for a file that is no list of pictures.
    """
    name = str(source)
    path = Path(source).expanduser()
    if name.strip() and path.exists():
        if path.is_dir() or is_table(path) or path.suffix.lower() == ".parquet":
            return path
        raise ValueError(
            f"Expected {source} to be a folder of pictures, a csv or a parquet file, but it is "
            "another file; pass the folder that the pictures lie in (unpack an archive, save a "
            "workbook as csv)."
        )
    if _HUB_ID.fullmatch(name):
        return None
    near = get_close_matches(path.name, names_beside(path), 1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else "."
    if "://" in name:
        hint = "; addresses are not opened: download the pictures first."
    raise FileNotFoundError(
        f"Expected {name or 'a name'} to be a folder, a csv, a parquet file or a Hub id, but there "
        f"is nothing there{hint}"
    )


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `Dataset.save_to_disk`."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def check_options(
    source: str | Path, path: Path | None, splits: bool | None, options: Mapping[str, Any]
) -> None:
    """Refuses options that would do nothing.

    Args:
        source: as it was given.
        path: where it lies here; None for a Hub id.
        splits: how folders that are called like splits are read.
        options: of a Hub id.

    Raises:
        ValueError: naming them, or for `splits` of another kind.
    """
    if not isinstance(splits, bool | None):
        raise ValueError(f"Expected `splits` to be True, False or None, but got {splits!r}.")
    given = sorted(name for name, value in options.items() if value is not None)
    if path is not None and given:
        raise ValueError(
            f"Expected {given} with the id of a dataset on the Hub only, but {source} lies here; "
            "leave them out."
        )
    if path is not None and (is_table(path) or (path.is_dir() and not is_saved(path))):
        return
    if splits is not None:
        raise ValueError(
            f"Expected `splits` with a folder of pictures or a csv only, but {source} names its "
            "splits itself; leave it out."
        )
    if path is not None and "::" in str(path.absolute()):
        raise ValueError(
            f"Expected a path without '::', which means something else to `datasets`, but got "
            f"{path.absolute()}; rename it."
        )


def names_beside(path: Path) -> list[str]:
    """What lies in the folder of a path, for somebody who mistyped it."""
    try:
        return [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []


def why_no_labels(source: str | Path, splits: Mapping[str, Any], notes: Sequence[str]) -> str:
    """What pictures lack that somebody wants to learn from, and what would give it to them.

    Args:
        source: of the pictures.
        splits: that have no labels.
        notes: what was left out.
    """
    first = next(iter(splits.values()))
    own = (IMAGE, LABEL, SAMPLE_ID, PATH)
    others = [name for name in first.column_names if name not in own]
    count = sum(map(len, splits.values()))
    what = f"{count} pictures"
    if list(splits) != ["train"]:
        what += f" of {', '.join(splits)}"
    seen = "lie in no folders of classes"
    if not Path(source).expanduser().is_dir():
        seen = f"have no column `{LABEL}`" + (f", but {others}" if others else "")
    elif any(map(split_of, paths_of(first)[:1])):
        seen += ", below folders that are read as splits (--splits none reads them as classes)"
    return " ".join((
        f"Expected {source} to say the label of each picture, but its {what} {seen};",
        "make one sub-folder per label, or a csv of path,label.", *notes,
    ))  # fmt: skip


def reading_of(how: str) -> bool | None:
    """What `--splits` means for `load_splits`.

    Args:
        how: `auto` or `none`.

    Raises:
        ValueError: for another word.
    """
    readings = {"auto": None, "none": False}
    if how not in readings:
        raise ValueError(f"Expected `splits` to be one of {[*readings]}, but got {how!r}.")
    return readings[how]


def check_classes(splits: Mapping[str, Any], source: str | Path) -> list[str]:
    """The classes of pictures to train on.

    Args:
        splits: as `load_splits` returns them.
        source: that they were read from.

    Raises:
        ValueError: if no split is to train on, or it has a single class, with what to do.
    """
    if "train" not in splits:
        raise ValueError(
            f"Expected pictures to train on, but {source} has the splits {list(splits)} only; add "
            "a split train, or pass --splits none (Python: splits=False) if they are classes."
        )
    rows = splits["train"]
    names = list(rows.features[LABEL].names)
    labels = rows[LABEL][:]
    if len(set(labels) - {-1}) > 1:
        return names
    below = {path.split("/")[-2] for path in paths_of(rows) if path.count("/") > 1}
    hint = "give it at least one more sub-folder of pictures"
    if len(below - set(names)) > 1:
        hint = f"if {', '.join(sorted(below)[:5])} are the classes, pass the folder they lie in"
    raise ValueError(
        f"Expected at least two classes to tell apart, but all pictures of {source} to train on "
        f"are {names[max(labels)]}; {hint}."
    )


def paths_of(dataset: Any) -> list[str]:
    """[N] where each picture lies, relative to the folder of all, with `/`; empty if unknown."""
    if PATH in dataset.column_names:
        given = dataset.with_format(None)[PATH][:]
        if all(isinstance(path, str) and path and not os.path.isabs(path) for path in given):
            return list(given)
    paths = _raw_paths(dataset)
    parents = {str(Path(path).parent) for path in paths if path}
    if not parents or any(not path for path in paths):
        return [Path(path).name for path in paths]
    if not all(Path(path).is_absolute() for path in paths):
        return [Path(path).name if Path(path).is_absolute() else path for path in paths]
    root = _common_root(sorted(parents))
    return [Path(path).relative_to(root).as_posix() for path in paths]


def fingerprint_of(dataset: Any) -> str | None:
    """A name for the content of a dataset, its files included; None for other kinds of dataset."""
    known = getattr(dataset, "_fingerprint", None)
    if known is None:
        return None
    # `datasets` knows files by their paths only
    total = hashlib.sha256(known.encode())
    for path in _raw_paths(dataset):
        if os.path.isfile(path):
            total.update(name_of_file(path) + b"\n")
    return total.hexdigest()


def source_of(pictures: str | Path, dataset: Any, split: str = "train") -> dict[str, str]:
    """Where pictures came from, as a datastore and a model card say it.

    Args:
        pictures: what `load_splits` was given.
        dataset: one of the splits that it returned.
        split: its name.

    Returns:
        `dataset` (the Hub id, or the name of the folder or file), `split`, and where they are
        known `revision` (the commit on the Hub) and `license`.
    """
    commits = {
        found.group(1)
        for place in dataset.info.download_checksums or {}
        if (found := _HUB_COMMIT.search(str(place)))
    }
    place = Path(pictures).expanduser()
    facts = {"dataset": place.resolve().name if place.exists() else place.name, "split": split}
    if commits:
        facts |= {"dataset": str(pictures), "revision": ", ".join(sorted(commits))}
    if dataset.info.license:
        facts["license"] = dataset.info.license
    return facts


def _raw_paths(dataset: Any) -> list[str]:
    """The path that each picture came with; empty strings where there is none."""
    chunks = dataset.data.column(IMAGE).chunks  # not combined: that would copy every picture
    paths = [path or "" for chunk in chunks for path in chunk.field("path").to_pylist()]
    if dataset._indices is None:
        return paths
    return [paths[row] for row in dataset._indices.column(0).to_pylist()]


def _common_root(parents: list[str]) -> str:
    """The folder above all label folders, so that a path keeps its label."""
    common = os.path.commonpath(parents)
    return common if len(parents) > 1 else str(Path(common).parent)
