"""Changes of a model without training: rows come, go or get other labels, and a ridge head follows.

Every function changes all it should or nothing, and returns a receipt. Numbers of classes never
change while rows have them: a new class gets the next number, one without rows keeps its own.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.backbone import extract, split_features
from ..core.rows import Values, as_whole_numbers
from ..core.votes import Metric, Weighting
from ..data.decode import BadImageError, decode_image
from ..milvus.datastore import MilvusDatastore
from ..store.backend import SearchBackend, as_row_store, check_alike
from ..store.datastore import Datastore
from ..store.table import StoredRows, combine, sum_of
from .receipts import Change, Receipt, Scope
from .ridge import center_head, follows_rows, prepare_rows, solve_head, sum_rows
from .thumbnails import Thumbnails, small_webp

Label = str | int


def number_of(model: Any, label: Label) -> int:
    """The number of a class that a model has.

    Raises:
        ValueError: for another name or number.
    """
    names = model.config.class_names
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return label
    raise ValueError(
        f"Expected a class that the model has, by name or number below {len(names)}, but got "
        f"{label!r}; its classes are {names[:20]}."
    )


def numbers_of(model: Any, labels: Sequence[Label], count: int) -> tuple[Tensor, list[str]]:
    """[M] class numbers, and the names of those that are new.

    Raises:
        ValueError: for another number of labels than `count`, or a label that cannot be one.
    """
    values: Any = labels
    wanted = values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)
    if isinstance(labels, str) or len(wanted) != count:
        raise ValueError(f"Expected one label per row ({count}), but got {labels!r:.200}.")
    known = {name: number for number, name in enumerate(model.config.class_names)}
    first, numbers = len(known), []
    for label in wanted:
        if isinstance(label, str) and label not in known:
            known[check_class_name(label)] = len(known)
        numbers.append(known[label] if isinstance(label, str) else number_of(model, label))
    return torch.tensor(numbers, dtype=torch.int64), list(known)[first:]


def check_class_name(name: str) -> str:
    """Refuses names that cannot be shown.

    Raises:
        ValueError: for an empty one, a very long one, or one with control characters.
    """
    if not name.strip() or len(name) > 200 or not name.isprintable():
        raise ValueError(
            f"Expected the name of a class to be printable text of 1 to 200 characters, but got "
            f"{name[:60]!r}."
        )
    return name


def append_classes(config: Any, names: Sequence[str]) -> None:
    """Appends classes, for which the neighbours speak in full until the blend is tuned again."""
    if names and config.num_tuned_labels is None:
        config.num_tuned_labels = config.classes
    name_classes(config, [*config.class_names, *names])


def name_classes(config: Any, names: Sequence[str]) -> None:
    """Gives the classes these names, in the order of their numbers."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}


_KEPT = (
    "measured", "forgotten", "forgotten_mean", "forgotten_thumbnails", "forgotten_picture",
    "thumbnails", "neighbor_picture",
)  # fmt: skip


class Follower:
    """What is kept in step with a datastore while rows come and go: its hash, and a ridge head.

    Attributes:
        total: sum of the rows' hashes.
        ridge: sums behind the head; None if it does not follow.
    """

    def __init__(self, model: Any) -> None:
        self.total = model.datastore.hash_sum()
        self.ridge = sum_rows(model) if follows_rows(model.config) else None
        self._seen = _marks(model.datastore)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # pickles of a model count again when they need to

    def __deepcopy__(self, memo: dict[int, Any]) -> "Follower":
        copied = object.__new__(Follower)
        copied.total, copied.ridge = self.total, self.ridge and self.ridge.copy()
        store, *rows = self._seen  # the copy of a datastore shares its rows until it changes
        copied._seen = (copy.deepcopy(store, memo), *rows)
        return copied

    def is_of(self, model: Any) -> bool:
        """Whether datastore and head are the ones this was made from."""
        same = all(a is b for a, b in zip(self._seen, _marks(model.datastore), strict=True))
        return same and (self.ridge is not None) == follows_rows(model.config)

    def fingerprint(self, store: Any) -> str:
        """Of all rows and the mean, whatever the order of the rows."""
        return combine(self.total, len(store), store.mean, store.metric, store.normalization)

    def follow(self, model: Any) -> None:
        """Says that everything was changed alike; a ridge head is solved again."""
        self._seen = _marks(model.datastore)
        if self.ridge is not None:
            model.head.classifier = solve_head(self.ridge, model.config, model.head)
            model.config.num_head_labels = self.ridge.num_labels


def rows_of(model: Any) -> Datastore | MilvusDatastore:
    """The datastore of a model, to be changed.

    Args:
        model: a `KnnForImageClassification`.

    Raises:
        ValueError: without one.
    """
    store: Datastore | MilvusDatastore | None = model.datastore
    if store is None:
        raise ValueError(
            "Expected a model with a datastore to change, but it has none; train it first."
        )
    return store


def follower_of(model: Any) -> Follower:
    """What follows a model's datastore; rows that were changed behind its back are counted again.

    Args:
        model: a `KnnForImageClassification` with a datastore.
    """
    if model.follower is None or not model.follower.is_of(model):
        model.follower = Follower(model)
    return model.follower


def _marks(store: Any) -> tuple[Any, ...]:
    """The datastore, and objects that are replaced when rows, labels or mean change."""
    return store, *store.marks


@contextmanager
def whole_change(model: Any) -> Iterator[None]:
    """What fails in the middle leaves rows, mean, head, names and receipts as they were.

    Args:
        model: a `KnnForImageClassification`.

    Raises:
        ValueError: see `rows_of`.
        DatastoreConnectionError: if rows in Milvus changed and the server then went away.
    """
    store: Any = rows_of(model)
    head, config, marks = model.head, model.config, store.marks
    rows, names, changes = copy.copy(store), config.class_names, list(model.changes)
    counts = config.num_head_labels, config.num_tuned_labels
    classifier, mean, scale = head.classifier, head.mean.clone(), head.scale.clone()
    kept = {name: getattr(model, name) for name in _KEPT}
    try:
        yield
    except BaseException:
        head.classifier = classifier
        head.mean.copy_(mean)
        head.scale.copy_(scale)
        name_classes(config, names)
        config.num_head_labels, config.num_tuned_labels = counts
        model.changes[:] = changes
        for name, value in kept.items():
            setattr(model, name, value)
        if any(one is not other for one, other in zip(store.marks, marks, strict=True)):
            model.follower = None
            store.restore(rows)
        raise


def recenter_rows(model: Any, follower: Follower, mean: Tensor | None = None) -> None:
    """Moves the mean, with which all that a ridge head has summed up changes.

    Args:
        model: a `KnnForImageClassification`.
        follower: of the model.
        mean: [D] to go back to; None takes that of the rows.
    """
    model.datastore.recenter(mean)
    if follower.ridge is not None:
        center_head(model.head, model.datastore.mean, model.config)
        follower.ridge = sum_rows(model)


logger = logging.getLogger(__name__)
_STALE_NOTE = "Measured before later changes of the datastore."
_ASKED_ROWS, _NAMED = 1024, 20

_FLAT_TEMPERATURE = 0.5
"""Above it, of squared distances of unit vectors, near and far rows weigh nearly the same."""

_HEAD_NOTE = "the {} head keeps what it learned; train it again for it to follow"
_HISTORY_NOTE = (
    "commits that were pushed before still hold the rows; HfApi().super_squash_history(repo_id) "
    "squashes them after the next push"
)

_TAUGHT_NOTE = "the neighbours speak in full for new classes until `tune` chooses the blend again"
_UNANSWERED_NOTE = (
    "{} of {} pictures are still answered as another class; teach more of theirs, or tune on "
    "pictures of all classes (`hf-knn tune`)"
)

_FLAT_NOTE = ", or set `knn_temperature` from {:g} to 0.14: that flat a vote ignores distances"
_CHOICE_NOTE = "k, temperatures, λ and regulariser stay as they were chosen"
_NAME_NOTE = "classes without rows keep their names: {}"
_PICTURE_NOTE = "the picture of neighbours for the model card was removed: it may have shown them"
_MEAN_NOTE = "the mean that centres rows stays as it was; recenter=True (--recenter) makes it anew"
_ELSEWHERE_NOTE = (
    "the rows lie in {}, changed there for all; a checkpoint that refers to them opens when this "
    "model was saved over it"
)

_COMPACTION_NOTE = "their bytes stay in the files of the server until it compacts them"


def fingerprint_rows(model: Any) -> str:
    """Of all rows of a model; what was counted for it serves later changes, also of copies.

    Args:
        model: a `KnnForImageClassification` with a datastore.

    Raises:
        ValueError: without one.
    """
    store = rows_of(model)
    return follower_of(model).fingerprint(store)


def features_of(model: Any, images: Any, batch_size: int = 32) -> Tensor:
    """Features of pictures, as the datastore's were made.

    Args:
        model: a `KnnForImageClassification`.
        images: [M, 3, H, W] pixel values, or pictures: paths, file contents, PIL images or arrays.
        batch_size: pictures per forward pass.

    Returns:
        [M, D] float32 on the CPU.

    Raises:
        BadImageError: naming the picture that cannot be decoded.
        ValueError: for pictures without an image processor.
    """
    if not isinstance(images, Tensor) and model.image_processor is None:
        raise ValueError(
            "Expected a model with an `image_processor` to read pictures, but it has none; pass "
            "pixel values [M, 3, H, W] or set model.image_processor."
        )
    was_training, parts = model.training, []
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                batch = images[start : start + batch_size]
                if not isinstance(batch, Tensor):
                    decoded = [_decoded(image, start + i) for i, image in enumerate(batch)]
                    batch = model.image_processor(images=decoded, return_tensors="pt")
                    batch = batch["pixel_values"]
                pixels = batch.to(model.device, model.dtype)
                parts.append(extract(model.backbone, pixels, model.config)[0].float().cpu())
    finally:
        model.train(was_training)
    width = model.config.feature_dim + model.config.extra_dim
    return torch.cat(parts).clone() if parts else torch.empty(0, width)


def small_pictures(images: Any) -> list[bytes]:
    """WEBP files of pictures; none of pixel values, which no longer are pictures."""
    if isinstance(images, Tensor):
        return []
    return [small_webp(_decoded(image, place)) for place, image in enumerate(images)]


def thumbnails_of(model: Any, images: Mapping[int, Any]) -> Thumbnails:
    """Small pictures of stored rows; see `KnnForImageClassification.keep_thumbnails`."""
    ids = [] if model.datastore is None else model.datastore.ids.tolist()
    unknown = sorted(set(images) - set(ids))
    if unknown:
        raise ValueError(
            f"Expected ids of stored rows, but the datastore does not have {unknown[:10]}."
        )
    return Thumbnails({i: small_webp(_decoded(image, i)) for i, image in images.items()})


def teach(
    model: Any,
    features: Tensor,
    labels: Sequence[Label],
    ids: Values | None = None,
    paths: Sequence[str] | None = None,
) -> Receipt:
    """Adds rows; see `KnnForImageClassification.teach`.

    Args:
        model: a `KnnForImageClassification` with a datastore.
        features: [M, D] raw features, as in `pooler_output`.
        labels: M class names, new ones too, or numbers of classes.
        ids: [M] unused ids, or None.
        paths: where each picture lies, or None.
    """
    width = model.config.feature_dim + model.config.extra_dim
    if features.ndim != 2 or features.shape[1] != width:
        raise ValueError(
            f"Expected `features` to be [M, {width}], but got shape {tuple(features.shape)}."
        )
    _, rows = split_features(features, model.config)
    receipt = _add(model, Change.TEACH, rows, labels, ids, paths)
    remark = _what_is_unanswered(model, features, receipt)
    if remark:
        model.changes[-1] = receipt = replace(receipt, notes=[*receipt.notes, remark])
    return receipt


def _what_is_unanswered(model: Any, features: Tensor, receipt: Receipt) -> str:
    """Says so if taught rows, asked for themselves, get another class than they were taught."""
    config = model.config
    labels, _ = numbers_of(model, receipt.labels[:_ASKED_ROWS], min(_ASKED_ROWS, len(features)))
    if not bool((labels >= config.blended_classes).any()):
        return ""
    head_part, store_part = split_features(features[:_ASKED_ROWS], model.config)
    with torch.inference_mode():
        neighbors = model.datastore.search(store_part.float(), config.k)
        log_probs, *_ = model.weigh(head_part.to(model.device), neighbors)
    missed = int((log_probs.argmax(1).cpu() != labels).sum())
    if not missed:
        return ""
    is_softmax = config.knn_weighting == Weighting.SOFTMAX and config.metric == Metric.COSINE
    is_flat = is_softmax and config.knn_temperature > _FLAT_TEMPERATURE
    note = _UNANSWERED_NOTE.format(missed, len(labels))
    return note + (_FLAT_NOTE.format(config.knn_temperature) if is_flat else "")


def merge(model: Any, other: SearchBackend, class_names: Sequence[str] | None = None) -> Receipt:
    """Adds the rows of another datastore of the same backbone; ids that exist are numbered anew.

    Args:
        model: a `KnnForImageClassification` with a datastore.
        other: its rows come in; their raw features are compared about the mean of the model's.
        class_names: what its label numbers mean; None is what they mean here.

    Raises:
        ValueError: for another backbone, width, metric or normalisation.
    """
    store, rows = rows_of(model), as_row_store(other)
    check_alike(store, rows)
    numbers = rows.labels.tolist()
    labels = numbers if class_names is None else [class_names[number] for number in numbers]
    taken = torch.isin(rows.ids, store.ids).any()
    ids = None if taken else rows.ids
    return _add(model, Change.MERGE, rows.features, labels, ids, rows.paths)


def forget(
    model: Any,
    ids: Values | None = None,
    *,
    label: Label | None = None,
    recenter: bool = False,
) -> Receipt:
    """Removes rows; see `KnnForImageClassification.forget`."""
    store = rows_of(model)
    if (ids is None) == (label is None):
        raise ValueError("Expected exactly one of `ids` and `label`.")
    if recenter and not isinstance(store, Datastore):
        raise ValueError(
            f"Expected `recenter` to be False for rows in {store.location}, of which every one "
            "would be written again; bring them home (model.datastore.to_datastore()) and load a "
            "new collection."
        )
    if label is not None:
        ids = store.ids_labelled(number_of(model, label))
    assert ids is not None
    return _remove(model, Change.FORGET, as_whole_numbers(ids, "ids"), recenter)


def relabel(model: Any, ids: Values, labels: Sequence[Label]) -> Receipt:
    """Gives rows other labels; see `KnnForImageClassification.relabel`."""
    return _relabel(model, Change.RELABEL, as_whole_numbers(ids, "ids"), labels)


def undo(model: Any) -> Receipt:
    """Takes the last change back; see `KnnForImageClassification.undo`."""
    rows_of(model)
    if not model.changes or model.changes[-1].action == Change.UNDO:
        raise ValueError("Expected a change to undo, but nothing was changed since the last undo.")
    last = model.changes[-1]
    with whole_change(model):
        receipt = _take_back(model, last)
        _drop_classes(model, last.new_classes)
    return receipt


def _take_back(model: Any, last: Receipt) -> Receipt:
    gone = model.forgotten
    ids = torch.tensor(last.ids, dtype=torch.int64)
    if last.action == Change.FORGET:
        if gone is None or gone.ids.tolist() != last.ids:
            raise ValueError(
                "Expected rows to bring back, but no byte of them was saved; teach them again, "
                "or merge a backup."
            )
        return _bring_back(model, gone, last.labels)
    if last.action == Change.RELABEL:
        return _relabel(model, Change.UNDO, ids, last.old_labels)
    return _remove(model, Change.UNDO, ids, False)


def _bring_back(model: Any, gone: StoredRows, labels: Sequence[Label]) -> Receipt:
    """Forgotten rows, about the mean that there was with them, and their small pictures."""
    thumbnails, picture = model.forgotten_thumbnails, model.forgotten_picture
    rows, paths = torch.from_numpy(gone.features), gone.paths if any(gone.paths) else None
    receipt = _add(
        model, Change.UNDO, rows, labels, gone.ids, paths, gone.splits, model.forgotten_mean
    )
    if thumbnails is not None and model.thumbnails is not None:
        model.thumbnails = model.thumbnails.joined(thumbnails)
    model.neighbor_picture = picture
    return receipt


def _add(
    model: Any,
    action: str,
    rows: Tensor,
    labels: Sequence[Label],
    ids: Values | None,
    paths: Sequence[str] | None,
    splits: list[str] | None = None,
    mean: Tensor | None = None,
) -> Receipt:
    store, follower = rows_of(model), follower_of(model)
    numbers, new = numbers_of(model, labels, len(rows))
    before = len(store), follower.fingerprint(store)
    with whole_change(model):
        if splits is None or isinstance(store, Datastore):  # whose rows are all of one split
            added = store.add(rows, numbers, ids, paths)
        else:
            added = store.add(rows, numbers, ids, paths, split=splits)
        stored = store.rows_of(added)  # as they were cast
        follower.total += sum_of(stored)
        if mean is not None and not torch.equal(mean, store.mean):
            recenter_rows(model, follower, mean)
        elif follower.ridge is not None:
            follower.ridge.add(_prepared(model, stored), torch.from_numpy(stored.labels))
        follower.follow(model)
        append_classes(model.config, new)
        names = _names(model, numbers)
        return _finish(model, follower, action, added, before, names, new_classes=new)


def _remove(model: Any, action: str, ids: Tensor, recenter: bool) -> Receipt:
    store, follower = rows_of(model), follower_of(model)
    before, mean = (len(store), follower.fingerprint(store)), store.mean
    gone = store.rows_of(ids)
    labels = torch.from_numpy(gone.labels)
    with whole_change(model):
        store.remove(ids)
        follower.total -= sum_of(gone)
        if recenter:
            recenter_rows(model, follower)
        elif follower.ridge is not None:
            follower.ridge.remove(_prepared(model, gone), labels)
        follower.follow(model)
        notes = _what_stays(model, labels, recenter) if action == Change.FORGET else []
        names = _names(model, labels)
        receipt = _finish(model, follower, action, ids, before, names, notes=notes)
        thumbnails, picture = model.thumbnails, model.neighbor_picture
        if thumbnails is not None:
            model.thumbnails = thumbnails.without(receipt.ids)
        if action == Change.FORGET:
            model.forgotten, model.forgotten_mean, model.forgotten_picture = gone, mean, picture
            model.forgotten_thumbnails = thumbnails and thumbnails.only(receipt.ids)
            model.neighbor_picture = None
    return receipt


def _what_stays(model: Any, labels: Tensor, recenter: bool) -> list[str]:
    """What is said of the mean, the names, a picture, and where else forgotten rows may be."""
    store, config = model.datastore, model.config
    empty = [n for n in labels.unique().tolist() if not len(store.ids_labelled(n))]
    names = ", ".join(config.class_names[number] for number in empty[:_NAMED])
    more = ", …" if len(empty) > _NAMED else ""
    notes = [] if recenter else [_MEAN_NOTE]
    if empty:
        notes.append(_NAME_NOTE.format(names + more))
    if model.neighbor_picture is not None:
        notes.append(_PICTURE_NOTE)
    is_here = isinstance(store, Datastore)
    return [*notes, _CHOICE_NOTE, _HISTORY_NOTE if is_here else _COMPACTION_NOTE]


def _relabel(model: Any, action: str, ids: Tensor, labels: Sequence[Label]) -> Receipt:
    store, follower = rows_of(model), follower_of(model)
    numbers, new = numbers_of(model, labels, len(ids))
    before = len(store), follower.fingerprint(store)
    old = store.rows_of(ids)
    old_numbers = torch.from_numpy(old.labels)
    old_names = _names(model, old_numbers)
    with whole_change(model):
        store.relabel(ids, numbers)
        follower.total += sum_of(old._replace(labels=numbers.numpy())) - sum_of(old)
        if follower.ridge is not None:
            follower.ridge.relabel(_prepared(model, old), old_numbers, numbers)
        follower.follow(model)
        append_classes(model.config, new)
        names = _names(model, numbers)
        return _finish(model, follower, action, ids, before, names, old_names, new_classes=new)


def _finish(
    model: Any,
    follower: Follower,
    action: str,
    ids: Tensor,
    before: tuple[int, str],
    labels: list[str],
    old_labels: Sequence[str] = (),
    new_classes: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Receipt:
    """Writes the receipt, and into the measurements that they are of before."""
    store = model.datastore
    scope, remarks = Scope.STORE_AND_HEAD, [*notes, *([_TAUGHT_NOTE] if new_classes else [])]
    if follower.ridge is None:
        scope = Scope.STORE
        remarks.insert(0, _HEAD_NOTE.format(model.config.head))
    if store.location is not None:
        remarks.append(_ELSEWHERE_NOTE.format(store.location))
    receipt = Receipt(
        str(action), ids.tolist(), labels, before[0], len(store), before[1],
        follower.fingerprint(store), str(scope), datetime.now(UTC).isoformat(timespec="seconds"),
        list(old_labels), list(new_classes), remarks,
    )  # fmt: skip
    model.changes.append(receipt)
    model.forgotten = model.forgotten_mean = None
    model.forgotten_thumbnails = model.forgotten_picture = None
    if model.measured is not None and _STALE_NOTE not in model.measured.get("note", ""):
        note = f"{model.measured.get('note', '')} {_STALE_NOTE}".strip()
        model.measured = model.measured | {"note": note}
    return receipt


def _prepared(model: Any, rows: StoredRows) -> Tensor:
    return prepare_rows(model.head, torch.from_numpy(rows.features))


def _names(model: Any, numbers: Tensor) -> list[str]:
    return [model.config.class_names[number] for number in numbers.tolist()]


def _drop_classes(model: Any, names: Sequence[str]) -> None:
    """Takes back classes that the undone change had made, the newest first, if no row is left."""
    follower, kept = follower_of(model), list(model.config.class_names)
    used = set(model.datastore.labels.unique().tolist()) if names else set()
    for name in reversed(names):
        if kept[-1] == name and len(kept) - 1 not in used:
            kept.pop()
    if follower.ridge is not None:
        follower.ridge.truncate(len(kept))
    name_classes(model.config, kept)
    if model.config.num_tuned_labels == len(kept):
        model.config.num_tuned_labels = None
    follower.follow(model)


def _decoded(image: Any, place: int) -> Any:
    try:
        from PIL import Image

        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        return decode_image(picture)
    except (BadImageError, OSError, TypeError) as error:
        raise BadImageError(f"Expected picture {place} to be readable, but {error}.") from error
