"""A whole checkpoint: written beside and swapped in, read as one version, checked for staleness."""

import hashlib
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoImageProcessor
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, cached_file
from transformers.utils.hub import resolve_revision

from .backbone import digest, hash_tensors
from .datastore import Datastore
from .manifest import (
    BLOB_PATTERN,
    FAISS_NAME,
    MANIFEST_NAME,
    Binding,
    DatastoreError,
    FileRecord,
    Manifest,
    StaleDatastoreError,
)
from .storage import give_default_mode, replaced_folder

logger = logging.getLogger(__name__)

AUTO_MAP = {
    "AutoConfig": "configuration_knn.KnnConfig",
    "AutoModel": "modeling_knn.KnnForImageClassification",
    "AutoModelForImageClassification": "modeling_knn.KnnForImageClassification",
}

_WEIGHTS_PATTERN = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
)
_OWN_CODE = re.compile(
    r"(\w+_knn|backbone|blobs|checkpoint|datastore|functional|manifest|rows|search|storage)\.py"
)
# what the processor is called and where it runs does not change its pixels by intent
_PROCESSOR_NAMES = ("image_processor_type", "feature_extractor_type", "processor_class", "device")
_READ_ATTEMPTS = 3


def is_checkpoint_file(name: str) -> bool:
    """Whether a file name belongs to a checkpoint, so that a new version must not inherit it."""
    return (
        name in (CONFIG_NAME, IMAGE_PROCESSOR_NAME, MANIFEST_NAME, FAISS_NAME)
        or name.startswith(".datastore-")
        or any(p.fullmatch(name) for p in (_WEIGHTS_PATTERN, BLOB_PATTERN, _OWN_CODE))
    )


def write_checkpoint(
    model: Any, folder: Path, save_weights: Callable[..., None], options: dict[str, Any]
) -> None:
    """Writes a model with its processor and datastore as one version.

    Args:
        model: a `KnnForImageClassification`.
        folder: where to.
        save_weights: `PreTrainedModel.save_pretrained` of the model.
        options: further options of `save_weights`.

    Raises:
        OSError: if something could not be written; the old version is intact.
    """
    store = model.datastore
    model.config.has_datastore = store is not None
    model.config.auto_map = dict(AUTO_MAP)
    try:
        with replaced_folder(folder, is_checkpoint_file) as staging:
            save_weights(staging, push_to_hub=False, **options)
            if model.image_processor is not None:
                model.image_processor.save_pretrained(staging)
            for path in staging.glob("model*.safetensors"):
                give_default_mode(path)
            if store is not None:
                store.save(staging, binding=_bind(model, staging), reuse=folder)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"Could not save the checkpoint to {folder}: {error}. The version that was there is "
            "intact; free space or choose another folder."
        ) from error


class CheckpointReader:
    """Finds the files of one checkpoint, in a folder or on the Hub, all of one version.

    Args:
        name: a folder or a Hub id.
        options: the options of `from_pretrained` (`revision`, `token`, `cache_dir`, …).

    Attributes:
        revision: the commit all files come from (Hub only).
    """

    def __init__(self, name: str | Path, options: dict[str, Any]) -> None:
        names = ("token", "cache_dir", "local_files_only", "force_download", "subfolder")
        self.name = str(name)
        self.options = {key: options[key] for key in names if options.get(key) is not None}
        places = {key: self.options[key] for key in names[:3] if key in self.options}
        self.revision = resolve_revision(self.name, options.get("revision"), **places)
        self.attempts = 0
        self.seen: bytes | None = None

    def start(self) -> None:
        """Notes which version is there before anything is read."""
        self.attempts += 1
        self.seen = self._manifest_bytes()

    def resolve(self, name: str) -> Path | None:
        """Finds a file of the checkpoint by name; None if it has none."""
        found = cached_file(
            self.name, name, revision=self.revision,
            _raise_exceptions_for_missing_entries=False, **self.options,
        )  # fmt: skip
        return None if found is None else Path(found)

    def read_processor(self) -> Any:
        """The checkpoint's image processor, or None."""
        return load_processor(self.name, revision=self.revision, **self.options)

    def read_datastore(self, pooling: str, allow_stale: bool) -> Datastore | None:
        """Reads the datastore that belongs to the weights.

        Args:
            pooling: the pooling of the model's datastore features.
            allow_stale: accept features made by other weights, settings or pooling.

        Returns:
            The datastore; None if the checkpoint was replaced meanwhile and must be read again.

        Raises:
            DatastoreError: for damaged, missing or disagreeing files.
            StaleDatastoreError: for another fingerprint.
        """
        try:
            store = self._read_datastore(pooling, allow_stale)
        except (DatastoreError, OSError):
            if self._was_replaced():
                return None
            raise
        return None if self._was_replaced() else store

    def _read_datastore(self, pooling: str, allow_stale: bool) -> Datastore:
        path = self.resolve(MANIFEST_NAME)
        if path is None:
            raise DatastoreError(
                f"Expected {self.name} to hold {MANIFEST_NAME}, as its {CONFIG_NAME} says, but it "
                "is missing; pass load_datastore=False for the plain classifier."
            )
        manifest = Manifest.read(path)
        if manifest.binding is not None:
            self._check_binding(manifest.binding, pooling, allow_stale)
        return Datastore.from_manifest(manifest, self.resolve)

    def _check_binding(self, binding: Binding, pooling: str, allow_stale: bool) -> None:
        """Compares the files beside the datastore with those it was saved with."""
        problem: Exception | None = None
        for record in binding.files:
            try:
                record.verify(self.resolve(record.name))
            except DatastoreError as error:
                problem = problem or error
        weights = [self.resolve(r.name) for r in binding.files if r.name.endswith(".safetensors")]
        found = _fingerprint([w for w in weights if w], self.resolve(IMAGE_PROCESSOR_NAME), pooling)
        if found[0] != binding.fingerprint:
            parts = ("weights", "processor settings", "pooling")
            was = (binding.weights, binding.processor, binding.pooling)
            changed = [p for p, a, b in zip(parts, found[1:], was, strict=True) if a != b]
            problem = StaleDatastoreError(
                f"Expected a datastore made by the backbone beside it, fingerprint "
                f"{found[0][:12]}…, but it was made by {binding.fingerprint[:12]}… (other "
                f"{', '.join(changed)}); build it again, or pass allow_stale=True to use it anyway."
            )
        if problem is not None and not allow_stale:
            raise problem
        if problem is not None:
            logger.warning("Using a datastore that does not fit its checkpoint: %s", problem)

    def _manifest_bytes(self) -> bytes | None:
        path = self.resolve(MANIFEST_NAME)
        try:
            return None if path is None else path.read_bytes()
        except FileNotFoundError:
            return None

    def _was_replaced(self) -> bool:
        return self._manifest_bytes() != self.seen and self.attempts < _READ_ATTEMPTS


def load_processor(name: str, **options: Any) -> Any:
    """The image processor that comes with a model, or None if there is none.

    Args:
        name: a folder or a Hub id.
        options: `revision`, `token`, `cache_dir`, ….
    """
    lookup = {key: value for key, value in options.items() if key != "trust_remote_code"}
    found = cached_file(
        name, IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False, **lookup
    )
    return None if found is None else AutoImageProcessor.from_pretrained(name, **options)


def _bind(model: Any, folder: Path) -> Binding:
    """Ties a datastore to the files of the checkpoint that lie in `folder`."""
    weights = sorted(folder.glob("model*.safetensors"))
    pooling = model.config.store_pooling
    found = _fingerprint(weights, folder / IMAGE_PROCESSOR_NAME, pooling)
    fingerprint, weight_sum, processor_sum, _ = found
    now, then = digest(model.backbone), model.datastore.digest
    if then is not None and then != now:
        if then.partition(":")[0] == now.partition(":")[0]:
            logger.warning(
                "The backbone was trained since the datastore was built; it is saved as stale. "
                "Build it again before you save."
            )
            weight_sum = hashlib.sha256(then.encode()).hexdigest()
            fingerprint = _combine(weight_sum, processor_sum, pooling)
        else:
            logger.warning("The backbone is saved with another dtype than built the datastore.")
    names = [CONFIG_NAME, *(path.name for path in weights)]
    files = [FileRecord.of(folder / name) for name in names]
    dtype = str(model.dtype).removeprefix("torch.")
    return Binding(fingerprint, weight_sum, processor_sum, pooling, dtype, files)


def _fingerprint(
    weights: list[Path], processor: Path | None, pooling: str
) -> tuple[str, str, str, str]:
    """The fingerprint of what makes features, and its three parts."""
    weight_sum = _hash_stored_backbone(weights)
    processor_sum = ""
    if processor is not None and processor.is_file():
        settings = json.loads(processor.read_text(encoding="utf-8"))
        kept = {key: value for key, value in settings.items() if key not in _PROCESSOR_NAMES}
        text = json.dumps(kept, sort_keys=True)
        processor_sum = hashlib.sha256(text.encode()).hexdigest()
    return _combine(weight_sum, processor_sum, pooling), weight_sum, processor_sum, pooling


def _combine(*parts: str) -> str:
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
