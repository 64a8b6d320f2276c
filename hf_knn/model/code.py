"""The code in a checkpoint: two files of ours, and whether they are those that are installed.

Version 0.1 wrote 51 files, which a new version takes away; any other `.py` file is the user's.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from ..core.plain_json import DatastoreError, parse_json

_TRAVELS = Path(__file__).parents[1] / "travels"
CODE_NAMES = ("configuration_hf_knn.py", "modeling_hf_knn.py")
"""The files that travel with a checkpoint for `trust_remote_code`."""

AUTO_MAP = {
    "AutoConfig": "configuration_hf_knn.KnnConfig",
    "AutoModel": "modeling_hf_knn.KnnForImageClassification",
    "AutoModelForImageClassification": "modeling_hf_knn.KnnForImageClassification",
}
LEGACY_CODE = (
    "backbone", "blobs", "checkpoint", "class_names", "confidence", "configuration_knn",
    "datastore", "datastore_changes", "datastore_files", "datastore_opening",
    "datastore_reference", "datastore_rows", "datastore_search", "explaining", "faiss_index",
    "first_pass", "flips", "following", "functional", "heads", "hub_files", "images", "indexing",
    "manifest", "milvus_changes", "milvus_client", "milvus_collection", "milvus_index",
    "milvus_load", "milvus_reading", "milvus_rows", "milvus_search", "milvus_store", "model_card",
    "modeling_knn", "pending_change", "persistence", "processors", "publishing", "receipts",
    "remembering", "ridge_head", "ridge_state", "row_fingerprint", "row_table", "rows", "search",
    "search_backend", "storage", "teaching", "thumbnails",
)  # fmt: skip
"""The modules that version 0.1 wrote into every checkpoint."""

_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)
_LARGEST_TEXT = 16 * 2**20  # the names of 20,000 classes are 3 MB
_CONFIGS = (CONFIG_NAME, "preprocessor_config.json", "processor_config.json")
"""Files of an image classifier that can name code."""

_ADAPTER = "adapter_config.json"
"""With it transformers opens the model that the adapter names, with that one's code."""

Read = Callable[[str], str | None]
"""Reads a file of a checkpoint by name; None if it is not there."""


def write_code(folder: Path) -> None:
    """Writes the code that travels into a checkpoint.

    Args:
        folder: of the checkpoint.
    """
    for name in CODE_NAMES:
        shutil.copyfile(_TRAVELS / name, folder / name)


def legacy_code(read: Read) -> set[str]:
    """What version 0.1 wrote into a checkpoint: what its `auto_map` reaches, and is on its list.

    Args:
        read: reads a file of the checkpoint.

    Returns:
        Names of files, which a new version must not keep.
    """
    waiting, found = _named_modules(read(CONFIG_NAME)), set[str]()
    while waiting:
        module = waiting.pop()
        text = read(f"{module}.py") if module in LEGACY_CODE and module not in found else None
        if text is not None:
            found.add(module)
            waiting |= set(_RELATIVE_IMPORT.findall(text))
    return {f"{module}.py" for module in found}


def reader_of(folder: Path) -> Read:
    """Reads texts of a folder; one above 16 MB counts as empty.

    Args:
        folder: of a checkpoint, which need not exist.
    """

    def read(name: str) -> str | None:
        path = folder / name
        if not path.is_file():
            return None
        data = path.read_bytes() if path.stat().st_size <= _LARGEST_TEXT else b""
        return data.decode("utf-8", errors="replace")

    return read


def compare_code(read: Read) -> list[str]:
    """Whether the code of a checkpoint is that of the installed package.

    Args:
        read: reads a file of the checkpoint.

    Returns:
        What differs, one sentence each; nothing if it is the same, byte for byte.
    """
    problems = []
    for name in CODE_NAMES:
        text = read(name)
        if text is None:
            problems.append(f"{name} is missing.")
        elif text.encode() != (_TRAVELS / name).read_bytes():
            problems.append(f"{name} is not that of the installed package.")
    if read(_ADAPTER) is not None:
        problems.append(f"{_ADAPTER} is there: where peft is installed, another model is opened.")
    ours = {name.removesuffix(".py") for name in CODE_NAMES}
    for name in _CONFIGS:
        text = read(name)
        if text is None:
            continue
        try:
            named = _code_named_in(parse_json(text, name))
            others = {target.rpartition(".")[0] for target in named}
        except DatastoreError:
            problems.append(f"{name} cannot be read, so nobody knows what code it names.")
            continue
        if others - ours:
            problems.append(f"{name} runs other code: {', '.join(sorted(others - ours))}.")
    return problems


def code_hashes() -> dict[str, str]:
    """The sha256 of each file of code of the installed package, by name."""
    return {n: hashlib.sha256((_TRAVELS / n).read_bytes()).hexdigest() for n in CODE_NAMES}


def _code_named_in(values: Any, key: str = "") -> Iterator[str]:
    """The classes in an `auto_map`, and in `custom_pipelines`, at any depth of a configuration."""
    if isinstance(values, str) and key in ("auto_map", "impl"):
        yield values
    elif isinstance(values, list):
        for value in values:
            yield from _code_named_in(value, key)
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from _code_named_in(value, key if key == "auto_map" else name)


def _named_modules(config: str | None) -> set[str]:
    """The modules that the `auto_map` of a configuration names."""
    try:
        values = parse_json(config or "{}", CONFIG_NAME)
    except DatastoreError:
        return set()
    named = values.get("auto_map") if isinstance(values, dict) else None
    targets = named.values() if isinstance(named, dict) else ()
    return {str(target).rpartition("--")[2].partition(".")[0] for target in targets}
