"""The version before the last training: one, inside the checkpoint, never pushed, for `undo`.

It is a whole checkpoint of hard links. What is forgotten is erased there as well: each row that may
be of the same picture.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from ..core.manifest import BLOB_PATTERN, FAISS_NAME, MANIFEST_NAME, DatastoreError
from ..core.reading import THUMBNAILS_NAME
from ..store.backend import RowStore
from ..store.folders import link_or_copy
from ..store.remote import PENDING_NAME, DatastoreReference, read_manifest
from ..store.table import StoredRows
from .card import MEASURED_NAME, NEIGHBORS_NAME, RELIABILITY_NAME
from .code import CODE_NAMES, legacy_code, reader_of
from .receipts import CHANGES_NAME

BEFORE_NAME = ".before"
"""Folder of a checkpoint with the version that a training replaced."""

REPORT_NAME = "report.json"
"""What `hf-knn train` says of a run, beside the checkpoint."""

_BESIDE = (REPORT_NAME, RELIABILITY_NAME, "training_args.json")
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
        or name in (MEASURED_NAME, NEIGHBORS_NAME, CHANGES_NAME, THUMBNAILS_NAME)
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


def keep_version(folder: Path, staging: Path) -> None:
    """Keeps the version that a folder holds inside the one that will replace it.

    Args:
        folder: of a checkpoint; need not exist. One whose rows lie on a server is not kept.
        staging: of the new version.
    """
    names = version_files(folder)
    if names and not refers_elsewhere(folder):
        link_version(folder, staging / BEFORE_NAME, names)
        (staging / BEFORE_NAME / _NOT_FOR_GIT).write_text("*\n", encoding="utf-8")


def carry_version(folder: Path, staging: Path) -> None:
    """Hands the version that is kept in a folder on to the one that will replace it."""
    before = folder / BEFORE_NAME
    if before.is_dir():
        names = [path.name for path in before.iterdir() if path.is_file()]
        link_version(before, staging / BEFORE_NAME, names)


def rows_alike(store: RowStore, gone: Iterable[StoredRows], is_same_maker: bool) -> Tensor:
    """Which rows of an earlier version may be of pictures that were forgotten.

    Args:
        store: the rows of that version.
        gone: what was forgotten, as it was stored.
        is_same_maker: whether one backbone made the features of both.

    Returns:
        [M] int64, their ids: those with nearly the same features; where other backbones made
        them, nobody can tell, so all.
    """
    if not is_same_maker:
        return store.ids
    queries = torch.cat([torch.from_numpy(rows.features).double() for rows in gone])
    found = []
    for block in store.blocks():
        rows = torch.from_numpy(block.features).double()
        near = torch.zeros(len(rows), dtype=torch.bool)
        for part in queries.split(_AT_ONCE):
            distances = torch.cdist(rows, part, compute_mode="donot_use_mm_for_euclid_dist")
            near |= (distances <= _TOLERANCE * part.norm(dim=1)).any(dim=1)
        found.append(torch.from_numpy(block.ids)[near])
    return torch.cat(found) if found else store.ids[:0]
