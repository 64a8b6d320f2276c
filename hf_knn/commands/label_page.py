"""The page of `hf-knn label`: a server, the browser that shows it, and how both end."""

import os
import socket
import sys
import threading
import webbrowser
from dataclasses import dataclass
from urllib.parse import urlencode

import uvicorn

from ..labelling.outcome import Outcome
from ..labelling.page import LabelPage
from ..labelling.session import Session
from ..labelling.shown import Ending
from ..serving.guard import TOKEN_IN_ADDRESS, Access
from .console import console, escape
from .label_ending import ending_of, say_ending

FIRST_PORT = 7861
"""The demo begins at the one before."""

_PORTS = 100
_PATIENCE = 5
"""Seconds that requests under way have when the server ends."""


@dataclass(frozen=True)
class PageOptions:
    """Where the page is, and who may see it.

    Attributes:
        host: an address or a name of this machine; None is this machine alone.
        port: None takes the first that is free from `FIRST_PORT` on: the same for a session that
            goes on, so that its tab does too.
        token: None takes that of `HF_KNN_TOKEN`, else makes one.
        opens_browser: show it here at once.
    """

    host: str | None = None
    port: int | None = None
    token: str | None = None
    opens_browser: bool = True


@dataclass(frozen=True)
class Place:
    """Where the page will be; taken before pictures are read, which takes long.

    Attributes:
        listening: the port.
        access: who may ask.
        opens_browser: see `PageOptions`.
    """

    listening: socket.socket
    access: Access
    opens_browser: bool

    @classmethod
    def take(cls, options: PageOptions) -> "Place":
        """Takes it.

        Args:
            options: where.

        Raises:
            ValueError: for a token that no header can carry.
            OSError: for a port that is taken, or a host that is none of this machine.
        """
        access = Access.choose(options.host, options.token)
        return cls(_listen(access.host, options.port), access, options.opens_browser)

    @property
    def address(self) -> str:
        """What a browser opens; with the token where one is needed and was not chosen."""
        host = self.access.host
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        name = f"[{host}]" if ":" in host else host
        start = f"http://{name}:{self.listening.getsockname()[1]}/"
        if self.access.is_local or self.access.is_given:
            return start
        return f"{start}?{urlencode({TOKEN_IN_ADDRESS: self.access.token})}"


def show_page(session: Session, place: Place) -> bool:
    """Serves the page until everything is written, or somebody presses Ctrl-C.

    Args:
        session: what is asked and answered.
        place: where.

    Returns:
        Whether everything was written, which is said then.

    Raises:
        KeyboardInterrupt: at Ctrl-C, once the server has ended.
    """
    written: list[Ending] = []

    def ending(outcome: Outcome) -> Ending:
        written.append(ending_of(outcome, session.pool.folder))
        return written[-1]

    def end() -> None:
        server.should_exit = True

    app = LabelPage(session, ending, end).app(place.access)
    options = uvicorn.Config(
        app, lifespan="off", ws="none", log_config=None, access_log=False, server_header=False,
        proxy_headers=False, timeout_graceful_shutdown=_PATIENCE,
    )  # fmt: skip
    server = uvicorn.Server(options)
    _say_where(place)
    if place.opens_browser and _can_open():
        # it listens already; a browser that asks before the server answers only waits
        threading.Thread(target=webbrowser.open, args=(place.address,), daemon=True).start()
    try:
        server.run(sockets=[place.listening])
    finally:
        place.listening.close()
    for each in written[-1:]:
        say_ending(each)
    return bool(written)


def _say_where(place: Place) -> None:
    access = place.access
    console.print(f"Name the pictures at [bold]{escape(place.address)}[/]", soft_wrap=True,
                  highlight=False)  # fmt: skip
    if not access.is_local:
        if access.is_given:
            console.print(f"Add ?{TOKEN_IN_ADDRESS}= and the token that you chose.")
        console.print("[yellow]Other machines can reach it, and nothing is encrypted; whoever has "
                      "the token can label.[/]", soft_wrap=True)  # fmt: skip
    console.print("Each answer is kept at once. Ctrl-C stops, and the same command goes on.")


def _can_open() -> bool:
    """Whether there is a screen: a browser for terminals would take this one."""
    if sys.platform in ("win32", "darwin") or "BROWSER" in os.environ:
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _listen(host: str, port: int | None) -> socket.socket:
    found = socket.getaddrinfo(host, port or FIRST_PORT, type=socket.SOCK_STREAM)
    family, _, _, _, address = found[0]
    tried = range(FIRST_PORT, FIRST_PORT + _PORTS) if port is None else [port]
    for number in tried:
        try:
            return socket.create_server((address[0], number), family=family)
        except OSError as error:
            problem = error
    raise OSError(
        f"Expected port {tried[0]} of {host} to be free, but: {problem.strerror}; choose another "
        "--port, or end the program that has it."
    ) from problem
