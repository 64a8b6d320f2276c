"""Heads and neighbours asked about rows that they have not seen: on folds, or on a validation set.

Whatever is asked about a row was made from other rows: the head, the datastore and its mean, and
the axes that a head projects on. From which confidence on answers are right can be told only of
answers that their rows did not choose. Cells are therefore chosen on one half of the rows, and each
half is judged by what the other half chooses; with few labels all are chosen on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ..core.search import Neighbors
from ..core.votes import Metric, Weighting, blend_log_probs, knn_log_probs, soften
from ..data.splits import Fold
from ..store.backend import SearchBackend
from .blend import (
    FIXED_K,
    FIXED_TEMPERATURE,
    Criterion,
    Grid,
    TuneResult,
    default_grid,
    has_few_labels,
    tune,
)

FEW_KNN_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5)
"""λ that are tried with few labels, at the fixed k and temperature.

On eight settings of the offline benchmark with frozen backbones, two draws of 4, 8 and 16 labels a
class each, heads in closed form had 54.4, 64.3 and 70.0 % on test so, 52.0, 63.1 and 69.3 with a
fixed λ of 0.5, and 54.7, 64.1 and 70.0 where k and temperature were chosen too.
"""


class LabelledRows(NamedTuple):
    """Rows as heads and neighbours see them.

    Attributes:
        head: [N, D] raw features for heads.
        store: [N, D'] raw features for neighbours.
        labels: [N] int64.
        groups: [N] int64 of what belongs together; None: each row is by itself.
        ids: [N] int64 of the rows, by which neighbours are ordered that are equally near; None
            numbers them.
    """

    head: Tensor
    store: Tensor
    labels: Tensor
    groups: Tensor | None = None
    ids: Tensor | None = None

    def at(self, rows: Tensor) -> "LabelledRows":
        """Some of the rows, by number."""
        groups, ids = (None if part is None else part[rows] for part in (self.groups, self.ids))
        return LabelledRows(self.head[rows], self.store[rows], self.labels[rows], groups, ids)


class Part(NamedTuple):
    """Rows that voices are made from, and rows that these are asked about."""

    fitted: LabelledRows
    held_out: LabelledRows


Answer = Callable[[Tensor], Tensor]
"""From raw features [B, D] to log-probabilities [B, C_head]."""

Fit = Callable[[LabelledRows], Answer]
"""Makes a head from rows."""

Store = Callable[[LabelledRows], SearchBackend]
"""Makes a datastore from rows."""


class HeldOut(NamedTuple):
    """What was said about rows that nobody had seen.

    Attributes:
        neighbors: [B, k] at the largest k that shall be tried.
        head_log_probs: [B, C_head].
        labels: [B] int64.
        groups: [B] int64 of what belongs together; None: each row is by itself.
    """

    neighbors: Neighbors
    head_log_probs: Tensor
    labels: Tensor
    groups: Tensor | None = None

    def at(self, rows: Tensor) -> "HeldOut":
        """Some of the rows, by number."""
        neighbors = Neighbors(*(field[rows] for field in self.neighbors))
        groups = None if self.groups is None else self.groups[rows]
        return HeldOut(neighbors, self.head_log_probs[rows], self.labels[rows], groups)

    def softened(self, temperature: float) -> "HeldOut":
        """The same with the head's logits divided by a temperature > 0."""
        return self._replace(head_log_probs=soften(self.head_log_probs, temperature))

    def halves(self) -> "tuple[HeldOut, HeldOut]":
        """Two random halves; what belongs together is on one side."""
        owners = torch.arange(len(self.labels)) if self.groups is None else self.groups
        names, which = owners.unique(return_inverse=True)
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
        is_first = (order < (len(names) + 1) // 2)[which]
        return self.at(is_first.nonzero().flatten()), self.at((~is_first).nonzero().flatten())


class Blended(NamedTuple):
    """What a blend said of rows that it was not chosen on.

    Attributes:
        log_probs: [B, C].
        labels: [B] int64.
    """

    log_probs: Tensor
    labels: Tensor


class BlendOf(NamedTuple):
    """How head and neighbours are blended, whatever the cell.

    Attributes:
        num_labels: C.
        metric: of the similarities.
        weighting: of the votes.
    """

    num_labels: int
    metric: str = Metric.COSINE
    weighting: str = Weighting.SOFTMAX

    def at(self, cell: TuneResult, rows: HeldOut) -> Tensor:
        """[B, C] log-probabilities of the blend at a cell, before its temperature."""
        near = rows.neighbors
        votes = knn_log_probs(
            near.similarities[:, : cell.k], near.labels[:, : cell.k], self.num_labels,
            cell.temperature, metric=self.metric, weighting=self.weighting,
        )  # fmt: skip
        return blend_log_probs(rows.head_log_probs, votes, cell.knn_weight)


Choose = Callable[[Mapping[str, HeldOut]], tuple[str, TuneResult]]
"""Takes one of several heads, and its cell, by what they said of the same rows."""


def is_chosen_on_all(held_out: int, num_labels: int, criterion: str | None) -> bool:
    """Whether labels are so few that none can be spared when heads and cells are chosen.

    On eight settings of the offline benchmark, two draws of 4 labels a class each, half of the rows
    chose what had 0.7 points less on test.

    Args:
        held_out: how many rows there are.
        num_labels: C.
        criterion: that was asked for, or None.
    """
    return criterion is None and has_few_labels(held_out, num_labels)


def judged_by_halves(
    heads: Mapping[str, HeldOut],
    choose: Choose,
    blend: BlendOf,
    first: tuple[str, TuneResult] | None = None,
) -> Blended:
    """Answers about each half of the rows by what the other half chooses.

    Args:
        heads: what each said of the same rows.
        choose: what is judged.
        blend: of head and neighbours.
        first: what the first half chooses, where that is known.
    """
    halves = {name: rows.halves() for name, rows in heads.items()}
    said: list[Tensor] = []
    labels: list[Tensor] = []
    for chosen_on in (0, 1):
        seen = {name: both[chosen_on] for name, both in halves.items()}
        if not all(len(rows.labels) for rows in seen.values()):
            continue  # a single row is in no other half
        name, cell = first if first is not None and not chosen_on else choose(seen)
        rows = halves[name][1 - chosen_on]
        said.append(blend.at(cell, rows))
        labels.append(rows.labels)
    return Blended(torch.cat(said), torch.cat(labels))


@dataclass(frozen=True)
class Answers:
    """What several heads, and the neighbours beside them, said about the same rows.

    Attributes:
        neighbors: see `HeldOut`, as the rest.
        heads: [B, C_head] by the name of the head.
        labels: [B] int64.
        groups: [B] int64, or None.
    """

    neighbors: Neighbors
    heads: dict[str, Tensor]
    labels: Tensor
    groups: Tensor | None

    def of(self, head: str) -> HeldOut:
        """One head, and the neighbours."""
        return HeldOut(self.neighbors, self.heads[head], self.labels, self.groups)


def parts_of(rows: LabelledRows, held_out: LabelledRows | Sequence[Fold]) -> Iterator[Part]:
    """What is fitted and asked about, one part after the other.

    Args:
        rows: to learn from.
        held_out: folds of these rows, or other rows.
    """
    if isinstance(held_out, LabelledRows):
        yield Part(rows, held_out)
        return
    for fold in held_out:
        fitted, asked = torch.from_numpy(fold.fitted), torch.from_numpy(fold.held_out)
        yield Part(rows.at(fitted), rows.at(asked))


def ask(
    rows: LabelledRows,
    held_out: LabelledRows | Sequence[Fold],
    heads: Mapping[str, Fit],
    store: Store,
    k: int,
    progress: bool = False,
) -> Answers:
    """Makes each head and a datastore from the rows of a part, and asks them about the others.

    The neighbours are searched once for all heads.

    Args:
        rows: to learn from.
        held_out: folds of these rows, or other rows.
        heads: what makes them, by name.
        store: makes a datastore.
        k: how many neighbours are searched; fewer where a part has fewer rows.
        progress: show a progress bar.
    """
    near: list[Neighbors] = []
    asked: list[LabelledRows] = []
    said: dict[str, list[Tensor]] = {name: [] for name in heads}
    count = 1 if isinstance(held_out, LabelledRows) else len(held_out)
    with transformers_logging.tqdm(
        total=count * (len(heads) + 1), desc="Asking heads and neighbours", disable=not progress
    ) as bar:
        for part in parts_of(rows, held_out):
            near.append(store(part.fitted).search(part.held_out.store, k))
            asked.append(part.held_out)
            bar.update()
            for name, fit in heads.items():
                said[name].append(fit(part.fitted)(part.held_out.head))
                bar.update()
    width = min(found.labels.shape[1] for found in near)
    fields = zip(*near, strict=True)
    neighbors = Neighbors(*(torch.cat([part[:, :width] for part in field]) for field in fields))
    groups = [part.groups for part in asked if part.groups is not None]
    return Answers(
        neighbors,
        {name: torch.cat(parts) for name, parts in said.items()},
        torch.cat([part.labels for part in asked]),
        torch.cat(groups) if groups else None,
    )


def widest(rows: int, held_out: int, num_labels: int) -> int:
    """The largest k that is tried.

    Args:
        rows: of the datastore.
        held_out: rows to choose on.
        num_labels: C.
    """
    return max(default_grid(rows, num_labels, coarse=has_few_labels(held_out, num_labels)).k)


def choose_cell(
    rows: HeldOut,
    held_out: int,
    stored: int,
    num_labels: int,
    criterion: str | None,
    *,
    metric: str = Metric.COSINE,
    weighting: str = Weighting.SOFTMAX,
    progress: bool = False,
) -> TuneResult:
    """Chooses k, temperature and λ on some of the rows that were held out.

    Below 16 labels a class λ alone is chosen, of `FEW_KNN_WEIGHTS`, unless a criterion is named.

    Args:
        rows: to choose on.
        held_out: how many there are with those that nothing is chosen on; the grid and whether
            there are few labels go by all of them.
        stored: rows of the datastore.
        num_labels: C.
        criterion: see `hf_knn.tune`; None is `one_standard_error`.
        metric: of the similarities.
        weighting: of the votes.
        progress: show a progress bar.
    """
    few = has_few_labels(held_out, num_labels)
    grid = default_grid(stored, num_labels, coarse=few)
    is_weight_alone = few and criterion is None
    if is_weight_alone:
        grid = Grid((FIXED_K,), (FIXED_TEMPERATURE,), FEW_KNN_WEIGHTS)
    result = tune(
        rows.neighbors, rows.head_log_probs, rows.labels, num_labels,
        criterion or Criterion.ONE_STANDARD_ERROR, metric=metric, weighting=weighting,
        grid=grid, progress=progress,
    )  # fmt: skip
    k = FIXED_K if is_weight_alone else result.k  # of a store that grows later, 20 may vote
    return replace(result, k=k, has_few_labels=few)
