"""The files of one revision, in a folder or on the Hub, and their hashes."""

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from transformers.utils import cached_file
from transformers.utils.hub import resolve_revision

HASH_BLOCK = 64 * 2**20
"""Bytes per separately hashed block of a blob."""

_READ_BYTES = 2**20
HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download", "subfolder")
"""Of `from_pretrained`, which hold for every file."""


class HubFiles:
    """Finds files by name, all of one version.

    Args:
        name: a folder or a Hub id.
        options: the options of `from_pretrained` (`revision`, `token`, `cache_dir`, …).

    Attributes:
        revision: the commit all files come from (Hub only).
    """

    def __init__(self, name: str | Path, options: dict[str, Any]) -> None:
        self.name = str(name)
        self.options = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
        places = {key: self.options[key] for key in HUB_OPTIONS[:3] if key in self.options}
        self.revision = resolve_revision(self.name, options.get("revision"), **places)

    def resolve(self, name: str) -> Path | None:
        """Finds a file by name; None if there is none.

        Raises:
            OSError: if there is no such repository or revision, or the download failed.
        """
        try:
            found = cached_file(
                self.name, name, revision=self.revision,
                _raise_exceptions_for_missing_entries=False, **self.options,
            )  # fmt: skip
        except (OSError, ValueError):
            raise
        except Exception as error:  # the HTTP client's own, of whichever client there is
            raise OSError(
                f"Could not get {name} of {self.name}: {error}; nothing was loaded, try again."
            ) from error
        return None if found is None else Path(found)


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


def hash_open_blocks(file: BinaryIO, count: int) -> list[str]:
    """Hashes the blocks of an open file, as many at once as there are processors.

    Args:
        file: open for reading; its position does not matter and stays.
        count: how many blocks; what lies beyond belongs to the last one.

    Returns:
        The hex sha256 of each block.
    """
    descriptor = file.fileno()

    def hash_block(number: int) -> str:
        found, position = hashlib.sha256(), number * HASH_BLOCK
        end = position + HASH_BLOCK if number + 1 < count else sys.maxsize
        while piece := os.pread(descriptor, min(_READ_BYTES, end - position), position):
            found.update(piece)
            position += len(piece)
        return found.hexdigest()

    if count <= 1:
        return [hash_block(number) for number in range(count)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(hash_block, range(count)))
