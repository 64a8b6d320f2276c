"""The data files of a stored datastore: writing, reuse of unchanged ones, checked reading.

Rows lie in one or more files, each named by its content; the first also holds the mean and, for an
inverted-file index, its centroids.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .manifest import DatastoreError, FileRecord, Manifest
from .storage import fsync_path, give_default_mode, link_or_copy

SHARD_BYTES = 5 * 10**9
"""A row file holds at most this many bytes of features."""

SMALL_SHARD_BYTES = 16 * 10**6
"""Added rows go into the last row file while it is smaller than this, else into a new one."""

Resolve = Callable[[str], Path | None]


class Shard(NamedTuple):
    """One row file: how many rows, and its record if the file holds them as they are."""

    rows: int
    record: FileRecord | None = None


class RowTable(NamedTuple):
    """What the files hold.

    Attributes:
        features: [N, D] float16 or float32.
        labels: [N] int64.
        ids: [N] int64.
        mean: [D] float32.
        paths: N strings, or None.
        centroids: [n, D'] float32 of an inverted-file index, or None.
        lists: [N] int64, each row's list, or None.
    """

    features: Tensor
    labels: Tensor
    ids: Tensor
    mean: Tensor
    paths: list[str] | None = None
    centroids: Tensor | None = None
    lists: Tensor | None = None


def split_into_shards(rows: int, row_bytes: int) -> list[Shard]:
    """Row files for new rows; one empty file for none.

    Args:
        rows: how many.
        row_bytes: bytes of features per row.
    """
    most = max(1, SHARD_BYTES // max(1, row_bytes))
    return [Shard(min(most, rows - start)) for start in range(0, max(1, rows), most)]


def append_to_shards(shards: Sequence[Shard], rows: int, row_bytes: int) -> list[Shard]:
    """Row files after rows were appended; large ones stay as they are."""
    kept, last = list(shards[:-1]), shards[-1]
    if last.rows * row_bytes < SMALL_SHARD_BYTES:
        return [*kept, *split_into_shards(last.rows + rows, row_bytes)]
    return [*shards, *split_into_shards(rows, row_bytes)]


def change_shards(shards: Sequence[Shard], changed: Tensor, kept: Tensor) -> list[Shard]:
    """Row files after some rows were changed or removed; only theirs must be written again.

    Args:
        shards: the row files before.
        changed: [N] bool, rows with other content.
        kept: [N] bool, rows that are still there.
    """
    result, start = [], 0
    for shard in shards:
        part = slice(start, start + shard.rows)
        rows = int(kept[part].sum())
        touched = rows < shard.rows or bool(changed[part].any())
        result.append(Shard(rows, None if touched else shard.record))
        start += shard.rows
    filled = [shard for shard in result if shard.rows] or [Shard(0)]
    if filled[0] is not result[0]:
        filled[0] = Shard(filled[0].rows)  # the first file is the one with the mean
    return filled


def write_files(
    folder: Path,
    scratch: Path,
    table: RowTable,
    shards: Sequence[Shard],
    places: Sequence[Path],
) -> list[FileRecord]:
    """Writes what is not there already.

    Args:
        folder: where to.
        scratch: a folder of the same file system for files that are not whole yet.
        table: the rows.
        shards: how they are divided; a shard with a record is reused where its file is found.
        places: folders in which unchanged files may lie; they are hard-linked.

    Returns:
        The records of the files, in row order.
    """
    records, start = [], 0
    for shard in shards:
        part = slice(start, start + shard.rows)
        record = shard.record
        if record is None or not _reuse(record, folder, places):
            record = _write(folder, scratch, _tensors(table, part), places)
        records.append(record)
        start += shard.rows
    return records


class OpenedFiles(NamedTuple):
    """The mapped files of a datastore.

    Attributes:
        table: the rows, without paths.
        shards: how they are divided.
        read_paths: reads the paths; raises DatastoreError where they disagree with their file.
        verify: hashes the files, those that were opened even if others took their names since;
            raises DatastoreError naming the file that is not what the manifest says.
    """

    table: RowTable
    shards: list[Shard]
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
    files = [_open(record, resolve) for record in manifest.blobs]
    features = _concatenate(files, "features", manifest)
    shape = (manifest.num_rows, manifest.dim)
    if tuple(features.shape) != shape or str(features.dtype) != f"torch.{manifest.dtype}":
        raise DatastoreError(
            f"Expected features of {shape} {manifest.dtype} as the manifest says, "
            f"but the blobs hold {tuple(features.shape)} {features.dtype}."
        )
    has_lists = "centroids" in files[0]
    table = RowTable(
        features,
        _concatenate(files, "labels", manifest, torch.int64),
        _concatenate(files, "ids", manifest, torch.int64),
        _take_vector(files[0], "mean", torch.float32, manifest.blobs[0]),
        None,
        files[0].get("centroids"),
        _concatenate(files, "lists", manifest, torch.int32).long() if has_lists else None,
    )
    pairs = zip(files, manifest.blobs, strict=True)
    shards = [Shard(len(tensors["ids"]), record) for tensors, record in pairs]

    def read_paths() -> list[str] | None:
        return _decode_paths(files, manifest) if "path_ends" in files[0] else None

    def verify() -> None:
        # copies of a datastore share this: what was found whole once is not read again
        for record, handle in zip(manifest.blobs, handles, strict=True):
            if not handle.closed:
                handle.seek(0)
                record.verify_stream(handle)
                handle.close()

    return OpenedFiles(table, shards, read_paths, verify)


def _tensors(table: RowTable, part: slice) -> dict[str, Tensor]:
    tensors = {
        "features": table.features[part],
        "labels": table.labels[part],
        "ids": table.ids[part],
    }
    if part.start == 0:
        tensors["mean"] = table.mean
    if table.paths is not None:
        tensors |= _encode_paths(table.paths[part])
    if table.centroids is not None and table.lists is not None:
        tensors["lists"] = table.lists[part].int()
        if part.start == 0:
            tensors["centroids"] = table.centroids
    return tensors


def _write(
    folder: Path, scratch: Path, tensors: dict[str, Tensor], places: Sequence[Path]
) -> FileRecord:
    temporary = scratch / "rows"
    save_file(tensors, temporary)
    found = FileRecord.of(temporary)
    record = found.renamed(f"datastore-{found.sha256[:12]}.safetensors")
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


def _open(record: FileRecord, resolve: Resolve) -> dict[str, Tensor]:
    path = record.verify_size(resolve(record.name))
    try:
        return load_file(path)
    except (SafetensorError, OSError, RuntimeError) as error:  # torch maps it, or cannot
        raise DatastoreError(
            f"Expected {record.name} to be a safetensors file, but: {error}"
        ) from error


def _take(tensors: dict[str, Tensor], key: str, record: FileRecord) -> Tensor:
    if key not in tensors:
        raise DatastoreError(
            f"Expected {record.name} to hold `{key}`, but it holds {sorted(tensors)}."
        )
    return tensors[key]


def _take_vector(
    tensors: dict[str, Tensor], key: str, dtype: torch.dtype, record: FileRecord
) -> Tensor:
    vector = _take(tensors, key, record)
    if vector.ndim != 1 or vector.dtype != dtype:
        raise DatastoreError(
            f"Expected `{key}` in {record.name} to be a list of {dtype}, "
            f"but got {tuple(vector.shape)} {vector.dtype}."
        )
    return vector


def _concatenate(
    files: list[dict[str, Tensor]], key: str, manifest: Manifest, dtype: torch.dtype | None = None
) -> Tensor:
    pairs = zip(files, manifest.blobs, strict=True)
    if dtype is None:
        parts = [_take(tensors, key, record) for tensors, record in pairs]
    else:
        parts = [_take_vector(tensors, key, dtype, record) for tensors, record in pairs]
    if len({(part.dtype, part.shape[1:]) for part in parts}) != 1:
        raise DatastoreError(f"Expected `{key}` of one dtype and width in all blobs.")
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _encode_paths(paths: list[str]) -> dict[str, Tensor]:
    encoded = [path.encode(errors="surrogateescape") for path in paths]
    ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
    text = np.array(bytearray(b"".join(encoded)), dtype=np.uint8)
    return {"path_bytes": torch.from_numpy(text), "path_ends": torch.from_numpy(ends)}


def _decode_paths(files: list[dict[str, Tensor]], manifest: Manifest) -> list[str]:
    paths: list[str] = []
    for tensors, record in zip(files, manifest.blobs, strict=True):
        text = _take_vector(tensors, "path_bytes", torch.uint8, record).numpy().tobytes()
        ends = _take_vector(tensors, "path_ends", torch.int64, record).tolist()
        rows = len(_take(tensors, "ids", record))
        starts = [0, *ends[:-1]] if ends else []
        in_order = all(a <= b for a, b in zip(starts, ends, strict=True))
        if len(ends) != rows or not in_order or (ends[-1] if ends else 0) != len(text):
            raise DatastoreError(
                f"Expected {record.name} to hold the paths of its {rows} rows, in order."
            )
        spans = zip(starts, ends, strict=True)
        paths += [text[start:end].decode(errors="surrogateescape") for start, end in spans]
    return paths
