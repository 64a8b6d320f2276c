"""JSON that anybody may have written: of a size, of a depth, and saying each thing once."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MANIFEST_NAME = "datastore.json"
LARGEST_JSON = 64 * 2**20
SHA256_PATTERN = re.compile(r"[0-9a-f]{64}")
_DEEPEST = 50
_LARGEST_COUNT = 2**48


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


class Fields:
    """Typed access to one JSON object, with the field's full name in each error.

    Args:
        values: the decoded JSON.
        prefix: of the names in messages; empty for the whole file.

    Raises:
        DatastoreError: by each method, naming the field, what was wanted and what was found.
    """

    def __init__(self, values: Any, prefix: str) -> None:
        if not isinstance(values, dict):
            raise DatastoreError(
                f"Expected {f'`{prefix[:-1]}` in ' if prefix else ''}{MANIFEST_NAME} to be an "
                f"object, but got {type(values).__name__}."
            )
        self.values, self.prefix = values, prefix

    def get(self, name: str) -> Any:
        """The value of a field."""
        if name not in self.values:
            raise DatastoreError(f"Expected {MANIFEST_NAME} to have `{self.prefix}{name}`.")
        return self.values[name]

    def wrong(self, name: str, wanted: str) -> DatastoreError:
        """The error for a field of another kind."""
        shown = repr(self.values.get(name))[:80]
        return DatastoreError(
            f"Expected `{self.prefix}{name}` in {MANIFEST_NAME} to be {wanted}, but got {shown}."
        )

    def count(self, name: str) -> int:
        """A whole number >= 0."""
        value: int = self._checked(
            name, f"a whole number in [0, {_LARGEST_COUNT}]",
            lambda value: type(value) is int and 0 <= value <= _LARGEST_COUNT,
        )  # fmt: skip
        return value

    def share(self, name: str) -> float:
        """A number in [0, 1]."""
        value: float = self._checked(
            name, "a number in [0, 1]", lambda value: type(value) is float and 0 <= value <= 1
        )
        return value

    def text(self, name: str) -> str:
        """A string."""
        value: str = self._checked(name, "a string", lambda value: isinstance(value, str))
        return value

    def matching(self, name: str, pattern: re.Pattern[str]) -> str:
        """A string that a pattern matches whole."""
        self.text(name)
        value: str = self._checked(name, f"a name like {pattern.pattern}", pattern.fullmatch)
        return value

    def sha256_or_none(self, name: str) -> str | None:
        """A sha256; None where the field is missing."""
        return self.matching(name, SHA256_PATTERN) if name in self.values else None

    def choice(self, name: str, choices: Iterable[str]) -> str:
        """One of some strings."""
        allowed = [str(choice) for choice in choices]
        value: str = self._checked(name, f"one of {allowed}", allowed.__contains__)
        return value

    def items(self, name: str) -> list[Any]:
        """A list."""
        value: list[Any] = self._checked(name, "a list", lambda value: isinstance(value, list))
        return value

    def texts(self, name: str) -> dict[str, str]:
        """An object of strings."""
        value: dict[str, str] = self._checked(
            name, "an object of strings",
            lambda value: isinstance(value, dict)
            and all(isinstance(text, str) for text in value.values()),
        )  # fmt: skip
        return value

    def _checked(self, name: str, wanted: str, is_right: Callable[[Any], object]) -> Any:
        value = self.get(name)
        if not is_right(value):
            raise self.wrong(name, wanted)
        return value
