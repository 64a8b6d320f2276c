"""How the values of options reach the package without being named again."""

from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from functools import partial, wraps
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints

Command = Callable[..., None]


def hand_over(declared: Callable[..., Command]) -> Command:
    """Makes a command of a function that declares options and returns what does the work.

    Args:
        declared: its parameters are the options; it returns a function of the package, which takes
            them by the same names; all but `backend`, which is said by a variable.

    Returns:
        The command, for typer.
    """

    @wraps(declared)
    def call(**values: Any) -> None:
        from hf_knn.commands.console import run

        command = declared(**values)
        values.pop("backend", None)
        run(partial(command, **values), json_output=bool(values.get("json_output")))

    return call


def fields_as_options(command: Command) -> Command:
    """Makes a command of a function whose first parameter is a dataclass of options.

    Typer reads the signature of a command; here each field stands in it as a parameter of its own.

    Args:
        command: takes the dataclass, and perhaps further options behind it.

    Returns:
        The command, for typer.
    """
    first, *others = signature(command).parameters.values()
    options: Any = first.annotation
    hints = get_type_hints(options, include_extras=True)
    parameters = [
        Parameter(
            each.name, Parameter.KEYWORD_ONLY, default=_default(each), annotation=hints[each.name]
        )
        for each in fields(options)
    ]

    @wraps(command)
    def call(**values: Any) -> None:
        command(options(**{name: values.pop(name) for name in hints}), **values)

    others = [other.replace(kind=Parameter.KEYWORD_ONLY) for other in others]
    vars(call)["__signature__"] = Signature([*parameters, *others])
    return call


def _default(each: Field[Any]) -> Any:
    if each.default_factory is not MISSING:
        return each.default_factory()
    return Parameter.empty if each.default is MISSING else each.default
