"""The rows of a checkpoint: read, hashed, searched exactly, copied; never changed."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from .learned import LearnedMap
from .manifest import FAISS_NAME, MANIFEST_NAME, Binding, DatastoreError, FileRecord, Manifest
from .rows import RowParts, Values, check_row_numbers, refuse_non_finite
from .search import Neighbors, RowSpace, Searcher, TorchFirstPass, check_request

Resolve = Callable[[str], Path | None]
"""Finds a file by name; None if it is missing."""


class FrozenDatastore:
    """Rows of (features, label, id) as a checkpoint holds them.

    Each byte that is kept in memory was hashed. `hf_knn.Datastore` is the one that can be changed.

    Args:
        manifest: the checked manifest.
        resolve: finds a file by name; None if it is missing.

    Attributes:
        features: [N, D] raw rows, float16 or float32.
        labels: [N] int64.
        ids: [N] int64, unique.
        mean: [D] float32, subtracted by `l2_centered`.
        learned_map: that rows and queries go through, or None.
        paths: N places of the pictures, relative to their dataset, or None.

    Raises:
        DatastoreError: if a file is missing, damaged, or disagrees with the manifest.
    """

    def __init__(self, manifest: Manifest, resolve: Resolve) -> None:
        self.manifest = manifest
        self.metric, self.normalization = manifest.metric, manifest.normalization
        self.places = [record.verify_size(resolve(record.name)) for record in manifest.blobs]
        files = [parse_blob(*pair) for pair in zip(manifest.blobs, self.places, strict=True)]
        self.features = join_features(files, manifest)
        self.labels = join_vectors(files, "labels", manifest, torch.int64)
        self.ids = join_vectors(files, "ids", manifest, torch.int64)
        self.mean = take_vector(files[0], "mean", torch.float32, manifest.blobs[0])
        self.learned_map = take_map(files[0], manifest)
        self.paths = decode_paths(files, manifest)
        check_content(self.features, self.labels, self.ids, self.mean)
        compared = (self.mean.double().numpy(), self.metric, self.normalization, self.learned_map)
        space = RowSpace(*compared, self.features)
        first_pass = TorchFirstPass(space.first_pass_rows(self.features))
        self._searcher = Searcher(self.features, self.ids.numpy(), space, first_pass)

    def __len__(self) -> int:
        return len(self.features)

    def __repr__(self) -> str:
        return f"FrozenDatastore({len(self)} x {self.dim}, metric={self.metric!r})"

    def __deepcopy__(self, memo: dict[int, object]) -> "FrozenDatastore":
        return self  # nothing of it ever changes

    @property
    def dim(self) -> int:
        """Width of a row (D)."""
        return self.features.shape[1]

    def path_of(self, row_id: int) -> str:
        """Where the picture of a row lies, relative to its dataset; empty if not known.

        Raises:
            ValueError: for an id that is not there.
        """
        rows = (self.ids == row_id).nonzero().flatten().tolist()
        if not rows:
            raise ValueError(f"Expected an id that the datastore has, but got {row_id}.")
        return "" if self.paths is None else self.paths[rows[0]]

    def search(
        self, queries: Tensor | NDArray, k: int = 20, exclude_ids: Values | None = None
    ) -> Neighbors:
        """Finds the k nearest rows of each query, exactly.

        Args:
            queries: [B, D] finite raw features of any float dtype and device.
            k: how many, >= 1; fewer rows give fewer neighbours.
            exclude_ids: [B] int64; the row with that id is no neighbour of that query (-1 = none).

        Returns:
            Neighbors [B, k'] by (similarity, id), compared in float64.

        Raises:
            ValueError: for NaN or infinite queries, another width, or k < 1.
        """
        wanted = check_request(queries, k, exclude_ids, self.dim)
        shape = (len(wanted.queries), wanted.width(len(self)))
        similarities, positions = np.zeros(shape), np.zeros(shape, np.int64)
        if 0 not in shape:
            similarities, positions = self._searcher.search(
                wanted.queries, shape[1], wanted.excluded
            )
        found = torch.from_numpy(positions)
        neighbors = Neighbors(torch.from_numpy(similarities), self.labels[found], self.ids[found])
        return neighbors.rounded(queries)

    def copy_to(self, folder: Path) -> None:
        """Copies the row files into another folder, before anything else is written there.

        Args:
            folder: made if it is not there.

        Raises:
            DatastoreError: for a file that is gone, or no longer what was opened.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for path, record in zip(self.places, self.manifest.blobs, strict=True):
            target = folder / record.name
            if not target.exists() or not target.samefile(path):
                target.unlink(missing_ok=True)
                shutil.copyfile(path, target)
            record.verify(target)  # afterwards: what was copied is what was opened

    def write_manifest(self, folder: Path, binding: Binding) -> None:
        """Binds the row files to the checkpoint that lies beside them.

        Args:
            folder: where they were copied to.
            binding: the checkpoint.
        """
        manifest = replace(self.manifest, binding=binding, faiss_index=None)
        (folder / FAISS_NAME).unlink(missing_ok=True)  # made from the rows, and not copied
        (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def check_content(
    features: RowParts, labels: Tensor, ids: Tensor, mean: Tensor, *, reads_features: bool = True
) -> None:
    """Refuses rows of a file that no datastore could have written.

    Args:
        features: [N, D].
        labels: [N].
        ids: [N].
        mean: [D].
        reads_features: False leaves the numbers in them to whoever reads them.

    Raises:
        DatastoreError: naming what is wrong.
    """
    try:
        check_row_numbers(labels, ids, len(features))
        for part in features.parts if reads_features else ():
            refuse_non_finite(part, "features")
        refuse_non_finite(mean.unsqueeze(0), "mean")
        if mean.shape != features.shape[1:]:
            raise ValueError(
                f"Expected `mean` to have shape {features.shape[1:]}, but got {tuple(mean.shape)}."
            )
    except ValueError as error:
        raise DatastoreError(f"The datastore is not usable: {error}") from error


def parse_blob(record: FileRecord, path: Path | None) -> dict[str, Tensor]:
    """The tensors of a row file, in memory: what is kept is what was hashed."""
    data = record.read(path)
    try:
        return load(data)
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise DatastoreError(
            f"Expected {record.name} to be a safetensors file, but: {error}"
        ) from error


def take(tensors: dict[str, Tensor], key: str, record: FileRecord) -> Tensor:
    """A tensor that a row file must hold."""
    if key not in tensors:
        raise DatastoreError(
            f"Expected {record.name} to hold `{key}`, but it holds {sorted(tensors)}."
        )
    return tensors[key]


def take_vector(
    tensors: dict[str, Tensor], key: str, dtype: torch.dtype, record: FileRecord
) -> Tensor:
    """A list of one dtype that a row file must hold."""
    vector = take(tensors, key, record)
    if vector.ndim != 1 or vector.dtype != dtype:
        raise DatastoreError(
            f"Expected `{key}` in {record.name} to be a list of {dtype}, "
            f"but got {tuple(vector.shape)} {vector.dtype}."
        )
    return vector


def take_map(tensors: dict[str, Tensor], manifest: Manifest) -> LearnedMap | None:
    """The learned map in the first row file, which must be that of the manifest; None without."""
    if manifest.learned_map is None:
        return None
    record = manifest.blobs[0]
    try:
        found = LearnedMap(take(tensors, "learned_map", record))
    except ValueError as error:
        raise DatastoreError(f"The datastore is not usable: {error}") from error
    if (found.sha256, found.dim) != (manifest.learned_map, manifest.dim):
        raise DatastoreError(
            f"Expected `learned_map` in {record.name} to have {manifest.dim} columns and sha256 "
            f"{manifest.learned_map[:12]}…, but got {found.dim} and {found.sha256[:12]}…; the file "
            "is from another save, download or save it again."
        )
    return found


def join_features(files: list[dict[str, Tensor]], manifest: Manifest) -> RowParts:
    """The features of all row files, which must be those of the manifest."""
    pairs = zip(files, manifest.blobs, strict=True)
    parts = [take(tensors, "features", record) for tensors, record in pairs]
    kinds = {f"{list(part.shape[1:])} {part.dtype}" for part in parts}
    if len(kinds) != 1 or parts[0].ndim != 2:
        raise DatastoreError(
            f"Expected features of ({manifest.num_rows}, {manifest.dim}) of one dtype in all "
            f"blobs, but they hold {[tuple(part.shape) for part in parts]}: {sorted(kinds)}."
        )
    features, shape = RowParts(parts), (manifest.num_rows, manifest.dim)
    if features.shape != shape or str(features.dtype) != f"torch.{manifest.dtype}":
        raise DatastoreError(
            f"Expected features of {shape} {manifest.dtype} as the manifest says, "
            f"but the blobs hold {features.shape} {features.dtype}."
        )
    return features


def join_vectors(
    files: list[dict[str, Tensor]], key: str, manifest: Manifest, dtype: torch.dtype
) -> Tensor:
    """One list over all row files."""
    pairs = zip(files, manifest.blobs, strict=True)
    parts = [take_vector(tensors, key, dtype, record) for tensors, record in pairs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def decode_paths(files: list[dict[str, Tensor]], manifest: Manifest) -> list[str] | None:
    """Where each row's picture lies; None if the row files do not say."""
    if "path_ends" not in files[0]:
        return None
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
