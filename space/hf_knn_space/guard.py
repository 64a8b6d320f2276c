"""What a request may ask of the server before the page sees it: bounded bodies, disk and origin."""

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hf_knn.data import MAX_UPLOAD

MAX_DISK = 4 * 2**30
"""Bytes that uploads and downloads of all visitors may take at a time."""

MAX_BODY = 2**20
"""Bytes of any other request."""

KEPT_SECONDS = 7200.0
"""After which a file is swept away, also one that an earlier process left."""

_LOOK_EVERY = 60.0
_BLOCK = 4096
_FOLDER = "GRADIO_TEMP_DIR"  # of gradio's own, read whenever it keeps a file
_OWN = "hf_knn_space"


class Shelf:
    """The folder of what visitors send and take away, which never stays.

    Args:
        folder: made if it is not there.
        max_bytes: that it may hold.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_DISK) -> None:
        self.folder, self._max_bytes = folder, max_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._used, self._looked = 0, -_LOOK_EVERY

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more may come; they count until the folder is looked through.

        Args:
            size: in bytes.
        """
        with self._lock:
            if time.monotonic() > self._looked + _LOOK_EVERY:
                self._used, self._looked = self._sweep(), time.monotonic()
            free = min(self._max_bytes - self._used, shutil.disk_usage(self.folder).free)
            if size > free:
                return False
            self._used += size
            return True

    def _sweep(self) -> int:
        """Deletes what is old, and counts the bytes of the rest."""
        oldest, used = time.time() - KEPT_SECONDS, 0
        for path in list(self.folder.rglob("*")):
            try:
                about = path.stat()
                if about.st_mtime >= oldest:
                    used += max(about.st_size, _BLOCK)  # many small files fill a disk too
                elif path.is_dir():
                    path.rmdir()
                else:
                    path.unlink()
            except OSError:  # the page has deleted it meanwhile, or the folder is not empty
                continue
        return used


@cache
def shelf() -> Shelf:
    """The one of this process: a folder of its own, since all that is old in it is deleted."""
    place = Path(os.environ.get(_FOLDER) or tempfile.gettempdir()).resolve()
    own = place if place.name == _OWN else place / _OWN
    os.environ[_FOLDER] = str(own)
    return Shelf(own)


class Guard:
    """Refuses requests with a message, before anything is kept or fetched for them.

    Args:
        app: what answers the others.
        shelf: where files go.
    """

    def __init__(self, app: ASGIApp, shelf: Shelf) -> None:
        self._app, self._shelf = app, shelf

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if scope["path"].rstrip("/").endswith("/upload"):
            refusal = await run_in_threadpool(self._refuse_upload, _length_of(scope))
            await (refusal or self._app)(scope, receive, send)
            return
        await run_in_threadpool(self._shelf.has_room, 0)  # what is old goes
        body = await _read(receive)
        refusal = _refuse_body(body)
        await (refusal or self._app)(scope, _again(body or b"", receive), send)

    def _refuse_upload(self, length: int | None) -> JSONResponse | None:
        if length is None:
            return _refusal(411, "Expected the length of the files to be said (Content-Length).")
        if length > MAX_UPLOAD:
            return _refusal(413, f"Expected at most {MAX_UPLOAD} bytes at once, but got {length}.")
        if not self._shelf.has_room(length):
            return _refusal(507, "The server has no room for files right now; try again later.")
        return None


def _refuse_body(body: bytes | None) -> JSONResponse | None:
    if body is None:
        return _refusal(413, f"Expected a request of at most {MAX_BODY} bytes.")
    try:
        sent = json.loads(body) if body else None
    except (ValueError, RecursionError):
        return None  # the page says so
    if any(path.lower().startswith(("http:", "https:")) for path in _paths(sent)):
        return _refusal(400, "Expected a file that was uploaded, but got an address.")
    return None


def _paths(sent: Any) -> Iterator[str]:
    """Every `path` in a request, however deep."""
    waiting = [sent]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if isinstance(one.get("path"), str):
                yield one["path"]
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"detail": message, "error": message}, status)


def _length_of(scope: Scope) -> int | None:
    said = dict(scope["headers"]).get(b"content-length", b"")
    return int(said) if said.isdigit() else None


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None beyond `MAX_BODY`."""
    body, is_more = b"", True
    while is_more:
        message = await receive()
        body += message.get("body", b"")
        is_more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            return None
    return body


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read to whoever asks first, and then what else comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_message
