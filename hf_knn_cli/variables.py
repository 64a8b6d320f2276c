"""Variables of the environment that say something to all of a command, in every process of it."""

import os

import typer


def set_during(context: typer.Context, name: str, value: str) -> None:
    """Sets a variable until a command has ended.

    Args:
        context: of the command.
        name: of the variable.
        value: of it.
    """
    before = os.environ.get(name)
    os.environ[name] = value
    context.call_on_close(lambda: restore(name, before))


def restore(name: str, before: str | None) -> None:
    """Gives a variable the value that it had.

    Args:
        name: of the variable.
        before: its value; None is no value.
    """
    if before is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = before
