"""The rows of a checkpoint: read, hashed, searched exactly, copied; never changed."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .manifest import DatastoreError, FileRecord, Manifest
from .rows import RowParts

Resolve = Callable[[str], Path | None]


def open_blob(record: FileRecord, resolve: Resolve) -> dict[str, Tensor]:
    path = record.verify_size(resolve(record.name))
    try:
        return load_file(path)
    except (SafetensorError, OSError, RuntimeError) as error:  # torch maps it, or cannot
        raise DatastoreError(
            f"Expected {record.name} to be a safetensors file, but: {error}"
        ) from error


def take(tensors: dict[str, Tensor], key: str, record: FileRecord) -> Tensor:
    if key not in tensors:
        raise DatastoreError(
            f"Expected {record.name} to hold `{key}`, but it holds {sorted(tensors)}."
        )
    return tensors[key]


def take_vector(
    tensors: dict[str, Tensor], key: str, dtype: torch.dtype, record: FileRecord
) -> Tensor:
    vector = take(tensors, key, record)
    if vector.ndim != 1 or vector.dtype != dtype:
        raise DatastoreError(
            f"Expected `{key}` in {record.name} to be a list of {dtype}, "
            f"but got {tuple(vector.shape)} {vector.dtype}."
        )
    return vector


def join_features(files: list[dict[str, Tensor]], manifest: Manifest) -> RowParts:
    pairs = zip(files, manifest.blobs, strict=True)
    parts = [take(tensors, "features", record) for tensors, record in pairs]
    kinds = {f"{list(part.shape[1:])} {part.dtype}" for part in parts}
    if len(kinds) != 1 or parts[0].ndim != 2:
        raise DatastoreError(
            f"Expected features of ({manifest.num_rows}, {manifest.dim}) of one dtype in all "
            f"blobs, but they hold {[tuple(part.shape) for part in parts]}: {sorted(kinds)}."
        )
    return RowParts(parts)


def join_vectors(
    files: list[dict[str, Tensor]], key: str, manifest: Manifest, dtype: torch.dtype
) -> Tensor:
    pairs = zip(files, manifest.blobs, strict=True)
    parts = [take_vector(tensors, key, dtype, record) for tensors, record in pairs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def decode_paths(files: list[dict[str, Tensor]], manifest: Manifest) -> list[str]:
    paths: list[str] = []
    for tensors, record in zip(files, manifest.blobs, strict=True):
        text = take_vector(tensors, "path_bytes", torch.uint8, record).numpy().tobytes()
        ends = take_vector(tensors, "path_ends", torch.int64, record).tolist()
        rows = len(take(tensors, "ids", record))
        starts = [0, *ends[:-1]] if ends else []
        in_order = all(a <= b for a, b in zip(starts, ends, strict=True))
        if len(ends) != rows or not in_order or (ends[-1] if ends else 0) != len(text):
            raise DatastoreError(
                f"Expected {record.name} to hold the paths of its {rows} rows, in order."
            )
        spans = zip(starts, ends, strict=True)
        paths += [text[start:end].decode(errors="surrogateescape") for start, end in spans]
    return paths
