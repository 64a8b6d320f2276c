"""What a server says instead of an answer: a status, and a sentence that says what to do."""

import logging

from starlette.requests import ClientDisconnect

from ..data.uploads import UploadError
from .answers import ConflictError, MissingError
from .live import BusyError, UnreadableError

logger = logging.getLogger(__name__)

SOON, LATER = 1, 5
"""Seconds after which one may try again."""


class Refusal(Exception):  # noqa: N818 - it is no failure of the server
    """An answer that is none.

    Args:
        status: of HTTP.
        sentence: what was expected, and what to do.
        retry_after: seconds after which the same request may do; None if it never will.
    """

    def __init__(self, status: int, sentence: str, retry_after: int | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.retry_after = status, sentence, retry_after


def refusal_of(error: Exception) -> Refusal:
    """What is said of an error; the log has what is nobody's business elsewhere.

    Args:
        error: that something raised while a request was answered.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, MissingError):
        return Refusal(404, str(error))
    if isinstance(error, ConflictError):
        return Refusal(409, str(error))
    if isinstance(error, UploadError):
        return Refusal(422, str(error))
    if isinstance(error, BusyError):
        return Refusal(
            503,
            "Another program is changing the checkpoint; nothing was changed. Try again.",
            LATER,
        )
    if isinstance(error, ClientDisconnect):
        return Refusal(400, "Expected the whole request, but the connection ended.")
    if not isinstance(error, UnreadableError):  # which was logged where it happened
        logger.error("A request could not be answered.", exc_info=error)
    return Refusal(
        503, "The checkpoint cannot be used right now; whoever runs this server sees why in its "
        "log. Try again later.", LATER,
    )  # fmt: skip
