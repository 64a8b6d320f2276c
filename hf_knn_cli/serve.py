"""The command of `hf-knn` that answers other programs."""

from typing import Annotated

import typer

from .choices import Backend
from .limits import reads_pictures
from .places import CheckpointArgument

app = typer.Typer()

NETWORK, BATCHES = "Who may ask", "Batches"
"""Groups of options in `--help`."""


@app.command()
@reads_pictures
def serve(
    checkpoint: CheckpointArgument,
    allowed: Annotated[
        list[str],
        typer.Option(
            "--allow-host",
            default_factory=list,
            show_default=False,
            rich_help_panel=NETWORK,
            help="A further name that it may be called by, such as that of a proxy before it, "
            "which makes the token needed for everything; repeat it.",
        ),
    ],
    host: Annotated[
        str,
        typer.Option(
            rich_help_panel=NETWORK,
            help="Where to listen; 0.0.0.0 is every network of this machine, and then the token is "
            "needed for everything.",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            show_default=False,
            rich_help_panel=NETWORK,
            help="Default: the first that is free from 8000 on.",
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            rich_help_panel=NETWORK,
            help="What whoever teaches and forgets has to send. Default: $HF_KNN_TOKEN, which no "
            "list of processes shows; else one is made and printed.",
        ),
    ] = None,
    backend: Annotated[
        Backend | None,
        typer.Option(
            show_default=False,
            help="What makes features: torch, onnx, openvino or auto. Default: $HF_KNN_BACKEND, "
            "else torch.",
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1,
            max=4096,
            rich_help_panel=BATCHES,
            help="Pictures of several requests that go through the model together.",
        ),
    ] = 32,
    wait_ms: Annotated[
        float,
        typer.Option(
            min=0,
            max=1000,
            rich_help_panel=BATCHES,
            help="Milliseconds that a picture waits for others, while other requests are coming.",
        ),
    ] = 5.0,
    max_waiting: Annotated[
        int,
        typer.Option(
            min=1,
            max=100_000,
            rich_help_panel=BATCHES,
            help="Requests under way at a time; more are told to try again (503).",
        ),
    ] = 256,
) -> None:
    """Answer other programs over HTTP: /predict, /explain, /teach, /forget, /health, /metrics.

    /docs is a page that says what each does, and tries it. What was taught or forgotten is saved in
    the checkpoint before it is answered; what other commands change there meanwhile is seen before
    the next answer. No address is fetched. Of a picture at most 64 MiB are taken, or --max-bytes if
    that is less.
    """
    from hf_knn.commands.console import run
    from hf_knn.commands.serve import ServeOptions, serve_checkpoint

    options = ServeOptions(host, port, token, allowed, backend, batch_size, wait_ms, max_waiting)
    run(serve_checkpoint, checkpoint, options)
