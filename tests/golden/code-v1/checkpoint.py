"""A whole checkpoint: written beside and swapped in, read as one version, checked for staleness."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import (
    CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
)

from .backbone import hash_tensors, same_weights, weight_marks
from .datastore import Datastore
from .datastore_reference import DatastoreReference, RemoteConsent, read_manifest
from .hub_files import HubFiles
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
from .milvus_store import MilvusDatastore
from .model_card import (
    MEASURED_NAME,
    NEIGHBORS_NAME,
    RELIABILITY_NAME,
    is_made_here,
    make_card,
    read_measured,
    read_picture,
    write_measured,
)
from .pending_change import PENDING_NAME, explain_pending, is_pending
from .processors import load_processor
from .publishing import CARD_NAME
from .receipts import CHANGES_NAME, Receipt, read_changes, write_changes
from .search_backend import SearchBackend
from .storage import give_default_mode, identity, link_or_copy, replaced_folder
from .thumbnails import THUMBNAILS_NAME, Thumbnails

logger = logging.getLogger(__name__)

AUTO_MAP = {
    "AutoConfig": "configuration_knn.KnnConfig",
    "AutoModel": "modeling_knn.KnnForImageClassification",
    "AutoModelForImageClassification": "modeling_knn.KnnForImageClassification",
}

_WEIGHTS_PATTERN = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
)
OWN_CODE = (
    "backbone.py", "blobs.py", "checkpoint.py", "class_names.py", "confidence.py",
    "configuration_knn.py", "datastore.py", "datastore_changes.py", "datastore_files.py",
    "datastore_opening.py", "datastore_reference.py", "datastore_rows.py", "datastore_search.py",
    "explaining.py", "faiss_index.py", "first_pass.py", "flips.py", "following.py", "functional.py",
    "heads.py", "hub_files.py", "images.py", "indexing.py", "manifest.py", "milvus_changes.py",
    "milvus_client.py", "milvus_collection.py", "milvus_index.py", "milvus_load.py",
    "milvus_reading.py", "milvus_rows.py", "milvus_search.py", "milvus_store.py", "model_card.py",
    "modeling_knn.py", "pending_change.py", "persistence.py", "processors.py", "publishing.py",
    "receipts.py", "remembering.py", "ridge_head.py", "ridge_state.py", "row_fingerprint.py",
    "row_table.py", "rows.py", "search.py", "search_backend.py", "storage.py", "teaching.py",
    "thumbnails.py",
)  # fmt: skip
"""The files that travel with a checkpoint for `trust_remote_code`."""

# where the processor runs does not change its pixels by intent
_PROCESSOR_PLACES = ("feature_extractor_type", "processor_class", "device")
_BACKEND_SUFFIX = re.compile(r"(Fast|Pil)$")
STALE = "stale"
"""What a datastore that was forced onto other weights remembers as its maker."""

_READ_ATTEMPTS = 3
_LABELS_CHECKED_AT_ONCE = 500_000  # reading them would read all of a large, mapped datastore


def is_checkpoint_file(name: str) -> bool:
    """Whether a file name belongs to a checkpoint, so that a new version must not inherit it."""
    return (
        name in (CONFIG_NAME, IMAGE_PROCESSOR_NAME, MANIFEST_NAME, FAISS_NAME)
        or name in (MEASURED_NAME, NEIGHBORS_NAME, CHANGES_NAME, THUMBNAILS_NAME, *OWN_CODE)
        or name.startswith((".datastore-", PENDING_NAME, f".{PENDING_NAME}"))
        or any(pattern.fullmatch(name) for pattern in (_WEIGHTS_PATTERN, BLOB_PATTERN))
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
    if store is not None:
        check_fits(store, model.config)
    model.config.has_datastore = store is not None
    model.config.auto_map = dict(AUTO_MAP)
    try:
        with replaced_folder(folder, is_checkpoint_file) as staging:
            _refuse_pending(store, folder)
            save_weights(staging, push_to_hub=False, **options)
            if model.image_processor is not None:
                model.image_processor.save_pretrained(staging)
            if model.measured is not None:
                write_measured(model.measured, staging)
            if model.changes:
                write_changes(model.changes, staging)
            if model.neighbor_picture is not None:
                (staging / NEIGHBORS_NAME).write_bytes(model.neighbor_picture)
            _write_thumbnails(model, staging)
            for path in staging.glob("model*.safetensors"):
                give_default_mode(path)
            if store is not None:
                store.save(staging, binding=_bind(model, staging), reuse=folder)
            _write_card(model, folder, staging)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"Could not save the checkpoint to {folder}: {error}. The version that was there is "
            "intact; free space or choose another folder."
        ) from error


def _write_card(model: Any, folder: Path, staging: Path) -> None:
    """The card as it is made at a push; one that is all a user's own stays as it is."""
    name, card, drawing = folder.resolve().name, folder / CARD_NAME, folder / RELIABILITY_NAME
    existing = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    if existing is not None and not is_made_here(existing):
        return
    if drawing.is_file() and model.measured is not None:
        link_or_copy(str(drawing), str(staging / RELIABILITY_NAME))
    (staging / CARD_NAME).write_text(make_card(model, name, existing, staging), encoding="utf-8")


def _refuse_pending(store: SearchBackend | None, folder: Path) -> None:
    """Keeps what takes another's change back, which the new version would not have."""
    own = store.journal if isinstance(store, MilvusDatastore) else None
    if is_pending(folder) and own != folder.resolve() / PENDING_NAME:
        raise DatastoreError(
            f"Expected {folder} to be whole, to be saved over. {explain_pending(folder)}"
        )


def _write_thumbnails(model: Any, folder: Path) -> None:
    """Those of the rows that there are: no byte of a row that is gone reaches the disk."""
    if model.thumbnails is None or model.datastore is None:
        return
    kept = model.thumbnails.only(model.datastore.ids.tolist())
    if len(kept):
        kept.save(folder)
        give_default_mode(folder / THUMBNAILS_NAME)


def made_by(model: Any) -> str:
    """Fingerprint of what makes a model's datastore features: weights, processor and pooling."""
    settings = "" if model.image_processor is None else model.image_processor.to_json_string()
    processor_sum = _hash_settings(json.loads(settings)) if settings else ""
    return "|".join([weight_marks(model.backbone), processor_sum, model.config.store_pooling])


def _is_same_maker(first: str, second: str) -> bool:
    """Whether two `made_by` agree, up to a cast of the weights."""
    if STALE in (first, second):
        return False
    (weights, *rest), (other_weights, *other_rest) = first.split("|"), second.split("|")
    return rest == other_rest and same_weights(weights, other_weights)


def check_fits(store: SearchBackend, config: Any) -> None:
    """Refuses a datastore that a model cannot use.

    Args:
        store: the datastore.
        config: the model's `KnnConfig`.

    Raises:
        ValueError: naming what disagrees and both values.
    """
    width = config.extra_dim or config.feature_dim
    pairs = [("width", store.dim, width), ("metric", store.metric, config.metric)]
    pairs.append(("normalization", store.normalization, config.normalization))
    for name, found, wanted in pairs:
        if found != wanted:
            raise ValueError(
                f"Expected a datastore of {name} {wanted}, as the model has, but got {found}."
            )
    beyond = store.label_beyond(config.classes)
    if beyond is not None:
        raise ValueError(
            f"Expected labels below {config.classes} in the datastore, the number of classes of "
            f"the model, but got {beyond}."
        )


class CheckpointReader(HubFiles):
    """Finds the files of one checkpoint, and reads it as one version."""

    def attempts(self) -> Iterator["CheckpointAttempt"]:
        """Attempts to read the checkpoint, until one saw a single version.

        Raises:
            DatastoreError: if the checkpoint was replaced during every attempt.
        """
        for _ in range(_READ_ATTEMPTS):
            yield CheckpointAttempt(self)
        raise DatastoreError(
            f"Expected to read one version of {self.name}, but it was replaced {_READ_ATTEMPTS} "
            "times meanwhile; try again when nobody writes it."
        )

    def read_processor(self) -> Any:
        """The checkpoint's image processor, or None."""
        return load_processor(self.name, revision=self.revision, **self.options)

    def read_measured(self) -> dict[str, Any] | None:
        """What the checkpoint says was measured, or None."""
        return read_measured(self.resolve(MEASURED_NAME))

    def read_changes(self) -> list[Receipt]:
        """What was taught and forgotten since the training, as far as the checkpoint says."""
        return read_changes(self.resolve(CHANGES_NAME))

    def read_neighbor_picture(self) -> bytes | None:
        """The picture of neighbours that comes with the checkpoint, or None."""
        return read_picture(self.resolve(NEIGHBORS_NAME))


class CheckpointAttempt:
    """One attempt to read a checkpoint: notes which version is there before anything is read.

    Args:
        reader: finds the files.

    Attributes:
        manifest: of the datastore, or what it refers to; None if there is none.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        self.reader = reader
        self.seen = self._manifest_identity()
        self.manifest: Manifest | DatastoreReference | None = None
        self.is_stale = False

    def verify(self, allow_stale: bool) -> None:
        """Compares the files beside the datastore with those it was saved with.

        Args:
            allow_stale: warn instead of refusing.

        Raises:
            DatastoreError: for damaged, missing or disagreeing files, naming them.
            StaleDatastoreError: for a datastore of other weights, settings or pooling.
        """
        path = self.reader.resolve(MANIFEST_NAME)
        if path is None:
            return
        self.manifest = read_manifest(path)
        if self.manifest.binding is None:
            return
        problem = self._find_problem(self.manifest.binding)
        if problem is not None and not allow_stale:
            raise problem
        if problem is not None:
            self.is_stale = isinstance(problem, StaleDatastoreError)
            logger.warning("Using a datastore that does not fit its checkpoint: %s", problem)

    def read_datastore(
        self, model: Any, trust_faiss_index: bool, consent: RemoteConsent
    ) -> SearchBackend | None:
        """Reads the datastore that belongs to a model; checks every byte of a downloaded one.

        Args:
            model: the model that was loaded from this checkpoint.
            trust_faiss_index: see `Datastore.load`.
            consent: whether a server may be asked, if the rows lie on one.

        Returns:
            The datastore; None if the checkpoint has none.

        Raises:
            DatastoreError: for damaged, missing or disagreeing files or rows.
            DatastoreConnectionError: for a server that does not answer.
            ValueError: for a server that may not be asked.
        """
        if self.manifest is None:
            if model.config.has_datastore:
                raise DatastoreError(
                    f"Expected {self.reader.name} to hold {MANIFEST_NAME}, as its {CONFIG_NAME} "
                    "says, but it is missing; pass load_datastore=False for the plain classifier."
                )
            return None
        store: SearchBackend
        if isinstance(self.manifest, DatastoreReference):
            store = self._open_elsewhere(self.manifest, consent)
        else:
            store = Datastore.from_manifest(
                self.manifest,
                self.reader.resolve,
                verify="auto" if self.reader.is_folder else "full",
                trust_faiss_index=trust_faiss_index,
            )
        if len(store) < _LABELS_CHECKED_AT_ONCE or store.location is not None:
            check_fits(store, model.config)
        store.digest = STALE if self.is_stale else made_by(model)
        binding = self.manifest.binding
        dtype = str(model.dtype).removeprefix("torch.")
        if binding is not None and dtype != binding.dtype:
            logger.warning(
                "The backbone is loaded as %s, but %s made the datastore's features; similarities "
                "can differ a little.", dtype, binding.dtype,
            )  # fmt: skip
        return store

    def _open_elsewhere(
        self, reference: DatastoreReference, consent: RemoteConsent
    ) -> MilvusDatastore:
        try:
            return MilvusDatastore.open(
                reference, trust_remote_datastore=consent.trusted, uri=consent.uri,
                token=consent.token,
            )  # fmt: skip
        except DatastoreError as error:
            folder = Path(self.reader.name)
            if not self.reader.is_folder or not is_pending(folder):
                raise
            # not the advice for a collection alone, to take the rows that are there
            raise DatastoreError(
                f"Expected the rows of {folder} to be those that it names, but they are not. "
                f"{explain_pending(folder)}"
            ) from error

    def read_thumbnails(self) -> Thumbnails | None:
        """Small pictures of the rows, if the datastore's manifest names their file.

        Raises:
            DatastoreError: for a damaged file.
        """
        binding = None if self.manifest is None else self.manifest.binding
        if binding is None or THUMBNAILS_NAME not in [record.name for record in binding.files]:
            return None
        return Thumbnails.load(self.reader.resolve(THUMBNAILS_NAME))

    def was_replaced(self) -> bool:
        """Whether another version is there than when this attempt began."""
        return self._manifest_identity() != self.seen

    def _find_problem(self, binding: Binding) -> DatastoreError | None:
        damaged: list[DatastoreError] = []
        found: dict[str, Path] = {}
        for record in binding.files:
            path = self.reader.resolve(record.name)
            if path is not None:
                found[record.name] = path
            try:
                record.verify(path)
            except DatastoreError as error:
                damaged.append(error)
        names = [record.name for record in binding.files if _is_weights(record.name)]
        if any(name not in found for name in names):
            return damaged[0]
        processor = self.reader.resolve(IMAGE_PROCESSOR_NAME)
        try:
            pooling = _stored_pooling(self.reader.resolve(CONFIG_NAME), binding.pooling)
            now = _fingerprint([found[name] for name in names], processor, pooling)
        except DatastoreError as error:
            return damaged[0] if damaged else error
        except SafetensorError:
            # not a readable file: which one, the hashes say
            return damaged[0] if damaged else None
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

    def _manifest_identity(self) -> tuple[int, int, int] | None:
        if not self.reader.is_folder:
            return None  # a commit does not change
        path = self.reader.resolve(MANIFEST_NAME)
        return None if path is None else identity(path)


def _bind(model: Any, folder: Path) -> Binding:
    """Ties a datastore to the files of the checkpoint that lie in `folder`."""
    weights = sorted(folder.glob("model*.safetensors"))
    pooling = model.config.store_pooling
    found = _fingerprint(weights, folder / IMAGE_PROCESSOR_NAME, pooling)
    fingerprint, weight_sum, processor_sum, _ = found
    then = model.datastore.digest
    if then is not None and not _is_same_maker(then, made_by(model)):
        logger.warning(
            "The datastore was not made by the backbone, image processor and pooling as they are "
            "now; it is saved as stale. "
            "Build it again before you save."
        )
        weight_sum = hashlib.sha256(then.encode()).hexdigest()
        fingerprint = _combine(weight_sum, processor_sum, pooling)
    dtype = str(model.dtype).removeprefix("torch.")
    before = model.datastore.binding
    if before and before.dtype != dtype:
        logger.warning("The backbone is saved as %s, another dtype than %s.", dtype, before.dtype)
    names = [CONFIG_NAME, *(path.name for path in weights)]
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        names.append(SAFE_WEIGHTS_INDEX_NAME)
    if (folder / THUMBNAILS_NAME).is_file():
        names.append(THUMBNAILS_NAME)
    files = [FileRecord.of(folder / name) for name in names]
    return Binding(fingerprint, weight_sum, processor_sum, pooling, dtype, files)


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") and name != THUMBNAILS_NAME


def _fingerprint(
    weights: list[Path], processor: Path | None, pooling: str
) -> tuple[str, str, str, str]:
    """The fingerprint of what makes features, and its three parts."""
    weight_sum = _hash_stored_backbone(weights)
    processor_sum = ""
    if processor is not None and processor.is_file():
        processor_sum = _hash_settings(_read_object(processor))
    return _combine(weight_sum, processor_sum, pooling), weight_sum, processor_sum, pooling


def _hash_settings(settings: dict[str, Any]) -> str:
    kept = {key: value for key, value in settings.items() if key not in _PROCESSOR_PLACES}
    kept["image_processor_type"] = _BACKEND_SUFFIX.sub(
        "", str(kept.get("image_processor_type", ""))
    )
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _stored_pooling(config: Path | None, fallback: str) -> str:
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
