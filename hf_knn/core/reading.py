"""A checkpoint and its datastore: read together, and the one must belong to the other."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import (
    CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    cached_file,
)
from transformers.utils.hub import resolve_revision

from .backbone import hash_tensors
from .config import KnnConfig
from .frozen import FrozenDatastore, Resolve
from .manifest import (
    MANIFEST_NAME,
    Binding,
    DatastoreError,
    FileRecord,
    Manifest,
    StaleDatastoreError,
)
from .plain_json import read_json

logger = logging.getLogger(__name__)

THUMBNAILS_NAME = "thumbnails.safetensors"
"""File of a checkpoint: ids, where each picture ends, and the bytes of all of them."""

CONTENTS_NAME = "contents.safetensors"
"""File of a checkpoint: ids, marks of the rows, and prints of their pictures."""

_NO_WEIGHTS = (THUMBNAILS_NAME, CONTENTS_NAME)

HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download", "subfolder")
"""Of `from_pretrained`, which hold for every file."""

PUSH_OPTIONS = (
    "repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr",
)  # fmt: skip
"""Of `save_pretrained`, which go to `push_to_hub`."""

# where the processor runs does not change its pixels by intent
_PROCESSOR_PLACES = ("feature_extractor_type", "processor_class", "device")
_BACKEND_SUFFIX = re.compile(r"(Fast|Pil)$")


class HubFiles:
    """Finds files by name, all of one version.

    Args:
        name: a folder or a Hub id; None finds nothing, where the weights are handed over.
        options: the options of `from_pretrained` (`revision`, `token`, `cache_dir`, …).

    Attributes:
        revision: the commit all files come from (Hub only).
    """

    def __init__(self, name: str | Path | None, options: dict[str, Any]) -> None:
        self.name = str(name)
        self.options = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
        places = {key: self.options[key] for key in HUB_OPTIONS[:3] if key in self.options}
        self.revision = resolve_revision(self.name, options.get("revision"), **places)

    def resolve(self, name: str) -> Path | None:
        """Finds a file by name; None if there is none.

        Raises:
            OSError: if there is no such repository or revision, or the download failed.
        """
        try:
            found = cached_file(
                self.name, name, revision=self.revision,
                _raise_exceptions_for_missing_entries=False, **self.options,
            )  # fmt: skip
        except (OSError, ValueError):
            raise
        except Exception as error:  # the HTTP client's own, of whichever client there is
            raise OSError(
                f"Could not get {name} of {self.name}: {error}; nothing was loaded, try again."
            ) from error
        return None if found is None else Path(found)


def read_datastore(files: HubFiles, config: KnnConfig, allow_stale: bool) -> FrozenDatastore | None:
    """The datastore of a checkpoint, with every byte checked.

    Args:
        files: of the checkpoint.
        config: of the model.
        allow_stale: warn of features that other weights made, instead of refusing them.

    Raises:
        DatastoreError: for damaged, missing or disagreeing files, naming them.
        StaleDatastoreError: for features that other weights, settings or another pooling made.
    """
    path = files.resolve(MANIFEST_NAME)
    if path is None:
        refuse_missing(files.name, config)
        return None
    manifest = Manifest.read(path)
    problem = find_problem(files.resolve, manifest.binding)
    if problem is not None and not allow_stale:
        raise problem
    if problem is not None:
        logger.warning("Using a datastore that does not fit its checkpoint: %s", problem)
    store = FrozenDatastore(manifest, files.resolve)
    largest = int(store.labels.max()) if len(store) else -1
    has_map = store.learned_map is not None
    check_fits(config, store.dim, store.metric, store.normalization, has_map, largest)
    return store


def refuse_missing(name: str, config: KnnConfig) -> None:
    """Refuses a checkpoint without the datastore that its configuration speaks of.

    Args:
        name: of the checkpoint.
        config: of its model.

    Raises:
        DatastoreError: if there should be one.
    """
    if config.has_datastore:
        raise DatastoreError(
            f"Expected {name} to hold {MANIFEST_NAME}, as its {CONFIG_NAME} says, but it is "
            "missing; pass load_datastore=False for the plain classifier."
        )


def check_fits(
    config: KnnConfig, dim: int, metric: str, normalization: str, has_map: bool, largest: int | None
) -> None:
    """Refuses a datastore that a model cannot use.

    Args:
        config: of the model.
        dim: width of the datastore's rows.
        metric: of the datastore.
        normalization: of the datastore.
        has_map: whether it has a learned map.
        largest: its largest label; None if it was not looked for.

    Raises:
        ValueError: naming what disagrees and both values.
    """
    width, learned = config.extra_dim or config.feature_dim, config.learned_metric
    for name, mine, theirs in (
        ("width", width, dim),
        ("metric", config.metric, metric),
        ("normalization", config.normalization, normalization),
        ("learned_metric", learned, has_map),
    ):
        if theirs != mine:
            raise ValueError(
                f"Expected a datastore of {name} {mine}, as the model has, but got {theirs}."
            )
    if largest is not None and largest >= config.classes:
        raise ValueError(
            f"Expected labels below {config.classes} in the datastore, the number of classes of "
            f"the model, but got {largest}."
        )


def find_problem(resolve: Resolve, binding: Binding | None) -> DatastoreError | None:
    """What of a checkpoint is not what its datastore was saved with; None if all is.

    Args:
        resolve: finds the files of the checkpoint.
        binding: of its datastore; None for one that was saved alone.
    """
    if binding is None:
        return None
    damaged: list[DatastoreError] = []
    found: dict[str, Path] = {}
    for record in binding.files:
        path = resolve(record.name)
        if path is not None:
            found[record.name] = path
        try:
            record.verify(path)
        except DatastoreError as error:
            damaged.append(error)
    names = [record.name for record in binding.files if _is_weights(record.name)]
    if any(name not in found for name in names):
        return damaged[0]
    processor = resolve(IMAGE_PROCESSOR_NAME)
    if processor is not None and not binding.processor:
        logger.warning("%s was put beside a datastore saved without one: they must fit.", processor)
        processor = None
    try:
        pooling = _stored_pooling(resolve(CONFIG_NAME), binding.pooling)
        now = fingerprint_files([found[name] for name in names], processor, pooling)
    except DatastoreError as error:
        return damaged[0] if damaged else error
    except SafetensorError:
        return damaged[0] if damaged else None  # not a readable file: which one, the hashes say
    if now[0] == binding.fingerprint:
        return damaged[0] if damaged else None
    parts = ("weights", "processor settings", "pooling")
    was = (binding.weights, binding.processor, binding.pooling)
    changed = [p for p, a, b in zip(parts, now[1:], was, strict=True) if a != b]
    changed += [record.name for record in binding.files if record.name in str(damaged)]
    return StaleDatastoreError(
        f"Expected a datastore made by the backbone beside it, fingerprint {now[0][:12]}…, but "
        f"{MANIFEST_NAME} names {binding.fingerprint[:12]}… (other {', '.join(changed)}); "
        f"build it again, or pass allow_stale=True to use it anyway."
    )


def bind(folder: Path, pooling: str, dtype: str, weight_sum: str | None = None) -> Binding:
    """Ties a datastore to the files of the checkpoint that lie in a folder.

    Args:
        folder: with weights, configuration and processor.
        pooling: of the datastore's features.
        dtype: of the backbone.
        weight_sum: what to name as the weights that made the features; None takes those here.
    """
    weights = sorted(folder.glob("model*.safetensors"))
    found = fingerprint_files(weights, folder / IMAGE_PROCESSOR_NAME, pooling)
    fingerprint, here, processor_sum, _ = found
    if weight_sum is not None:
        fingerprint = _combine(weight_sum, processor_sum, pooling)
    names = [CONFIG_NAME, *(path.name for path in weights)]
    others = (SAFE_WEIGHTS_INDEX_NAME, *_NO_WEIGHTS)
    names += [name for name in others if (folder / name).is_file()]
    files = [FileRecord.of(folder / name) for name in names]
    return Binding(fingerprint, weight_sum or here, processor_sum, pooling, dtype, files)


def bind_again(folder: Path, pooling: str, dtype: torch.dtype, before: Binding | None) -> Binding:
    """Ties rows that were opened with one checkpoint to another; what was stale stays so.

    Args:
        folder: see `bind`.
        pooling: of the datastore's features.
        dtype: of the backbone.
        before: the checkpoint that they were opened with.
    """
    name = str(dtype).removeprefix("torch.")
    binding = bind(folder, pooling, name)
    alike = binding.fingerprint, _combine(binding.weights, "", binding.pooling)
    if before is None or before.dtype != name or before.fingerprint in alike:
        return binding
    logger.warning(
        "The datastore was not made by the backbone, image processor and pooling as they are now; "
        "it is saved as stale."
    )
    return bind(folder, pooling, name, before.fingerprint)  # which is no hash of weights


def warn_of_dtype(dtype: torch.dtype, binding: Binding | None) -> None:
    """Says so if a backbone is loaded in another dtype than made the datastore's features.

    Args:
        dtype: of the backbone.
        binding: of the datastore.
    """
    name = str(dtype).removeprefix("torch.")
    if binding is not None and name != binding.dtype:
        logger.warning(
            "The backbone is loaded as %s, but %s made the datastore's features; similarities "
            "can differ a little.", name, binding.dtype,
        )  # fmt: skip


def refuse_other_rows(folder: Path, mine: Manifest | None) -> None:
    """Refuses to save over another datastore, of which files would be left.

    Args:
        folder: to be saved into; it need not exist.
        mine: the datastore to be saved, or None.

    Raises:
        ValueError: if another one lies there.
    """
    if not (folder / MANIFEST_NAME).exists():
        return
    if mine is None or Manifest.read(folder / MANIFEST_NAME).blobs != mine.blobs:
        raise ValueError(
            f"Expected {folder} to hold no other datastore; choose another folder, or `pip install "
            "hf-knn`, which replaces a checkpoint as a whole."
        )


def fingerprint_files(
    weights: list[Path], processor: Path | None, pooling: str
) -> tuple[str, str, str, str]:
    """The fingerprint of what makes features, and its three parts.

    Args:
        weights: the files with the backbone's tensors.
        processor: the file with the processor's settings, if there is one.
        pooling: of the features.
    """
    weight_sum = _hash_stored_backbone(weights)
    processor_sum = ""
    if processor is not None and processor.is_file():
        processor_sum = hash_settings(_read_object(processor))
    return _combine(weight_sum, processor_sum, pooling), weight_sum, processor_sum, pooling


def hash_settings(settings: dict[str, Any]) -> str:
    """The sha256 of a processor's settings, wherever it runs."""
    kept = {key: value for key, value in settings.items() if key not in _PROCESSOR_PLACES}
    kind = str(kept.get("image_processor_type", ""))
    kept["image_processor_type"] = _BACKEND_SUFFIX.sub("", kind)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") and name not in _NO_WEIGHTS


def _stored_pooling(config: Path | None, fallback: str) -> str:
    """The pooling that the configuration beside the datastore asks for."""
    values = {} if config is None else _read_object(config)
    return str(values.get("knn_pooling") or values.get("pooling") or fallback)


def _read_object(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise DatastoreError(
            f"Expected {path.name} to hold a JSON object, but it does not; the file is damaged, "
            "download or save it again."
        )
    return values


def _combine(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _hash_stored_backbone(paths: list[Path]) -> str:
    """Hashes the backbone's tensors under the names and dtypes they are stored with."""
    place: dict[str, Path] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            place |= {name: path for name in file.keys() if name.startswith("backbone.")}  # noqa: SIM118

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in sorted(place):
            with safe_open(place[name], "pt") as file:
                yield name, file.get_tensor(name)

    return hash_tensors(tensors())
