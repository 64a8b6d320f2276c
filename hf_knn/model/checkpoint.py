"""A whole checkpoint: written beside and swapped in, read as one version, checked for staleness."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME

from ..core.config import KnnConfig
from ..core.manifest import (
    MANIFEST_NAME,
    Binding,
    DatastoreError,
    Manifest,
    StaleDatastoreError,
)
from ..core.plain_json import read_json
from ..core.reading import (
    CONTENTS_NAME,
    HUB_OPTIONS,
    THUMBNAILS_NAME,
    HubFiles,
    bind,
    check_fits,
    find_problem,
    hash_settings,
    refuse_missing,
    warn_of_dtype,
)
from ..store.backend import RowStore, learned_map_of
from ..store.datastore import Datastore
from ..store.folders import give_default_mode, identity, link_or_copy, replaced_folder, restore
from ..store.hub import CARD_NAME
from ..store.kept import tidy
from ..store.remote import (
    PENDING_NAME,
    DatastoreReference,
    RemoteConsent,
    explain_pending,
    is_pending,
    open_remote,
    read_manifest,
)
from .backbones import same_weights, weight_marks
from .before import (
    BEFORE_NAME,
    SHOWS_ROWS,
    carry_versions,
    is_checkpoint_file,
    keep_version,
    kept_versions,
    remove_version,
    rows_alike,
    version_files,
)
from .card import (
    MEASURED_NAME,
    NEIGHBORS_NAME,
    RELIABILITY_NAME,
    is_made_here,
    make_card,
    read_measured,
    read_picture,
    write_measured,
)
from .code import AUTO_MAP, legacy_code, reader_of, write_code
from .contents import Contents
from .memory import Memory
from .pictures import Thumbnails
from .receipts import CHANGES_NAME, read_changes, write_changes

if TYPE_CHECKING:
    from .modeling import KnnForImageClassification

logger = logging.getLogger(__name__)

STALE = "stale"
"""What a datastore that was forced onto other weights remembers as its maker."""

_OLDER = "erased in an older version that is kept, too"
_ERASED = "erased in the version before the last training too: {} of its rows"
_ERASED_ALL = (
    "the version before the last training was erased too, since it may hold the same pictures; "
    "undo cannot bring it back"
)

_READ_ATTEMPTS = 3
_LABELS_CHECKED_AT_ONCE = 500_000  # reading them would read all of a large, mapped datastore


def is_damage(error: Exception) -> bool:
    """Whether a file was not what it should be, rather than refused for what it says."""
    return isinstance(error, DatastoreError | SafetensorError) or isinstance(
        error.__context__, JSONDecodeError | UnicodeDecodeError
    )


def write_checkpoint(
    model: "KnnForImageClassification",
    folder: Path,
    save_weights: Callable[..., None],
    options: dict[str, Any],
    keep_replaced: int = 0,
) -> None:
    """Writes a model with its processor and datastore as one version.

    Args:
        model: a `KnnForImageClassification`.
        folder: where to.
        save_weights: `PreTrainedModel.save_pretrained` of the model.
        options: further options of `save_weights`.
        keep_replaced: how many versions to keep, that which is there and older ones, see
            `before`; 0 keeps those that are kept.

    Raises:
        OSError: if something could not be written; the old version is intact.
    """
    store = model.datastore
    if store is not None:
        check_store(store, model.config)
    model.config.has_datastore = store is not None
    model.config.auto_map = dict(AUTO_MAP)
    gone = legacy_code(reader_of(folder)) | {BEFORE_NAME}
    if keep_replaced:
        gone |= version_files(folder)
    if model.memory.gone:
        gone |= {*SHOWS_ROWS}
    note = ""

    def is_owned(name: str) -> bool:
        return is_checkpoint_file(name) or name in gone

    try:
        with replaced_folder(folder, is_owned) as staging:
            _refuse_pending(store, folder)
            kept = kept_versions(folder)
            if keep_replaced:
                keep_version(folder, staging, kept[: keep_replaced - 1])
            else:
                carry_versions(kept, staging)
            note = _erase_forgotten(model, staging / BEFORE_NAME)
            memory = model.memory
            changes = (memory.remarked(note) if note and memory.receipts else memory).receipts
            save_weights(staging, push_to_hub=False, **options)
            write_code(staging)
            if model.image_processor is not None:
                model.image_processor.save_pretrained(staging)
            if model.measured is not None:
                write_measured(model.measured, staging)
            if changes:
                write_changes(changes, staging)
            if model.neighbor_picture is not None:
                (staging / NEIGHBORS_NAME).write_bytes(model.neighbor_picture)
            _write_pictures(model, staging)
            for path in staging.glob("model*.safetensors"):
                give_default_mode(path)
            if store is not None:
                store.save(staging, binding=_bind(model, staging), reuse=folder)
            drawing = folder / RELIABILITY_NAME
            if drawing.is_file() and model.measured is not None and not keep_replaced:
                link_or_copy(str(drawing), str(staging / RELIABILITY_NAME))
            write_card(model, folder, staging)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"Could not save the checkpoint to {folder}: {error}. The version that was there is "
            "intact; free space or choose another folder."
        ) from error
    tidy()
    if note:
        model.changes = changes


def _erase_forgotten(model: "KnnForImageClassification", place: Path) -> str:
    """Erases in the versions before what was forgotten since the model was opened.

    Args:
        model: that forgot it.
        place: of the last version, in a folder that nobody reads yet; older ones are inside of it.

    Returns:
        What was erased; empty for nothing.
    """
    if not place.is_dir() or not model.memory.gone:
        return ""
    # each of them is asked about what this model forgot: one between may not have had the rows
    older = _erase_forgotten(model, place / BEFORE_NAME)
    own = _erase_in_one(model, place)
    return own + (f"; {_OLDER}" if own else _OLDER) if older else own


def _erase_in_one(model: "KnnForImageClassification", place: Path) -> str:
    memory = model.memory
    for name in SHOWS_ROWS:
        (place / name).unlink(missing_ok=True)
    try:
        earlier = type(model).from_pretrained(place)
        alike = _alike(memory, earlier.memory)
    except (OSError, ValueError, SafetensorError) as error:
        logger.warning("The version before the last training cannot be opened: %s", error)
        alike = None
    if alike is not None and not len(alike):
        return ""
    if alike is None or len(alike) == len(earlier.datastore):
        remove_version(place)
        return _ERASED_ALL
    earlier.forget(alike)
    earlier.save_pretrained(place)
    (place / CARD_NAME).unlink(missing_ok=True)
    return _ERASED.format(len(alike))


def _alike(memory: Memory, earlier: Memory) -> Tensor:
    """Ids of the rows of an earlier version that may be of forgotten pictures."""
    if earlier.rows is None:
        return torch.empty(0, dtype=torch.int64)
    makers = (STALE if m.rows is None else m.rows.digest or STALE for m in (memory, earlier))
    return rows_alike(earlier.rows, earlier.contents, memory.gone, _is_same_maker(*makers))


def write_card(model: "KnnForImageClassification", folder: Path, staging: Path) -> None:
    """Writes the card as it is made at a push; one that is all a user's own stays as it is.

    Args:
        model: what it is about.
        folder: with the card that is there; it names the model.
        staging: where the new one goes.
    """
    name, card = folder.resolve().name, folder / CARD_NAME
    existing = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    if existing is not None and not is_made_here(existing):
        return
    (staging / CARD_NAME).write_text(make_card(model, name, existing, staging), encoding="utf-8")


def _refuse_pending(store: RowStore | None, folder: Path) -> None:
    """Keeps what takes another's change back, which the new version would not have."""
    own = None if store is None else store.journal
    if is_pending(folder) and own != folder.resolve() / PENDING_NAME:
        raise DatastoreError(
            f"Expected {folder} to be whole, to be saved over. {explain_pending(folder)}"
        )


def _write_pictures(model: "KnnForImageClassification", folder: Path) -> None:
    """Small pictures and prints of the rows that there are: no byte of one that is gone."""
    memory, rows = model.memory, model.datastore
    small, contents = memory.thumbnails, memory.contents
    if rows is None or not (small or contents):
        return
    if small or rows.location is None:  # else asking a server for all ids would take long
        ids = rows.ids.tolist()
        small, contents = small and small.only(ids), contents and contents.only(ids)
    for name, part in ((THUMBNAILS_NAME, small), (CONTENTS_NAME, contents)):
        if part:
            part.save(folder)
            give_default_mode(folder / name)


def made_by(model: "KnnForImageClassification") -> str:
    """Fingerprint of what makes a model's datastore features: weights, processor and pooling."""
    settings = "" if model.image_processor is None else model.image_processor.to_json_string()
    processor_sum = hash_settings(json.loads(settings)) if settings else ""
    return "|".join([weight_marks(model.backbone), processor_sum, model.config.store_pooling])


def _is_same_maker(first: str, second: str) -> bool:
    """Whether two `made_by` agree, up to a cast of the weights."""
    if STALE in (first, second):
        return False
    (weights, *rest), (other_weights, *other_rest) = first.split("|"), second.split("|")
    return rest == other_rest and same_weights(weights, other_weights)


def check_store(store: RowStore, config: KnnConfig) -> None:
    """Refuses a datastore that a model cannot use; see `check_fits`."""
    has_map, largest = learned_map_of(store) is not None, store.label_beyond(config.classes)
    check_fits(config, store.dim, store.metric, store.normalization, has_map, largest)


class CheckpointReader(HubFiles):
    """Finds the files of one checkpoint, and reads it as one version.

    Args:
        name: a folder or a Hub id; a folder that an interrupted save left hidden is put back.
        options: see `HubFiles`.
    """

    def __init__(self, name: str | Path | None, options: dict[str, Any]) -> None:
        if name is not None:
            restore(Path(name))
        super().__init__(name, options)

    @property
    def commit(self) -> str | None:
        """The commit all files come from; None for a folder, or where nobody could be asked."""
        return None if self.is_folder else getattr(self.revision, "resolved", None)

    @property
    def is_folder(self) -> bool:
        """Whether they lie in a folder here."""
        return Path(self.name).is_dir()

    def download_again(self) -> bool:
        """Ignores what was downloaded before, since it was damaged on its way; False if it cannot.

        The client of the Hub compares sizes only.
        """
        if self.is_folder or any(self.options.get(name) for name in HUB_OPTIONS[2:4]):
            return False
        logger.warning("Downloading %s again: a file does not match its hash.", self.name)
        self.options["force_download"] = True
        return True

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

    def check_settings(self) -> None:
        """Reads what transformers will read, which a nesting without end would send astray.

        Raises:
            DatastoreError: naming the file that is none of ours.
        """
        names = [CONFIG_NAME, IMAGE_PROCESSOR_NAME]
        names += [SAFE_WEIGHTS_INDEX_NAME] if self.is_folder else []
        for path in map(self.resolve, names):
            if path is not None:
                read_json(path)

    def read_memory(self, memory: Memory) -> Memory:
        """With what the checkpoint says beside its rows: receipts, measurements, and a picture.

        Args:
            memory: of the model that was loaded from it.
        """
        return replace(
            memory,
            receipts=tuple(read_changes(self.resolve(CHANGES_NAME))),
            measured=read_measured(self.resolve(MEASURED_NAME)),
            picture=read_picture(self.resolve(NEIGHBORS_NAME)),
        )


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
        problem = find_problem(self.reader.resolve, self.manifest.binding)
        if problem is not None and not allow_stale:
            raise problem
        if problem is not None:
            self.is_stale = isinstance(problem, StaleDatastoreError)
            logger.warning("Using a datastore that does not fit its checkpoint: %s", problem)

    def read_datastore(
        self, model: "KnnForImageClassification", trust_faiss_index: bool, consent: RemoteConsent
    ) -> RowStore | None:
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
            refuse_missing(self.reader.name, model.config)
            return None
        store: RowStore
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
            check_store(store, model.config)
        store.digest = STALE if self.is_stale else made_by(model)
        binding = self.manifest.binding
        warn_of_dtype(model.dtype, binding)
        return store

    def _open_elsewhere(self, reference: DatastoreReference, consent: RemoteConsent) -> RowStore:
        try:
            return open_remote(reference, consent)
        except DatastoreError as error:
            folder = Path(self.reader.name)
            if not self.reader.is_folder or not is_pending(folder):
                raise
            # not the advice for a collection alone, to take the rows that are there
            raise DatastoreError(
                f"Expected the rows of {folder} to be those that it names, but they are not. "
                f"{explain_pending(folder)}"
            ) from error

    def read_pictures(self, memory: Memory) -> Memory:
        """With small pictures and prints of the rows, if the datastore's manifest names the files.

        Args:
            memory: with the rows.

        Raises:
            DatastoreError: for a damaged file.
        """
        binding = None if self.manifest is None else self.manifest.binding
        bound = [] if binding is None else [record.name for record in binding.files]
        places = [
            self.reader.resolve(name) if name in bound else None
            for name in (THUMBNAILS_NAME, CONTENTS_NAME)
        ]
        small, contents = Thumbnails.load(places[0]), Contents.load(places[1])
        return replace(memory, thumbnails=small, contents=contents)

    def was_replaced(self) -> bool:
        """Whether another version is there than when this attempt began."""
        return self._manifest_identity() != self.seen

    def _manifest_identity(self) -> tuple[int, int, int] | None:
        if not self.reader.is_folder:
            return None  # a commit does not change
        path = self.reader.resolve(MANIFEST_NAME)
        return None if path is None else identity(path)


def _bind(model: "KnnForImageClassification", folder: Path) -> Binding:
    """Ties a datastore to the files of the checkpoint that lie in `folder`."""
    store, weight_sum = model.datastore, None
    assert store is not None
    if store.digest is not None and not _is_same_maker(store.digest, made_by(model)):
        logger.warning(
            "The datastore was not made by the backbone, image processor and pooling as they are "
            "now; it is saved as stale. "
            "Build it again before you save."
        )
        weight_sum = hashlib.sha256(store.digest.encode()).hexdigest()
    dtype = str(model.dtype).removeprefix("torch.")
    before = store.binding
    if before and before.dtype != dtype:
        logger.warning("The backbone is saved as %s, another dtype than %s.", dtype, before.dtype)
    return bind(folder, model.config.store_pooling, dtype, weight_sum)
