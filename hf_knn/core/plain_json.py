"""JSON that anybody may have written: of a size, of a depth, and saying each thing once."""

import json
from pathlib import Path
from typing import Any

LARGEST_JSON = 64 * 2**20
_DEEPEST = 50


class DatastoreError(ValueError):
    """A datastore on disk that is damaged, incomplete or not what it says it is."""


def read_json(path: Path, most: int = LARGEST_JSON) -> Any:
    """What a JSON file holds that anybody may have written.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        DatastoreError: if it is larger, no JSON, says something twice, or is nested deeper than any
            of ours.
    """
    if path.stat().st_size > most:
        raise DatastoreError(f"Expected {path.name} to have at most {most} bytes; it is not ours.")
    return parse_json(path.read_bytes(), path.name)


def parse_json(text: bytes | str, name: str) -> Any:
    """What a JSON text holds that anybody may have written; see `read_json`.

    Args:
        text: of the file.
        name: of the file, for the message.
    """
    try:
        values = json.loads(text, object_pairs_hook=_said_once)
        level: list[Any] = [[values]]
        for _ in range(_DEEPEST):
            parts = (part.values() if isinstance(part, dict) else part for part in level)
            level = [value for part in parts for value in part if isinstance(value, dict | list)]
        if level:
            raise ValueError(f"more than {_DEEPEST} levels")
    except (ValueError, RecursionError) as error:
        raise DatastoreError(
            f"Expected {name} to be JSON that is not nested deeply, but got: {error}; the file is "
            "damaged, download or save it again."
        ) from None
    return values


def _said_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name that is there twice")
    return values
