"""The manifest of a datastore: what a checkpoint promises about its files, and the check.

`datastore.json` is the commit point of a save: files that it does not name are litter, files that
it names are exactly what it says, or the datastore is refused.
"""

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from .config import Normalization, Pooling, check_metric
from .plain_json import MANIFEST_NAME, SHA256_PATTERN, DatastoreError, Fields, read_json
from .votes import Metric

HASH_BLOCK = 64 * 2**20
"""Bytes per separately hashed block of a blob."""

Read = Callable[[int, int], bytes | memoryview]
_READ_BYTES = 2**20
_SEEKING = threading.Lock()


def hash_blocks(path: Path) -> tuple[str, list[str]]:
    """The hex sha256 of a file, and of each block of `HASH_BLOCK` bytes; it is read once.

    Args:
        path: the file.
    """
    whole, blocks = hashlib.sha256(), []
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            whole.update(block)
            blocks.append(hashlib.sha256(block).hexdigest())
    return whole.hexdigest(), blocks


def read_at(file: BinaryIO, position: int, count: int) -> bytes:
    """Reads an open file at a place, whatever other threads and forked processes read of it."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), count, position)
    with _SEEKING:  # Windows, where nothing forks
        file.seek(position)
        return file.read(count)


def hash_read_blocks(read: Read, count: int) -> list[str]:
    """Hashes the blocks of a file, as many at once as there are processors.

    Args:
        read: its bytes from a position on, at most so many.
        count: how many blocks; what lies beyond belongs to the last one.

    Returns:
        The hex sha256 of each block.
    """

    def hash_block(number: int) -> str:
        found, position = hashlib.sha256(), number * HASH_BLOCK
        end = position + HASH_BLOCK if number + 1 < count else sys.maxsize
        while piece := read(position, min(_READ_BYTES, end - position)):
            found.update(piece)
            position += len(piece)
        return found.hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(hash_block, range(count)))


FORMAT = "hf_knn.datastore"
FORMAT_VERSION, MAPPED_VERSION = 1, 2  # the second, of a datastore with a learned map
REFERENCE_FORMAT = "hf_knn.datastore-reference"
"""Of a `datastore.json` that says in which vector database the rows lie."""

STORAGE_DTYPES = ("float16", "float32")
MEASURED_ON = ("rows", "perturbed rows", "queries unlike the rows")
FAISS_NAME = "datastore.faiss"
BLOB_PATTERN = re.compile(r"datastore-[0-9a-f]{12}\.safetensors")

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


class StaleDatastoreError(DatastoreError):
    """A datastore whose features were made by other weights, processor settings or pooling."""


@dataclass(frozen=True)
class FileRecord:
    """What the manifest promises about one file: size in bytes, sha256 whole and per block."""

    name: str
    size: int
    sha256: str
    blocks: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Measures a file."""
        sha256, blocks = hash_blocks(path)
        return cls(path.name, path.stat().st_size, sha256, blocks)

    def verify_size(self, path: Path | None) -> Path:
        """Compares a file's size with its record, without reading it; returns its path.

        Args:
            path: where the file should be; None if it could not be found.

        Raises:
            DatastoreError: naming the file, what was promised and what was found.
        """
        if path is None or not path.is_file():
            raise DatastoreError(
                f"Expected the file {self.name}, which {MANIFEST_NAME} names, but it is missing; "
                "download or save the checkpoint again."
            )
        size = path.stat().st_size
        if size != self.size:
            raise DatastoreError(
                f"Expected {self.name} to have {self.size} bytes, but got {size}; "
                "the file is truncated or from another save, download or save it again."
            )
        return path

    def verify(self, path: Path | None) -> None:
        """Compares a file with its record, byte for byte.

        Args:
            path: where the file should be; None if it could not be found.

        Raises:
            DatastoreError: naming the file, what was promised and what was found.
        """
        with self.verify_size(path).open("rb") as file:
            self.compare(partial(read_at, file))

    def read(self, path: Path | None) -> bytes:
        """Reads a file whole; what is returned is what was compared with the record.

        Args:
            path: where the file should be; None if it could not be found.

        Raises:
            DatastoreError: naming the file, what was promised and what was found.
        """
        data = self.verify_size(path).read_bytes()
        self.compare(lambda start, count: memoryview(data)[start : start + count])
        return data

    def compare(self, read: Read, only: int | None = None) -> None:
        """Compares the bytes of a file, or of one block, with the record; several blocks at once.

        Args:
            read: its bytes from a position on, at most so many.
            only: the block, the positions of which count from its begin; None for the file.

        Raises:
            DatastoreError: naming the file, what was promised and what was found.
        """
        numbers = range(len(self.blocks)) if only is None else [only]
        found = hash_read_blocks(read, len(numbers))
        for number, theirs in zip(numbers, found, strict=True):
            if (mine := self.blocks[number]) != theirs:
                raise DatastoreError(
                    f"Expected {self.name} to have sha256 {mine[:12]}… in block {number} of "
                    f"{len(self.blocks)}, but got {theirs[:12]}…; the file is damaged or from "
                    "another save, download or save it again."
                )


@dataclass(frozen=True)
class IndexInfo:
    """Which index a datastore has.

    Attributes:
        requested: what was asked for: `auto`, `flat` or a faiss factory string.
        spec: what was built: `flat` or a faiss factory string.
        parameters: search parameters, such as `nprobe`.
        recall: share of the 20 nearest rows that was found, the worst of `recalls`; None for an
            exact index, or one not built yet.
        measured_on: which of them that was, see `MEASURED_ON`; None if nobody said.
        recalls: by what it was measured on; empty if nobody said.
    """

    requested: str
    spec: str
    parameters: dict[str, int] = field(default_factory=dict)
    recall: float | None = None
    measured_on: str | None = None
    recalls: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        facts = [f"{name} {value}" for name, value in self.parameters.items()]
        known = self.recalls or {self.measured_on or "rows": self.recall or 0.0}
        facts += [] if self.recall is None else [f"recall@20 {say_recalls(known)}"]
        return f"{self.spec} ({', '.join(facts)})" if facts else self.spec


def say_recalls(recalls: dict[str, float]) -> str:
    """Recalls in words, by what they were measured on."""
    return ", ".join(f"{recall:.4f} on {kind}" for kind, recall in recalls.items())


@dataclass(frozen=True)
class Binding:
    """The checkpoint a datastore belongs to.

    Attributes:
        fingerprint: sha256 over stored backbone tensors, processor settings and pooling.
        weights: sha256 of the backbone's stored tensors, in the order of their stored names.
        processor: sha256 of the image processor's settings; empty without a processor.
        pooling: pooling of the stored features.
        dtype: dtype of the stored backbone.
        files: `config.json` and the weight files.
    """

    fingerprint: str
    weights: str
    processor: str
    pooling: str
    dtype: str
    files: list[FileRecord]


@dataclass(frozen=True)
class Manifest:
    """The content of `datastore.json`.

    Attributes:
        num_rows: N, rows over all blobs.
        dim: D, width of a row.
        dtype: storage dtype, `float16` or `float32`.
        metric: `cosine` or `l2`.
        normalization: `l2_centered`, `l2` or `none`.
        index: which index it has.
        blobs: the row files, in row order.
        faiss_index: the serialized index, if one was written.
        binding: the checkpoint it belongs to; None for a datastore saved alone.
        source: dataset, revision and split of the rows, and what encoded them, as far as known.
        learned_map: sha256 of the learned map, which lies in the first row file; None without one.
    """

    num_rows: int
    dim: int
    dtype: str
    metric: str
    normalization: str
    index: IndexInfo
    blobs: list[FileRecord]
    faiss_index: FileRecord | None = None
    binding: Binding | None = None
    source: dict[str, str] = field(default_factory=dict)
    learned_map: str | None = None

    def to_json(self) -> str:
        """The text of `datastore.json`."""
        values = {"format": FORMAT, "format_version": FORMAT_VERSION, "block_size": HASH_BLOCK}
        found = asdict(self)
        for name in ("measured_on", "recalls"):
            if not found["index"][name]:
                del found["index"][name]  # as every version wrote it
        return signed_json(values | found)

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Reads and checks `datastore.json`.

        Args:
            path: the file.

        Raises:
            DatastoreError: naming the field, what was wanted and what was found.
        """
        return cls.parse(read_json(path))

    @classmethod
    def parse(cls, values: Any) -> "Manifest":
        """Checks the decoded JSON field by field; nothing is trusted because of where it came from.

        Args:
            values: the decoded JSON.

        Raises:
            DatastoreError: naming the field, what was wanted and what was found.
        """
        fields = Fields(values, "")
        if fields.text("format") == REFERENCE_FORMAT:
            raise DatastoreError(
                f"Expected {MANIFEST_NAME} to name files with rows, but it refers to a vector "
                "database, which only the package can ask: `pip install 'hf-knn[milvus]'`, `import "
                "hf_knn` and open the checkpoint as a model, or pass load_datastore=False for the "
                "plain classifier."
            )
        check_format(fields, FORMAT)
        if fields.count("block_size") != HASH_BLOCK:
            raise fields.wrong("block_size", str(HASH_BLOCK))
        metric = fields.choice("metric", list(Metric))
        normalization = fields.choice("normalization", list(Normalization))
        try:
            check_metric(metric, normalization)
        except ValueError as error:
            raise DatastoreError(f"{MANIFEST_NAME}: {error}") from None
        faiss_index, binding = fields.get("faiss_index"), fields.get("binding")
        if faiss_index is not None:
            faiss_index = _parse_file(faiss_index, "faiss_index", re.compile(re.escape(FAISS_NAME)))
        manifest = cls(
            num_rows=fields.count("num_rows"),
            dim=fields.count("dim"),
            dtype=fields.choice("dtype", STORAGE_DTYPES),
            metric=metric,
            normalization=normalization,
            index=parse_index(fields.get("index")),
            blobs=_parse_files(fields, "blobs", BLOB_PATTERN),
            faiss_index=faiss_index,
            binding=None if binding is None else parse_binding(binding),
            source=fields.texts("source"),
            learned_map=fields.sha256_or_none("learned_map"),
        )
        stored = manifest.num_rows * manifest.dim * (2 if manifest.dtype == "float16" else 4)
        available = sum(blob.size for blob in manifest.blobs)
        if not manifest.blobs or stored > available:
            raise DatastoreError(
                f"Expected the blobs of {MANIFEST_NAME} to hold {manifest.num_rows} x "
                f"{manifest.dim} {manifest.dtype} values ({stored} bytes), but they have "
                f"{available} bytes."
            )
        return manifest


def signed_json(values: dict[str, Any]) -> str:
    """The text of a `datastore.json` with its own checksum."""
    values = {k: v for k, v in values.items() if k != "learned_map" or v is not None}
    if "learned_map" in values:  # without one all is as every version wrote it
        values["format_version"] = MAPPED_VERSION
    return json.dumps(values | {"checksum": _checksum(values)}, indent=2) + "\n"


def check_format(fields: Fields, wanted: str) -> None:
    """Checks what a `datastore.json` says about itself: format, version and its own checksum.

    Args:
        fields: of the whole file.
        wanted: the format.

    Raises:
        DatastoreError: for another format, another version, or a damaged file.
    """
    if fields.text("format") != wanted:
        raise fields.wrong("format", wanted)
    version, has_map = fields.count("format_version"), "learned_map" in fields.values
    if version != (wanted_version := MAPPED_VERSION if has_map else FORMAT_VERSION):
        raise DatastoreError(
            f"Expected {MANIFEST_NAME} of format version {wanted_version}, but got version "
            f"{version}; upgrade hf_knn."
        )
    checksum = fields.matching("checksum", SHA256_PATTERN)
    if checksum != _checksum({k: v for k, v in fields.values.items() if k != "checksum"}):
        raise DatastoreError(
            f"Expected {MANIFEST_NAME} to match its own checksum {checksum[:12]}…, but it does "
            "not; the file is damaged, download or save it again."
        )


def _checksum(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _parse_file(values: Any, prefix: str, pattern: re.Pattern[str]) -> FileRecord:
    fields = Fields(values, f"{prefix}.")
    size = fields.count("size")
    blocks = fields.items("blocks")
    if len(blocks) != -(-size // HASH_BLOCK):
        raise fields.wrong("blocks", f"one hash per {HASH_BLOCK} bytes of {size}")
    if not all(isinstance(block, str) and SHA256_PATTERN.fullmatch(block) for block in blocks):
        raise fields.wrong("blocks", "a list of sha256 sums")
    sha256 = fields.matching("sha256", SHA256_PATTERN)
    if len(blocks) == 1 and blocks != [sha256]:
        raise fields.wrong("blocks", "the hash of the file, which is one block")
    return FileRecord(fields.matching("name", pattern), size, sha256, blocks)


def _parse_files(fields: Fields, name: str, pattern: re.Pattern[str]) -> list[FileRecord]:
    places = [f"{fields.prefix}{name}[{i}]" for i in range(len(fields.items(name)))]
    pairs = zip(fields.items(name), places, strict=True)
    return [_parse_file(values, place, pattern) for values, place in pairs]


def parse_index(values: Any) -> IndexInfo:
    """Checks the part of a JSON file that says which index there is; raises DatastoreError."""
    fields = Fields(values, "index.")
    recall = None if fields.get("recall") is None else fields.share("recall")
    measured_on = fields.values.get("measured_on")
    if measured_on not in (None, *MEASURED_ON):  # version 0.1 measured on rows alone, and said None
        raise fields.wrong("measured_on", f"one of {MEASURED_ON} or null")
    named = Fields(fields.get("parameters"), "index.parameters.")
    by_kind = Fields(fields.values.get("recalls", {}), "index.recalls.")
    if not by_kind.values.keys() <= set(MEASURED_ON):
        raise fields.wrong("recalls", f"numbers by {MEASURED_ON}")
    return IndexInfo(
        fields.text("requested"), fields.text("spec"),
        {name: named.count(name) for name in named.values}, recall, measured_on,
        {name: by_kind.share(name) for name in by_kind.values},
    )  # fmt: skip


def parse_binding(values: Any) -> Binding:
    """Checks the part of a `datastore.json` that ties it to a checkpoint.

    Raises:
        DatastoreError: naming the field, what was wanted and what was found.
    """
    fields = Fields(values, "binding.")
    return Binding(
        fingerprint=fields.matching("fingerprint", SHA256_PATTERN),
        weights=fields.matching("weights", SHA256_PATTERN),
        processor=fields.text("processor"),
        pooling=fields.choice("pooling", list(Pooling)),
        dtype=fields.text("dtype"),
        files=_parse_files(fields, "files", _PLAIN_NAME),
    )
