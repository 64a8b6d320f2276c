"""A checkpoint of what was labelled: trained anew, or taught to the one that there was."""

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from transformers import PrinterCallback

from ..data.decode import BadImageError
from ..features.extract import ImageFeatures
from ..milvus.datastore import MilvusDatastore
from ..model.card import make_card
from ..model.modeling import KnnForImageClassification
from ..model.versions import mark_training, occupant_of
from ..store.folders import exclusive_lock
from ..store.hub import CARD_NAME
from ..training.arguments import KnnTrainingArguments
from ..training.trainer import KnnTrainer
from .pool import Pool

MOST_THUMBNAILS = 20_000
"""Of more pictures no small copies are kept: to open the model is to read them all."""


@dataclass(frozen=True)
class Taught:
    """What became of a checkpoint.

    Attributes:
        is_made: whether there is one.
        notes: in sentences.
    """

    is_made: bool
    notes: list[str]


def train_checkpoint(
    backbone: str, target: Path, pool: Pool, labels: Mapping[str, str], seed: int = 0
) -> Taught:
    """Trains as `hf-knn train` does: head and blend are chosen on rows held out in folds.

    Args:
        backbone: as for `from_backbone`.
        target: folder of the checkpoint.
        pool: the pictures.
        labels: of those that have one.
        seed: of the folds.
    """
    counts = Counter(labels.values())
    if len(counts) < 2:
        only = next(iter(counts))
        return Taught(
            False, [f"No checkpoint was made: all labels are {only}, and it takes two classes."]
        )
    names = sorted(counts)
    rows = _rows(pool, labels, names)
    model = KnnForImageClassification.from_backbone(backbone, names)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = KnnTrainingArguments(
            output_dir=scratch, freeze_backbone=True, seed=seed, report_to=[], disable_tqdm=True,
            save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        trainer = KnnTrainer(model, arguments, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        chosen = trainer.tune(progress=False)
    assert model.datastore is not None
    model.datastore.source |= {"dataset": pool.folder.name, "split": "train"}
    mark_training(model.datastore, _hash_of(pool, labels))
    said = [f"The head is {model.config.head}. {chosen.say('on rows held out')}"]
    few = [name for name in names if counts[name] < 2]
    if few:
        said.append(f"One picture alone is labelled of {', '.join(few)}: label more of it.")
    if len(rows) <= MOST_THUMBNAILS:
        ids = model.datastore.ids.tolist()
        said += _keep_thumbnails(model, pool, dict(zip(ids, rows.paths, strict=True)))
    return Taught(True, [*said, *_save(model, target)])


def teach_checkpoint(
    base: str | Path, target: Path, pool: Pool, taught: Mapping[str, str]
) -> Taught:
    """Teaches the labels to a checkpoint, and saves the result beside it.

    Args:
        base: the checkpoint, which stays as it is.
        target: folder of the new one.
        pool: the pictures.
        taught: of those that it did not know, or knew with another label.
    """
    if not taught:
        return Taught(False, ["No checkpoint was made: it would know nothing new."])
    model: KnnForImageClassification = KnnForImageClassification.from_pretrained(base)
    if isinstance(model.datastore, MilvusDatastore):  # which others ask
        model.datastore = model.datastore.to_datastore()
    last: dict[bytes, str] = {}  # of copies that got two labels, the last one counts
    where = {name: number for number, name in enumerate(pool.names)}
    for name in taught:
        last[pool.contents[where[name]].numpy().tobytes()] = name
    names = [name for name in taught if name in set(last.values())]
    numbers = torch.tensor([where[name] for name in names], dtype=torch.int64)
    receipt = model.teach(
        features=pool.features[numbers], contents=pool.contents[numbers], paths=names,
        labels=[taught[name] for name in names], relabel=True,
    )  # fmt: skip
    said = [f"{receipt}"]
    if model.thumbnails is not None:
        skipped = set(receipt.skipped)
        taken = [name for place, name in enumerate(names) if place not in skipped]
        ids = receipt.ids[len(receipt.old_labels) :]
        said += _keep_thumbnails(model, pool, dict(zip(ids, taken, strict=True)))
    return Taught(True, [*said, *_save(model, target)])


def _keep_thumbnails(
    model: KnnForImageClassification, pool: Pool, names: Mapping[int, str]
) -> list[str]:
    """Small pictures of rows, to explain answers; a file that changed meanwhile leaves them out."""
    try:
        model.keep_thumbnails({row_id: pool.path(name) for row_id, name in names.items()})
    except (BadImageError, OSError) as error:
        return [f"No small copies of the pictures are kept: {error}."]
    return [
        "Small copies of the pictures are kept in the model, to explain answers: whoever opens its "
        "folder sees them, and a push leaves them behind."
    ]


def _save(model: KnnForImageClassification, target: Path) -> list[str]:
    """Saves a model with its card; what was there is kept as the version before."""
    with exclusive_lock(target):
        replaced = occupant_of(target)
        model.save_pretrained(target, keep_replaced=1)
        card = target / CARD_NAME
        earlier = card.read_text(encoding="utf-8") if card.is_file() else None
        card.write_text(make_card(model, target.name, earlier, target), encoding="utf-8")
    if replaced is None:
        return []
    back = f" `hf-knn undo {target}` brings it back." if replaced.is_kept else ""
    return [f"{replaced}{back}"]


def _rows(pool: Pool, labels: Mapping[str, str], names: list[str]) -> ImageFeatures:
    numbers = [number for number, name in enumerate(pool.names) if name in labels]
    index = torch.tensor(numbers, dtype=torch.int64)
    own = [pool.names[number] for number in numbers]
    return ImageFeatures(
        features=pool.features[index],
        labels=torch.tensor([names.index(labels[name]) for name in own]),
        ids=torch.arange(len(own)),
        label_names=names,
        paths=own,
        backend=pool.backend,
        contents=pool.contents[index],
    )


def _hash_of(pool: Pool, labels: Mapping[str, str]) -> str:
    """Of what the pictures show and their labels, whatever they are called."""
    where = {name: number for number, name in enumerate(pool.names)}
    lines = sorted(
        f"{pool.contents[where[name]].numpy().tobytes().hex()} {label}"
        for name, label in labels.items()
    )
    return sha256("\n".join(lines).encode()).hexdigest()
