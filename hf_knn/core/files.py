"""Files of a checkpoint, and what was promised about each: its size, and sha256 by blocks."""

import hashlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

MANIFEST_NAME = "datastore.json"
HASH_BLOCK = 64 * 2**20
"""Bytes per separately hashed block of a blob."""

_READ_BYTES = 2**20
_SEEKING = threading.Lock()


def hash_blocks(path: Path) -> tuple[str, list[str]]:
    """Hashes a file once, as a whole and in blocks of `HASH_BLOCK` bytes.

    Args:
        path: the file.

    Returns:
        The hex sha256 of the file and of each block.
    """
    whole, blocks = hashlib.sha256(), []
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            whole.update(block)
            blocks.append(hashlib.sha256(block).hexdigest())
    return whole.hexdigest(), blocks


def read_at(file: BinaryIO, position: int, count: int) -> bytes:
    """Reads an open file at a place, whatever other threads and forked processes read of it.

    Args:
        file: open for reading.
        position: of the first byte.
        count: how many bytes at most.
    """
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), count, position)
    with _SEEKING:  # Windows, where nothing forks
        file.seek(position)
        return file.read(count)


def hash_read_blocks(read: Callable[[int, int], bytes | memoryview], count: int) -> list[str]:
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

    if count <= 1:
        return [hash_block(number) for number in range(count)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(hash_block, range(count)))


class DatastoreError(ValueError):
    """A datastore on disk that is damaged, incomplete or not what it says it is."""


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
        """Compares a file's size with its record, without reading it.

        Args:
            path: where the file should be; None if it could not be found.

        Returns:
            The path.

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

    def verify(self, path: Path | None) -> Path:
        """Compares a file with its record, byte for byte.

        Args:
            path: where the file should be; None if it could not be found.

        Returns:
            The path.

        Raises:
            DatastoreError: naming the file, what was promised and what was found.
        """
        path = self.verify_size(path)
        with path.open("rb") as file:
            self.compare(partial(read_at, file))
        return path

    def read(self, path: Path | None) -> bytes:
        """Reads a file whole; what is returned is what was compared with the record.

        Args:
            path: where the file should be; None if it could not be found.

        Raises:
            DatastoreError: naming the file, what was promised and what was found.
        """
        data = self.verify_size(path).read_bytes()
        view = memoryview(data)
        self.compare(lambda position, count: view[position : position + count])
        return data

    def compare(self, read: Callable[[int, int], bytes | memoryview]) -> None:
        """Compares the bytes of a file with its record, several blocks at once.

        Args:
            read: its bytes from a position on, at most so many.

        Raises:
            DatastoreError: naming the file, what was promised and what was found.
        """
        found = hash_read_blocks(read, len(self.blocks))
        for number, (mine, theirs) in enumerate(zip(self.blocks, found, strict=True)):
            if mine != theirs:
                raise DatastoreError(
                    f"Expected {self.name} to have sha256 {mine[:12]}… in block {number} of "
                    f"{len(found)}, but got {theirs[:12]}…; the file is damaged or from another "
                    "save, download or save it again."
                )
