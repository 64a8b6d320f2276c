"""A datastore in a folder: everything staged first, the manifest renamed last, checked when opened.

Rows lie in one or more files, each named by its content; the first also holds the mean, a learned
map and, for an inverted-file index, its centroids.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..core.frozen import (
    Resolve,
    check_content,
    decode_paths,
    join_features,
    join_vectors,
    take,
    take_map,
    take_vector,
)
from ..core.lazy import Once
from ..core.learned import LearnedMap, width_of
from ..core.manifest import (
    BLOB_PATTERN,
    FAISS_NAME,
    MANIFEST_NAME,
    Binding,
    DatastoreError,
    FileRecord,
    IndexInfo,
    Manifest,
    read_at,
)
from ..core.search import RowSpace, Singles
from ..core.votes import Metric
from .faiss import has_faiss, write_flat
from .folders import (
    exclusive_lock,
    fsync_path,
    give_default_mode,
    identity,
    link_or_copy,
    restore,
    stage_file,
)
from .index import RowIndex
from .kept import KeptIndex, TrustedIndex, tidy
from .kinds import FLAT, allowed, is_rebuildable
from .mapped import CheckedRows, RowFile
from .row_files import map_blob, read_blob, read_lists, tensors_of
from .table import RowTable, Shard

logger = logging.getLogger(__name__)

LARGEST_FAISS_FILE = 100 * 10**6
"""No index is written that would be larger and could be built again from the rows."""

SCRATCH = ".datastore.staging"
"""Folder inside a datastore's folder for files that are not whole yet."""

LARGEST_VERIFIED_AT_ONCE = 256 * 2**20
"""Row files of fewer bytes are read into memory, hashed, when they are opened; others mapped."""

_LOAD_ATTEMPTS = 10

Opened = TypeVar("Opened")


@dataclass(frozen=True)
class Contents:
    """What a stored datastore consists of.

    Attributes:
        table: the rows and how they are divided over files.
        mean: [D] float32.
        metric: `cosine` or `l2`.
        normalization: `l2_centered`, `l2` or `none`.
        learned_map: that rows and queries go through, or None.
        index: how it is searched.
        binding: the checkpoint it belongs to, or None.
        source: where the rows came from, as far as known.
    """

    table: RowTable
    mean: Tensor
    metric: str
    normalization: str
    learned_map: LearnedMap | None
    index: RowIndex
    binding: Binding | None
    source: dict[str, str]


def needs_index(table: RowTable, index: RowIndex) -> bool:
    """Whether the index of a table must stand before it is saved: it is written, or unknown."""
    return index.info.spec != FLAT and not (_is_large(table) and index.is_known(table))


def write_datastore(folder: Path, contents: Contents, places: Sequence[Path | None]) -> Manifest:
    """Writes a datastore as one version.

    Args:
        folder: made if needed; other files in it are left alone.
        contents: what to write.
        places: folders in which unchanged files may lie, or None; they are hard-linked.

    Returns:
        The manifest that was written.

    Raises:
        OSError: if something could not be written; the version that was there is intact.
    """
    target = folder.absolute()
    try:
        with exclusive_lock(target):
            target.mkdir(parents=True, exist_ok=True)
            manifest = _write_version(target, contents, [place for place in places if place])
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"Could not save the datastore to {folder}: {error}. The version that was there is "
            "intact; free space or choose another folder."
        ) from error
    tidy()
    return manifest


def _write_version(folder: Path, contents: Contents, places: Sequence[Path]) -> Manifest:
    table = contents.table
    _clear_litter(folder)  # of saves that were killed
    scratch = folder / SCRATCH
    scratch.mkdir()
    try:
        blobs = _write_rows(folder, scratch, contents, places)
        index = _stage_faiss(folder, scratch, contents)
        if index is not None:  # it was made from rows too
            table.verify()
        count, dim = table.features.shape
        learned = contents.learned_map
        manifest = Manifest(
            count, dim, str(table.features.dtype).removeprefix("torch."), contents.metric,
            contents.normalization, contents.index.info, blobs,
            None if index is None else replace(FileRecord.of(index), name=FAISS_NAME),
            contents.binding, contents.source, None if learned is None else learned.sha256,
        )  # fmt: skip
        text = manifest.to_json().encode()
        target = folder / MANIFEST_NAME
        staged = stage_file(target, lambda path: path.write_bytes(text), scratch)
        _replace_faiss(folder, scratch, index)
        fsync_path(folder)
        staged.replace(target)  # the commit point
        fsync_path(folder)
    except BaseException:
        if (scratch / FAISS_NAME).exists():
            (scratch / FAISS_NAME).replace(folder / FAISS_NAME)
        raise
    finally:
        _clear_litter(folder)
    return manifest


def _write_rows(
    folder: Path, scratch: Path, contents: Contents, places: Sequence[Path]
) -> list[FileRecord]:
    """Writes the row files that are not there already; their records, in row order."""
    shared = {"mean": contents.mean}  # in the first file; belongs to no row
    if contents.learned_map is not None:
        shared["learned_map"] = contents.learned_map.weight
    if contents.index.centroids is not None:
        shared["centroids"] = torch.from_numpy(contents.index.centroids)
    records, start = [], 0
    for shard in contents.table.shards:
        part = slice(start, start + shard.rows)
        record, behind = shard.record, contents.table.files_behind(part)
        if record is None or not _reuse(record, folder, scratch, places, behind):
            for file in behind:
                file.check_size()
            tensors = tensors_of(contents.table, part) | (shared if part.start == 0 else {})
            record = _write_file(folder, scratch, tensors, places)
            for file in behind:
                file.verify()  # afterwards: what was written is what was opened
        records.append(record)
        start += shard.rows
    return records


def _write_file(
    folder: Path, scratch: Path, tensors: dict[str, Tensor], places: Sequence[Path]
) -> FileRecord:
    temporary = scratch / "rows"
    save_file(tensors, temporary)
    found = FileRecord.of(temporary)
    record = replace(found, name=f"datastore-{found.sha256[:12]}.safetensors")
    if _reuse(record, folder, scratch, places, []):
        temporary.unlink()
    else:
        give_default_mode(temporary)
        _put(temporary, folder / record.name)
    return record


def _put(temporary: Path, target: Path) -> None:
    fsync_path(temporary)
    temporary.replace(target)


def _reuse(
    record: FileRecord, folder: Path, scratch: Path, places: Sequence[Path],
    opened: Sequence[RowFile],
) -> bool:  # fmt: skip
    """Keeps, hard-links or copies a file that is there already; what comes is what was promised.

    Args:
        record: of the file.
        folder: where it shall be.
        scratch: for a file that is not known to be whole yet.
        places: folders in which it may lie too.
        opened: files that are open, whatever became of their names.

    Raises:
        DatastoreError: for one that is open, and changed since.
    """
    target, temporary = folder / record.name, scratch / record.name
    if target.is_file() and _is_whole(record, target):
        return True  # a damaged one is replaced
    for place in places:
        if not (place / record.name).is_file():
            continue
        link_or_copy(str(place / record.name), str(temporary))
        if _is_whole(record, temporary):
            _put(temporary, target)
            return True
        temporary.unlink()
    for file in opened:
        if file.record == record:
            file.copy_to(temporary)
            _put(temporary, target)
            return True
    return False


def _is_whole(record: FileRecord, path: Path) -> bool:
    try:
        record.verify(path)
    except (DatastoreError, OSError):  # damaged, or on a bad sector
        return False
    return True


def _stage_faiss(folder: Path, scratch: Path, contents: Contents) -> Path | None:
    """The serialized index, for users of faiss; read back for those who trust it only."""
    table, info, index = contents.table, contents.index.info, contents.index.approximate
    is_large = _is_large(table)
    if info.spec == FLAT and has_faiss() and not is_large:
        facts = (contents.metric, contents.normalization, contents.learned_map, table.features)
        space = RowSpace(contents.mean.double().numpy(), *facts)
        rows = space.normalize(table.features[:]).astype(np.float32)
        write: Callable[[Path], object] = partial(
            write_flat, rows=rows, ids=table.ids.numpy(), is_l2=space.is_l2
        )
    elif index is not None and not (is_large and is_rebuildable(info.spec)):
        write = index.write
    else:
        return None
    return stage_file(folder / FAISS_NAME, write, scratch)


def _is_large(table: RowTable) -> bool:
    count, dim = table.features.shape
    return count * dim * 4 >= LARGEST_FAISS_FILE


def _replace_faiss(folder: Path, scratch: Path, index: Path | None) -> None:
    """Puts the new index in place; until the commit, readers of the old one find it in scratch."""
    old = folder / FAISS_NAME
    if old.exists():
        link_or_copy(str(old), str(scratch / FAISS_NAME))
        fsync_path(scratch)
    if index is None:
        old.unlink(missing_ok=True)
    else:
        index.replace(old)


def _clear_litter(folder: Path) -> None:
    """Removes the scratch folder, and row files that the manifest on disk does not name."""
    shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    try:
        named = {record.name for record in Manifest.read(folder / MANIFEST_NAME).blobs}
    except FileNotFoundError:
        named = set()
    except DatastoreError:
        return  # whoever repairs it may need them
    for entry in folder.iterdir():
        if BLOB_PATTERN.fullmatch(entry.name) and entry.name not in named:
            entry.unlink(missing_ok=True)


class OpenedFiles(NamedTuple):
    """The row files of a datastore.

    Attributes:
        table: the rows, without paths.
        mean: [D] float32.
        learned_map: that rows and queries go through, or None.
        info: which index the files describe, as far as it is built.
        centroids: [L, D] float32 of an inverted file; None for other kinds.
        trusted: an open, hashed file with the index of these rows, or None.
        kept: where such an index is kept in the user's cache; None for an exact one.
        read_searched: hashes what was copied of files that are mapped, and checks it; the rows
            that it returns, without paths, hash what is read of their features; done once.
        read_whole: hashes files that are mapped, those that were opened even if others took their
            names since, checks what they hold, and returns the rows with their paths; done once.
            Both raise DatastoreError naming the file that is not what the manifest says.
    """

    table: RowTable
    mean: Tensor
    learned_map: LearnedMap | None
    info: IndexInfo
    centroids: Singles | None
    trusted: TrustedIndex | None
    kept: KeptIndex | None
    read_searched: Once[RowTable]
    read_whole: Once[RowTable]

    @property
    def of_index(
        self,
    ) -> tuple[IndexInfo, Singles | None, TrustedIndex | None, KeptIndex | None]:
        """What is known of the index."""
        return self.info, self.centroids, self.trusted, self.kept

    @property
    def no_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features, labels and ids as wide as these, without a row."""
        return self.table.features.parts[0][:0], self.table.labels[:0], self.table.ids[:0]


def is_read_at_once(manifest: Manifest) -> bool:
    """Whether the row files of a manifest are read into memory; larger ones are mapped."""
    return sum(record.size for record in manifest.blobs) < LARGEST_VERIFIED_AT_ONCE


def is_hashed_at_once(manifest: Manifest, verify: str) -> bool:
    """Whether files are hashed when they are opened, or before they are first needed.

    Args:
        manifest: that names them.
        verify: `full` or `auto`.

    Raises:
        ValueError: for another `verify`.
    """
    if verify not in ("auto", "full"):
        raise ValueError(f"Expected `verify` to be 'auto' or 'full', but got {verify!r}.")
    return verify == "full" or is_read_at_once(manifest)


def open_files(manifest: Manifest, resolve: Resolve, *, trust_faiss_index: bool) -> OpenedFiles:
    """Reads small files of a manifest, hashed, into memory; maps large ones, not hashed yet.

    Args:
        manifest: the checked manifest.
        resolve: finds a file by name; None if it is missing.
        trust_faiss_index: open `datastore.faiss` too, to be parsed, and build whatever index the
            manifest names.

    Raises:
        DatastoreError: if a file is missing, has another size, or disagrees with the manifest.
    """
    info = allowed(manifest.index, manifest.num_rows, trust_faiss_index)
    open_blob = read_blob if is_read_at_once(manifest) else map_blob
    opened = [open_blob(record, resolve(record.name)) for record in manifest.blobs]
    files = [tensors for tensors, _ in opened]
    mapped = tuple(file for _, file in opened if file is not None)
    features = CheckedRows(join_features(files, manifest).parts, mapped)
    mean = take_vector(files[0], "mean", torch.float32, manifest.blobs[0])
    table = RowTable(
        features,
        join_vectors(files, "labels", manifest, torch.int64),
        join_vectors(files, "ids", manifest, torch.int64),
        None,
        None,
        [
            Shard(len(take(tensors, "ids", record)), record)
            for tensors, record in zip(files, manifest.blobs, strict=True)
        ],
        mapped,
    )
    centroids = None
    with _damage_named_first(table):
        learned = take_map(files[0], manifest)
        if is_rebuildable(info.spec):
            centroids, lists = read_lists(files, manifest, width_of(learned, manifest.dim))
            table = replace(table, lists=lists)

    kept, place = None, resolve(manifest.blobs[0].name)
    if not trust_faiss_index and info.spec != FLAT and place is not None:
        kept = KeptIndex(manifest, info, place.parent)

    def read_searched() -> RowTable:
        table.not_cut_off()
        if kept is not None:
            kept.tell(mapped)
        with _damage_named_first(table):
            check_content(table.features, table.labels, table.ids, mean, reads_features=False)
        for file in mapped:
            file.check_others()  # afterwards, so that what was copied of it is hashed
        return table

    def read_whole() -> RowTable:
        table.not_cut_off()
        with _damage_named_first(table):
            check_content(table.features, table.labels, table.ids, mean)
            paths = decode_paths(files, manifest)
        table.verify()  # afterwards, so that what was copied of the files is hashed
        return replace(table, paths=paths)

    trusted = _open_faiss_file(manifest, resolve) if trust_faiss_index else None
    once = Once(read_searched), Once(read_whole)
    return OpenedFiles(table, mean, learned, info, centroids, trusted, kept, *once)


@contextmanager
def _damage_named_first(table: RowTable) -> Iterator[None]:
    """Hashes the files of a table before an error says what is wrong in them."""
    try:
        yield
    except DatastoreError:
        table.verify()
        raise


def _open_faiss_file(manifest: Manifest, resolve: Resolve) -> TrustedIndex | None:
    """The serialized index, open and hashed; None, with a warning, if none can be searched."""
    record, problem = manifest.faiss_index, None
    # a flat index of distances is written for others; ours is built from the rows in no time
    is_readable = manifest.metric == Metric.COSINE or manifest.index.spec != FLAT
    if record is not None and is_readable and has_faiss():
        for name in (FAISS_NAME, f"{SCRATCH}/{FAISS_NAME}"):  # where a kill left the old one
            if (path := resolve(name)) is None:
                continue
            try:
                file = record.verify_size(path).open("rb")
                record.compare(partial(read_at, file))
            except DatastoreError as error:
                problem = problem or error
            else:
                return TrustedIndex(file, record)
    if problem is not None:
        raise problem
    logger.warning(
        "There is no %s that can be read (none was written, it is gone, it is flat with metric l2, "
        "or faiss is not installed): the index is built from the rows.", FAISS_NAME,
    )  # fmt: skip
    return None


def open_newest(folder: Path, open_version: Callable[[Manifest, Resolve], Opened]) -> Opened:
    """Opens the version of a folder that is there; anew where a writer replaces it meanwhile.

    Args:
        folder: with a `datastore.json`.
        open_version: opens what a manifest names, with what finds the files.

    Raises:
        FileNotFoundError: if there is no datastore in the folder.
        DatastoreError: if a file is missing, damaged, or disagrees with the manifest.
    """

    def resolve(name: str) -> Path | None:
        path = folder / name
        return path if path.is_file() else None

    restore(folder)
    path = resolve(MANIFEST_NAME)
    if path is None:
        raise FileNotFoundError(
            f"Expected {folder} to hold a datastore, but it has no {MANIFEST_NAME}."
        )
    for attempt in range(_LOAD_ATTEMPTS):
        before = identity(path)
        try:
            return open_version(Manifest.read(path), resolve)
        except (DatastoreError, FileNotFoundError):
            # a writer may have replaced the version that was being read
            if identity(path) == before or attempt + 1 == _LOAD_ATTEMPTS:
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")
