"""How much a server takes in: so many requests, bytes and seconds, and not one more."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..data.uploads import MAX_UPLOAD
from .guard import refused
from .refusals import LATER, SOON, Refusal

MAX_BODY = MAX_UPLOAD * 4 // 3 + 2**20
"""Bytes of one request: base64 takes four for three."""

MAX_HELD = 2**30
"""Bytes of all requests that are being answered."""

READ_SECONDS = 60.0
"""In which a request has to arrive."""


class Intake:
    """Counts what is under way, and refuses what would be too much.

    Args:
        app: what answers.
        most: requests with a body at a time.
        told: is called with path, method, status and seconds of each answer.

    Attributes:
        requests: how many with a body are under way.
    """

    def __init__(
        self, app: ASGIApp, most: int, told: Callable[[str, str, int, float], None]
    ) -> None:
        self._app, self._most, self._told = app, most, told
        self.requests, self._held = 0, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            with self._admitted(scope["method"]) as refusal:
                if refusal is None:
                    await self._answered(scope, receive, watched)
                else:
                    await refusal(scope, receive, watched)
        finally:
            self._told(scope["path"], scope["method"], status, time.perf_counter() - started)

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        held = 0
        until = time.monotonic() + READ_SECONDS
        is_whole = False

        async def bounded() -> Message:
            nonlocal held, is_whole
            if is_whole:  # whoever asks now waits for the end of the connection
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except TimeoutError:
                raise Refusal(
                    408, f"Expected the whole request within {READ_SECONDS:g} seconds."
                ) from None
            size = len(message.get("body", b""))
            held, self._held = held + size, self._held + size
            is_whole = not message.get("more_body", False)
            if held > MAX_BODY:
                raise Refusal(413, f"Expected a request of at most {MAX_BODY} bytes.")
            if self._held > MAX_HELD:
                raise Refusal(503, "The server holds too many pictures right now; try again.", SOON)
            return message

        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > MAX_BODY:
            answer = refused(413, f"Expected a request of at most {MAX_BODY} bytes.")
            await answer(scope, receive, send)
            return
        try:
            await self._app(scope, bounded, send)
        finally:
            self._held -= held

    @contextmanager
    def _admitted(self, method: str) -> Iterator[JSONResponse | None]:
        """Counts a request; yields what is said to one too many."""
        if method != "POST":  # nothing of it waits
            yield None
        elif self.requests >= self._most:
            yield refused(
                503, f"Expected at most {self._most} requests at a time; try again in a moment.",
                {"retry-after": str(LATER)},
            )  # fmt: skip
        else:
            self.requests += 1
            try:
                yield None
            finally:
                self.requests -= 1
