"""A datastore in a folder: everything staged first, the manifest renamed last, checked when opened.

Rows lie in one or more files, each named by its content; the first also holds the mean and, for an
inverted-file index, its centroids.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from ..core.frozen import (
    Resolve,
    decode_paths,
    join_features,
    join_vectors,
    open_blob,
    take,
    take_vector,
)
from ..core.manifest import (
    BLOB_PATTERN,
    FAISS_NAME,
    MANIFEST_NAME,
    Binding,
    DatastoreError,
    FileRecord,
    IndexInfo,
    Manifest,
)
from ..core.search import RowSpace, Singles
from ..core.votes import Metric
from .faiss import FaissApproximate, has_faiss, write_flat
from .folders import fsync_path, give_default_mode, link_or_copy, stage_file
from .index import FLAT, is_rebuildable
from .table import RowTable, Shard


def write_files(
    folder: Path,
    scratch: Path,
    table: RowTable,
    shared: dict[str, Tensor],
    places: Sequence[Path],
) -> list[FileRecord]:
    """Writes what is not there already.

    Args:
        folder: where to.
        scratch: a folder of the same file system for files that are not whole yet.
        table: the rows; a shard with a record is reused where its file is found.
        shared: tensors of the first file that belong to no row: `mean`, and `centroids`.
        places: folders in which unchanged files may lie; they are hard-linked.

    Returns:
        The records of the files, in row order.
    """
    records, start = [], 0
    for shard in table.shards:
        part = slice(start, start + shard.rows)
        record = shard.record
        if record is None or not _reuse(record, folder, places):
            tensors = _tensors(table, part) | (shared if part.start == 0 else {})
            record = _write(folder, scratch, tensors, places)
        records.append(record)
        start += shard.rows
    return records


class OpenedFiles(NamedTuple):
    """The mapped files of a datastore.

    Attributes:
        table: the rows, without paths.
        shared: what belongs to no row: `mean`, and `centroids` if there are any.
        read_paths: reads the paths; raises DatastoreError where they disagree with their file.
        verify: hashes the files, those that were opened even if others took their names since;
            raises DatastoreError naming the file that is not what the manifest says.
    """

    table: RowTable
    shared: dict[str, Tensor]
    read_paths: Callable[[], list[str] | None]
    verify: Callable[[], None]


def open_files(manifest: Manifest, resolve: Resolve) -> OpenedFiles:
    """Maps the files of a manifest into memory; checks sizes, headers and shapes, not content.

    Args:
        manifest: the checked manifest.
        resolve: finds a file by name; None if it is missing.

    Raises:
        DatastoreError: if a file is missing, has another size, or disagrees with the manifest.
    """
    # opened before they are mapped, so that what is hashed is what is mapped
    handles = [record.verify_size(resolve(record.name)).open("rb") for record in manifest.blobs]
    files = [open_blob(record, resolve) for record in manifest.blobs]
    features = join_features(files, manifest)
    shared = {"mean": take_vector(files[0], "mean", torch.float32, manifest.blobs[0])}
    lists = None
    if "centroids" in files[0]:
        shared["centroids"] = files[0]["centroids"]
        lists = join_vectors(files, "lists", manifest, torch.int32).long().numpy()
    pairs = zip(files, manifest.blobs, strict=True)
    table = RowTable(
        features,
        join_vectors(files, "labels", manifest, torch.int64),
        join_vectors(files, "ids", manifest, torch.int64),
        None,
        lists,
        [Shard(len(take(tensors, "ids", record)), record) for tensors, record in pairs],
    )

    def read_paths() -> list[str] | None:
        return decode_paths(files, manifest)

    def verify() -> None:
        # copies of a datastore share this: what was found whole once is not read again
        for record, handle in zip(manifest.blobs, handles, strict=True):
            if not handle.closed:
                record.verify_stream(handle)
                handle.close()

    return OpenedFiles(table, shared, read_paths, verify)


def _tensors(table: RowTable, part: slice) -> dict[str, Tensor]:
    tensors = {
        "features": torch.from_numpy(table.features[part]),
        "labels": table.labels[part],
        "ids": table.ids[part],
    }
    if table.paths is not None:
        tensors |= _encode_paths(table.paths[part])
    if table.lists is not None:
        tensors["lists"] = torch.from_numpy(table.lists[part]).int()
    return tensors


def _write(
    folder: Path, scratch: Path, tensors: dict[str, Tensor], places: Sequence[Path]
) -> FileRecord:
    temporary = scratch / "rows"
    save_file(tensors, temporary)
    found = FileRecord.of(temporary)
    record = replace(found, name=f"datastore-{found.sha256[:12]}.safetensors")
    if _reuse(record, folder, places):
        temporary.unlink()
    else:
        give_default_mode(temporary)
        fsync_path(temporary)
        temporary.replace(folder / record.name)
    return record


def _reuse(record: FileRecord, folder: Path, places: Sequence[Path]) -> bool:
    """Keeps or hard-links a file that is there already, after checking its bytes."""
    for place in (folder, *places):
        path = place / record.name
        if not path.is_file():
            continue
        try:
            record.verify(path)
        except DatastoreError:
            continue  # damaged on disk: a fresh copy takes its place
        if place != folder:
            link_or_copy(str(path), str(folder / record.name))
        return True
    return False


def _encode_paths(paths: list[str]) -> dict[str, Tensor]:
    encoded = [path.encode(errors="surrogateescape") for path in paths]
    ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
    text = np.array(bytearray(b"".join(encoded)), dtype=np.uint8)
    return {"path_bytes": torch.from_numpy(text), "path_ends": torch.from_numpy(ends)}


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
            faiss_index=None if index is None else replace(FileRecord.of(index), name=FAISS_NAME),
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


logger = logging.getLogger(__name__)


def blobs_in(folder: Path) -> list[FileRecord] | None:
    """What the manifest of a folder names; None if there is no manifest to read.

    Args:
        folder: where a datastore may lie.
    """
    try:
        return Manifest.read(folder / MANIFEST_NAME).blobs
    except (FileNotFoundError, DatastoreError):
        return None


def verified_faiss_file(manifest: Manifest, resolve: Resolve) -> BinaryIO | None:
    """The serialized index of a manifest, open and hashed, if it can be searched as it is.

    Args:
        manifest: the checked manifest.
        resolve: finds a file by name; None if missing.

    Returns:
        The file; None, with a warning, if there is none that could be searched.

    Raises:
        DatastoreError: if it is damaged.
    """
    record, problem = manifest.faiss_index, None
    # a flat index of distances is written for others; ours is built from the rows in no time
    is_readable = manifest.metric == Metric.COSINE or manifest.index.spec != FLAT
    if record is not None and is_readable and has_faiss():
        for name in (FAISS_NAME, f"{SCRATCH}/{FAISS_NAME}"):  # where a kill left the old one
            if (path := resolve(name)) is None:
                continue
            try:
                file = record.verify_size(path).open("rb")
                record.verify_stream(file)
            except DatastoreError as error:
                problem = problem or error
            else:
                return file
    if problem is not None:
        raise problem
    logger.warning(
        "There is no %s that can be read (none was written, it is gone, it is flat with metric l2, "
        "or faiss is not installed): the index is built from the rows.", FAISS_NAME,
    )  # fmt: skip
    return None


def checked_centroids(opened: OpenedFiles, manifest: Manifest) -> Singles:
    """The centroids of an inverted file, which must fit the rows' lists and the manifest.

    Args:
        opened: the opened files of the datastore.
        manifest: the checked manifest.

    Returns:
        [L, D] float32, one per list.

    Raises:
        DatastoreError: if there are none, or they do not fit, with both numbers.
    """
    table, centroids = opened.table, opened.shared.get("centroids")
    lists = table.lists
    if centroids is None or lists is None or len(lists) != manifest.num_rows:
        raise DatastoreError(
            f"Expected the blobs to hold centroids and {manifest.num_rows} lists for the index "
            f"{manifest.index.spec}, but they do not; save the datastore again."
        )
    count = len(centroids)
    if centroids.dtype != torch.float32 or centroids.shape[1:] != (manifest.dim,):
        raise DatastoreError(
            f"Expected centroids [{count}, {manifest.dim}] float32 in {manifest.blobs[0].name}, "
            f"but got {tuple(centroids.shape)} {centroids.dtype}; save the datastore again."
        )
    if not manifest.index.spec.startswith(f"IVF{count},"):
        raise DatastoreError(
            f"Expected {count} lists in the index of the manifest, one per centroid, "
            f"but got {manifest.index.spec}."
        )
    if len(lists) and (int(lists.min()) < 0 or int(lists.max()) >= count):
        raise DatastoreError(f"Expected lists in [0, {count}) in {manifest.blobs[0].name}.")
    return centroids.numpy()
