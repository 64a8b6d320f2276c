"""The memory of the classifier: rows of (features, label, id) with exact search.

The only file that imports faiss, the only one that normalises features or turns them into
similarities, and the only one that knows the files of a stored datastore.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from .blobs import RowTable, read_row_files, write_row_files
from .configuration_knn import Normalization, check_metric
from .functional import Metric
from .manifest import (
    BLOB_PATTERN,
    FAISS_NAME,
    MANIFEST_NAME,
    STORAGE_DTYPES,
    Binding,
    DatastoreError,
    FileRecord,
    Manifest,
)
from .rows import (
    Values,
    as_features,
    as_whole_numbers,
    check_paths,
    check_row_numbers,
    refuse_non_finite,
    shown,
    to_storage,
)
from .search import ExactSearcher, FirstPass, Ints, TorchFirstPass, normalize_rows
from .storage import exclusive_lock, write_durably

try:
    import faiss
except ImportError:  # a missing CUDA runtime of faiss-gpu is a RuntimeError, and stays one
    faiss = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

FAISS_HINT = "run `pip install hf-knn[cpu]`, or `hf-knn[gpu]` where there is an NVIDIA GPU"
LARGEST_FAISS_FILE = 100 * 10**6


class Neighbors(NamedTuple):
    """The nearest rows of a batch of queries, by (similarity, id).

    Attributes:
        similarities: [B, k'] float32, higher is closer: inner products of unit vectors (`cosine`)
            or negative squared distances (`l2`).
        labels: [B, k'] int64.
        ids: [B, k'] int64.
    """

    similarities: Tensor
    labels: Tensor
    ids: Tensor


class _FaissFirstPass:
    """Exhaustive search with faiss."""

    def __init__(self, rows: NDArray[np.float32]) -> None:
        self.index = faiss.IndexFlatIP(rows.shape[1])
        self.index.add(rows)

    def candidates(self, queries: NDArray[np.float32], count: int) -> tuple[NDArray, Ints]:
        """See `FirstPass.candidates`."""
        return self.index.search(queries, count)


class Datastore:
    """Rows of (features, label, id) that are searched by similarity.

    Rows are raw features, cast once on entry to the storage dtype; normalisation is applied to
    stored rows and queries alike when they are compared. The constructor takes checked parts: build
    with `from_features` or `load`.

    Args:
        features: [N, D] float16 or float32, CPU.
        labels: [N] int64, >= 0.
        ids: [N] int64, unique, >= 0.
        mean: [D] float32, subtracted by `l2_centered`.
        metric: `cosine` or `l2`.
        normalization: `l2_centered`, `l2` or `none`.
        index: `flat`.
        paths: where each row's picture lies, relative to its dataset, if known.

    Attributes:
        manifest: what was read from disk; None for a datastore built in memory.
        digest: fingerprint of the in-memory backbone that made the features, if known.
        source: dataset id, revision and split of the rows, as far as known.

    Raises:
        ValueError: for parts that do not fit, with both numbers.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        ids: Tensor,
        mean: Tensor,
        *,
        metric: str = Metric.COSINE,
        normalization: str = Normalization.L2_CENTERED,
        index: str = "flat",
        paths: Sequence[str] | None = None,
    ) -> None:
        check_metric(metric, normalization)
        if str(features.dtype).removeprefix("torch.") not in STORAGE_DTYPES or features.ndim != 2:
            raise ValueError(
                f"Expected `features` to be [N, D] float16 or float32, "
                f"but got {tuple(features.shape)} {features.dtype}."
            )
        if mean.shape != features.shape[1:]:
            raise ValueError(
                f"Expected `mean` to have shape {tuple(features.shape[1:])}, "
                f"but got {tuple(mean.shape)}."
            )
        self.metric, self.normalization = str(metric), str(normalization)
        self.index = _resolve_index(index)
        self.features, self.mean = features.contiguous(), mean.float()
        self.labels, self.ids = check_row_numbers(labels, ids, len(features))
        self.paths = check_paths(paths, len(features))
        self.manifest: Manifest | None = None
        self.digest: str | None = None
        self.source: dict[str, str] = {}
        self._searcher: ExactSearcher | None = None

    @classmethod
    def from_features(
        cls,
        features: Tensor | NDArray,
        labels: Values,
        ids: Values | None = None,
        metric: str = "cosine",
        normalization: str = "l2_centered",
        index: str = "auto",
        paths: Sequence[str] | None = None,
    ) -> Self:
        """Builds a datastore; fixes the mean that centring uses.

        Args:
            features: [N, D] raw features of any float dtype and device; stored as float16, or as
                float32 where float16 would lose too much (a message says so).
            labels: [N] whole numbers >= 0.
            ids: [N] unique whole numbers >= 0; None numbers the rows.
            metric: `cosine` (inner product of unit vectors) or `l2` (negative squared distance).
            normalization: `l2_centered` (subtract the mean of these rows, then length 1), `l2`
                (length 1) or `none`.
            index: `auto` or `flat`.
            paths: [N] where each row's picture lies, relative to its dataset.

        Raises:
            ValueError: for NaN or infinite features (with the row numbers), shapes that disagree,
                negative, float or doubled ids or labels, or a bad option.
        """
        stored = to_storage(as_features(features, "features"), torch.float16)
        count = len(stored)
        numbers = torch.arange(count) if ids is None else as_whole_numbers(ids, "ids")
        wanted = as_whole_numbers(labels, "labels")
        zeros = torch.zeros(stored.shape[1])
        store = cls(
            stored, wanted, numbers, zeros,
            metric=metric, normalization=normalization, index=index, paths=paths,
        )  # fmt: skip
        store.recenter()
        return store

    def __len__(self) -> int:
        return len(self.features)

    @property
    def dim(self) -> int:
        """Width of a row (D)."""
        return self.features.shape[1]

    @property
    def dtype(self) -> str:
        """Storage dtype, `float16` or `float32`."""
        return str(self.features.dtype).removeprefix("torch.")

    def __repr__(self) -> str:
        return (
            f"Datastore({len(self)} x {self.dim} {self.dtype}, metric={self.metric!r}, "
            f"normalization={self.normalization!r}, index={self.index!r})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return copy.copy(self)  # rows are replaced, never written in place, so they can be shared

    def search(
        self,
        queries: Tensor | NDArray,
        k: int = 20,
        exclude_ids: Values | None = None,
    ) -> Neighbors:
        """Finds the k nearest rows of each query, exactly.

        Args:
            queries: [B, D] finite raw features of any float dtype and device.
            k: how many, >= 1; fewer rows give fewer neighbours.
            exclude_ids: [B] int64; the row with that id is not a neighbour of that query (-1 =
                none): leave-one-out by id, whatever else lies at the same place.

        Returns:
            Neighbors [B, min(k, N)], or [B, min(k, N - 1)] with `exclude_ids`, on the device of the
            queries, ordered by similarity (compared in float64), then id.

        Raises:
            ValueError: for NaN or infinite queries (with the row numbers), another width, k < 1, or
                exclude_ids of another length.
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise ValueError(f"Expected `k` to be a whole number >= 1, but got {k!r}.")
        wanted = as_features(queries, "queries", self.dim).numpy()
        excluded: Ints | None = None
        if exclude_ids is not None:
            excluded = as_whole_numbers(exclude_ids, "exclude_ids", lowest=-1).numpy()
            if len(excluded) != len(wanted):
                raise ValueError(
                    f"Expected `exclude_ids` to have one id per query ({len(wanted)}), "
                    f"but got {len(excluded)}."
                )
        width = max(0, min(int(k), len(self) - (excluded is not None)))
        if width == 0 or len(wanted) == 0:
            similarities = np.zeros((len(wanted), width))
            positions = np.zeros((len(wanted), width), np.int64)
        else:
            similarities, positions = self._get_searcher().search(wanted, width, excluded)
        device = queries.device if isinstance(queries, Tensor) else torch.device("cpu")
        largest = torch.finfo(torch.float32).max
        rows = torch.from_numpy(positions)
        return Neighbors(
            torch.from_numpy(similarities).clamp(-largest, largest).float().to(device),
            self.labels[rows].to(device),
            self.ids[rows].to(device),
        )

    def add(
        self,
        features: Tensor | NDArray,
        labels: Values,
        ids: Values | None = None,
        paths: Sequence[str] | None = None,
    ) -> Tensor:
        """Adds rows, all or none. The mean does not move; `recenter` moves it.

        Args:
            features: [M, D] raw features.
            labels: [M] whole numbers >= 0.
            ids: [M] unique whole numbers that the datastore does not have; None continues after the
                largest id.
            paths: [M] where each row's picture lies.

        Returns:
            [M] the ids of the new rows.

        Raises:
            ValueError: for bad features, labels or ids, or an id that exists; nothing is changed.
        """
        added = as_features(features, "features", self.dim)
        first = int(self.ids.max()) + 1 if len(self) else 0
        numbers = torch.arange(first, first + len(added))
        if ids is not None:
            numbers = as_whole_numbers(ids, "ids")
        known = numbers[torch.isin(numbers, self.ids)]
        if len(known):
            raise ValueError(
                f"Expected `ids` that the datastore does not have, but it has {shown(known)}; "
                "remove them first or leave `ids` out."
            )
        stored = to_storage(added, self.features.dtype)
        old = self.features.to(stored.dtype)  # widened when the new rows need float32
        old_paths, new_paths = self.paths, check_paths(paths, len(added))
        all_paths = None
        if old_paths is not None or new_paths is not None:
            all_paths = (old_paths or [""] * len(self)) + (new_paths or [""] * len(added))
        row_labels, row_ids = check_row_numbers(
            as_whole_numbers(labels, "labels"), numbers, len(added)
        )
        self._replace_rows(
            torch.cat([old, stored]),
            torch.cat([self.labels, row_labels]),
            torch.cat([self.ids, row_ids]),
            all_paths,
        )
        return row_ids

    def remove(self, ids: Values) -> None:
        """Removes rows, all or none; the next save holds no byte of them.

        Args:
            ids: [M] unique ids that the datastore has.

        Raises:
            ValueError: for an id that it does not have; nothing is changed.
        """
        rows = self._positions(ids)
        keep = torch.ones(len(self), dtype=torch.bool)
        keep[rows] = False
        paths = None
        if self.paths is not None:
            paths = [path for path, kept in zip(self.paths, keep.tolist(), strict=True) if kept]
        self._replace_rows(self.features[keep], self.labels[keep], self.ids[keep], paths)

    def relabel(self, ids: Values, labels: Values) -> None:
        """Gives rows other labels, all or none.

        Args:
            ids: [M] unique ids that the datastore has.
            labels: [M] whole numbers >= 0.

        Raises:
            ValueError: for an id that it does not have, or bad labels; nothing is changed.
        """
        rows = self._positions(ids)
        wanted = as_whole_numbers(labels, "labels")
        if len(wanted) != len(rows):
            raise ValueError(
                f"Expected one of `labels` per id ({len(rows)}), but got {len(wanted)}."
            )
        changed = self.labels.clone()
        changed[rows] = wanted
        self.labels = changed

    def recenter(self) -> None:
        """Sets the mean that `l2_centered` subtracts to the mean of the present rows."""
        mean = torch.zeros(self.dim)
        if len(self):
            mean = torch.from_numpy(self.features.numpy().mean(axis=0, dtype=np.float64)).float()
        self.mean, self._searcher = mean, None

    def path_of(self, row_id: int) -> str:
        """Where the picture of a row lies, relative to its dataset; empty if not known.

        Args:
            row_id: an id that the datastore has.

        Raises:
            ValueError: for an id that it does not have.
        """
        row = int(self._positions([row_id])[0])
        return self.paths[row] if self.paths is not None else ""

    def save(
        self, folder: str | Path, *, binding: Binding | None = None, reuse: Path | None = None
    ) -> Manifest:
        """Writes the datastore into a folder; `datastore.json`, renamed last, is the commit point.

        Args:
            folder: where to; created if needed, other files in it are left alone.
            binding: the checkpoint that the datastore belongs to.
            reuse: a folder whose unchanged blobs are hard-linked instead of written.

        Returns:
            The manifest that was written.

        Raises:
            OSError: if something could not be written; the version that was there is intact.
        """
        target = Path(folder).absolute()
        try:
            with exclusive_lock(target):
                target.mkdir(parents=True, exist_ok=True)
                return self._write(target, binding, reuse)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"Could not save the datastore to {folder}: {error}. The version that was there is "
                "intact; free space or choose another folder."
            ) from error

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads a datastore and checks every byte against its manifest.

        Args:
            folder: a folder written by `save`.

        Raises:
            FileNotFoundError: if there is no datastore in the folder.
            DatastoreError: if a file is missing, damaged, or disagrees with the manifest.
        """

        def resolve(name: str) -> Path | None:
            path = Path(folder) / name
            return path if path.is_file() else None

        manifest_path = resolve(MANIFEST_NAME)
        if manifest_path is None:
            raise FileNotFoundError(
                f"Expected {folder} to hold a datastore, but it has no {MANIFEST_NAME}."
            )
        attempts = 3  # a writer may replace the version that is being read
        while True:
            before = manifest_path.read_bytes()
            try:
                return cls.from_manifest(Manifest.read(manifest_path), resolve)
            except DatastoreError:
                attempts -= 1
                now = manifest_path.read_bytes() if manifest_path.is_file() else before
                if now == before or not attempts:
                    raise

    @classmethod
    def from_manifest(cls, manifest: Manifest, resolve: Callable[[str], Path | None]) -> Self:
        """Reads the blobs that a manifest names.

        Args:
            manifest: the checked manifest.
            resolve: finds a file by name (in a folder, or in the Hub's cache); None if missing.

        Raises:
            DatastoreError: if a file is missing, damaged, or disagrees with the manifest.
        """
        table = read_row_files(manifest, resolve)
        try:
            refuse_non_finite(table.features, "features")
            refuse_non_finite(table.mean.unsqueeze(0), "mean")
            store = cls(
                table.features,
                table.labels,
                table.ids,
                table.mean,
                metric=manifest.metric,
                normalization=manifest.normalization,
                index=manifest.index,
                paths=table.paths,
            )
        except ValueError as error:
            raise DatastoreError(f"The datastore is not usable: {error}") from error
        store.manifest, store.source = manifest, dict(manifest.source)
        return store

    def _write(self, folder: Path, binding: Binding | None, reuse: Path | None) -> Manifest:
        table = RowTable(self.features, self.labels, self.ids, self.mean, self.paths)
        blobs = write_row_files(folder, table, reuse)
        manifest = Manifest(
            len(self), self.dim, self.dtype, self.metric, self.normalization, self.index,
            blobs, self._write_faiss(folder), binding, self.source,
        )  # fmt: skip
        text = manifest.to_json()
        write_durably(folder / MANIFEST_NAME, lambda path: _write_bytes(path, text.encode()))
        named = {blob.name for blob in manifest.blobs}
        for entry in folder.iterdir():
            is_litter = BLOB_PATTERN.fullmatch(entry.name) and entry.name not in named
            if is_litter or entry.name.startswith(".datastore-"):
                entry.unlink(missing_ok=True)
        return manifest

    def _write_faiss(self, folder: Path) -> FileRecord | None:
        """The serialized index, for users of faiss; never read back by default."""
        path = folder / FAISS_NAME
        if not has_faiss() or len(self) * self.dim * 4 >= LARGEST_FAISS_FILE:
            path.unlink(missing_ok=True)
            return None
        features, mean = self.features.numpy(), self.mean.double().numpy()
        is_l2 = self.metric == Metric.L2
        flat = faiss.IndexFlatL2(self.dim) if is_l2 else faiss.IndexFlatIP(self.dim)
        index = faiss.IndexIDMap2(flat)
        rows = normalize_rows(features, mean, self.normalization).astype(np.float32)
        index.add_with_ids(rows, self.ids.numpy())
        data = faiss.serialize_index(index).tobytes()
        write_durably(path, lambda temporary: _write_bytes(temporary, data))
        return FileRecord.of(path)

    def _get_searcher(self) -> ExactSearcher:
        if self._searcher is None:
            first_pass: Callable[[NDArray[np.float32]], FirstPass] = TorchFirstPass
            if has_faiss():
                first_pass = _FaissFirstPass
            else:
                logger.warning("faiss is not installed, searching with torch; %s.", FAISS_HINT)
            self._searcher = ExactSearcher(
                self.features.numpy(), self.ids.numpy(), self.mean.double().numpy(),
                self.metric, self.normalization, first_pass,
            )  # fmt: skip
        return self._searcher

    def _replace_rows(
        self, features: Tensor, labels: Tensor, ids: Tensor, paths: list[str] | None
    ) -> None:
        self.features, self.labels, self.ids, self.paths = features, labels, ids, paths
        self._searcher = None

    def _positions(self, ids: Values) -> Tensor:
        wanted = as_whole_numbers(ids, "ids")
        if len(wanted.unique()) != len(wanted):
            raise ValueError("Expected `ids` to name each row once, but some are doubled.")
        order = self.ids.argsort()
        places = torch.searchsorted(self.ids[order], wanted).clamp(max=max(0, len(self) - 1))
        rows = order[places] if len(self) else wanted[:0]
        if len(rows) != len(wanted) or not torch.equal(self.ids[rows], wanted):
            missing = wanted[~torch.isin(wanted, self.ids)]
            raise ValueError(
                f"Expected `ids` that the datastore has, but it does not have {shown(missing)}."
            )
        return rows


def has_faiss() -> bool:
    """Whether faiss can be used for search."""
    return faiss is not None


def _resolve_index(index: str) -> str:
    if index not in ("auto", "flat"):
        raise ValueError(
            f"Expected `index` to be 'auto' or 'flat', but got {index!r}; other faiss indexes are "
            "not supported by this version."
        )
    return "flat"


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
