"""`hf-knn serve`: a checkpoint behind HTTP."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.uploads import give_back_large_blocks
from ..features.backends import check_backend
from ..features.encoders import TORCH
from ..store.advice import install, needs
from .console import Terminal, console, escape, typed

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
        KeyboardInterrupt: when it was stopped by Ctrl-C, after it has said what was kept.
    """
    needs(_NEEDED, "hf-knn serve", install("serve"))
    from ..serving.app import Server, Settings
    from ..serving.guard import SHORT_TOKEN, TOKEN_VARIABLE, Access
    from ..serving.listening import address_of, listen, serve
    from ..serving.live import LiveCheckpoint

    access = Access.choose(options.host, options.token, options.allowed)
    give_back_large_blocks()
    backend = TORCH if options.backend is None else check_backend(options.backend)
    bound = listen(access.host, options.port)
    with bound:
        with console.status("Opening the checkpoint …"):
            live = LiveCheckpoint(checkpoint, backend)
        settings = Settings(options.batch_size, options.wait_ms / 1000, options.max_waiting)
        server = Server(live, access, settings)
        address = address_of(bound, access)

        def say() -> None:
            latest = live.latest
            rows = latest.model.datastore
            console.print(
                f"[bold]{escape(checkpoint)}[/]: {0 if rows is None else len(rows):,} stored "
                f"pictures, {latest.model.config.classes} classes, features by "
                f"{latest.encoder.backend}.", soft_wrap=True,
            )  # fmt: skip
            console.print(f"Answering at [bold]{address}[/]; what it does: {address}/docs",
                          soft_wrap=True, highlight=False)  # fmt: skip
            header = "" if access.is_local else ' -H "Authorization: Bearer $TOKEN"'
            console.print(f"Try: [bold]curl{escape(header)} -F files=@PICTURE.jpg "
                          f"{address}/predict[/]", soft_wrap=True, highlight=False)  # fmt: skip
            what = "to teach and to forget" if access.is_local else "for everything"
            if access.is_given:
                console.print(f"The token that was given is needed {what}.", soft_wrap=True)
            else:
                console.print(f"Token, needed {what}: [bold]{escape(access.token)}[/]",
                              soft_wrap=True, highlight=False)  # fmt: skip
                console.print(f"Another start makes another one; {TOKEN_VARIABLE} keeps it.")
            if len(access.token) < SHORT_TOKEN:
                console.print(f"[yellow]The token has fewer than {SHORT_TOKEN} characters, and "
                              "may be guessed.[/]")  # fmt: skip
            if not access.is_local:
                console.print("[yellow]Other machines can ask, and nothing is encrypted; put a "
                              "proxy with a certificate before it.[/]", soft_wrap=True)  # fmt: skip
            console.print("Ctrl-C ends it.")

        logging.getLogger("hf_knn.serving").setLevel(logging.ERROR)
        try:
            serve(server, bound, say)
        finally:
            _say_kept(checkpoint, live.folder, server.changes)


def _say_kept(checkpoint: str, folder: Path | None, changes: Sequence[str]) -> None:
    said = Terminal(stderr=True)
    if folder is None or not changes:
        said.print("\nEnded; what was asked is answered, and nothing was changed.")
        return
    counts = ", ".join(f"{count} x {action}" for action, count in Counter(changes).items())
    said.print(
        f"\nEnded; what was asked is answered. Kept in {escape(checkpoint)}: {counts}. "
        f"{typed('log', checkpoint)} lists the changes, and {typed('undo', checkpoint)} takes the "
        "last one back.", soft_wrap=True, highlight=False,
    )  # fmt: skip
