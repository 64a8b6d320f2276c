"""The folder of a run: locked while one works in it, and of one set of revisions."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from catalog.tasks import Source, find_task
from study.cells import FAILURES, FORMAT, RUN, write_json


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder.

    Raises:
        RuntimeError: if one is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(
            f"Expected {folder} to be free, but another run works in it; do wait for it, or choose "
            "another --output."
        ) from error
    try:
        yield
    finally:
        lock.release()


def begin(folder: Path, suite: str, revisions: dict[str, str], options: dict[str, Any]) -> None:
    """Notes what a folder holds, or checks that a run that goes on there has the same.

    Args:
        folder: of the results.
        suite: name of the suite.
        revisions: of the pictures, by task.
        options: that numbers depend on.

    Raises:
        ValueError: for other revisions, options or a newer format, with both.
    """
    path = folder / RUN
    document = {"format": FORMAT, "suite": suite, "revisions": revisions, "options": options}
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        _check_same(folder, known, document)
        document = known | {"revisions": known["revisions"] | revisions}
        if suite not in known["suite"].split(", "):
            document["suite"] = f"{known['suite']}, {suite}"
    else:
        known = None
    if document != known:
        write_json(path, document)
    shutil.rmtree(folder / FAILURES, ignore_errors=True)  # those of the run before


def note_model(folder: Path, name: str, revision: str, *, write: bool) -> None:
    """Notes of which revision a backbone is, or checks that it is still that one.

    Args:
        folder: of the results, begun.
        name: of the backbone.
        revision: of its weights, as they are opened now.
        write: whether to note it; one rank does.

    Raises:
        ValueError: if cells of another revision lie there, with both.
    """
    path = folder / RUN
    known = json.loads(path.read_text(encoding="utf-8"))
    models = known.get("models", {})
    if models.get(name, revision) != revision:
        raise ValueError(
            f"Expected {name} at the revision {models[name]} that {folder} holds, but it is "
            f"{revision} now; do pin that one in catalog/backbones.py, or choose another --output: "
            "numbers of two revisions are not mixed."
        )
    if write and name not in models:
        write_json(path, known | {"models": models | {name: revision}})


def _check_same(folder: Path, known: dict[str, Any], wanted: dict[str, Any]) -> None:
    if known["format"] != FORMAT:
        raise ValueError(
            f"Expected results of format {FORMAT} in {folder}, but got {known['format']}; do "
            "choose another --output."
        )
    for task, revision in wanted["revisions"].items():
        if known["revisions"].get(task, revision) != revision:
            held = known["revisions"][task]
            on_hub = find_task(task).source is Source.HUB
            pinned = f"pass --task {task} --revision {held}, or " if on_hub else ""
            raise ValueError(
                f"Expected {task} at the revision {held} that {folder} holds, but it is {revision} "
                f"now; do {pinned}choose another --output: numbers of two revisions are not mixed."
            )
    for name, value in wanted["options"].items():
        if known["options"].get(name) != value:
            raise ValueError(
                f"Expected {name} to be {known['options'].get(name)} as in {folder}, but got "
                f"{value}; do choose another --output."
            )
