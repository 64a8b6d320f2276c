"""Changes of a model without training: rows come, go or get other labels, and a ridge head follows.

Every function changes all it should or nothing, and returns a receipt. Numbers of classes never
change while rows have them: a new class gets the next number, one without rows keeps its own.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backbone import extract, split_features
from .class_names import Label, append_classes, name_classes, number_of, numbers_of
from .datastore import Datastore
from .following import Follower, follower_of, own_rows, recenter_rows, total_of, whole_change
from .functional import Metric, Weighting
from .images import BadImageError, decode_image
from .receipts import Change, Receipt, Scope
from .ridge_head import prepare_rows
from .rows import Values, as_whole_numbers
from .thumbnails import Thumbnails, small_webp

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


def fingerprint_rows(model: Any) -> str:
    """Of all rows of a model; what was counted for it serves later changes, also of copies.

    Args:
        model: a `KnnForImageClassification` with a datastore of its own.

    Raises:
        ValueError: without one.
    """
    store = own_rows(model)
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


def merge(model: Any, other: Datastore, class_names: Sequence[str] | None = None) -> Receipt:
    """Adds the rows of another datastore of the same backbone; ids that exist are numbered anew.

    Args:
        model: a `KnnForImageClassification` with a datastore.
        other: its rows come in; their raw features are compared about the mean of the model's.
        class_names: what its label numbers mean; None is what they mean here.

    Raises:
        ValueError: for another backbone, width, metric or normalisation.
    """
    store = own_rows(model)
    store.check_alike(other)
    numbers = other.labels.tolist()
    labels = numbers if class_names is None else [class_names[number] for number in numbers]
    taken = torch.isin(other.ids, store.ids).any()
    ids = None if taken else other.ids
    return _add(model, Change.MERGE, other.features, labels, ids, other.paths)


def forget(
    model: Any,
    ids: Values | None = None,
    *,
    label: Label | None = None,
    recenter: bool = False,
) -> Receipt:
    """Removes rows; see `KnnForImageClassification.forget`."""
    store = own_rows(model)
    if (ids is None) == (label is None):
        raise ValueError("Expected exactly one of `ids` and `label`.")
    if label is not None:
        ids = store.ids[store.labels == number_of(model, label)]
    assert ids is not None
    return _remove(model, Change.FORGET, as_whole_numbers(ids, "ids"), recenter)


def relabel(model: Any, ids: Values, labels: Sequence[Label]) -> Receipt:
    """Gives rows other labels; see `KnnForImageClassification.relabel`."""
    return _relabel(model, Change.RELABEL, as_whole_numbers(ids, "ids"), labels)


def undo(model: Any) -> Receipt:
    """Takes the last change back; see `KnnForImageClassification.undo`."""
    own_rows(model)
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
        if gone is None or not torch.equal(gone.ids, ids):
            raise ValueError(
                "Expected rows to bring back, but no byte of them was saved; teach them again, "
                "or merge a backup."
            )
        return _bring_back(model, gone, last.labels)
    if last.action == Change.RELABEL:
        return _relabel(model, Change.UNDO, ids, last.old_labels)
    return _remove(model, Change.UNDO, ids, False)


def _bring_back(model: Any, gone: Datastore, labels: Sequence[Label]) -> Receipt:
    """Forgotten rows, about the mean that there was with them, and their small pictures."""
    thumbnails, picture = model.forgotten_thumbnails, model.forgotten_picture
    receipt = _add(model, Change.UNDO, gone.features, labels, gone.ids, gone.paths, gone.mean)
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
    mean: Tensor | None = None,
) -> Receipt:
    store, follower = own_rows(model), follower_of(model)
    numbers, new = numbers_of(model, labels, len(rows))
    before = len(store), follower.fingerprint(store)
    with whole_change(model):
        added = store.add(rows, numbers, ids, paths)
        stored = store.subset(added)  # as they were cast
        follower.total += total_of(stored)
        if mean is not None and not torch.equal(mean, store.mean):
            recenter_rows(model, follower, mean)
        elif follower.ridge is not None:
            follower.ridge.add(prepare_rows(model.head, stored.features), stored.labels)
        follower.follow(model)
        append_classes(model.config, new)
        return _finish(model, follower, action, added, before, new_classes=new)


def _remove(model: Any, action: str, ids: Tensor, recenter: bool) -> Receipt:
    store, follower = own_rows(model), follower_of(model)
    before = len(store), follower.fingerprint(store)
    gone = store.subset(ids)
    names = [model.config.class_names[number] for number in gone.labels.tolist()]
    with whole_change(model):
        store.remove(ids)
        follower.total -= total_of(gone)
        if recenter:
            recenter_rows(model, follower)
        elif follower.ridge is not None:
            follower.ridge.remove(prepare_rows(model.head, gone.features), gone.labels)
        follower.follow(model)
        notes = []
        if action == Change.FORGET:
            mean = [] if recenter else [_MEAN_NOTE]
            notes = [*mean, *_what_stays(model, gone), _CHOICE_NOTE, _HISTORY_NOTE]
        receipt = _finish(model, follower, action, ids, before, names, notes=notes)
        thumbnails, picture = model.thumbnails, model.neighbor_picture
        if thumbnails is not None:
            model.thumbnails = thumbnails.without(receipt.ids)
        if action == Change.FORGET:
            model.forgotten, model.forgotten_picture = gone, picture
            model.forgotten_thumbnails = thumbnails and thumbnails.only(receipt.ids)
            model.neighbor_picture = None
    return receipt


def _what_stays(model: Any, gone: Datastore) -> list[str]:
    """What is said of the names of forgotten rows, and of the picture that may show them."""
    labels = gone.labels.unique()
    empty = labels[~torch.isin(labels, model.datastore.labels)].tolist()
    names = ", ".join(model.config.class_names[number] for number in empty[:_NAMED])
    more = ", …" if len(empty) > _NAMED else ""
    notes = [_NAME_NOTE.format(names + more)] if empty else []
    return [*notes, _PICTURE_NOTE] if model.neighbor_picture is not None else notes


def _relabel(model: Any, action: str, ids: Tensor, labels: Sequence[Label]) -> Receipt:
    store, follower = own_rows(model), follower_of(model)
    numbers, new = numbers_of(model, labels, len(ids))
    before = len(store), follower.fingerprint(store)
    old = store.subset(ids)
    names = [model.config.class_names[number] for number in old.labels.tolist()]
    with whole_change(model):
        store.relabel(ids, numbers)
        follower.total += total_of(store.subset(ids)) - total_of(old)
        if follower.ridge is not None:
            prepared = prepare_rows(model.head, old.features)
            follower.ridge.relabel(prepared, old.labels, numbers)
        follower.follow(model)
        append_classes(model.config, new)
        return _finish(model, follower, action, ids, before, old_labels=names, new_classes=new)


def _finish(
    model: Any,
    follower: Follower,
    action: str,
    ids: Tensor,
    before: tuple[int, str],
    labels: list[str] | None = None,
    old_labels: Sequence[str] = (),
    new_classes: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Receipt:
    """Writes the receipt, and into the measurements that they are of before."""
    store = model.datastore
    if labels is None:
        labels = [model.config.class_names[n] for n in store.subset(ids).labels.tolist()]
    scope, remarks = Scope.STORE_AND_HEAD, [*notes, *([_TAUGHT_NOTE] if new_classes else [])]
    if follower.ridge is None:
        scope = Scope.STORE
        remarks.insert(0, _HEAD_NOTE.format(model.config.head))
    receipt = Receipt(
        str(action), ids.tolist(), labels, before[0], len(store), before[1],
        follower.fingerprint(store), str(scope), datetime.now(UTC).isoformat(timespec="seconds"),
        list(old_labels), list(new_classes), remarks,
    )  # fmt: skip
    model.changes.append(receipt)
    model.forgotten = model.forgotten_thumbnails = model.forgotten_picture = None
    if model.measured is not None and _STALE_NOTE not in model.measured.get("note", ""):
        note = f"{model.measured.get('note', '')} {_STALE_NOTE}".strip()
        model.measured = model.measured | {"note": note}
    return receipt


def _drop_classes(model: Any, names: Sequence[str]) -> None:
    """Takes back classes that the undone change had made, the newest first, if no row is left."""
    follower, kept = follower_of(model), list(model.config.class_names)
    used = set(model.datastore.labels.unique().tolist())
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
