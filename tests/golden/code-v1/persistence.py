"""Writing a datastore into a folder: everything staged first, the manifest renamed last."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .blobs import write_files
from .faiss_index import FaissApproximate, has_faiss, write_flat
from .indexing import FLAT, is_rebuildable
from .manifest import (
    BLOB_PATTERN,
    FAISS_NAME,
    MANIFEST_NAME,
    Binding,
    DatastoreError,
    FileRecord,
    IndexInfo,
    Manifest,
)
from .row_table import RowTable
from .search import RowSpace
from .storage import fsync_path, link_or_copy, stage_file

LARGEST_FAISS_FILE = 100 * 10**6
SCRATCH = ".datastore.staging"
"""Folder inside a datastore's folder for files that are not whole yet."""


@dataclass(frozen=True)
class Contents:
    """What a stored datastore consists of.

    Attributes:
        table: the rows and how they are divided over files.
        mean: [D] float32.
        centroids: [n, D'] float32 of an inverted-file index, or None.
        metric: `cosine` or `l2`.
        normalization: `l2_centered`, `l2` or `none`.
        index: which index it has.
        approximate: the index itself if it is an approximate one that stands, else None.
        binding: the checkpoint it belongs to, or None.
        source: where the rows came from, as far as known.
    """

    table: RowTable
    mean: Tensor
    centroids: NDArray[np.float32] | None
    metric: str
    normalization: str
    index: IndexInfo
    approximate: FaissApproximate | None
    binding: Binding | None
    source: dict[str, str]


def write_datastore(folder: Path, contents: Contents, places: Sequence[Path]) -> Manifest:
    """Writes a datastore; the caller holds the lock of the folder.

    Args:
        folder: an existing folder; other files in it are left alone.
        contents: what to write.
        places: folders in which unchanged files may lie.

    Returns:
        The manifest that was written.

    Raises:
        OSError: if something could not be written; the version that was there is intact.
    """
    table = contents.table
    _clear_litter(folder)  # of saves that were killed
    scratch = folder / SCRATCH
    scratch.mkdir()
    try:
        shared = {"mean": contents.mean}
        if contents.centroids is not None:
            shared["centroids"] = torch.from_numpy(contents.centroids)
        blobs = write_files(folder, scratch, table, shared, places)
        index = _stage_faiss(folder, scratch, contents)
        count, dim = table.features.shape
        manifest = Manifest(
            num_rows=count,
            dim=dim,
            dtype=str(table.features.dtype).removeprefix("torch."),
            metric=contents.metric,
            normalization=contents.normalization,
            index=contents.index,
            blobs=blobs,
            faiss_index=None if index is None else FileRecord.of(index).renamed(FAISS_NAME),
            binding=contents.binding,
            source=contents.source,
        )
        text = manifest.to_json().encode()
        target = folder / MANIFEST_NAME
        staged = stage_file(target, lambda path: _write_bytes(path, text), scratch)
        _replace_faiss(folder, scratch, index)
        fsync_path(folder)
        staged.replace(target)  # the commit point
        fsync_path(folder)
    except BaseException:
        if (scratch / FAISS_NAME).exists():
            (scratch / FAISS_NAME).replace(folder / FAISS_NAME)
        raise
    finally:
        _clear_litter(folder)
    return manifest


def _stage_faiss(folder: Path, scratch: Path, contents: Contents) -> Path | None:
    """The serialized index, for users of faiss; read back for those who trust it only."""
    table, index = contents.table, contents.approximate
    count, dim = table.features.shape
    is_large = count * dim * 4 >= LARGEST_FAISS_FILE
    if contents.index.spec == FLAT and has_faiss() and not is_large:
        mean = contents.mean.double().numpy()
        space = RowSpace(mean, contents.metric, contents.normalization, table.features)
        rows = space.normalize(table.features[:]).astype(np.float32)
        write: Callable[[Path], None] = partial(
            write_flat, rows=rows, ids=table.ids.numpy(), is_l2=space.is_l2
        )
    elif index is not None and not (is_large and is_rebuildable(contents.index.spec)):
        write = index.write
    else:
        return None
    return stage_file(folder / FAISS_NAME, write, scratch)


def _replace_faiss(folder: Path, scratch: Path, index: Path | None) -> None:
    """Puts the new index in place; until the commit, readers of the old one find it in scratch."""
    old = folder / FAISS_NAME
    if old.exists():
        link_or_copy(str(old), str(scratch / FAISS_NAME))
        fsync_path(scratch)
    if index is None:
        old.unlink(missing_ok=True)
    else:
        index.replace(old)


def _clear_litter(folder: Path) -> None:
    """Removes the scratch folder, and row files that the manifest on disk does not name."""
    shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    try:
        named = {record.name for record in Manifest.read(folder / MANIFEST_NAME).blobs}
    except FileNotFoundError:
        named = set()
    except DatastoreError:
        return  # whoever repairs it may need them
    for entry in folder.iterdir():
        if BLOB_PATTERN.fullmatch(entry.name) and entry.name not in named:
            entry.unlink(missing_ok=True)


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
