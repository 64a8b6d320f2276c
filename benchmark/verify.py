"""Checks the registries against the Hub: `python benchmark/verify.py`, where there is a network.

For each task: whether the dataset and its revision are there and open to us, and the names of its
splits and columns. For each backbone: whether the repository and its revision are there. Entries
without a revision are told the one to pin.
"""

from collections.abc import Iterable
from typing import Annotated, NamedTuple

import typer
from datasets import load_dataset_builder
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from rich.console import Console
from rich.table import Table

from catalog.backbones import BACKBONES, Backbone, find_backbone
from catalog.hub_loading import resolve_revision
from catalog.tasks import TASKS, Source, Task, find_task
from hf_knn_cli.terminal import prepare_streams


class Verdict(NamedTuple):
    """What was found of one entry.

    Attributes:
        name: of the entry.
        revision: the commit it is, or would be pinned to; empty if it is not there.
        problems: what does not fit; none is verified.
    """

    name: str
    revision: str
    problems: list[str]


def verify_task(entry: Task) -> Verdict:
    """Looks a task of the Hub up: access, revision, splits, columns and number of classes."""
    try:
        revision = resolve_revision(entry)
        builder = load_dataset_builder(entry.location, entry.config, revision=revision)
    except (PermissionError, ValueError, DatasetNotFoundError, HfHubHTTPError) as error:
        return Verdict(entry.name, "", [str(error)])
    problems = []
    splits, features = builder.info.splits or {}, builder.info.features or {}
    columns = (entry.image, entry.label, entry.group)
    if not splits or not features:
        problems.append("the Hub does not tell splits and columns before a download")
    else:
        problems += _absent("split", entry.splits, splits)
        problems += _absent("column", columns, features)
    names = getattr(features.get(entry.label), "names", None)
    if names is not None and entry.classes and len(names) != entry.classes:
        problems.append(f"{len(names)} classes, not {entry.classes}")
    size = sum(split.num_examples for name, split in splits.items() if name in entry.splits)
    if size and entry.pictures and not 0.5 * entry.pictures <= size <= 2 * entry.pictures:
        problems.append(f"{size} pictures, not about {entry.pictures}")
    return Verdict(entry.name, revision, problems)


def _absent(kind: str, wanted: Iterable[str | None], there: Iterable[str]) -> list[str]:
    known = sorted(there)
    return [f"{kind} {w!r} is not among {known}" for w in wanted if w and w not in known]


def verify_backbone(entry: Backbone) -> Verdict:
    """Looks a backbone of the Hub up: access and revision."""
    assert entry.location is not None
    try:
        found = HfApi().model_info(entry.location, revision=entry.revision)
    except HfHubHTTPError as error:
        return Verdict(entry.name, "", [f"{entry.location}: {error}".splitlines()[0]])
    problems = []
    if getattr(found, "gated", False):
        problems.append(f"gated: accept its terms at https://huggingface.co/{entry.location}")
    return Verdict(entry.name, str(found.sha), problems)


def verify(tasks: Iterable[str] | None, backbones: Iterable[str] | None) -> list[Verdict]:
    """Verdicts on the named entries that live on the Hub; None takes all that do."""
    if tasks is None:
        tasks = [name for name, task in TASKS.items() if task.source is Source.HUB]
    if backbones is None:
        backbones = [n for n, b in BACKBONES.items() if b.location and not b.offline]
    found = [verify_task(find_task(name)) for name in tasks]
    return found + [verify_backbone(find_backbone(name)) for name in backbones]


def main(
    task: Annotated[list[str] | None, typer.Option(help="Repeatable; default: all.")] = None,
    backbone: Annotated[list[str] | None, typer.Option(help="Repeatable; default: all.")] = None,
) -> None:
    """Check ids, revisions, splits, columns and sizes; exit code 1 if something does not fit."""
    some = task or backbone
    found = verify((task or []) if some else None, (backbone or []) if some else None)
    table = Table(title="Entries on the Hub", title_justify="left")
    for column in ("entry", "revision", "problems"):
        table.add_column(column, overflow="fold")
    for verdict in found:
        table.add_row(verdict.name, verdict.revision or "-", "\n".join(verdict.problems) or "none")
    Console().print(table)
    if any(verdict.problems for verdict in found):
        raise SystemExit(1)


if __name__ == "__main__":
    prepare_streams()
    typer.run(main)
