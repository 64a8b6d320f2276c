"""The model for when none is given: drawn pictures and a frozen CNN, from installed packages."""

import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hf_knn import KnnForImageClassification, KnnTrainer, KnnTrainingArguments, extract_features

from .files import CLONED_BENCHMARK
from .uploads import SpaceError

_REVISION = 2  # raise it when the model would come out different
_SAMPLES = 6


class Builtin(NamedTuple):
    """A model to begin with.

    Attributes:
        model: ready to answer, with small pictures of its rows.
        samples: pictures that it was not trained on.
    """

    model: KnnForImageClassification
    samples: list[Image.Image]


def open_builtin(
    task: str = "openmoji-categories",
    backbone: str = "efficientnet-lite0",
    limit: int | None = 720,
) -> Builtin:
    """Opens the built-in model, making it first: about a minute on two cores, once.

    Args:
        task: see benchmark/catalog/tasks.py.
        backbone: see benchmark/catalog/backbones.py.
        limit: pictures, None for all.

    Raises:
        SpaceError: outside a clone of the repository, where a model must be named.
    """
    if not CLONED_BENCHMARK.is_dir():
        raise SpaceError(
            "Expected a model, but got none; set HF_KNN_MODEL to a checkpoint or a Hub id."
        )
    sys.path.append(str(CLONED_BENCHMARK))
    from catalog.cache import build_once, cache_root
    from catalog.offline_backbones import build_backbone  # a clone alone has them
    from catalog.offline_tasks import load_pictures
    from catalog.splits import split_indices

    rows = load_pictures(task, limit=limit)
    train, validation, test = split_indices(rows["label"][:], 0, (0.8, 0.15, 0.05))
    name = f"{task}_{backbone}_{len(rows)}_r{_REVISION}"
    place = cache_root() / "space" / name
    if not place.is_dir():
        print("Building the embedded model: once, about a minute.", flush=True)
        source = build_backbone(backbone)
        build_once(place, lambda folder: _build(folder, source, rows, train, validation))
    model = KnnForImageClassification.from_pretrained(place)
    samples = [rows[int(number)]["image"] for number in _spread(test)]
    return Builtin(model, samples)


def _build(
    folder: Path, backbone: Path, rows: Any, train: NDArray[np.int64], validation: NDArray[np.int64]
) -> None:
    model = KnnForImageClassification.from_backbone(
        backbone, rows.features["label"].names, head="ridge"
    )
    features = extract_features(model, rows)
    features.paths = list(rows["name"])
    with tempfile.TemporaryDirectory() as scratch:
        trainer = KnnTrainer(
            model,
            KnnTrainingArguments(scratch, freeze_backbone=True, report_to=[]),
            train_dataset=features.select(train),
            eval_dataset=features.select(validation),
        )
        trainer.train()
        trainer.tune()
        trainer.evaluate()
    numbers = features.ids[train].tolist()
    model.keep_thumbnails({number: rows[number]["image"] for number in numbers})
    model.save_pretrained(folder)


def _spread(numbers: NDArray[np.int64]) -> list[int]:
    step = max(1, len(numbers) // _SAMPLES)
    return [int(number) for number in numbers[::step][:_SAMPLES]]
