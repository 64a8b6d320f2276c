"""What differs between two models of one backbone: rows, classes, settings, numbers."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .backbones import weight_marks
from .modeling import KnnForImageClassification

SETTINGS = (
    "k", "knn_temperature", "knn_weight", "knn_weighting", "blend_temperature", "pooling",
    "knn_pooling", "metric", "normalization", "learned_metric", "head", "head_regularizer",
    "head_temperature",
)  # fmt: skip

_BLOCK_ROWS = 8192


@dataclass(frozen=True)
class Difference:
    """From one model to another.

    Attributes:
        added: ids of rows that only the second has.
        removed: ids of rows that only the first has.
        relabelled: id, old and new class name of rows in both.
        changed: ids of rows in both with other features.
        new_classes: names that only the second has.
        lost_classes: names that only the first has.
        settings: name to old and new value.
        metrics: name to old and new value, of what was measured in both.
        same_backbone: whether all weights of the backbone agree.
        same_head: whether all weights of the head agree.
    """

    added: list[int] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    relabelled: list[tuple[int, str, str]] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)
    new_classes: list[str] = field(default_factory=list)
    lost_classes: list[str] = field(default_factory=list)
    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    same_backbone: bool = True
    same_head: bool = True

    @property
    def is_nothing(self) -> bool:
        """Whether both are the same, numbers that were measured left aside."""
        rows = self.added or self.removed or self.relabelled or self.changed
        names = self.new_classes or self.lost_classes or self.settings
        return not (rows or names) and self.same_backbone and self.same_head


def compare(first: KnnForImageClassification, second: KnnForImageClassification) -> Difference:
    """What the second model has that the first has not, and the other way round."""
    one, two = first.config, second.config
    rows = _compare_rows(first, second)
    settings = {name: (getattr(one, name), getattr(two, name)) for name in SETTINGS}
    before, after = _metrics(first), _metrics(second)
    return Difference(
        **rows,
        new_classes=[name for name in two.class_names if name not in one.class_names],
        lost_classes=[name for name in one.class_names if name not in two.class_names],
        settings={name: pair for name, pair in settings.items() if pair[0] != pair[1]},
        metrics={n: (before[n], after[n]) for n in before if n in after and before[n] != after[n]},
        same_backbone=weight_marks(first.backbone) == weight_marks(second.backbone),
        same_head=_same_weights(first.head, second.head),
    )


def _compare_rows(
    first: KnnForImageClassification, second: KnnForImageClassification
) -> dict[str, Any]:
    one, two = _ids_of(first), _ids_of(second)
    found: dict[str, Any] = {
        "added": two[~torch.isin(two, one)].sort().values.tolist(),
        "removed": one[~torch.isin(one, two)].sort().values.tolist(),
    }
    both = one[torch.isin(one, two)].sort().values
    return found | (_compare_common(both, first, second) if len(both) else {})


def _ids_of(model: KnnForImageClassification) -> torch.Tensor:
    if model.datastore is None:
        return torch.empty(0, dtype=torch.int64)
    return model.datastore.ids


def _compare_common(
    ids: torch.Tensor, first: KnnForImageClassification, second: KnnForImageClassification
) -> dict[str, Any]:
    """Rows that both have, block by block."""
    relabelled, changed = [], []
    one, two = first.datastore, second.datastore
    assert one is not None
    assert two is not None
    mine, theirs = first.config.class_names, second.config.class_names
    for block in ids.split(_BLOCK_ROWS):
        old, new = one.rows_of(block), two.rows_of(block)
        labels = zip(block.tolist(), old.labels.tolist(), new.labels.tolist(), strict=True)
        names = [(row_id, mine[before], theirs[after]) for row_id, before, after in labels]
        relabelled += [row for row in names if row[1] != row[2]]
        is_changed = np.ones(len(block), np.bool_)
        if one.dim == two.dim:
            values = [rows.features.astype(np.float32) for rows in (old, new)]
            is_changed = (values[0] != values[1]).any(axis=1)
        changed += block[torch.from_numpy(is_changed)].tolist()
    return {"relabelled": relabelled, "changed": changed}


def _metrics(model: KnnForImageClassification) -> dict[str, float]:
    return (model.measured or {}).get("metrics", {})


def _same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    mine, theirs = first.state_dict(), second.state_dict()
    return mine.keys() == theirs.keys() and all(
        mine[name].shape == theirs[name].shape and torch.equal(mine[name], theirs[name])
        for name in mine
    )
