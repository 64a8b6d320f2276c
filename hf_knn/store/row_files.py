"""What is in a row file, and how one is opened: read into memory, or mapped."""

import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..core.frozen import join_vectors, parse_blob, take
from ..core.manifest import DatastoreError, FileRecord, Manifest
from ..core.search import Ints, Singles
from .table import RowFile, RowTable

_LARGE = ("features", "path_bytes", "path_ends")


def read_blob(record: FileRecord, path: Path | None) -> tuple[dict[str, Tensor], None]:
    """Reads a row file into memory; what is kept is what was hashed.

    Args:
        record: what it should be.
        path: where it is; None if it is missing.

    Raises:
        DatastoreError: for another file.
    """
    return parse_blob(record, path), None


def map_blob(record: FileRecord, path: Path | None) -> tuple[dict[str, Tensor], RowFile]:
    """Maps the features of a row file into memory, and copies what is small.

    Sizes and header are checked, not content: that is for whoever has copied what is needed.

    Args:
        record: what it should be.
        path: where it is; None if it is missing.

    Raises:
        DatastoreError: for a file of another size, or no safetensors file.
    """
    path = record.verify_size(path)
    file = path.open("rb")  # before it is mapped, so that what is hashed is what is mapped
    try:
        tensors = load_file(path)
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise DatastoreError(f"{record.name} was replaced while it was opened; open it again.")
        kept = RowFile(record, file, take(tensors, "features", record))
    except (SafetensorError, OSError, RuntimeError) as error:  # torch maps it, or cannot
        file.close()
        raise DatastoreError(
            f"Expected {record.name} to be a safetensors file, but: {error}"
        ) from error
    except DatastoreError:
        file.close()
        raise
    small = {name: t.clone() for name, t in tensors.items() if name not in _LARGE}
    return tensors | small, kept


def read_lists(
    files: list[dict[str, Tensor]], manifest: Manifest, width: int
) -> tuple[Singles, Ints]:
    """The centroids of an inverted file, and the list of each row, which must fit each other.

    Args:
        files: the tensors of the row files.
        manifest: that names them.
        width: of the rows as they are compared.
    """
    spec, count, name = manifest.index.spec, manifest.num_rows, manifest.blobs[0].name
    if "centroids" not in files[0]:
        raise DatastoreError(
            f"Expected the blobs to hold centroids and {count} lists for the index {spec}, but "
            "they do not; save the datastore again."
        )
    centroids = files[0]["centroids"]
    lists = join_vectors(files, "lists", manifest, torch.int32).long().numpy()
    if len(lists) != count:
        raise DatastoreError(
            f"Expected the blobs to hold centroids and {count} lists for the index {spec}, but "
            f"they hold {len(lists)} lists; save the datastore again."
        )
    most = len(centroids)
    if centroids.dtype != torch.float32 or centroids.shape[1:] != (width,):
        raise DatastoreError(
            f"Expected centroids [{most}, {width}] float32 in {name}, "
            f"but got {tuple(centroids.shape)} {centroids.dtype}; save the datastore again."
        )
    if not spec.startswith(f"IVF{most},"):
        raise DatastoreError(
            f"Expected {most} lists in the index of the manifest, one per centroid, but got {spec}."
        )
    if not torch.isfinite(centroids).all():
        raise DatastoreError(f"Expected finite centroids in {name}; save the datastore again.")
    if len(lists) and (int(lists.min()) < 0 or int(lists.max()) >= most):
        raise DatastoreError(f"Expected lists in [0, {most}) in {name}.")
    return centroids.numpy(), lists


def tensors_of(table: RowTable, part: slice) -> dict[str, Tensor]:
    """What is written of some rows, by position."""
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


def _encode_paths(paths: list[str]) -> dict[str, Tensor]:
    encoded = [path.encode(errors="surrogateescape") for path in paths]
    ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
    text = np.array(bytearray(b"".join(encoded)), dtype=np.uint8)
    return {"path_bytes": torch.from_numpy(text), "path_ends": torch.from_numpy(ends)}
