"""Features on disk, by picture: what was computed once is read, whatever dataset it comes in.

A folder holds what one backbone makes of pictures. Its files are written whole, under the hash of
their content, and say which pictures they hold.
"""

import json
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .picture_keys import KEY_BYTES
from .storage import hash_blocks

logger = logging.getLogger(__name__)

ABOUT_NAME = "about.json"
KEYS_FOLDER = "keys"


class Shard(NamedTuple):
    """Some pictures and what became of them.

    Attributes:
        keys: [n, 16] uint8, see `picture_keys`; first those with features, in their order.
        features: [m, D] float32 of the first m keys.
        reasons: why each of the other n - m pictures cannot be decoded.
    """

    keys: NDArray[np.uint8]
    features: Tensor
    reasons: list[str]


class FeatureCache:
    """A folder of shards.

    Args:
        folder: where they lie, made at the first write; None keeps nothing.
        about: what `hf-knn cache` says of it.
    """

    def __init__(self, folder: Path | None, about: dict[str, Any] | None = None) -> None:
        self.folder, self.about = folder, about or {}

    def shards_with(self, wanted: set[bytes]) -> Iterable[Shard]:
        """The shards that hold some of the wanted pictures; a damaged file is removed, and said.

        Args:
            wanted: keys, as bytes.
        """
        if self.folder is None or not self.folder.is_dir():
            return
        found = False
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            shard = self._read(path, wanted)
            if shard is not None:
                found = True
                yield shard
        if found:
            self._say_used()

    def count(self, wanted: set[bytes]) -> int:
        """How many of the wanted pictures are here, by what the files say.

        Args:
            wanted: keys, as bytes.
        """
        found: set[bytes] = set()
        for path in self.folder.glob("shard-*.safetensors") if self.folder is not None else ():
            try:
                with safe_open(path, framework="pt") as file:
                    found.update(wanted.intersection(key_list(file.get_tensor("keys").numpy())))
            except (SafetensorError, FileNotFoundError):  # damaged, or cleared just now
                continue
        return len(found)

    def write(self, shard: Shard) -> None:
        """Adds a shard; a disk that is full or read-only is a warning, and nothing more is kept."""
        if self.folder is None:
            return
        text = bytearray(json.dumps(shard.reasons).encode())
        tensors = {
            "keys": torch.tensor(shard.keys),
            "features": shard.features,
            "reasons": torch.frombuffer(text, dtype=torch.uint8),
        }
        writer = f"{os.getpid()}.{threading.get_ident()}"
        temporary = self.folder / f".shard.{writer}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary)
            sha256, _ = hash_blocks(temporary)
            temporary.replace(self.folder / f"shard-{sha256[:24]}.safetensors")
            self._say_used()
        except (OSError, SafetensorError) as error:
            logger.warning("Features are not cached, %s cannot be written: %s", self.folder, error)
            self.folder = None
        finally:
            if temporary.exists():
                temporary.unlink()

    def _read(self, path: Path, wanted: set[bytes]) -> Shard | None:
        try:
            with safe_open(path, framework="pt") as file:
                keys = file.get_tensor("keys").numpy()
                if wanted.isdisjoint(key_list(keys)):
                    return None
                sha256, _ = hash_blocks(path)
                if path.stem.removeprefix("shard-") == sha256[:24]:
                    reasons = json.loads(file.get_tensor("reasons").numpy().tobytes())
                    return Shard(keys, file.get_tensor("features"), reasons)
        except SafetensorError as error:
            logger.debug("%s: %s", path, error)
        except FileNotFoundError:  # another process cleared it just now
            return None
        logger.warning("Computing %s again: the cached file is damaged.", path.name)
        path.unlink(missing_ok=True)
        return None

    def _say_used(self) -> None:
        """Its time is when the folder was last of use."""
        assert self.folder is not None
        place = self.folder / ABOUT_NAME
        try:
            if place.is_file():
                os.utime(place)
            else:
                place.write_text(json.dumps(self.about, indent=2) + "\n", encoding="utf-8")
        except OSError as error:  # a cache that can only be read is still of use
            logger.debug("%s: %s", place, error)


def key_list(keys: NDArray[np.uint8]) -> list[bytes]:
    """[n, 16] uint8 as a list of bytes, to look up."""
    data = keys.tobytes()
    return [data[start : start + KEY_BYTES] for start in range(0, len(data), KEY_BYTES)]


def cache_root() -> Path:
    """Where this project keeps what it can compute again: `$HF_KNN_CACHE` or `~/.cache/hf_knn`."""
    return Path(os.environ.get("HF_KNN_CACHE") or Path.home() / ".cache" / "hf_knn")


def stacked(keys: Sequence[bytes]) -> NDArray[np.uint8]:
    """A list of keys as [n, 16] uint8."""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
