"""What is in a row file, and how one is opened: read into memory, or mapped."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..core.frozen import join_vectors, parse_blob, take
from ..core.manifest import MANIFEST_NAME, DatastoreError, FileRecord, Manifest, read_at
from ..core.plain_json import parse_json
from ..core.search import Ints, Singles
from .mapped import RowFile, Span
from .table import RowTable

_LARGE = ("features", "path_bytes", "path_ends")
_LENGTH_BYTES = 8  # which say how long the header of a safetensors file is


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
        start, others = _layout(file, record)
        kept = RowFile(record, file, take(tensors, "features", record), start, others)
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


def _layout(file: BinaryIO, record: FileRecord) -> tuple[int, list[Span]]:
    """Where features begin in a safetensors file, and where all lies that is copied of it."""
    length = int.from_bytes(read_at(file, 0, _LENGTH_BYTES), "little")
    begin = _LENGTH_BYTES + length
    header = parse_json(read_at(file, _LENGTH_BYTES, length), record.name)
    spans: dict[str, Span] = {
        name: (begin + facts["data_offsets"][0], begin + facts["data_offsets"][1])
        for name, facts in header.items()
        if name != "__metadata__"
    }
    others = [span for name, span in spans.items() if name not in _LARGE]
    return spans.get("features", (0, 0))[0], [(0, begin), *others]


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


def lies_in(folder: Path | None, records: Sequence[FileRecord | None]) -> bool:
    """Whether the manifest of a folder names just these row files.

    Args:
        folder: where a datastore may lie; None if there is none.
        records: of the row files, None for one that was never written.
    """
    try:
        return folder is not None and Manifest.read(folder / MANIFEST_NAME).blobs == records
    except (FileNotFoundError, DatastoreError):
        return False


def place_of(folder: Path | None, records: Sequence[FileRecord | None]) -> Path:
    """The folder of a datastore that was pickled by its place.

    Args:
        folder: where it lay.
        records: of its row files.

    Raises:
        DatastoreError: if it is gone, or another one.
    """
    if folder is None or not lies_in(folder, records):
        raise DatastoreError(
            f"Expected the datastore in {folder} to be the one that was pickled, but it is gone or "
            "was changed; pickle it again."
        )
    return folder
