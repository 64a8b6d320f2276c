"""What a request asks for, read from multipart or JSON; nothing in it is believed, or fetched."""

import base64
import binascii
from collections import Counter
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from ..data.uploads import MAX_FILES, UploadError, check_count, largest_upload
from .refusals import Refusal
from .schema import FILES, IMAGES, JSON, MULTIPART

_MOST_FIELDS, _MOST_PARTS = 32, 1000
_LONGEST_NAME = 200

Options = TypeVar("Options", bound=BaseModel)


async def read_json(request: Request, model: type[Options]) -> Options:
    """The body of a request, as it has to be.

    Args:
        request: with JSON.
        model: what it has to be.

    Raises:
        Refusal: for anything else.
    """
    if _kind_of(request) != JSON:
        raise _unsupported(request, JSON)
    return _validated(model, await request.body())


async def read_pictures_and(
    request: Request, json_model: type[BaseModel], options: type[Options]
) -> tuple[list[tuple[str, bytes]], Options]:
    """Pictures and what is to be done with them.

    Args:
        request: of multipart, with the pictures in any part that is a file, or of JSON.
        json_model: `options`, and `images` as base64.
        options: what else may be said.

    Returns:
        Name and content of 1 to `MAX_FILES` pictures, and the options.

    Raises:
        Refusal: for anything else.
    """
    for name in request.query_params:
        raise Refusal(
            422, f"Expected `{_shown(name)}` in the form or in the JSON, not in the address."
        )
    kind = _kind_of(request)
    if kind == JSON:
        sent = _validated(json_model, await request.body())
        texts: list[str] = getattr(sent, IMAGES)
        _check_number(texts)
        files = [(f"picture {n}", _decoded(text, n)) for n, text in enumerate(texts, 1)]
        rest = sent.model_dump(exclude={IMAGES}, exclude_unset=True)
        return _checked(files), options.model_validate(rest)
    if kind != MULTIPART:
        raise _unsupported(request, f"{MULTIPART} or {JSON}")
    try:
        async with request.form(max_files=_MOST_PARTS, max_fields=_MOST_FIELDS) as form:
            fields, uploads = _split(form)
            _check_number(uploads)
            files = [
                (_shown(each.filename) or f"picture {n}", await each.read())
                for n, each in enumerate(uploads, 1)
            ]
    except HTTPException as error:  # of starlette's parser
        raise Refusal(400, f"Expected multipart that can be read, but: {error.detail}") from error
    except (ValueError, LookupError) as error:  # of the one below it
        if isinstance(error, UploadError):
            raise
        raise Refusal(400, "Expected multipart that can be read, but it is none.") from error
    return _checked(files), _validated(options, fields)


def _split(form: FormData) -> tuple[dict[str, str], list[UploadFile]]:
    """Fields by their names, and files."""
    pairs = form.multi_items()
    fields = [(name, value) for name, value in pairs if isinstance(value, str)]
    counts = Counter(name for name, _ in fields)
    doubled = [name for name, count in counts.items() if count > 1]
    if FILES in counts:
        raise Refusal(422, f"Expected `{FILES}` to be files, but got text; send a file.")
    if doubled:
        raise Refusal(422, f"Expected each field once, but {_shown(doubled[0])!r} comes twice.")
    return dict(fields), [value for _, value in pairs if isinstance(value, UploadFile)]


def _check_number(pictures: list[str] | list[UploadFile]) -> None:
    if len(pictures) > MAX_FILES:
        raise Refusal(
            413, f"Expected at most {MAX_FILES} pictures at once, but got {len(pictures)}."
        )
    check_count([*pictures])


def _checked(files: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    most = largest_upload()
    for name, content in files:
        if len(content) > most:
            raise Refusal(
                413, f"Expected pictures of at most {most} bytes, but {name} has "
                f"{len(content)}; make it smaller.",
            )  # fmt: skip
    return files


def _decoded(text: str, number: int) -> bytes:
    if text[:5] == "data:":
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(
            422, f"Expected picture {number} to be a file as base64, but it is not; an address or "
            "a path is not followed.",
        ) from error  # fmt: skip


def _validated(model: type[Options], sent: bytes | dict[str, str]) -> Options:
    try:
        if isinstance(sent, bytes):
            return model.model_validate_json(sent)
        return model.model_validate(sent)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise Refusal(400, "Expected JSON, but the request is none.") from error
        place = _shown(".".join(map(str, first["loc"]))) or "the request"
        raise Refusal(
            422, f"Expected `{place}` to be as /docs says, but: {first['msg']}."
        ) from error


def _kind_of(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _unsupported(request: Request, wanted: str) -> Refusal:
    sent = _shown(_kind_of(request)) or "nothing"
    return Refusal(415, f"Expected a request of {wanted}, but its Content-Type says {sent}.")


def _shown(text: str | None) -> str:
    """What somebody sent, as a part of a sentence: short, in one line, without surrogates."""
    known = (text or "")[:_LONGEST_NAME].encode("utf-8", "replace").decode("utf-8")
    return "".join(each if each.isprintable() else "?" for each in known)
