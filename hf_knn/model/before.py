"""The versions before the last trainings, inside the checkpoint, never pushed, for `undo`.

Each is a whole checkpoint of hard links, with the one before it inside. What is forgotten is erased
in all of them: each row that may be of the same picture.
"""

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from ..core.manifest import BLOB_PATTERN, FAISS_NAME, MANIFEST_NAME, DatastoreError
from ..core.reading import CONTENTS_NAME, THUMBNAILS_NAME
from ..store.backend import RowStore
from ..store.folders import link_or_copy
from ..store.hub import PAGE_NAME, REPORT_NAME, TRAINING_NAME
from ..store.remote import PENDING_NAME, DatastoreReference, read_manifest
from .card import MEASURED_NAME, NEIGHBORS_NAME, RELIABILITY_NAME
from .code import CODE_NAMES, legacy_code, reader_of
from .contents import Contents
from .memory import Gone
from .receipts import CHANGES_NAME

BEFORE_NAME = ".before"
"""Folder of a checkpoint with the version that a training replaced."""

SHOWS_ROWS = (PAGE_NAME, REPORT_NAME)
"""Beside a checkpoint; they name and show stored pictures, so that a `forget` takes them away."""

_BESIDE = (*SHOWS_ROWS, TRAINING_NAME, RELIABILITY_NAME, "training_args.json")
"""What is told of a version beside its checkpoint: it goes and comes with it."""

_NOT_FOR_GIT = ".gitignore"
_WEIGHTS_PATTERN = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
)
_TOLERANCE = 0.05
"""How far features of one picture may be apart, by backend or precision, of their length."""

_AT_ONCE = 1024


def is_checkpoint_file(name: str) -> bool:
    """Whether a file name belongs to a checkpoint, so that a new version must not inherit it."""
    return (
        name in (CONFIG_NAME, IMAGE_PROCESSOR_NAME, MANIFEST_NAME, FAISS_NAME, *CODE_NAMES)
        or name in (MEASURED_NAME, NEIGHBORS_NAME, CHANGES_NAME, THUMBNAILS_NAME, CONTENTS_NAME)
        or name.startswith((".datastore-", PENDING_NAME, f".{PENDING_NAME}"))
        or any(pattern.fullmatch(name) for pattern in (_WEIGHTS_PATTERN, BLOB_PATTERN))
    )


def version_files(folder: Path) -> set[str]:
    """Names of the files of a folder that are part of a version; empty if it holds none.

    Args:
        folder: a checkpoint, or any other folder; it need not exist.
    """
    if not folder.is_dir():
        return set()
    names = {path.name for path in folder.iterdir() if path.is_file()}
    if not any(map(is_checkpoint_file, names)):
        return set()
    legacy = legacy_code(reader_of(folder))
    return {name for name in names if is_checkpoint_file(name) or name in (*legacy, *_BESIDE)}


def refers_elsewhere(folder: Path) -> bool:
    """Whether the rows of a checkpoint lie on a server, where a training leaves them."""
    try:
        return isinstance(read_manifest(folder / MANIFEST_NAME), DatastoreReference)
    except (OSError, DatastoreError):
        return False


def link_version(folder: Path, target: Path, names: Iterable[str]) -> None:
    """Links files of a version into another folder.

    Args:
        folder: where they are.
        target: where to; made if needed.
        names: of the files.
    """
    target.mkdir(exist_ok=True)
    for name in names:
        link_or_copy(str((folder / name).resolve()), str(target / name))


def kept_versions(folder: Path) -> list[Path]:
    """The versions that a checkpoint keeps, the last one first.

    Args:
        folder: of the checkpoint; need not exist.
    """
    found = []
    while (folder := folder / BEFORE_NAME).is_dir():
        found.append(folder)
    return found


def keep_version(folder: Path, staging: Path, older: Sequence[Path] = ()) -> None:
    """Keeps the version that a folder holds, and older ones, inside the one that will replace it.

    Args:
        folder: of a checkpoint; need not exist. One whose rows lie on a server is not kept.
        staging: of the new version.
        older: versions that are kept further on, the last one first.
    """
    names = version_files(folder)
    if names and not refers_elsewhere(folder):
        link_version(folder, staging / BEFORE_NAME, names)
        (staging / BEFORE_NAME / _NOT_FOR_GIT).write_text("*\n", encoding="utf-8")
        carry_versions(older, staging / BEFORE_NAME)


def carry_versions(versions: Sequence[Path], staging: Path) -> None:
    """Hands versions that are kept on to the one that will replace the present one.

    Args:
        versions: their folders, the last one first.
        staging: of the new version, which does not keep any yet.
    """
    for version in versions:
        staging = staging / BEFORE_NAME
        link_version(version, staging, [path.name for path in version.iterdir() if path.is_file()])


def remove_version(version: Path) -> None:
    """Removes a version that is kept; the one before it, which is inside of it, takes its place.

    Args:
        version: its folder, in a staging folder that nobody reads yet.
    """
    older = version.with_name(f"{version.name}.older")
    if (version / BEFORE_NAME).is_dir():
        os.rename(version / BEFORE_NAME, older)
    shutil.rmtree(version)
    if older.is_dir():
        os.rename(older, version)


def rows_alike(
    store: RowStore, contents: Contents | None, gone: Iterable[Gone], is_same_maker: bool
) -> Tensor:
    """Which rows of an earlier version may be of pictures that were forgotten.

    Prints tell pictures apart. Where one of two has none, rows may be of one picture if their
    features are nearly the same; where other backbones made them, nobody can tell.

    Args:
        store: the rows of that version.
        contents: prints of their pictures, or None.
        gone: what was forgotten.
        is_same_maker: whether one backbone made the features of both.

    Returns:
        [M] int64, their ids.
    """
    prints, known, unknown = set[bytes](), [], []
    for part in gone:
        mine = {} if part.contents is None else part.contents.prints_of(part.rows)
        prints |= {content.tobytes() for content in mine.values()}
        is_known = np.isin(part.rows.ids, list(mine))
        known.append(part.rows.features[is_known])
        unknown.append(part.rows.features[~is_known])
    found = []
    for block in store.blocks():
        theirs = {} if contents is None else contents.prints_of(block)
        same = [i in theirs and theirs[i].tobytes() in prints for i in block.ids.tolist()]
        # with prints on both sides only the same features are told of one picture
        apart = np.where(np.isin(block.ids, list(theirs)), 0.0, _TOLERANCE)
        alike = np.array(same, bool)
        for features, tolerance in (
            (np.concatenate(known), apart),
            (np.concatenate(unknown), np.full_like(apart, _TOLERANCE)),
        ):
            if is_same_maker:
                alike |= _are_near(block.features, features, tolerance)
            elif len(features):
                alike |= tolerance > 0
        found.append(torch.from_numpy(block.ids[alike]))
    return torch.cat(found) if found else store.ids[:0]


def _are_near(rows: NDArray[Any], queries: NDArray[Any], tolerance: NDArray[Any]) -> NDArray[Any]:
    """[N] bool: rows [N, D] that are near to any query [M, D], to within [N] of its length."""
    near = torch.zeros(len(rows), dtype=torch.bool)
    points = torch.from_numpy(rows).double()
    for part in torch.from_numpy(queries).double().split(_AT_ONCE):
        distances = torch.cdist(points, part, compute_mode="donot_use_mm_for_euclid_dist")
        most = torch.from_numpy(tolerance)[:, None] * part.norm(dim=1)
        near |= (distances <= most).any(dim=1)
    return near.numpy()
