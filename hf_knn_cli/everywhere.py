"""The options that every command takes, before its name or behind it, without naming them.

The group of all commands adds them to each: `--version`, `--quiet`, `--verbose` and `--debug` to
all, `--device` to those that compute features, which are those with a `--backend`.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer._click.shell_completion import CompletionItem
from typer.core import TyperArgument, TyperGroup

from .completion import (
    Completed,
    complete_backbone,
    complete_checkpoint,
    complete_device,
    complete_label,
)
from .places import fail
from .terminal import command_typed
from .variables import restore, set_during

PANEL = "Every command"

DEBUG, VERBOSITY, DEVICE = "HF_KNN_DEBUG", "HF_KNN_VERBOSITY", "HF_KNN_DEVICE"
VISIBLE = "CUDA_VISIBLE_DEVICES"
QUIET, VERBOSE = "quiet", "verbose"
"""Values of `HF_KNN_VERBOSITY`."""

STOPPED = 130
"""The exit code of a command that Ctrl-C ended: 128 + 2, as a shell has it."""

_OF_ALL = ("version", "quiet", "verbose", "debug")
_GPU = re.compile(r"cuda:(\d+)")
_KINDS = {str: "<text>", int: "<number>", float: "<number>", Path: "<path>"}


_COMPLETED: dict[str, Callable[[typer.Context, str], Sequence[Completed]]] = {
    "backbone": complete_backbone,
    "device": complete_device,
    **dict.fromkeys(("label", "labels"), complete_label),
    **dict.fromkeys(("checkpoint", "model", "first", "second", "other"), complete_checkpoint),
}
"""What a shell is told of a parameter, by its name, in whichever command it is."""


def _show_version(context: typer.Context, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    from importlib.metadata import version

    typer.echo(f"hf-knn {version('hf-knn')}")
    raise typer.Exit


def _say_less(context: typer.Context, value: bool) -> None:
    _set_verbosity(context, QUIET if value else None)


def _say_more(context: typer.Context, value: bool) -> None:
    _set_verbosity(context, VERBOSE if value else None)


def _set_verbosity(context: typer.Context, wanted: str | None) -> None:
    if wanted is None or context.resilient_parsing:
        return
    notes = _notes(context)
    if notes.setdefault(VERBOSITY, wanted) != wanted:
        raise typer.BadParameter("Expected one of --quiet and --verbose, but got both.")
    set_during(context, VERBOSITY, wanted)


def _show_tracebacks(context: typer.Context, value: bool) -> None:
    if value and not context.resilient_parsing:
        set_during(context, DEBUG, "1")


def _choose_device(context: typer.Context, value: str | None) -> str | None:
    """Says it to the whole command by a variable."""
    if context.resilient_parsing:
        return value
    if value is None:
        if context.parent is not None and DEVICE not in os.environ:
            set_during(context, DEVICE, "auto")
        return value
    if value not in ("auto", "cpu", "cuda", "mps") and not _GPU.fullmatch(value):
        raise typer.BadParameter(
            f"Expected auto, cpu, cuda, cuda:1 (the second GPU) or mps, but got {value!r}."
        )
    _notes(context)[DEVICE] = value
    number = _GPU.fullmatch(value)
    if number:  # the only one that is seen: a trainer would take the first, or all
        seen = [each for each in os.environ.get(VISIBLE, "").split(",") if each]
        place = int(number[1])
        if seen and place >= len(seen):
            fail(f"Expected one of the {len(seen)} GPUs that CUDA_VISIBLE_DEVICES names, but got "
                 f"--device {value}; count from cuda:0.")  # fmt: skip
        set_during(context, VISIBLE, seen[place] if seen else number[1])
    set_during(context, DEVICE, "cuda" if number else value)
    if value not in ("auto", "cpu"):
        from hf_knn.commands.devices import check_device

        try:
            check_device(value)
        except ValueError as error:
            fail(str(error))
    return value


def _notes(context: typer.Context) -> dict[str, str]:
    """What the command line said so far, before the command and behind it."""
    root = context.find_root()
    if root.obj is None:
        root.obj = {}
    noted: dict[str, str] = root.obj.setdefault("everywhere", {})
    return noted


def device_named(context: typer.Context) -> str | None:
    """The device that the command line names, wherever; None if it names none.

    Args:
        context: of a command.
    """
    return _notes(context).get(DEVICE)


def options_everywhere(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, expose_value=False,
            rich_help_panel=PANEL, help="Print the version and end.",
        ),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", "-q", callback=_say_less, is_eager=True, expose_value=False,
            rich_help_panel=PANEL,
            help="Print results, warnings and errors only: no progress, no advice what to do next.",
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", callback=_say_more, is_eager=True, expose_value=False,
            rich_help_panel=PANEL,
            help="Also print versions, device and cache folders, what is decided on the way, time "
            "and memory.",
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", callback=_show_tracebacks, is_eager=True, expose_value=False,
            rich_help_panel=PANEL, help="Show where in the code an error comes from.",
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", callback=_choose_device, expose_value=False, show_default=False,
            rich_help_panel=PANEL,
            help="Where features are computed: auto, cpu, cuda, cuda:1 (the second GPU) or mps. "
            "Default: $HF_KNN_DEVICE, else auto, which takes an NVIDIA GPU if there is one.",
        ),
    ] = None,
) -> None:  # fmt: skip
    """Declares them; what each does is in its callback."""


class Commands(TyperGroup):
    """All commands of `hf-knn`, each with the options of this module."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        shared = {str(each.name): each for each in self.params}
        for each in self.params:
            each.metavar = _plain_kind(each)
            _complete(each)
        for command in self.commands.values():
            names = {str(each.name) for each in command.params}
            of_this = [*_OF_ALL, "device"] if "backend" in names else [*_OF_ALL]
            for each in command.params:
                each.callback = _silent_while_completing(each.callback)
                each.metavar = _plain_kind(each)
                _complete(each)
            command.help = _reflowed(command.help)
            command.params += [shared[name] for name in of_this if name not in names]

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Runs the command line; what it said by variables is over with it, also after an error."""
        before = dict(os.environ)
        try:
            return super().main(*arguments, **options)
        finally:
            for name in _said_by_variables({*before, *os.environ}):
                restore(name, before.get(name))

    def resolve_command(self, context: Any, arguments: list[str]) -> Any:
        """Finds the command, and refuses a device for one that computes nothing."""
        name, command, rest = super().resolve_command(context, arguments)
        takes = {str(each.name) for each in command.params} if command else {"device"}
        if "device" not in takes and device_named(context) and not context.resilient_parsing:
            raise typer.BadParameter(f"{name} computes no features, so it takes no --device.")
        return name, command, rest

    def invoke(self, context: Any) -> Any:
        """Runs a command; Ctrl-C ends it with a sentence, also while it still imports."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt as error:
            print(
                f"\nStopped before anything was done. The same line begins again: "
                f"{command_typed()}", file=sys.stderr,
            )  # fmt: skip
            raise typer.Exit(STOPPED) from error


def _complete(parameter: Any) -> None:
    """Tells the shell what a parameter may be, unless its command does."""
    complete = _COMPLETED.get(str(parameter.name))
    if complete is not None and parameter._custom_shell_complete is None:
        parameter._custom_shell_complete = partial(_items, complete)


def _items(
    complete: Callable[[typer.Context, str], Sequence[Completed]],
    context: Any,
    _parameter: Any,
    incomplete: str,
) -> list[CompletionItem]:
    found = complete(context, incomplete)
    return [
        CompletionItem(each) if isinstance(each, str) else CompletionItem(each[0], help=each[1])
        for each in found
    ]


def _reflowed(text: str | None) -> str | None:
    """A docstring in paragraphs, which a terminal breaks where it is wide enough."""
    return None if text is None else re.sub(r"(?<=\S)\n(?=\S)", " ", text)


def _said_by_variables(names: Iterable[str]) -> list[str]:
    return [each for each in names if each.startswith("HF_KNN_") or each == VISIBLE]


def _plain_kind(parameter: Any) -> str | None:
    """What `--help` calls a value: a name in capitals for an argument, no Python for an option."""
    if parameter.metavar is not None:
        return str(parameter.metavar)
    if isinstance(parameter, TyperArgument):
        return str(parameter.name).upper()
    if parameter.is_flag:
        return ""  # it takes no value
    described = parameter.type_descriptor
    inner = next(iter(get_args(described.annotation)), described.annotation)
    return None if described.is_choice else _KINDS.get(inner)


def _silent_while_completing(check: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """A shell that completes a line half typed wants no complaint about it, and no network."""
    return None if check is None else partial(_unless_completing, check)


def _unless_completing(check: Callable[..., Any], context: Any, param: Any, value: Any) -> Any:
    return value if context.resilient_parsing else check(context, param, value)
