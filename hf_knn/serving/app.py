"""The server's routes, and what stands behind them."""

import asyncio
import json
import logging
import math
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse
from starlette.types import Receive, Scope, Send

from ..data.uploads import MAX_FILES, check_label
from ..model.receipts import Receipt
from ..model.receipts import Scope as Reached
from .answers import Look, Picture, Wish, answer, forgetting, lesson, read_pictures
from .asking import read_json, read_pictures_and
from .batches import Batcher, Job
from .guard import Access, Guard, refused
from .intake import Intake
from .live import Change, LiveCheckpoint, ReplacedError, UnreadableError
from .measures import Measures
from .refusals import LATER, Refusal, refusal_of
from .schema import (
    AnswerOptions,
    AnswerRequest,
    Document,
    ForgetRequest,
    Health,
    Problem,
    ReasonedDocument,
    ReceiptDocument,
    TeachOptions,
    TeachRequest,
    body,
)

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 60.0
"""In which an answer is given, or refused."""

CHANGING = ("/teach", "/forget")
_PATHS = ("/predict", "/explain", *CHANGING, "/health", "/metrics", "/docs", "/openapi.json")
_ATTEMPTS = 3
_CHANGE_WAIT = 0.05
"""Seconds that a change waits for others while requests are coming: a save takes longer."""


_ABOUT = f"""An image classifier that also remembers: a head and its nearest neighbours.

Pictures come as files of a form or as base64 in JSON, up to {MAX_FILES} at a time; answers are
those of `hf-knn predict --json`. `/teach` and `/forget` need the token of the server, as
`Authorization: Bearer TOKEN`; what they did is saved before they answer."""


@dataclass
class _Changing(Job):
    change: Change = field(kw_only=True)


@dataclass(frozen=True)
class Settings:
    """How a server takes requests together.

    Attributes:
        batch_size: pictures that go through the backbone together, and changes that are saved
            together, >= 1.
        wait: seconds that a picture waits for others, >= 0.
        waiting: requests at a time, >= 1; more are told to try again.
    """

    batch_size: int = 32
    wait: float = 0.005
    waiting: int = 256


class Server:
    """One live checkpoint behind HTTP, as an ASGI application.

    Args:
        live: the checkpoint.
        access: who may ask.
        settings: how many at a time.

    Attributes:
        live: the checkpoint.
        app: the routes, without the guard.
        changes: receipts of what was changed since it was started; of each, its action.
    """

    def __init__(
        self, live: LiveCheckpoint, access: Access, settings: Settings | None = None
    ) -> None:
        settings = settings or Settings()
        self.live, self.changes = live, list[str]()
        self._measures = Measures(_PATHS)
        self._readers = ThreadPoolExecutor(
            max(2, os.cpu_count() or 1), thread_name_prefix="hf-knn-read"
        )
        self.app = self._routes()
        self._intake = Intake(self.app, settings.waiting, self._measures.answered)
        self._looks: Batcher[Look] = Batcher(
            "hf-knn-look", self._answer, settings.batch_size, settings.wait,
            lambda: self._intake.requests,
        )  # fmt: skip
        self._changing: Batcher[_Changing] = Batcher(
            "hf-knn-change",
            self._change,
            settings.batch_size,
            _CHANGE_WAIT,
            lambda: self._intake.requests,
        )
        self._guarded = Guard(self._intake, access, lambda _, path: path.startswith(CHANGING))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        await self._guarded(scope, receive, send)

    def close(self) -> None:
        """Ends the threads, when all that was asked is answered."""
        self._looks.close()
        self._changing.close()
        self._readers.shutdown()

    # ---- what the threads do --------------------------------------------------------------------

    def _answer(self, looks: Sequence[Look]) -> None:
        answer(self.live, looks, self._measures.looked)

    def _change(self, jobs: Sequence[_Changing]) -> None:
        outcomes = self.live.change([job.change for job in jobs])
        for job, outcome in zip(jobs, outcomes, strict=True):
            if not isinstance(outcome, Receipt):
                job.future.set_exception(outcome)
                continue
            if outcome.scope != Reached.NOTHING:
                self._measures.changed(outcome.action)
                self.changes.append(outcome.action)
            job.future.set_result(outcome)

    # ---- what requests wait for -----------------------------------------------------------------

    async def _read(self, files: Sequence[tuple[str, bytes]]) -> tuple[list[Picture], str]:
        """Pictures, and the maker of their pixels."""
        version = self.live.latest
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._readers, read_pictures, version, files)
        return found, version.maker

    async def _documents(self, request: Request, explain: bool) -> list[dict[str, Any]]:
        files, options = await read_pictures_and(request, AnswerRequest, AnswerOptions)
        wish = Wish(explain, options.max_error, options.top, options.neighbors)
        for _ in range(_ATTEMPTS):
            pictures, maker = await self._read(files)
            bad = [picture for picture in pictures if picture.error]
            if len(bad) == len(pictures):
                raise Refusal(
                    422, f"Expected at least one picture that can be read, but none of "
                    f"{len(bad)} can; {bad[0].name}: {bad[0].error}.",
                )  # fmt: skip
            try:
                found = await _result(self._looks.put(Look(pictures, maker, wish)))
            except ReplacedError:
                continue
            documents: list[dict[str, Any]] = found
            return documents
        raise _replaced_often()

    async def _taught(self, request: Request) -> Receipt:
        files, options = await read_pictures_and(request, TeachRequest, TeachOptions)
        label = check_label(options.label)
        self._check_changes()
        for _ in range(_ATTEMPTS):
            pictures, maker = await self._read(files)
            for one in pictures:
                if one.error:
                    raise Refusal(
                        422, f"Expected pictures that can be read, but {one.name} cannot: "
                        f"{one.error}. Nothing was taught.",
                    )  # fmt: skip
            try:
                features = await _result(self._looks.put(Look(pictures, maker)))
                change = lesson(pictures, features, maker, label, options.again, options.relabel)
                return await self._changed(change)
            except ReplacedError:
                continue
        raise _replaced_often()

    async def _changed(self, change: Change) -> Receipt:
        receipt: Receipt = await _result(self._changing.put(_Changing(change=change)))
        return receipt

    def _check_changes(self) -> None:
        if self.live.folder is None:
            raise Refusal(
                409, "Expected a checkpoint in a folder of the server, but this one is of the Hub "
                "and cannot be changed there; download it and serve the folder.",
            )  # fmt: skip

    # ---- routes ---------------------------------------------------------------------------------

    def _routes(self) -> FastAPI:
        from .. import __version__

        problems: dict[int | str, dict[str, Any]] = {
            status: {"model": Problem} for status in (400, 401, 403, 413, 415, 422, 503)
        }
        conflicts = problems | {404: {"model": Problem}, 409: {"model": Problem}}
        app = FastAPIOffline(
            docs_url="/docs", redoc_url=None, title="hf-knn serve", version=__version__,
            description=_ABOUT, lifespan=self._lifespan,
        )  # fmt: skip
        app.router.route_class = _Saying
        with_token = [Depends(HTTPBearer(auto_error=False, description="The server's token."))]
        pictures = body(AnswerRequest, AnswerOptions)

        @app.get("/", include_in_schema=False)
        async def root() -> Response:
            return RedirectResponse("/docs")

        @app.post("/predict", responses=problems | {200: {"model": list[Document]}},
                  openapi_extra=pictures)  # fmt: skip
        async def predict(request: Request) -> Response:
            """Classify pictures: classes, what head and neighbours say, and who voted."""
            return _json(await self._documents(request, explain=False))

        @app.post("/explain", responses=problems | {200: {"model": list[ReasonedDocument]}},
                  openapi_extra=pictures)  # fmt: skip
        async def explain(request: Request) -> Response:
            """Classify pictures and say why: shares of the vote, and what would change it."""
            return _json(await self._documents(request, explain=True))

        @app.post("/teach", responses=conflicts | {200: {"model": ReceiptDocument}},
                  dependencies=with_token,
                  openapi_extra=body(TeachRequest, TeachOptions))  # fmt: skip
        async def teach(request: Request) -> Response:
            """Teach pictures under one label, all or none, without training; a receipt."""
            return _json(asdict(await self._taught(request)))

        @app.post("/forget", responses=conflicts | {200: {"model": ReceiptDocument}},
                  dependencies=with_token, openapi_extra=body(ForgetRequest, None))  # fmt: skip
        async def forget(request: Request) -> Response:
            """Forget stored pictures by their ids, all or none: no byte of their rows stays."""
            wanted = await read_json(request, ForgetRequest)
            self._check_changes()
            return _json(asdict(await self._changed(forgetting(wanted.ids))))

        @app.get("/health", responses={200: {"model": Health}, 503: {"model": Problem}})
        async def health() -> Response:
            """Whether it answers, and what it holds."""
            try:
                latest = await asyncio.to_thread(self.live.glance)
            except UnreadableError as error:
                told = "The checkpoint cannot be opened; see the server's log."
                raise Refusal(503, told, LATER) from error
            return _json({
                "status": "ok", "rows": self._rows(), "classes": latest.model.config.class_names,
                "backend": latest.encoder.backend, "version": __version__,
                "can_be_changed": self.live.folder is not None,
            })  # fmt: skip

        @app.get("/metrics", response_class=Response,
                 responses={200: {"content": {"text/plain": {}}}})  # fmt: skip
        async def metrics() -> Response:
            """Numbers for Prometheus."""
            text = self._measures.text(self._intake.requests, self._rows(), self.live.opened)
            return Response(text, media_type=CONTENT_TYPE_LATEST)

        app.add_exception_handler(HTTPException, _say_http)
        return app

    def _rows(self) -> int:
        store = self.live.latest.model.datastore
        return 0 if store is None else len(store)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.close)


class _Saying(APIRoute):
    """A route whose errors are sentences, whatever they are."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def saying(request: Request) -> Response:
            try:
                return await handler(request)
            except HTTPException:
                raise
            except Exception as error:
                known = refusal_of(error)
                after = {} if known.retry_after is None else {"retry-after": str(known.retry_after)}
                return refused(known.status, known.sentence, after)

        return saying


async def _result(future: Future[Any]) -> Any:
    """What a thread makes of a job, in time; a change that was begun is waited for."""
    waiting = asyncio.wrap_future(future)
    done, _ = await asyncio.wait([waiting], timeout=ANSWER_SECONDS)
    if not done and future.cancel():
        raise Refusal(503, "The server has too much to do right now; nothing was done.", LATER)
    return await waiting


def _replaced_often() -> Refusal:
    return Refusal(503, "The checkpoint is being replaced right now; try again.", LATER)


def _json(value: object) -> Response:
    text = json.dumps(_finite(value), allow_nan=False)
    return Response(text, media_type="application/json")


def _finite(value: object) -> object:
    """JSON knows no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return [*map(_finite, value)] if isinstance(value, list | tuple) else value


async def _say_http(request: Request, error: Exception) -> JSONResponse:
    """What the framework refuses: there is no such path, or not by this method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        sentence = f"Expected one of {', '.join(_PATHS)}; /docs says what they do."
    elif error.status_code == 405:
        sentence = f"Expected another method than {request.method} here; see /docs."
    else:
        sentence = f"Expected another request: {error.detail}."
    return refused(error.status_code, sentence, dict(error.headers or {}))
