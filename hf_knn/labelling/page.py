"""The page of `hf-knn label`: its three files, and what they ask for.

The session decides everything; here its questions become JSON and what is sent becomes answers. One
request at a time reaches it, and what was sent about a question that is no longer asked is refused.
"""

import io
import json
import logging
import secrets
import threading
from collections.abc import Awaitable, Callable
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..data.decode import decoding
from ..serving.guard import Access, Guard
from .answers import ANSWER, FINISH, UNDO, Sent, SentAnswer, SentFinish, read_sent
from .outcome import COPY, LINK, Outcome
from .session import Session
from .shown import Document, Ending, PictureNumbers, Source, shown

logger = logging.getLogger(__name__)

SIZES = (360, 1600)
"""Longer sides of the pictures that are sent, in pixels; page.js names them too."""

MOST_SENT = 2**20
"""Bytes of a request; a group of 10,000 pictures has 60,000."""

_Endpoint = Callable[[Request], Awaitable[Response]]
_Asked = TypeVar("_Asked", bound=Sent)
_STATIC = {"": "index.html", "page.js": "page.js", "page.css": "page.css"}
_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FOLDERS = {"copies": COPY, "links": LINK, "list": None}
_TINY, _QUALITY = 128, 90
_AHEAD = 4
"""The one that is asked now among them."""

_ELSEWHERE = "This question was answered elsewhere; nothing was changed. Here is what is asked now."


class LabelPage:
    """One session behind a page, and any number of tabs that show it.

    Args:
        session: what is asked and answered.
        ending: what is said of an outcome.
        finished: called when everything was written, once the page was told.
        folders: what the page proposes to write, see `Session.finish`.
        with_model: likewise.
    """

    def __init__(
        self,
        session: Session,
        ending: Callable[[Outcome], Ending],
        finished: Callable[[], None],
        folders: str | None = None,
        with_model: bool = True,
    ) -> None:
        self._session, self._ending, self._finished = session, ending, finished
        kind = next(kind for kind, how in _FOLDERS.items() if how == folders)
        self._proposed = {"kind": kind, "with_model": with_model}
        self._lock = threading.Lock()
        self._run = secrets.token_hex(8)
        self._numbers = PictureNumbers()

    def app(self, access: Access) -> Guard:
        """The page as an ASGI application.

        Args:
            access: who may ask; on this machine alone without a token.
        """
        routes = [Route(f"/{path}", _file(name)) for path, name in _STATIC.items()]
        routes += [
            Route("/api/question", self._ask),
            Route("/api/ahead", self._ahead),
            Route("/api/answer", self._taking(ANSWER, self._answer), methods=["POST"]),
            Route("/api/undo", self._taking(UNDO, self._undo), methods=["POST"]),
            Route("/api/finish", self._taking(FINISH, self._finish), methods=["POST"]),
            Route("/pictures/{number:int}", self._picture),
            Route(
                "/favicon.ico", lambda _: Response(status_code=204)
            ),  # browsers ask by themselves
        ]
        app = Starlette(routes=routes, exception_handlers={Exception: _failed})
        return Guard(app, access, lambda method, path: False)

    def _ask(self, _: Request) -> Response:
        with self._lock:
            return _json(self._question())

    def _question(self) -> Document:
        session = self._session
        folder = session.pool.folder
        document = shown(
            session.question(), session.labels, session.progress(), folder, self._numbers
        )
        return document | {"run": self._run, "finish": self._proposed}

    def _ahead(self, _: Request) -> Response:
        """What may be asked next, so that it is there by then."""
        session = self._session
        with self._lock:
            names = session.suggestions(_AHEAD)
            numbers = [self._numbers.of(session.pool.path(name)) for name in names]
            return _json({"pictures": numbers})

    def _taking(
        self, kind: TypeAdapter[_Asked], take: Callable[[_Asked, Document], Document]
    ) -> _Endpoint:
        """An endpoint that reads what is sent about a question, and refuses an old one."""

        def taken(sent: _Asked) -> Response:
            with self._lock:
                question = self._question()
                if (sent.run, sent.number) != (self._run, question["number"]):
                    return _json({"error": _ELSEWHERE, "question": question}, 409)
                try:
                    said = take(sent, question)
                except (ValueError, OSError) as error:
                    return _json({"error": _sentence(error)}, 422)
            return _json(said, task=BackgroundTask(self._finished) if "commands" in said else None)

        async def endpoint(request: Request) -> Response:
            body = await _body(request)
            if body is None:
                return _json({"error": f"Expected at most {MOST_SENT} bytes."}, 413)
            try:
                sent = read_sent(kind, body)
            except ValueError as error:
                return _json({"error": str(error)}, 422)
            return await run_in_threadpool(taken, sent)

        return endpoint

    def _answer(self, sent: SentAnswer, question: Document) -> Document:
        if sent.number is None:
            raise ValueError("Expected a question to answer, but every picture has an answer.")
        asked = {picture["number"] for picture in question["pictures"]}

        def path_of(number: int) -> Path:
            source = self._numbers.source(number) if number in asked else None
            if not isinstance(source, Path):
                raise ValueError(f"Expected a picture of the question, but got number {number}.")
            return source

        self._session.answer(sent.number, sent.answer(path_of))
        return self._question()

    def _undo(self, _: Sent, __: Document) -> Document:
        said = self._session.undo()
        return {"said": said, "question": self._question()}

    def _finish(self, sent: SentFinish, _: Document) -> Document:
        ending = self._ending(self._session.finish(_FOLDERS[sent.kind], sent.with_model))
        return {"said": ending.said, "commands": [each._asdict() for each in ending.commands]}

    def _picture(self, request: Request) -> Response:
        """A picture of the session, upright and without its metadata."""
        wanted = request.query_params.get("size", "")
        if wanted not in map(str, SIZES):
            return _json({"error": f"Expected a size of {SIZES}, but got {wanted!r:.20}."}, 422)
        try:
            with self._lock:
                source = self._numbers.source(request.path_params["number"])
            content, kind = _encoded(source, int(wanted))
        except (ValueError, OSError) as error:
            return _json({"error": _sentence(error)}, 404)
        # an address holds the run, so it never means another picture
        return Response(content, 200, {"cache-control": "private, max-age=86400, immutable"}, kind)


def _encoded(source: Source, side: int) -> tuple[bytes, str]:
    """A picture made small; a tiny one exactly as it is."""
    buffer = io.BytesIO()
    with decoding(source) as image:
        if max(image.size) <= _TINY:
            image.save(buffer, "PNG")
            return buffer.getvalue(), "image/png"
        image.thumbnail((side, side))
        image.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue(), "image/jpeg"


def _file(name: str) -> Callable[[Request], Response]:
    path = files(__package__).joinpath("static", name)
    content, kind = path.read_bytes(), _KINDS[Path(name).suffix]

    def endpoint(_: Request) -> Response:
        return Response(content, 200, {"content-security-policy": _POLICY}, kind)

    return endpoint


async def _body(request: Request) -> bytes | None:
    """What was sent; None if it is too much."""
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > MOST_SENT:
            return None
    return b"".join(parts)


def _json(document: Document, status: int = 200, task: BackgroundTask | None = None) -> Response:
    """ASCII, since a name may hold what UTF-8 cannot."""
    content = json.dumps(document, allow_nan=False)
    return Response(content, status, media_type="application/json", background=task)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:  # without the place, which is not told
        return f"The computer said: {error.strerror}."
    return f"{str(error).rstrip('.')}."


def _failed(_: Request, error: Exception) -> Response:
    logger.error("The page could not be answered.", exc_info=error)
    return _json(
        {"error": "Something went wrong; the terminal says what. Your answers are kept."}, 500
    )
