"""What takes a change of rows in Milvus back, kept in a checkpoint until that names the new rows.

A server and a folder cannot be changed in one step. So the file is written before the first row is
changed, and goes with the old version of the folder when the checkpoint is saved: as long as it is
there, the rows are to be taken back to what the checkpoint names.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.manifest import MANIFEST_NAME, DatastoreError
from ..core.plain_json import parse_json
from ..store.folders import give_default_mode, write_durably
from ..store.remote import (
    PENDING_NAME,
    URI_VARIABLE,
    DatastoreReference,
    RemoteConsent,
    explain_pending,
    is_pending,
    read_manifest,
)
from ..store.table import StoredRows
from .about import About
from .changes import Reversal, take_back
from .collection import MilvusCollection
from .server import DatastoreConnectionError, DatastoreRefusalError, MilvusServer, check_exists

_FORMAT = "hf_knn.pending_change.1"
_TENSORS = ("ids", "labels", "features", "added", "texts")


class Pending(NamedTuple):
    """What the file says.

    Attributes:
        uri: of the server.
        reversal: of the change.
    """

    uri: str
    reversal: Reversal


def write_pending(path: Path, uri: str, reversal: Reversal) -> None:
    """Writes the file, durably, before anything is changed.

    Args:
        path: of the file.
        uri: of the server.
        reversal: of the change that will be made.

    Raises:
        DatastoreError: if a change is under way there.
        OSError: if it could not be written.
    """
    if path.exists():
        raise DatastoreError(f"Expected one change at a time, but {path} speaks of another one.")
    write_durably(path, lambda temporary: _save(temporary, uri, reversal))


def read_pending(path: Path) -> Pending:
    """Reads the file, if it is as it was written.

    Args:
        path: of the file.

    Raises:
        DatastoreError: for a file that is damaged, or not what `write_pending` writes.
    """
    try:
        with safe_open(path, "pt") as file:
            facts, tensors = file.metadata() or {}, {n: file.get_tensor(n) for n in _TENSORS}
        return _parsed(dict(facts), tensors)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise DatastoreError(
            f"Expected {path} to say how a change is taken back, but: {error}. If the rows "
            "that are there now are wanted, remove the file and save the model with "
            "MilvusDatastore.connect(…, recover=True)."
        ) from error


def settle(folder: Path) -> bool:
    """Takes an interrupted change back; the caller holds the lock of the folder.

    Args:
        folder: of a checkpoint.

    Returns:
        Whether there was one.

    Raises:
        ValueError: without consent to ask the server.
        DatastoreError: if the rows are neither what they were nor what they would have been.
        DatastoreConnectionError: if the server does not answer; call again.
    """
    if not is_pending(folder):
        return False
    path = folder / PENDING_NAME
    (uri, reversal), reference = read_pending(path), read_manifest(folder / MANIFEST_NAME)
    if not isinstance(reference, DatastoreReference) or reference.fingerprint not in (
        reversal.before.fingerprint,
        reversal.after.fingerprint,
    ):
        raise DatastoreError(
            f"Expected {path} to speak of the rows that the checkpoint names, but it speaks of "
            f"others, fingerprint {reversal.before.fingerprint[:12]}…; if they are of no use any "
            "more, remove the file."
        )
    if reference.fingerprint == reversal.before.fingerprint:
        address, token = RemoteConsent().place_of(reference)
        if address != uri:  # another server may hold the same rows, and need nothing
            raise DatastoreError(
                f"Expected the address where a change was interrupted, but got {address}; set "
                f"{URI_VARIABLE} to {uri}."
            )
        _take_back_at(address, token, reference.collection, reversal, path)
    path.unlink()
    return True


def _take_back_at(
    address: str, token: str, collection: str, reversal: Reversal, path: Path
) -> None:
    try:
        server = MilvusServer(check_exists(address), token)
        take_back(MilvusCollection(server, collection), reversal)
    except DatastoreConnectionError as error:
        raise DatastoreConnectionError(f"{error} {explain_pending(path.parent)}") from error
    except DatastoreError as error:
        raise DatastoreError(
            f"{error} If the rows that are there now are wanted, remove {path} and save the model "
            "with MilvusDatastore.connect(…, recover=True)."
        ) from error


class Journaled(Protocol):
    """A `MilvusDatastore`, as far as it matters here.

    Attributes:
        collection: of the rows.
        journal: where it writes how its changes are taken back; None for nowhere.
    """

    collection: MilvusCollection
    journal: Path | None


@contextmanager
def whole_or_not(store: Journaled | None, folder: Path) -> Iterator[None]:
    """Takes a change of a datastore back unless the checkpoint was saved with it.

    Args:
        store: the datastore of the checkpoint; None if its rows are not in Milvus.
        folder: of the checkpoint; the caller holds its lock.

    Raises:
        DatastoreConnectionError: if the server went away in the middle, saying what to run then.
    """
    if store is None:
        yield
        return
    store.journal = folder / PENDING_NAME
    try:
        yield
    except BaseException as error:
        _take_back_now(store, folder, error)
        raise
    finally:
        store.journal = None


def _take_back_now(store: Journaled, folder: Path, error: BaseException) -> None:
    path = folder / PENDING_NAME
    if not path.is_file():
        return  # nothing was changed yet, or all is saved
    lost: BaseException | None = error
    if not isinstance(error, DatastoreConnectionError) or isinstance(error, DatastoreRefusalError):
        try:
            take_back(store.collection, read_pending(path).reversal)
            path.unlink()
            lost = None
        except DatastoreConnectionError as second:
            lost = second
    if lost is not None:
        raise DatastoreConnectionError(f"{lost} {explain_pending(folder)}") from error


def _save(path: Path, uri: str, reversal: Reversal) -> None:
    before, after, old, added = reversal
    tensors = {
        "features": torch.from_numpy(np.ascontiguousarray(old.features)),
        "ids": torch.from_numpy(old.ids), "labels": torch.from_numpy(old.labels),
        "added": torch.tensor(added, dtype=torch.int64),
        "texts": torch.frombuffer(
            bytearray(json.dumps([old.paths, old.splits]).encode()), dtype=torch.uint8
        ),
    }  # fmt: skip
    records = {"before": json.dumps(before.to_row()), "after": json.dumps(after.to_row())}
    facts = records | {"uri": uri}
    save_file(tensors, path, facts | {"format": _FORMAT, "sha256": _hash(facts, tensors)})
    give_default_mode(path)


def _parsed(facts: dict[str, str], tensors: dict[str, Tensor]) -> Pending:
    if facts.pop("format", "") != _FORMAT:
        raise ValueError(f"it is not of the format {_FORMAT}")
    if facts.pop("sha256", "") != _hash(facts, tensors):
        raise ValueError("it is damaged")
    rows = (parse_json(facts[name], PENDING_NAME) for name in ("before", "after"))
    before, after = (About.from_row(row) for row in rows)
    ids, labels, features, added, texts = (tensors[name].numpy() for name in _TENSORS)
    paths, splits = parse_json(texts.tobytes(), PENDING_NAME)
    old = StoredRows(ids, labels, features, paths, splits)
    return Pending(facts["uri"], Reversal(before, after, old, added.tolist()))


def _hash(facts: dict[str, str], tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in _TENSORS:
        found.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        found.update(tensors[name].numpy().tobytes())
    return found.hexdigest()
