"""`hf-knn cache`: what is kept to be fast, and how to be rid of it."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError, safe_open

from ..features.cache import ABOUT_NAME, KEYS_FOLDER, cache_root
from .console import console

_DAY = 86_400


@dataclass(frozen=True)
class Entry:
    """One folder of the cache.

    Attributes:
        kind: `features`, `graph`, `choices` (of backends) or `keys` (of pictures in memory).
        name: of the folder.
        model: what it belongs to; empty if unknown.
        backend: and precision, of features.
        pictures: how the first dataset looked, of features.
        rows: pictures it holds, of features.
        bytes: on disk.
        used: seconds since 1970 at which it was last of use.
    """

    kind: str
    name: str
    model: str
    backend: str
    pictures: str
    rows: int
    bytes: int
    used: float


def show_cache(clear: bool, older_than: int | None, json_output: bool) -> None:
    """Lists the cache, and clears what is listed.

    Args:
        clear: remove what is listed.
        older_than: list only what was not used for so many days, >= 0; None lists everything.
        json_output: print JSON instead of a table.

    Raises:
        OSError: if something cannot be removed.
    """
    latest = None if older_than is None else time.time() - older_than * _DAY
    entries = [e for e in cache_entries() if latest is None or e.used <= latest]
    if clear:
        for entry in entries:
            shutil.rmtree(_place_of(entry))
    if json_output:
        document = {"root": str(cache_root()), "cleared": clear}
        typer.echo(json.dumps(document | {"entries": [asdict(e) for e in entries]}, indent=2))
        return
    if entries:
        console.print(_table(entries))
    total = sum(entry.bytes for entry in entries)
    verb = "Cleared" if clear else "Kept"
    console.print(f"{verb} in {escape(str(cache_root()))}: {_size(total)}.", soft_wrap=True)
    if entries and not clear:
        console.print("Next: [bold]hf-knn cache --clear[/], or with --older-than 30")


def cache_entries() -> list[Entry]:
    """What the cache holds, the most recently used first."""
    root = cache_root()
    features = [path for path in _folders(root / "features") if path.name != KEYS_FOLDER]
    found = [_features_of(path) for path in features]
    found += [_plain("graph", path) for path in _folders(root / "graphs")]
    for kind, path in (("choices", root / "backends"), ("keys", root / "features" / KEYS_FOLDER)):
        if path.is_dir():
            found.append(_plain(kind, path))
    return sorted(found, key=lambda entry: -entry.used)


def _place_of(entry: Entry) -> Path:
    root = cache_root()
    match entry.kind:
        case "graph":
            return root / "graphs" / entry.name
        case "choices":
            return root / "backends"
        case _:
            return root / "features" / entry.name


def _folders(parent: Path) -> Iterator[Path]:
    if parent.is_dir():
        yield from (path for path in parent.iterdir() if path.is_dir())


def _features_of(folder: Path) -> Entry:
    about: dict[str, Any] = {}
    place = folder / ABOUT_NAME
    if place.is_file():
        try:
            about = json.loads(place.read_text(encoding="utf-8"))
        except ValueError:
            about = {}  # damaged: the folder is listed and can be cleared all the same
    rows = sum(_rows_of(path) for path in folder.glob("shard-*.safetensors"))
    plain = _plain("features", folder)
    used = place.stat().st_mtime if place.is_file() else plain.used
    backend = " ".join(filter(None, [about.get("backend"), about.get("precision")]))
    return Entry(
        plain.kind, plain.name, str(about.get("model", "")), backend,
        str(about.get("first_pictures", "")), rows, plain.bytes, used,
    )  # fmt: skip


def _rows_of(path: Path) -> int:
    try:
        with safe_open(path, framework="pt") as file:
            return int(file.get_slice("features").get_shape()[0])
    except SafetensorError:
        return 0  # damaged: the next extraction computes it again


def _plain(kind: str, folder: Path) -> Entry:
    states = [path.stat() for path in folder.rglob("*") if path.is_file()]
    used = max((state.st_mtime for state in states), default=folder.stat().st_mtime)
    size = sum(state.st_size for state in states)
    return Entry(kind, folder.name, "", "", "", 0, size, used)


def _table(entries: list[Entry]) -> Table:
    table = Table()
    for column in ("kind", "model", "backend", "first pictures", "rows", "size", "last used"):
        table.add_column(column, justify="right" if column in ("rows", "size") else "left")
    for entry in entries:
        day = time.strftime("%Y-%m-%d", time.localtime(entry.used))
        rows = f"{entry.rows:,}" if entry.rows else ""
        name = escape(Path(entry.model).name)
        table.add_row(
            entry.kind, name, entry.backend, escape(entry.pictures), rows, _size(entry.bytes), day
        )
    return table


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
