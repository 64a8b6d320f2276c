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
from .row_table import RowParts, RowTable, Shard
from .storage import fsync_path, give_default_mode, link_or_copy

Resolve = Callable[[str], Path | None]


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
    files = [_open(record, resolve) for record in manifest.blobs]
    features = _features(files, manifest)
    shape = (manifest.num_rows, manifest.dim)
    if features.shape != shape or str(features.dtype) != f"torch.{manifest.dtype}":
        raise DatastoreError(
            f"Expected features of {shape} {manifest.dtype} as the manifest says, "
            f"but the blobs hold {features.shape} {features.dtype}."
        )
    shared = {"mean": _take_vector(files[0], "mean", torch.float32, manifest.blobs[0])}
    lists = None
    if "centroids" in files[0]:
        shared["centroids"] = files[0]["centroids"]
        lists = _vectors(files, "lists", manifest, torch.int32).long().numpy()
    pairs = zip(files, manifest.blobs, strict=True)
    table = RowTable(
        features,
        _vectors(files, "labels", manifest, torch.int64),
        _vectors(files, "ids", manifest, torch.int64),
        None,
        lists,
        [Shard(len(_take(tensors, "ids", record)), record) for tensors, record in pairs],
    )

    def read_paths() -> list[str] | None:
        return _decode_paths(files, manifest) if "path_ends" in files[0] else None

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


def _features(files: list[dict[str, Tensor]], manifest: Manifest) -> RowParts:
    pairs = zip(files, manifest.blobs, strict=True)
    parts = [_take(tensors, "features", record) for tensors, record in pairs]
    kinds = {f"{list(part.shape[1:])} {part.dtype}" for part in parts}
    if len(kinds) != 1 or parts[0].ndim != 2:
        raise DatastoreError(
            f"Expected features of ({manifest.num_rows}, {manifest.dim}) of one dtype in all "
            f"blobs, but they hold {[tuple(part.shape) for part in parts]}: {sorted(kinds)}."
        )
    return RowParts(parts)


def _vectors(
    files: list[dict[str, Tensor]], key: str, manifest: Manifest, dtype: torch.dtype
) -> Tensor:
    pairs = zip(files, manifest.blobs, strict=True)
    parts = [_take_vector(tensors, key, dtype, record) for tensors, record in pairs]
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
