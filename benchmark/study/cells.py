"""One cell of the study on disk: numbers and provenance as JSON, answers per picture as npz.

The JSON is written last and names the hash of the npz: a cell is finished or not there.
"""

import hashlib
import io
import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_knn.fit import score_log_probs
from study.arms import FLOOR, Arm
from study.terms import terms_of

FORMAT = 1
METRICS = ("top1", "top5", "mean_class", "nll", "ece", "auroc")
CELLS, FAILURES, RUN = "cells", "failures", "run.json"


class Cell(NamedTuple):
    """One measurement.

    Attributes:
        task: name of the task.
        backbone: name of the backbone.
        protocol: name of the protocol.
        seed: of the split and of whatever is drawn.
        shots: pictures per class, of `lowdata`.
        shift: what the test pictures went through, of `robustness`.
    """

    task: str
    backbone: str
    protocol: str
    seed: int
    shots: int | None = None
    shift: str | None = None

    @property
    def name(self) -> str:
        """Its file name, without ending."""
        parts = [self.task, self.backbone, self.protocol]
        parts += [f"{self.shots}shot"] if self.shots is not None else []
        parts += [self.shift] if self.shift is not None else []
        plain = [_plain(part) for part in (*parts, f"seed{self.seed}")]
        return "--".join(plain)

    @property
    def option(self) -> int | str | None:
        """What its protocol varies beside the seed."""
        return self.shots if self.shots is not None else self.shift


class Asked(NamedTuple):
    """The test pictures of a split: [n] each."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int32]
    groups: NDArray[np.int64]
    near_duplicate: NDArray[np.bool_]


def is_finished(folder: Path, cell: Cell) -> bool:
    """Whether a whole result of a cell lies in a folder; damaged files are removed."""
    path, arrays = (folder / CELLS / f"{cell.name}{end}" for end in (".json", ".npz"))
    if not path.exists():
        return False
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        whole = document["arrays_sha256"] == hashlib.sha256(arrays.read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError):
        whole = False
    if not whole:
        path.unlink()
    return whole


def write_cell(folder: Path, cell: Cell, document: dict[str, Any], arrays: dict[str, Any]) -> Path:
    """Writes a finished cell: both files appear whole.

    Args:
        folder: of the results.
        cell: which.
        document: what the JSON says beside `format` and `cell`.
        arrays: of the npz.

    Returns:
        The JSON file.
    """
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    content = stream.getvalue()
    facts = {"format": FORMAT, "cell": cell._asdict()}
    facts |= document | {"arrays_sha256": hashlib.sha256(content).hexdigest()}
    write_whole(folder / CELLS / f"{cell.name}.npz", content)
    return write_json(folder / CELLS / f"{cell.name}.json", facts)


def write_failure(folder: Path, cell: Cell, error: BaseException) -> Path:
    """Notes why a cell could not be measured."""
    facts = {"cell": cell._asdict(), "error": type(error).__name__, "message": str(error)}
    return write_json(folder / FAILURES / f"{cell.name}.json", facts)


def write_json(path: Path, document: Any) -> Path:
    """Writes JSON that appears whole; NaN becomes null."""
    text = json.dumps(_finite(document), indent=1, allow_nan=False) + "\n"
    return write_whole(path, text.encode())


def write_whole(path: Path, content: bytes) -> Path:
    """Writes a file that appears whole or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    if os.name == "posix":
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return path


def describe_arms(
    arms: dict[str, Arm], validation: Tensor, asked: Asked, num_labels: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of each arm for the JSON, and its answers for the npz.

    Args:
        arms: what was measured.
        validation: [V] labels of the validation pictures.
        asked: the test pictures.
        num_labels: C.
    """
    labels = torch.from_numpy(asked.labels.astype(np.int64))
    clean = torch.from_numpy(~asked.near_duplicate)
    described, arrays = {}, dict(asked._asdict())
    for name, arm in arms.items():
        floored = floor(arm.test)
        described[name] = {
            "chosen": arm.chosen,
            "validation": {} if arm.validation is None
            else metrics_of(arm.validation, validation),
            "test": metrics_of(arm.test, labels),
            "test_clean": metrics_of(arm.test[clean], labels[clean]) if clean.any() else {},
            "per_class": recall_per_class(floored, labels, num_labels),
            "terms": None if arm.mix is None else terms_of(arm, labels),
        }  # fmt: skip
        confidence, predicted = floored.max(1)
        own = floored.gather(1, labels.unsqueeze(1)).squeeze(1)
        arrays[f"predicted/{name}"] = predicted.numpy().astype(np.int32)
        arrays[f"confidence/{name}"] = confidence.exp().float().numpy()
        arrays[f"true/{name}"] = own.exp().float().numpy()
    return described, arrays


def metrics_of(log_probs: Tensor, labels: Tensor) -> dict[str, float]:
    """The metrics that cells hold."""
    found = score_log_probs(log_probs.double().numpy(), labels.numpy())
    return {name: found[name] for name in METRICS if name in found}


def recall_per_class(log_probs: Tensor, labels: Tensor, num_labels: int) -> list[float | None]:
    """[C] share of each class's pictures that are answered right; None for a class without."""
    right = (log_probs.argmax(1) == labels).double()
    hits = torch.zeros(num_labels, dtype=torch.float64).index_add_(0, labels, right)
    counts = torch.bincount(labels, minlength=num_labels)
    return [
        float(h / n) if n else None for h, n in zip(hits.tolist(), counts.tolist(), strict=True)
    ]


def floor(log_probs: Tensor) -> Tensor:
    """Log-probabilities of at least log(1e-12), as reports say."""
    return log_probs.double().clamp_min(math.log(FLOOR))


def _plain(text: str) -> str:
    """A name that is safe as a part of a file name, and that of one thing only."""
    plain = re.sub(r"[^\w.]+", "-", text).strip("-.")
    if plain == text:
        return plain
    return f"{plain[-60:]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}" if plain else "x"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
