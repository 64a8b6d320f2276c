"""The row files of a stored datastore: writing, reuse of unchanged ones, checked reading."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .manifest import DatastoreError, FileRecord, Manifest
from .storage import give_default_mode, link_or_copy, write_durably

SHARD_BYTES = 5 * 10**9
"""A row file holds at most this many bytes of features."""


class RowTable(NamedTuple):
    """What the row files hold.

    Attributes:
        features: [N, D] float16 or float32.
        labels: [N] int64.
        ids: [N] int64.
        mean: [D] float32; lies in the first file.
        paths: N strings, or None.
    """

    features: Tensor
    labels: Tensor
    ids: Tensor
    mean: Tensor
    paths: list[str] | None


def write_row_files(folder: Path, table: RowTable, reuse: Path | None) -> list[FileRecord]:
    """Writes the row files, named by their content; files that are there already stay.

    Args:
        folder: where to.
        table: the rows.
        reuse: a folder whose unchanged files are hard-linked instead of written.

    Returns:
        One record per file, in row order.
    """
    count, dim = table.features.shape
    rows = max(1, SHARD_BYTES // max(1, dim * table.features.element_size()))
    return [
        _write_file(folder, _tensors(table, start, start + rows), reuse)
        for start in range(0, max(1, count), rows)
    ]


def read_row_files(manifest: Manifest, resolve: Callable[[str], Path | None]) -> RowTable:
    """Reads and verifies the row files that a manifest names.

    Args:
        manifest: the checked manifest.
        resolve: finds a file by name; None if it is missing.

    Raises:
        DatastoreError: if a file is missing, damaged, or disagrees with the manifest.
    """
    files = [_read_file(record.verify(resolve(record.name)), record) for record in manifest.blobs]
    features = _concatenate(files, "features", manifest)
    shape = (manifest.num_rows, manifest.dim)
    if tuple(features.shape) != shape or str(features.dtype) != f"torch.{manifest.dtype}":
        raise DatastoreError(
            f"Expected features of {shape} {manifest.dtype} as the manifest says, "
            f"but the blobs hold {tuple(features.shape)} {features.dtype}."
        )
    return RowTable(
        features,
        _concatenate(files, "labels", manifest),
        _concatenate(files, "ids", manifest),
        _take(files[0], "mean", manifest.blobs[0]),
        _decode_paths(files, manifest) if "path_ends" in files[0] else None,
    )


def _tensors(table: RowTable, start: int, stop: int) -> dict[str, Tensor]:
    part = slice(start, stop)
    tensors = {
        "features": table.features[part],
        "labels": table.labels[part],
        "ids": table.ids[part],
    }
    if start == 0:
        tensors["mean"] = table.mean
    if table.paths is not None:
        tensors |= _encode_paths(table.paths[part])
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _write_file(folder: Path, tensors: dict[str, Tensor], reuse: Path | None) -> FileRecord:
    temporary = folder / ".datastore-rows.tmp"
    try:
        save_file(tensors, temporary)
        sha256 = FileRecord.of(temporary).sha256
        record = FileRecord.of(temporary, f"datastore-{sha256[:12]}.safetensors")
        if not _reuse_file(record, folder, reuse):
            give_default_mode(temporary)
            write_durably(folder / record.name, lambda path: _move(temporary, path))
    finally:
        temporary.unlink(missing_ok=True)
    return record


def _move(source: Path, target: Path) -> None:
    source.replace(target)


def _reuse_file(record: FileRecord, folder: Path, reuse: Path | None) -> bool:
    """Keeps or hard-links a file that is there already, after checking its bytes."""
    for place in (folder, reuse):
        if place is None or not (place / record.name).is_file():
            continue
        try:
            record.verify(place / record.name)
        except DatastoreError:
            continue  # damaged on disk: the fresh copy takes its place
        if place is not folder:
            link_or_copy(str(place / record.name), str(folder / record.name))
        return True
    return False


def _read_file(path: Path, record: FileRecord) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DatastoreError(
            f"Expected {record.name} to be a safetensors file, but: {error}"
        ) from error


def _take(tensors: dict[str, Tensor], key: str, record: FileRecord) -> Tensor:
    if key not in tensors:
        raise DatastoreError(
            f"Expected {record.name} to hold `{key}`, but it holds {sorted(tensors)}."
        )
    return tensors[key]


def _concatenate(files: list[dict[str, Tensor]], key: str, manifest: Manifest) -> Tensor:
    parts = [
        _take(tensors, key, record) for tensors, record in zip(files, manifest.blobs, strict=True)
    ]
    if len({(part.dtype, part.shape[1:]) for part in parts}) != 1:
        raise DatastoreError(f"Expected `{key}` of one dtype and width in all blobs.")
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _encode_paths(paths: list[str]) -> dict[str, Tensor]:
    encoded = [path.encode() for path in paths]
    ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
    text = np.frombuffer(b"".join(encoded), np.uint8).copy()
    return {"path_bytes": torch.from_numpy(text), "path_ends": torch.from_numpy(ends)}


def _decode_paths(files: list[dict[str, Tensor]], manifest: Manifest) -> list[str]:
    paths: list[str] = []
    for tensors, record in zip(files, manifest.blobs, strict=True):
        text = _take(tensors, "path_bytes", record).numpy().tobytes()
        ends = _take(tensors, "path_ends", record).tolist()
        starts = [0, *ends[:-1]]
        if sorted(ends) != ends or (ends[-1] if ends else 0) != len(text):
            raise DatastoreError(f"Expected the paths in {record.name} to lie in order.")
        paths += [text[a:b].decode(errors="replace") for a, b in zip(starts, ends, strict=True)]
    return paths
