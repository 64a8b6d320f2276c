"""Measures a cell and says everything about it."""

import resource
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray

from study.cells import Asked, Cell, describe_arms, write_cell
from study.phases import MEASURE, rates_of
from study.protocols import NEED_PICTURES, PROTOCOLS, Measured
from study.provenance import provenance
from study.study import Study
from study.twins import near_duplicates


@dataclass
class Bench:
    """Measures cells of one task with one backbone and writes them.

    Args:
        study: what protocols share.
        pairs: [P, 2] pictures that are (nearly) the same.
        folder: of the results.
        precision: of features.
    """

    study: Study
    pairs: NDArray[np.int64]
    folder: Path
    precision: str

    def measure(self, cell: Cell, *, write: bool) -> None:
        """Measures a cell and writes it."""
        study = self.study
        if cell.protocol in NEED_PICTURES and study.loaded.is_streamed:
            raise ValueError(
                f"Expected pictures on the disk for {cell.protocol}, but {cell.task} is streamed; "
                "do leave --stream out."
            )
        with study.phases.phase(MEASURE):
            measured = PROTOCOLS[cell.protocol](study, cell.seed, cell.option)
            document, arrays = self._describe(cell, measured)
        seconds, images, image_seconds = study.phases.take()
        sizes = {part: document["data"][part] for part in ("train", "validation", "test")}
        document |= {
            "seconds": seconds,
            "images": images,
            "images_per_second": images / image_seconds if images else None,
            "rates": rates_of(seconds, images, sizes),
            "peak_memory_bytes": peak_memory(),
        }
        if write:
            write_cell(self.folder, cell, document, arrays)

    def _describe(self, cell: Cell, measured: Measured) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the JSON says beside time and memory, and the arrays of the npz."""
        study = self.study
        parts = study.pool.parts(cell.seed)
        train = parts.train
        if cell.shots is not None:
            train = np.asarray(study.few(cell.seed, cell.shots)[0])
        groups = study.pool.groups
        asked = Asked(
            parts.test,
            study.labels.numpy()[parts.test].astype(np.int32),
            parts.test if groups is None else groups[parts.test],
            near_duplicates(self.pairs, train, parts.test),
        )
        validation = measured.voices.split.validation.labels
        arms, arrays = describe_arms(measured.arms, validation, asked, study.num_labels)
        document = {
            "task": self._task(),
            "model": self._model(),
            "provenance": self._provenance(),
            "data": {
                "train": len(measured.voices.split.train.labels),
                "validation": len(validation),
                "test": len(parts.test),
                "near_duplicates_in_train": int(asked.near_duplicate.sum()),
            },
            "arms": arms,
            "heat": measured.heat,
            "extra": measured.extra,
            "pairs": measured.pairs,
        }
        return document, arrays

    def _task(self) -> dict[str, Any]:
        entry = self.study.loaded.entry
        return {
            "title": entry.title, "classes": self.study.num_labels, "metric": entry.metric,
            "licence": entry.licence, "citation": entry.citation,
            "revision": self.study.loaded.revision, "verified": entry.verified,
            "label_names": self.study.loaded.label_names,
        }  # fmt: skip

    def _model(self) -> dict[str, Any]:
        entry = self.study.backbone.entry
        return {
            "title": entry.title, "kind": entry.kind, "revision": self.study.backbone.revision,
            "licence": entry.licence, "image_size": entry.image_size, "verified": entry.verified,
        }  # fmt: skip

    def _provenance(self) -> dict[str, Any]:
        return provenance() | {
            "precision": self.precision,
            "world_size": PartialState().num_processes,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1_024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
