"""What a receipt says that a change did not reach."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.backbone import split_features
from ..core.votes import Metric, Weighting
from ..store.backend import RowStore

if TYPE_CHECKING:
    from .modeling import KnnForImageClassification

_ASKED_ROWS, _NAMED = 1024, 20

_FLAT_TEMPERATURE = 0.5
"""Above it, of squared distances of unit vectors, near and far rows weigh nearly the same."""

STALE = "Measured before later changes of the datastore."

HEAD = "the {} head keeps what it learned; train it again for it to follow"

TAUGHT = "the neighbours speak in full for new classes until `tune` chooses the blend again"

ELSEWHERE = (
    "the rows lie in {}, changed there for all; a checkpoint that refers to them opens when this "
    "model was saved over it"
)

_HISTORY = (
    "commits that were pushed before still hold the rows; HfApi().super_squash_history(repo_id) "
    "squashes them after the next push"
)

_UNANSWERED = (
    "{} of {} pictures are still answered as another class; teach more of theirs, or tune on "
    "pictures of all classes (`hf-knn tune`)"
)

_FLAT = ", or set `knn_temperature` from {:g} to 0.14: that flat a vote ignores distances"

_CHOICE = "k, temperatures, λ and regulariser stay as they were chosen"

_NAMES = "classes without rows keep their names: {}"

_PICTURE = "the picture of neighbours for the model card was removed: it may have shown them"

_MEAN = "the mean that centres rows stays as it was; recenter=True (--recenter) makes it anew"

_COMPACTION = "their bytes stay in the files of the server until it compacts them"


def of_forgotten(
    store: RowStore, labels: Tensor, names: Sequence[str], recenter: bool, had_picture: bool
) -> list[str]:
    """What is said of the mean, the names, a picture, and where else forgotten rows may be.

    Args:
        store: without the rows.
        labels: [M] int64 of the rows.
        names: of all classes.
        recenter: whether the mean was made anew.
        had_picture: whether there was a picture of neighbours.
    """
    empty = [n for n in labels.unique().tolist() if not len(store.ids_labelled(n))]
    shown = ", ".join(names[number] for number in empty[:_NAMED])
    notes = [] if recenter else [_MEAN]
    if empty:
        notes.append(_NAMES.format(shown + (", …" if len(empty) > _NAMED else "")))
    if had_picture:
        notes.append(_PICTURE)
    return [*notes, _CHOICE, _HISTORY if store.location is None else _COMPACTION]


def of_unanswered(
    model: "KnnForImageClassification", features: Tensor, labels: Sequence[str]
) -> str:
    """Says so if taught rows, asked for themselves, get another class than they were taught.

    Args:
        model: which was taught them.
        features: [M, D], as in `pooler_output`.
        labels: M names.

    Returns:
        Empty if there is nothing to say.
    """
    config, asked = model.config, labels[:_ASKED_ROWS]
    blended = config.blended_classes
    if blended == len(
        config.id2label or ()
    ):  # there are none for which the neighbours speak in full
        return ""
    names, store = config.class_names, model.datastore
    if store is None or set(names[blended:]).isdisjoint(asked):
        return ""
    head_part, store_part = split_features(features[:_ASKED_ROWS], config)
    with torch.inference_mode():
        neighbors = store.search(store_part.float(), config.k)
        log_probs, *_ = model.weigh(head_part.to(model.device), neighbors)
    answers = [names[number] for number in log_probs.argmax(1).tolist()]
    missed = sum(answer != label for answer, label in zip(answers, asked, strict=True))
    if not missed:
        return ""
    is_softmax = config.knn_weighting == Weighting.SOFTMAX and config.metric == Metric.COSINE
    is_flat = is_softmax and config.knn_temperature > _FLAT_TEMPERATURE
    note = _UNANSWERED.format(missed, len(asked))
    return note + (_FLAT.format(config.knn_temperature) if is_flat else "")
