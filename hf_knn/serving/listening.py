"""Where a server listens, and how it ends: what was asked before is answered."""

import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from .guard import Access

FIRST_PORT = 8000
_PORTS = 100
_BACKLOG = 2048
_ENDS = (signal.SIGINT, signal.SIGTERM)
_GRACE = 90
"""Seconds that requests under way have when the server ends."""


def listen(host: str, port: int | None = None, first: int = FIRST_PORT) -> socket.socket:
    """Takes a port before anything takes long.

    Args:
        host: an address or a name of this machine.
        port: None takes the first that is free, from `first` on.
        first: see `port`.

    Returns:
        A bound socket.

    Raises:
        OSError: if it is taken, or the host is none of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port or first, type=socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(
            f"Expected --host to be an address or a name of this machine, but got {host!r} "
            f"({error.strerror or error}); leave it out to be asked by this machine alone."
        ) from error
    family, _, _, _, address = found[0]
    tried = [port] if port is not None else range(first, first + _PORTS)
    problem: OSError | None = None
    for number in tried:
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((address[0], number))
            bound.listen(_BACKLOG)
        except OSError as error:
            bound.close()
            problem = error
            continue
        return bound
    assert problem is not None
    raise OSError(
        f"Expected port {tried[0]} of {host} to be free, but: {problem.strerror}; choose another "
        "--port, or end the program that has it."
    ) from problem


def address_of(bound: socket.socket, access: Access) -> str:
    """The address to open on this machine, without a token.

    Args:
        bound: of `listen`.
        access: who may ask.
    """
    host, port = access.host, bound.getsockname()[1]
    if host in ("0.0.0.0", "::", ""):  # all addresses of this machine
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    app: ASGIApp,
    bound: socket.socket,
    ready: Callable[[], None],
    is_over: Callable[[], bool] = lambda: False,
) -> None:
    """Answers until somebody ends it (Ctrl-C, a signal); requests under way are answered.

    Args:
        app: what answers.
        bound: of `listen`; it is closed.
        ready: called once it answers.
        is_over: asked now and then; it ends too when this is true.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    config = uvicorn.Config(
        app, access_log=False, log_config=None, ws="none", server_header=False, lifespan="on",
        timeout_graceful_shutdown=_GRACE, proxy_headers=False,
    )  # fmt: skip
    server = _Server(config, ready, is_over)
    try:
        server.run(sockets=[bound])
    finally:
        bound.close()


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, ready: Callable[[], None], is_over: Callable[[], bool]
    ) -> None:
        super().__init__(config)
        self._ready, self._is_over = ready, is_over

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._is_over()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ends by Ctrl-C or SIGTERM, and then lets whoever started it go on."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in _ENDS}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()
