"""A checkpoint is read as one version, and its datastore must belong to its weights."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .backbone import hash_tensors
from .manifest import DatastoreError

THUMBNAILS_NAME = "thumbnails.safetensors"
"""File of a checkpoint: ids, where each picture ends, and the bytes of all of them."""


# where the processor runs does not change its pixels by intent
_PROCESSOR_PLACES = ("feature_extractor_type", "processor_class", "device")


_BACKEND_SUFFIX = re.compile(r"(Fast|Pil)$")


def is_weights_file(name: str) -> bool:
    return name.endswith(".safetensors") and name != THUMBNAILS_NAME


def fingerprint_files(
    weights: list[Path], processor: Path | None, pooling: str
) -> tuple[str, str, str, str]:
    """The fingerprint of what makes features, and its three parts."""
    weight_sum = _hash_stored_backbone(weights)
    processor_sum = ""
    if processor is not None and processor.is_file():
        processor_sum = hash_settings(_read_object(processor))
    return combine_hashes(weight_sum, processor_sum, pooling), weight_sum, processor_sum, pooling


def hash_settings(settings: dict[str, Any]) -> str:
    kept = {key: value for key, value in settings.items() if key not in _PROCESSOR_PLACES}
    kept["image_processor_type"] = _BACKEND_SUFFIX.sub(
        "", str(kept.get("image_processor_type", ""))
    )
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def stored_pooling(config: Path | None, fallback: str) -> str:
    """The pooling that the configuration beside the datastore asks for."""
    if config is None:
        return fallback
    values = _read_object(config)
    return str(values.get("knn_pooling") or values.get("pooling") or fallback)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise DatastoreError(
            f"Expected {path.name} to hold a JSON object, but it does not; the file is damaged, "
            "download or save it again."
        )
    return values


def combine_hashes(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _hash_stored_backbone(paths: list[Path]) -> str:
    """Hashes the backbone's tensors under the names and dtypes they are stored with."""
    place: dict[str, Path] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            place |= {name: path for name in file.keys() if name.startswith("backbone.")}  # noqa: SIM118

    def tensors() -> Any:
        for name in sorted(place):
            with safe_open(place[name], "pt") as file:
                yield name, file.get_tensor(name)

    return hash_tensors(tensors())
