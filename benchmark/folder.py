"""The folder of a run: locked while one works in it, and of one set of revisions."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cells import FAILURES, FORMAT, RUN, write_json
from filelock import FileLock, Timeout


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


def _check_same(folder: Path, known: dict[str, Any], wanted: dict[str, Any]) -> None:
    if known["format"] != FORMAT:
        raise ValueError(
            f"Expected results of format {FORMAT} in {folder}, but got {known['format']}; do "
            "choose another --output."
        )
    for task, revision in wanted["revisions"].items():
        if known["revisions"].get(task, revision) != revision:
            raise ValueError(
                f"Expected {task} at the revision {known['revisions'][task]} that {folder} holds, "
                f"but it is {revision} now; do pass --revision {known['revisions'][task]}, or "
                "choose another --output: numbers of two revisions are not mixed."
            )
    for name, value in wanted["options"].items():
        if known["options"].get(name) != value:
            raise ValueError(
                f"Expected {name} to be {known['options'].get(name)} as in {folder}, but got "
                f"{value}; do choose another --output."
            )
