"""Calls to a Milvus server: a timeout each, a bounded number of tries, errors that say where."""

import logging
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..store.advice import install
from ..store.remote import LOCAL_ENDING, check_uri

if TYPE_CHECKING:  # importing it takes a second, and few need it
    from pymilvus import MilvusClient

logger = logging.getLogger(__name__)

T = TypeVar("T")

TIMEOUT, PATIENCE = 30.0, 60.0

_FIRST_WAIT, _LONGEST_WAIT = 0.25, 4.0
_CONNECT_FAILED = 2  # pymilvus has no name for it
_TRANSIENT_CODES = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED"}
_TRANSIENT_ERRORS = {"ConnectError", "MilvusUnavailableException", "FutureTimeoutError"}


class DatastoreConnectionError(ConnectionError):
    """A vector database that does not answer; the rows in it are as they were."""


class DatastoreRefusalError(DatastoreConnectionError):
    """A vector database that answers, with an error that stays."""


def check_exists(uri: str) -> str:
    """Refuses a local file that is not there, which opening would make.

    Args:
        uri: checked.

    Raises:
        FileNotFoundError: naming the file.
    """
    if uri.endswith(LOCAL_ENDING) and not Path(uri).exists():
        raise FileNotFoundError(
            f"Expected {uri} to hold a datastore, but there is no such file; load one with "
            "MilvusDatastore.from_datastore, or say where it is."
        )
    return uri


class MilvusServer:
    """A connection, and how calls over it are made.

    A try may take `timeout` seconds. After an error that can pass (no connection, an overloaded
    server, a timeout) a call is tried again, less and less often, until `patience` seconds are
    over; all calls made here can be repeated.

    Args:
        uri: see `check_uri`.
        token: of the server; empty for none.
        timeout: seconds per try, > 0.
        patience: seconds after which no further try is made, >= 0.

    Raises:
        ImportError: without pymilvus, or without milvus-lite for a local file.
        ValueError: for a bad address or option.
        DatastoreConnectionError: if nobody answers there.
    """

    def __init__(
        self, uri: str, token: str = "", timeout: float = TIMEOUT, patience: float = PATIENCE
    ) -> None:
        if not timeout > 0 or not patience >= 0:
            raise ValueError(
                f"Expected `timeout` > 0 and `patience` >= 0, but got {timeout} and {patience}."
            )
        self.uri, self.timeout, self.patience = check_uri(uri), timeout, patience
        self.library = _import_pymilvus(self.is_local)
        if self.is_local and not Path(self.uri).parent.is_dir():
            raise FileNotFoundError(
                f"Expected the folder of {self.uri} to be there, but it is not; make it first."
            )
        create = self.library.MilvusClient
        self.client: MilvusClient = self.ask(
            "connect", lambda: create(uri=self.uri, token=token, timeout=timeout)
        )

    @property
    def is_local(self) -> bool:
        """Whether Milvus Lite serves a file in this process."""
        return self.uri.endswith(LOCAL_ENDING)

    @cached_property
    def version(self) -> str:
        """What the server says it is, such as `v2.6.1`, or `milvus_lite-3.2.2` at any address."""
        return str(self.call("get_server_version"))

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        """Calls a method of the client.

        Args:
            name: of the method.
            args: of the method.
            options: of the method; `timeout` is added.

        Returns:
            What it returns.

        Raises:
            DatastoreConnectionError: if the server does not answer in time.
            DatastoreRefusalError: if it answers with an error that stays.
        """
        method = getattr(self.client, name)
        return self.ask(name, lambda: method(*args, timeout=self.timeout, **options))

    def ask(self, what: str, action: Callable[[], T]) -> T:
        """Does something that asks the server, again after an error that can pass.

        Args:
            what: a word for the message.
            action: what to do; safe to repeat.

        Raises:
            DatastoreConnectionError: if the server does not answer in time.
            DatastoreRefusalError: if it answers with an error that stays.
        """
        started, wait = time.monotonic(), _FIRST_WAIT
        while True:
            try:
                return action()
            except _errors() as error:
                if not is_transient(error):
                    raise DatastoreRefusalError(
                        f"Milvus at {self.uri} refused `{what}`: {_reason(error)}"
                    ) from error
                passed = time.monotonic() - started
                if passed + wait > self.patience:
                    raise DatastoreConnectionError(
                        f"Expected Milvus at {self.uri} to answer `{what}`, but it did not in "
                        f"{passed:.1f} s ({_reason(error)}); start the server, check the address "
                        "and the token, or give it a longer `timeout` or `patience`."
                    ) from error
                logger.warning(
                    "Milvus at %s does not answer `%s` (%s); once more in %.1f s.",
                    self.uri, what, _reason(error), wait,
                )  # fmt: skip
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)

    def close(self) -> None:
        """Closes the connection; the rows stay where they are."""
        self.client.close()


def is_transient(error: Exception) -> bool:
    """Whether the same call may work a moment later.

    Args:
        error: of pymilvus or gRPC.
    """
    code = getattr(error, "code", None)
    code = code() if callable(code) else code
    name = getattr(code, "name", "")
    if name in _TRANSIENT_CODES or code == _CONNECT_FAILED or getattr(error, "retriable", False):
        return True
    return type(error).__name__ in _TRANSIENT_ERRORS


def _reason(error: Exception) -> str:
    details = getattr(error, "details", None)
    text = getattr(error, "message", None) or (details() if callable(details) else str(error))
    return (str(text) or type(error).__name__).splitlines()[0][:300]


def _errors() -> tuple[type[Exception], ...]:
    try:
        import grpc
        from pymilvus.exceptions import MilvusException
    except ImportError as missing:
        raise _missing("pymilvus") from missing
    return MilvusException, grpc.RpcError, grpc.FutureTimeoutError


def _import_pymilvus(is_local: bool) -> Any:
    try:  # not at import time: it takes a second, and few need it
        import pymilvus
    except ImportError as missing:
        raise _missing("pymilvus") from missing
    if is_local:
        try:
            import milvus_lite  # noqa: F401
        except ImportError as missing:
            raise _missing("milvus-lite") from missing
    return pymilvus


def _missing(name: str) -> ImportError:
    return ImportError(
        f"{name} is not installed, and a datastore in Milvus needs it; run `{install('milvus')}`."
    )
