"""One live checkpoint: the newest version of it answers, and a change is saved before it is told.

A folder is the truth, since other processes change it too (`hf-knn teach`, a training). So it is
looked at before each answer, and again, under the lock of its writers, before each change.
"""

import copy
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME

from ..core.manifest import MANIFEST_NAME
from ..features.extract import PictureEncoder
from ..milvus.datastore import MilvusDatastore
from ..milvus.pending import settle, whole_or_not
from ..model.checkpoint import made_by
from ..model.modeling import KnnForImageClassification
from ..model.receipts import Receipt, Scope
from ..store.folders import exclusive_lock, identity, restore

logger = logging.getLogger(__name__)

WAIT_SECONDS = 20.0
"""For another process that is changing the checkpoint."""

_GLANCE_SECONDS = 1.0

_PROBLEMS = (
    OSError, ValueError, AttributeError, TypeError, LookupError, RuntimeError, SafetensorError
)  # fmt: skip
"""What files of somebody can make the libraries raise."""


class UnreadableError(Exception):
    """The checkpoint cannot be opened, or not be saved, right now; the log says why."""


class BusyError(Exception):
    """Another process has been changing the checkpoint for long."""


class ReplacedError(Exception):
    """Another process put another backbone there meanwhile: features have to be made anew."""


class Version(NamedTuple):
    """A checkpoint as it was opened, or as it was changed here since.

    Attributes:
        model: what answers; only `LiveCheckpoint` changes it.
        encoder: makes features for it.
        maker: a fingerprint of what makes them; features of another maker mean nothing to it.
        seen: tells the files from others; None for one that is to be opened again.
    """

    model: KnnForImageClassification
    encoder: PictureEncoder
    maker: str
    seen: tuple[Any, ...] | None


Change = Callable[[Version], Receipt]
"""Changes the model; a ValueError or ReplacedError says why not, and then nothing was changed."""

Outcome = Receipt | ValueError | ReplacedError


class LiveCheckpoint:
    """A checkpoint that answers and can be changed, by several threads.

    Args:
        name: a folder or a Hub id; the commit of a Hub id stays the one that is opened.
        backend: what makes features, see `PictureEncoder`.

    Attributes:
        folder: where it is kept; None for a Hub id, which cannot be changed.
        opened: how often it was opened again, since another process had changed it.

    Raises:
        ValueError: for a damaged checkpoint, or a backend that cannot run it.
        ImportError: for a backend that is not installed.
        OSError: if something is not there.
    """

    def __init__(self, name: str, backend: str = "torch") -> None:
        self.name, place = name, Path(name)
        restore(place)
        self.folder = place.resolve() if place.is_dir() else None
        self.opened = 0
        self._backend = backend
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._version = self._open()

    @property
    def latest(self) -> Version:
        """The version that answered last; it may be out of date."""
        return self._version

    @contextmanager
    def answering(self) -> Iterator[Version]:
        """The newest version; within the block it stays as it is.

        Raises:
            UnreadableError: if it cannot be opened.
        """
        if self.folder is not None:
            restore(self.folder)
        with self._turn:  # a change does not wait for one answer after another
            pass
        with self._lock:
            yield self._newest()

    def glance(self) -> Version:
        """The newest version, or after a second that of an answer or change under way.

        Raises:
            UnreadableError: if it cannot be opened.
        """
        if not self._lock.acquire(timeout=_GLANCE_SECONDS):
            return self._version
        try:
            return self._newest()
        finally:
            self._lock.release()

    def change(self, changes: Sequence[Change]) -> list[Outcome]:
        """Makes some changes, one after the other, and saves them together.

        When this returns, they survive the end of this process.

        Args:
            changes: to be made.

        Returns:
            The receipt of each, or why it could not be made.

        Raises:
            BusyError: if another process holds the checkpoint for long; nothing was changed.
            UnreadableError: if it could not be opened or saved; nothing was changed.
        """
        folder = self.folder
        assert folder is not None  # whoever calls this has looked
        try:
            with exclusive_lock(folder, WAIT_SECONDS):
                restore(folder)
                with self._turn, self._lock:
                    return self._change_all(folder, changes)
        except TimeoutError as error:
            raise BusyError from error

    def _change_all(self, folder: Path, changes: Sequence[Change]) -> list[Outcome]:
        try:
            settle(folder)
            version = self._newest()
            elsewhere = version.model.datastore
            if not isinstance(elsewhere, MilvusDatastore):
                return self._changed(folder, changes)
            found: list[Outcome] = []
            for change in changes:  # rows of a server are taken back one change at a time
                with whole_or_not(elsewhere, folder):
                    found += self._changed(folder, [change])
            return found
        except UnreadableError:
            raise
        except _PROBLEMS as error:
            logger.error("The checkpoint could not be changed: %s", error)
            self._version = self._version._replace(seen=None)
            raise UnreadableError from error

    def _changed(self, folder: Path, changes: Sequence[Change]) -> list[Outcome]:
        version = self._version
        model = version.model
        found: list[Outcome] = []
        last = None
        for change in changes:
            try:
                receipt = change(version)
            except (ValueError, ReplacedError) as error:
                found.append(error)
                continue
            if receipt.scope != Scope.NOTHING:
                last = len(found)
            found.append(receipt)
        if last is None:
            return found
        self._version = version._replace(seen=None)  # until it is whole on disk
        model.save_pretrained(folder)
        found[last] = model.changes[-1]  # the save may have noted something
        model.memory = replace(model.memory, gone=())  # no byte of what was forgotten
        self._version = version._replace(seen=_seen(folder))
        return found

    def _newest(self) -> Version:
        seen = self._version.seen
        if self.folder is not None and (seen is None or seen != _seen(self.folder)):
            try:
                self._version = self._open()
            except _PROBLEMS as error:
                logger.error("The checkpoint cannot be opened: %s", error)
                raise UnreadableError from error
            self.opened += 1
        return self._version

    def _open(self) -> Version:
        seen = None if self.folder is None else _seen(self.folder)  # before: another one is seen
        model = KnnForImageClassification.from_pretrained(self.name).eval()
        eye = copy.copy(model)  # it holds no rows of a version that is gone
        eye.datastore = None
        encoder = PictureEncoder(eye, self._backend)
        self._backend = encoder.backend  # chosen once
        return Version(model, encoder, made_by(model), seen)


def _seen(folder: Path) -> tuple[Any, ...]:
    """What changes with each version of a folder: a save exchanges all of it."""
    return tuple(identity(place) for place in (folder / MANIFEST_NAME, folder / CONFIG_NAME))
