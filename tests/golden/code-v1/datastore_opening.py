"""What of a stored datastore is checked before it is believed: centroids, and faiss's own file."""

import logging
from pathlib import Path
from typing import BinaryIO

import torch

from .blobs import OpenedFiles, Resolve
from .faiss_index import has_faiss
from .first_pass import Singles
from .functional import Metric
from .indexing import FLAT
from .manifest import FAISS_NAME, MANIFEST_NAME, DatastoreError, FileRecord, Manifest
from .persistence import SCRATCH

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
