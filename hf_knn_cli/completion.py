"""What a shell completes: checkpoint folders, labels, backbones, devices; nothing heavy is read."""

import json
import os
from pathlib import Path
from typing import Any

import typer

from .backbones import known_backbones

Completed = str | tuple[str, str]
"""What may be typed, and perhaps a word about it."""

_CONFIG = "config.json"
_MOST = 200
"""Names that are offered at most."""


def complete_checkpoint(_: typer.Context, incomplete: str) -> list[str]:
    """Checkpoint folders that a name may go on to, and folders on the way there.

    Args:
        incomplete: what was typed so far.
    """
    begun = incomplete.rpartition("/")[2]
    prefix = incomplete[: len(incomplete) - len(begun)]
    folder = os.path.expanduser(prefix or ".")
    try:
        entries = sorted(Path(folder).iterdir())
    except OSError:
        return []
    found = [
        entry
        for entry in entries
        if entry.name.startswith(begun)
        and (begun.startswith(".") or not entry.name.startswith("."))
        and entry.is_dir()
    ]
    checkpoints = [f"{prefix}{entry.name}" for entry in found if _kind_of(entry) is not None]
    others = [f"{prefix}{entry.name}/" for entry in found if _kind_of(entry) is None]
    return (checkpoints + others)[:_MOST]


def complete_label(context: typer.Context, incomplete: str) -> list[str]:
    """The classes of the checkpoint that the line names.

    Args:
        context: of the command, with what was typed so far.
        incomplete: of the label.
    """
    # arguments that were typed before an option without its value are not parsed yet
    named = [context.params.get("checkpoint"), context.params.get("model"), *context.args]
    found = (_kind_of(Path(os.path.expanduser(str(each)))) for each in named if each)
    values = next((each for each in found if each is not None), {})
    labels = values.get("id2label")
    names = sorted(map(str, labels.values())) if isinstance(labels, dict) else []
    return [name for name in names if name.startswith(incomplete)][:_MOST]


def complete_backbone(context: typer.Context, incomplete: str) -> list[Completed]:
    """Short names with a word about each, and checkpoint folders.

    Args:
        context: of the command.
        incomplete: what was typed so far.
    """
    named: list[Completed] = [
        (each.name, f"{each.title}, {each.megabytes} MB, {each.licence}")
        for each in known_backbones().values()
        if each.name.startswith(incomplete)
    ]
    return named or [*complete_checkpoint(context, incomplete)]


def complete_device(_: typer.Context, incomplete: str) -> list[str]:
    """Devices.

    Args:
        incomplete: what was typed so far.
    """
    return [
        each for each in ("auto", "cpu", "cuda", "cuda:1", "mps") if each.startswith(incomplete)
    ]


def _kind_of(folder: Path) -> dict[str, Any] | None:
    """The settings of a checkpoint of this package; None for another folder."""
    try:
        values = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(values, dict) and values.get("model_type") == "hf_knn"
    return values if is_ours else None
