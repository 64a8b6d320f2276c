"""One task with one backbone: what its protocols share, so that nothing is computed twice."""

from functools import lru_cache

import numpy as np
import torch
from datasets import Column
from numpy.typing import NDArray
from torch import Tensor

from catalog.loaded_task import LoadedTask
from hf_knn.data import few_rows, few_shots
from study.arms import Arm
from study.arms_of import Split, Voices
from study.few import FewVoices
from study.phases import EXTRACT, TRAIN
from study.pool import OpenBackbone, Pool, Rows
from study.scratch import train_scratch
from study.shifts import shifted
from study.tuning_run import fine_tune

LEAST_TO_HOLD_OUT = 4
"""Pictures per class from which a backbone that is trained itself gives a quarter away to choose
on: it has seen the labels of any fold."""

REMEMBERED = 8
"""Splits whose fitted voices are kept, for the next protocol."""


class Study:
    """One task with one backbone.

    Args:
        loaded: the task.
        backbone: the backbone.
        pool: features of all pictures; of a backbone trained on each split the labels alone.
        epochs: of a backbone that is trained.
    """

    def __init__(
        self, loaded: LoadedTask, backbone: OpenBackbone, pool: Pool, epochs: int = 30
    ) -> None:
        self.loaded, self.backbone, self.pool, self.epochs = loaded, backbone, pool, epochs
        self.phases = backbone.phases
        self.num_labels = len(loaded.label_names)
        self.voices = lru_cache(maxsize=REMEMBERED)(self._voices)
        self.few_voices = lru_cache(maxsize=REMEMBERED)(self._few_voices)
        self._pixels: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        """[N] of the pool."""
        return self.pool.rows.labels

    def split(self, seed: int) -> Split:
        """The pictures of a seed as features."""
        parts = self.pool.parts(seed)
        rows = self.pool.rows
        if self.backbone.is_scratch:
            rows = self.trained_rows(parts.train, seed)
        return Split(*(rows.select(part) for part in parts))

    def _voices(self, seed: int) -> Voices:
        return self.voices_of(self.split(seed), seed)

    def voices_of(self, split: Split, seed: int, head: Arm | None = None) -> Voices:
        """Voices of some pictures, their time charged to this study."""
        return Voices(split, self.num_labels, seed, head, self.phases)

    def few(self, seed: int, shots: int) -> tuple[Tensor, NDArray[np.int64]]:
        """Row numbers of the few labelled pictures of a seed, and of its test pictures.

        Those for validation are among the few: labels to choose on are part of the budget.
        """
        parts = self.pool.parts(seed)
        everyone = torch.as_tensor([*parts.train, *parts.validation]).sort().values
        return everyone[few_shots(self.labels[everyone], shots, seed)], parts.test

    def _few_voices(self, seed: int, shots: int) -> FewVoices:
        """Voices that know so many pictures per class."""
        few, test = self.few(seed, shots)
        rows, is_scratch, held = self.pool.rows, self.backbone.is_scratch, few[:0]
        if is_scratch:
            if shots >= LEAST_TO_HOLD_OUT:
                is_held = torch.zeros(len(few), dtype=torch.bool)
                is_held[torch.as_tensor(few_rows(self.labels[few], 0.25, seed))] = True
                few, held = few[~is_held], few[is_held]
            rows = self.trained_rows(few, seed)
        split = Split(*(rows.select(part) for part in (few, held, test)))
        return FewVoices(split, self.num_labels, seed, self.phases, has_seen=is_scratch)

    def trained_rows(
        self, train: Tensor | NDArray[np.int64], seed: int, more: Tensor | None = None
    ) -> Rows:
        """Features by the small backbone, trained on some pictures from scratch.

        Args:
            train: row numbers to train on.
            seed: of the training.
            more: [M, 3, H, W] pictures that are asked about too, behind all others; their labels
                come out as 0.
        """
        pixels, labels = self.pixels, self.labels
        if more is not None:
            pixels = torch.cat([pixels, more])
            labels = torch.cat([labels, labels.new_zeros(len(more))])
        with self.phases.phase(TRAIN):
            return train_scratch(
                self.backbone.fresh().backbone, pixels, labels, train,
                self.num_labels, seed, self.epochs,
            )  # fmt: skip

    @property
    def pixels(self) -> Tensor:
        """[N, 3, H, W] all pictures, as a small backbone sees them."""
        if self._pixels is None:
            with self.phases.phase(EXTRACT):
                self._pixels = self._read_pixels(self.loaded.rows["image"])
        return self._pixels

    def _read_pixels(self, pictures: Column) -> Tensor:
        processor = self.backbone.model.image_processor
        blocks = [
            processor(
                images=[image.convert("RGB") for image in pictures[start : start + 256]],
                return_tensors="pt",
            )["pixel_values"]
            for start in range(0, len(pictures), 256)
        ]
        return torch.cat(blocks)

    def shifted_test(self, seed: int, shift: str) -> Rows:
        """Features of the test pictures of a seed, damaged."""
        parts = self.pool.parts(seed)
        pictures = shifted(self.loaded.rows.select(parts.test), shift)
        if self.backbone.is_scratch:  # trained again, to the same weights
            rows = self.trained_rows(parts.train, seed, self._read_pixels(pictures["image"]))
            asked = rows.select(range(len(self.labels), len(rows.labels)))
            return asked._replace(labels=self.labels[parts.test])
        found = self.backbone.features(pictures)
        return self.backbone.rows(found)

    def finetuned(self, seed: int) -> Voices:
        """Voices of a backbone that was trained on the training pictures of a seed."""
        parts = self.pool.parts(seed)
        with self.phases.phase(TRAIN):
            tuned = fine_tune(
                self.backbone.fresh(), self.loaded.rows, parts, seed, self.epochs,
                self.loaded.entry.augmentation,
            )  # fmt: skip
        found = self.backbone.features(self.loaded.rows, tuned.model)
        rows = self.backbone.rows(found, tuned.model)
        split = Split(*(rows.select(part) for part in parts))
        answers = [tuned.head_log_probs(found.features[part]) for part in parts[1:]]
        head = Arm(answers[0], answers[1], tuned.chosen)
        return self.voices_of(split, seed, head)
