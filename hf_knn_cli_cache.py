"""The command of `hf-knn` about what is kept to be fast, and the option that picks a backend."""

import os
from enum import StrEnum
from typing import Annotated

import typer

app = typer.Typer()


class Backend(StrEnum):
    """What runs the backbone when features are computed."""

    AUTO = "auto"
    TORCH = "torch"
    ONNX = "onnx"
    OPENVINO = "openvino"


def _use(context: typer.Context, backend: Backend | None) -> Backend | None:
    """Every extraction of this command reads the variable, also those of a trainer."""
    if backend is not None:
        before = os.environ.get("HF_KNN_BACKEND")
        os.environ["HF_KNN_BACKEND"] = str(backend)
        context.call_on_close(lambda: _restore(before))
    return backend


def _restore(before: str | None) -> None:
    if before is None:
        del os.environ["HF_KNN_BACKEND"]
    else:
        os.environ["HF_KNN_BACKEND"] = before


BackendOption = Annotated[
    Backend | None,
    typer.Option(
        callback=_use,
        help="What computes features; auto takes the fastest installed that agrees with PyTorch. "
        "Default: $HF_KNN_BACKEND, else auto.",
        show_default=False,
    ),
]


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove what is listed.")] = False,
    older_than: Annotated[
        int | None,
        typer.Option(min=0, help="Only what was not used for so many days.", show_default=False),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """List what is kept to be fast: features, graphs and choices of backends; clear it."""
    from hf_knn.cache_command import show_cache
    from hf_knn.console import run

    run(show_cache, clear, older_than, json_output)
