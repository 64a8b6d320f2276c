"""Who is here: one overlay per visitor, bounded in number and in time."""

import hashlib
import logging
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from hf_knn import Datastore, KnnForImageClassification

from .journal import Journal, JournalError
from .overlay import Overlay, fingerprint
from .uploads import SpaceError

MAX_IN_MEMORY = 256
"""Visitors whose models are held; others make room, which loses what no journal keeps."""

MAX_BYTES = 2 * 2**30
"""Of the rows and sums that those visitors' models hold together, about."""

MAX_ON_DISK = 5000
"""Journals; others make room for a new one."""

MAX_BYTES_ON_DISK = 4 * 2**30
"""Of all journals together."""

FEW_EXAMPLES, SMALL_JOURNAL = 10, 100_000
"""A visitor with no more than so many pictures, or bytes, is one of those who taught little."""

KEPT_ON_DISK = 30 * 24 * 3600.0
"""Seconds after its last change when a journal is deleted."""

logger = logging.getLogger(__name__)

_EXPIRE_EVERY = 3600.0
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,64}")


def room_for(model: KnnForImageClassification) -> int:
    """How many visitors' models may be held: each has rows, a copy to search, sums of a head.

    Args:
        model: the published model.
    """
    store = model.datastore
    if not isinstance(store, Datastore):
        return MAX_IN_MEMORY
    bytes_each = 6 * len(store) * store.dim
    if model.config.head in ("ridge", "kernel", "lda"):
        bytes_each += 16 * model.head.classifier.in_features**2  # sums, and a factor of them
    return max(1, min(MAX_IN_MEMORY, MAX_BYTES // max(1, bytes_each)))


class Kept(NamedTuple):
    """What decides who makes room: whether much was taught, when it was last of use, and whose."""

    is_large: bool
    used: float
    name: str | Path


def first_to_go(kept: Iterable[Kept]) -> Iterator[Kept]:
    """Who makes room, one after the other.

    Those who taught little, or much, whoever are more, and the longest unused of them. So no crowd
    of new visitors drives out all who taught much, nor keeps out those who begin.
    """
    oldest_last = sorted(kept, key=lambda each: each.used, reverse=True)
    few = [each for each in oldest_last if not each.is_large]
    much = [each for each in oldest_last if each.is_large]
    while few or much:
        yield (few if len(few) >= len(much) else much).pop()


def new_token() -> str:
    """A name that nobody guesses."""
    return secrets.token_urlsafe(24)


def token_of(browser: object) -> str:
    """What a browser kept, or a new token if it kept none.

    Args:
        browser: of `gr.BrowserState`, which anybody can send.
    """
    return browser if isinstance(browser, str) and _TOKEN.fullmatch(browser) else new_token()


def check_token(token: str) -> str:
    """Refuses what `new_token` does not make, which could be guessed or be a path.

    Raises:
        SpaceError: without repeating what was sent.
    """
    if not _TOKEN.fullmatch(token):
        raise SpaceError(
            "Expected a visitor token of 16 to 64 letters, digits, - and _; leave it empty and use "
            "the one that comes back."
        )
    return token


class Visitors:
    """The overlays of a model, by token.

    Args:
        model: the published model.
        folder: where journals are kept; None keeps everything in memory.
        max_in_memory: None is what `MAX_IN_MEMORY` and `MAX_BYTES` allow.
    """

    def __init__(
        self,
        model: KnnForImageClassification,
        folder: Path | None,
        max_in_memory: int | None = None,
    ) -> None:
        self._model = model
        self._max = max_in_memory or room_for(model)
        self._lock = threading.Lock()
        self._overlays: dict[str, Overlay] = {}
        self._folder = None
        self._next_expiry = time.monotonic() + _EXPIRE_EVERY
        if folder is not None:  # features of other weights mean nothing: a folder per model
            self._folder = folder / fingerprint(model)[:32]
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(
                    f"Expected `HF_KNN_DATA` to be a folder that can be written, but got {folder} "
                    f"({error.strerror}); choose another one."
                ) from error
            self.expire()
        if isinstance(model.datastore, Datastore) and len(model.datastore):
            model.fingerprint_rows()  # counted once, for the first change of every visitor

    @contextmanager
    def hold(self, token: str, create: bool = False) -> Iterator[Overlay | None]:
        """The visitor's overlay, for one change or answer at a time.

        Args:
            token: empty for somebody without one.
            create: make an overlay if there is none.

        Yields:
            The overlay; None if there is none, so that the published model answers.

        Raises:
            SpaceError: for a bad token, or while too many others are being answered.
        """
        if time.monotonic() > self._next_expiry:
            self.expire()
        while True:
            overlay = self._find(check_token(token), create) if token else None
            if overlay is None:
                yield None
                return
            with overlay.lock:
                if overlay.is_closed:  # it had to make room while this one waited
                    continue
                overlay.seen = time.monotonic()
                yield overlay
                return

    def expire(self) -> int:
        """Deletes the journals that nobody has changed for long.

        Returns:
            How many.
        """
        self._next_expiry = time.monotonic() + _EXPIRE_EVERY
        if self._folder is None:
            return 0
        oldest = time.time() - KEPT_ON_DISK
        with self._lock:
            held = {self._path(token) for token in self._overlays}
            old = [
                path
                for path in self._folder.iterdir()
                if path not in held and path.stat().st_mtime < oldest
            ]
            for path in old:
                path.unlink(missing_ok=True)
        return len(old)

    def _find(self, token: str, create: bool) -> Overlay | None:
        with self._lock:
            overlay = self._overlays.get(token)
            if overlay is not None and not overlay.is_closed:
                return overlay
            path = self._path(token)
            if not create and (path is None or not path.exists()):
                return None
            if not isinstance(self._model.datastore, Datastore):
                raise SpaceError("This model cannot be taught here: it holds no rows of its own.")
            self._make_room_in_memory()
            if create:
                self._make_room_on_disk(path)
            journal = None if path is None else Journal(path)
            try:
                overlay = self._overlays[token] = Overlay(self._model, journal)
            except JournalError as error:
                logger.error("%s: %s", path, error)
                raise SpaceError(
                    "What you taught cannot be read: its file on the server was damaged. Tell "
                    "whoever runs this page, or clear its data in your browser to begin anew."
                ) from error
            return overlay

    def _make_room_in_memory(self) -> None:
        kept = (
            Kept(len(overlay.examples) > FEW_EXAMPLES, overlay.seen, token)
            for token, overlay in self._overlays.items()
        )
        for each in first_to_go(list(kept)):
            if len(self._overlays) < self._max:
                return
            self._let_go(str(each.name))
        if len(self._overlays) >= self._max:
            raise SpaceError("Too many visitors are teaching right now; try again in a while.")

    def _make_room_on_disk(self, own: Path | None) -> None:
        """Deletes journals while there are too many or too large ones; never that of who asks."""
        if self._folder is None:
            return
        states = {path: path.stat() for path in self._folder.glob("*.journal") if path != own}
        kept = [
            Kept(state.st_size > SMALL_JOURNAL, state.st_mtime, path)
            for path, state in states.items()
        ]
        count, size = len(kept), sum(state.st_size for state in states.values())
        holders = {self._path(token): token for token in self._overlays}
        for _, _, path in first_to_go(kept):
            if count < MAX_ON_DISK and size < MAX_BYTES_ON_DISK:
                return
            assert isinstance(path, Path)
            holder = holders.get(path)
            if holder is None or self._let_go(holder):
                path.unlink(missing_ok=True)
                count, size = count - 1, size - states[path].st_size

    def _let_go(self, token: str) -> bool:
        """Forgets a visitor in memory; False while they are being answered."""
        overlay = self._overlays[token]
        if not overlay.lock.acquire(blocking=False):
            return False
        overlay.is_closed = True
        del self._overlays[token]
        overlay.lock.release()
        return True

    def _path(self, token: str) -> Path | None:
        """A name from which nobody who sees the folder learns the token."""
        if self._folder is None:
            return None
        return self._folder / f"{hashlib.sha256(token.encode()).hexdigest()[:40]}.journal"
