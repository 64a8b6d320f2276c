"""A datastore in a folder: saved, opened, and sent to another process by its place."""

import dataclasses
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError

from .blobs import Resolve, open_files
from .datastore_changes import DatastoreChanges
from .datastore_opening import blobs_in, checked_centroids, verified_faiss_file
from .faiss_index import FaissApproximate
from .indexing import FLAT, is_rebuildable
from .manifest import MANIFEST_NAME, Binding, DatastoreError, Manifest
from .persistence import Contents, write_datastore
from .storage import exclusive_lock, identity

LARGEST_VERIFIED_AT_ONCE = 256 * 2**20

_LOAD_ATTEMPTS = 10


class DatastoreFiles(DatastoreChanges):
    """Saves and opens the files of a `Datastore`."""

    def save(
        self, folder: str | Path, *, binding: Binding | None = None, reuse: Path | None = None
    ) -> Manifest:
        """Writes the datastore into a folder; `datastore.json`, renamed last, is the commit point.

        Only files whose rows changed are written; the others stay or are hard-linked.

        Args:
            folder: where to; created if needed, other files in it are left alone.
            binding: the checkpoint that the datastore belongs to.
            reuse: a further folder in which unchanged files may lie.

        Returns:
            The manifest that was written.

        Raises:
            OSError: if something could not be written; the version that was there is intact.
        """
        target = Path(folder).absolute()
        self.verify()
        if self._index.spec != FLAT and len(self):
            if self._searcher is not None and self._searcher.has_removed_rows:
                self._searcher = None  # no byte of a removed row may reach the disk
            self.build_index()  # its lists, or the index itself, are part of what is saved
        try:
            with exclusive_lock(target):
                target.mkdir(parents=True, exist_ok=True)
                places = [place for place in (reuse, self.home) if place is not None]
                manifest = write_datastore(target, self._contents(binding), places)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"Could not save the datastore to {folder}: {error}. The version that was there is "
                "intact; free space or choose another folder."
            ) from error
        pairs = zip(self._table.shards, manifest.blobs, strict=True)
        shards = [shard._replace(record=record) for shard, record in pairs]
        self._table = dataclasses.replace(self._table, shards=shards)
        return manifest

    @classmethod
    def load(
        cls, folder: str | Path, *, verify: str = "auto", trust_faiss_index: bool = False
    ) -> Self:
        """Opens a datastore; large ones are mapped into memory, not read.

        Args:
            folder: a folder written by `save`.
            verify: `full` checks every byte now; `auto` does so below 256 MB, and else before the
                first search.
            trust_faiss_index: read `datastore.faiss` instead of building the index again, which
                saves the time that a graph needs. Native code parses that file: say so only for
                files of your own.

        Raises:
            FileNotFoundError: if there is no datastore in the folder.
            DatastoreError: if a file is missing, damaged, or disagrees with the manifest.
            ValueError: for another `verify`.
        """

        def resolve(name: str) -> Path | None:
            path = Path(folder) / name
            return path if path.is_file() else None

        manifest_path = resolve(MANIFEST_NAME)
        if manifest_path is None:
            raise FileNotFoundError(
                f"Expected {folder} to hold a datastore, but it has no {MANIFEST_NAME}."
            )
        for attempt in range(_LOAD_ATTEMPTS):
            before = identity(manifest_path)
            try:
                store = cls.from_manifest(
                    Manifest.read(manifest_path), resolve, verify=verify,
                    trust_faiss_index=trust_faiss_index,
                )  # fmt: skip
            except (DatastoreError, FileNotFoundError):
                # a writer may have replaced the version that was being read
                if identity(manifest_path) == before or attempt + 1 == _LOAD_ATTEMPTS:
                    raise
            else:
                store.home = Path(folder).absolute()
                return store
        raise AssertionError("unreachable: the last attempt returns or raises")

    @classmethod
    def from_manifest(
        cls,
        manifest: Manifest,
        resolve: Resolve,
        *,
        verify: str = "auto",
        trust_faiss_index: bool = False,
    ) -> Self:
        """Opens the files that a manifest names.

        Args:
            manifest: the checked manifest.
            resolve: finds a file by name (in a folder, or in the Hub's cache); None if missing.
            verify: see `load`.
            trust_faiss_index: see `load`.

        Raises:
            DatastoreError: if a file is missing, damaged, or disagrees with the manifest.
        """
        if verify not in ("auto", "full"):
            raise ValueError(f"Expected `verify` to be 'auto' or 'full', but got {verify!r}.")
        size = sum(record.size for record in manifest.blobs)
        at_once = verify == "full" or size < LARGEST_VERIFIED_AT_ONCE
        opened = open_files(manifest, resolve)
        table = opened.table
        try:
            store = cls(
                table.features.parts[0][:0],
                table.labels[:0],
                table.ids[:0],
                opened.shared["mean"],
                metric=manifest.metric,
                normalization=manifest.normalization,
            )
        except ValueError as error:
            raise DatastoreError(f"The datastore is not usable: {error}") from error
        store.manifest, store.source = manifest, dict(manifest.source)
        store._index, store._table = manifest.index, table
        if is_rebuildable(manifest.index.spec):
            try:
                store._centroids = checked_centroids(opened, manifest)
            except DatastoreError:
                opened.verify()  # a damaged file is named before what it seems to say
                raise
        else:
            store._table = dataclasses.replace(table, lists=None)
        store._unverified = opened
        if trust_faiss_index:
            store._trusted = verified_faiss_file(manifest, resolve)
        if at_once:
            store.verify()
        return store

    def __getstate__(self) -> dict[str, Any]:
        """Rows that lie on disk as they are go to another process by their place, not by value."""
        state = self.__dict__ | {"_searcher": None, "_trusted": None, "_unverified": None}
        records = [shard.record for shard in self._table.shards]
        if self.home is None or None in records or records != blobs_in(self.home):
            self.verify()
            return state | {"_table": self._table}
        return state | {"_table": None, "_blobs": records}

    def __setstate__(self, state: dict[str, Any]) -> None:
        records = state.pop("_blobs", None)
        self.__dict__.update(state)
        if records is None:
            return
        if records != blobs_in(state["home"]):
            raise DatastoreError(
                f"Expected the datastore in {state['home']} to be the one that was pickled, but it "
                "is gone or was changed; pickle it again."
            )
        found = type(self).load(state["home"])
        self._table, self._unverified = found._table, found._unverified

    def _contents(self, binding: Binding | None) -> Contents:
        index = None if self._searcher is None else self._searcher.first_pass
        return Contents(
            self._table, self.mean, self._centroids, self.metric, self.normalization, self._index,
            index if isinstance(index, FaissApproximate) else None, binding, self.source,
        )  # fmt: skip
