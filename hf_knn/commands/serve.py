"""`hf-knn serve`: a checkpoint behind HTTP."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..data.uploads import give_back_large_blocks
from ..features.backends import check_backend
from ..features.encoders import TORCH
from ..model.receipts import Change
from ..store.advice import install, needs
from .console import Terminal, console, escape, typed

if TYPE_CHECKING:
    from ..serving.guard import Access

_NEEDED = {
    "fastapi": "fastapi", "fastapi_offline": "fastapi-offline", "uvicorn": "uvicorn",
    "prometheus_client": "prometheus-client", "python_multipart": "python-multipart",
}  # fmt: skip


@dataclass(frozen=True)
class ServeOptions:
    """How `hf-knn serve` was asked to answer.

    Attributes:
        host: an address or a name of this machine.
        port: None takes the first that is free from 8000 on.
        token: None takes that of `HF_KNN_TOKEN`, else makes one.
        allowed: further names that it may be called by.
        backend: what makes features; None takes `$HF_KNN_BACKEND`, else `torch`.
        batch_size: pictures that go through the backbone together, >= 1.
        wait_ms: milliseconds that a picture waits for others, >= 0.
        max_waiting: requests at a time, >= 1.
    """

    host: str | None = None
    port: int | None = None
    token: str | None = None
    allowed: Sequence[str] = ()
    backend: str | None = None
    batch_size: int = 32
    wait_ms: float = 5.0
    max_waiting: int = 256


def serve_checkpoint(checkpoint: str, options: ServeOptions) -> None:
    """Answers requests until it is stopped.

    Args:
        checkpoint: a folder or a Hub id.
        options: how.

    Raises:
        ImportError: without the extra `serve`, or for a backend that is not installed.
        ValueError: for a damaged checkpoint, a token or a name that is none.
        OSError: for a port that is taken.
    """
    needs(_NEEDED, "hf-knn serve", install("serve"))
    from ..serving.app import Server, Settings
    from ..serving.guard import Access
    from ..serving.listening import address_of, listen, serve
    from ..serving.live import LiveCheckpoint

    access = Access.choose(options.host, options.token, options.allowed)
    give_back_large_blocks()
    backend = check_backend(options.backend or os.environ.get("HF_KNN_BACKEND") or TORCH)
    with listen(access.host, options.port) as bound:
        with console.status("Opening the checkpoint …"):
            live = LiveCheckpoint(checkpoint, backend)
        settings = Settings(options.batch_size, options.wait_ms / 1000, options.max_waiting)
        server = Server(live, access, settings)
        logging.getLogger("hf_knn.serving").setLevel(logging.ERROR)

        def say_ready() -> None:
            model, backend = live.latest.model, live.latest.encoder.backend
            rows = 0 if model.datastore is None else len(model.datastore)
            console.print(
                f"[bold]{escape(checkpoint)}[/]: {rows:,} stored pictures, "
                f"{model.config.classes} classes, features by {backend}.", soft_wrap=True,
            )  # fmt: skip
            _say_how_to_ask(address_of(bound, access), access)

        serve(server, bound, say_ready)
        _say_kept(checkpoint, server.changes)


def _say_how_to_ask(address: str, access: "Access") -> None:
    from ..serving.guard import SHORT_TOKEN, TOKEN_VARIABLE

    say = partial(console.print, soft_wrap=True, highlight=False)
    say(f"Answering at [bold]{address}[/]; what it does: {address}/docs")
    header = "" if access.is_local else ' -H "Authorization: Bearer $TOKEN"'
    say(f"Try: [bold]curl{escape(header)} -F files=@PICTURE.jpg {address}/predict[/]")
    what = "to teach and to forget" if access.is_local else "for everything"
    if access.is_given:
        say(f"The token that was given is needed {what}.")
    else:
        say(f"Token, needed {what}: [bold]{escape(access.token)}[/]")
        say(f"Another start makes another one; the variable {TOKEN_VARIABLE} keeps one.")
    if len(access.token) < SHORT_TOKEN:
        say(f"[yellow]The token has fewer than {SHORT_TOKEN} characters; it may be guessed.[/]")
    if not access.is_local:
        say("[yellow]Others can ask, and nothing is encrypted; put a proxy with a certificate "
            "before it.[/]")  # fmt: skip
    say("Ctrl-C ends it.")


def _say_kept(checkpoint: str, changes: Sequence[str]) -> None:
    said = "\nEnded; what was asked is answered, and nothing was changed."
    if changes:
        counts = ", ".join(f"{count} x {action}" for action, count in Counter(changes).items())
        said = (
            f"\nEnded; what was asked is answered. Kept in {escape(checkpoint)}: {counts}. "
            f"{typed('log', checkpoint)} lists the changes."
        )
        if changes[-1] != Change.FORGET:
            said += f" {typed('undo', checkpoint)} takes the last one back."
    Terminal(stderr=True).print(said, soft_wrap=True, highlight=False)
