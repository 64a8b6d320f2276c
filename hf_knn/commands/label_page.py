"""The page of `hf-knn label`: where it is, the browser that shows it, and how both end."""

import os
import socket
import sys
import threading
import webbrowser
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlencode

from ..labelling.outcome import Outcome
from ..labelling.page import LabelPage
from ..labelling.session import Session
from ..labelling.shown import Ending
from ..serving.guard import TOKEN_IN_ADDRESS, Access
from ..serving.listening import address_of, listen, serve
from .console import console, escape
from .label_ending import ending_of, say_ending

FIRST_PORT = 7861
"""The demo begins at the one before."""


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
        bound: the port.
        access: who may ask.
        opens_browser: see `PageOptions`.
    """

    bound: socket.socket
    access: Access
    opens_browser: bool

    @classmethod
    def take(cls, options: PageOptions) -> Self:
        """Takes it.

        Args:
            options: where.

        Raises:
            ValueError: for a token that no header can carry.
            OSError: for a port that is taken, or a host that is none of this machine.
        """
        access = Access.choose(options.host, options.token)
        return cls(listen(access.host, options.port, FIRST_PORT), access, options.opens_browser)

    @property
    def address(self) -> str:
        """What a browser opens, with the token where one is needed."""
        return self._with(self.access.token)

    @property
    def printed(self) -> str:
        """The same for all to see: a token that somebody chose is not printed."""
        return self._with("YOUR-TOKEN" if self.access.is_given else self.access.token)

    def _with(self, token: str) -> str:
        start = f"{address_of(self.bound, self.access)}/"
        return start if self.access.is_local else f"{start}?{urlencode({TOKEN_IN_ADDRESS: token})}"


def show_page(
    session: Session, place: Place, folders: str | None = None, with_model: bool = True
) -> bool:
    """Serves the page until everything is written, or somebody presses Ctrl-C.

    Args:
        session: what is asked and answered.
        place: where.
        folders: what the page proposes to write, see `Session.finish`.
        with_model: likewise.

    Returns:
        Whether everything was written, which is said then.
    """
    written: list[Ending] = []
    is_over = threading.Event()

    def ending(outcome: Outcome) -> Ending:
        written.append(ending_of(outcome, session.pool.folder))
        return written[-1]

    def ready() -> None:
        _say_where(place)
        if place.opens_browser and _can_open():
            threading.Thread(target=webbrowser.open, args=(place.address,), daemon=True).start()

    page = LabelPage(session, ending, is_over.set, folders, with_model)
    serve(page.app(place.access), place.bound, ready, is_over.is_set)
    for each in written[-1:]:
        say_ending(each)
    return bool(written)


def _say_where(place: Place) -> None:
    access = place.access
    console.print(f"Name the pictures at [bold]{escape(place.printed)}[/]", soft_wrap=True,
                  highlight=False)  # fmt: skip
    if not access.is_local:
        console.print("[yellow]Other machines can reach it under the name of this one, and nothing "
                      "is encrypted; whoever has the token can label.[/]",
                      soft_wrap=True)  # fmt: skip
    console.print("Each answer is kept at once. Ctrl-C stops, and the same command goes on.")


def _can_open() -> bool:
    """Whether there is a screen: a browser for terminals would take this one."""
    if sys.platform in ("win32", "darwin") or "BROWSER" in os.environ:
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
