"""The limits of pictures, for every command that reads some."""

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any

import typer

from .variables import set_during

Command = Callable[..., None]


def _by_variable(context: typer.Context, option: typer.CallbackParam, value: int | None) -> None:
    """Says a limit to whatever decodes a picture during this command, in every process of it."""
    if value is not None:
        set_during(context, f"HF_KNN_{str(option.name).upper()}", str(value))


def _option(what: str, default: str) -> Any:
    return typer.Option(
        callback=_by_variable, min=1, show_default=False, rich_help_panel="Limits of a picture",
        help=f"{what}; a larger picture is refused before it is decoded. Default: {default}.",
    )  # fmt: skip


_LIMITS = {
    "max_pixels": _option(
        "Most pixels, width times height",
        "$HF_KNN_MAX_PIXELS, else 200 million of a JPEG, 64 million of others",
    ),
    "max_bytes": _option("Largest file, in bytes", "$HF_KNN_MAX_BYTES, else 512 MiB"),
}


def reads_pictures(command: Command) -> Command:
    """Adds `--max-pixels` and `--max-bytes` to a command; what decodes pictures hears of them.

    Args:
        command: as typer takes it.
    """

    @wraps(command)
    def call(**values: Any) -> None:
        command(**{name: value for name, value in values.items() if name not in _LIMITS})

    own = signature(command)
    limits = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[int | None, how])
        for name, how in _LIMITS.items()
    ]
    keyworded = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in own.parameters.values()]
    vars(call)["__signature__"] = own.replace(parameters=[*keyworded, *limits])
    return call
