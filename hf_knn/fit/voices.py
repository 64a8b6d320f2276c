"""What is said of rows by those who have not seen them: k-NN by leave-one-out, two voices on folds.

On folds a ridge head and the neighbours are fitted on the same rows, so that they can be compared
and blended. Regulariser and temperature of the head are chosen once, by leave-one-out on the rows
of the first fold: two numbers that no single row can move, and to choose them takes ten times as
long as to use them.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.backbone import split_features
from ..core.config import KnnConfig, Normalization
from ..core.search import Neighbors, normalize_rows
from ..core.votes import PROBABILITY_FLOOR, blend_log_probs, knn_log_probs
from ..data.splits import Fold
from ..features.extract import ImageFeatures
from ..model.ridge import RidgeState
from ..store.backend import SearchBackend, even_parts
from ..store.datastore import Datastore
from ..store.folders import write_durably
from .blend import default_grid, tune
from .ridge import RidgeFit, fit_ridge, scale_of

K, TEMPERATURE, WEIGHT = 20, 0.14, 0.5
"""The cell of the blend: the fixed one, since what is chosen here would be chosen on these rows."""


class HeadCell(NamedTuple):
    """What a ridge head is fitted with.

    Attributes:
        regularizer: relative to the mean eigenvalue, see `ridge.scale_of`.
        temperature: > 0.
    """

    regularizer: float
    temperature: float


class Voices(NamedTuple):
    """Log-probabilities of rows by voices that have not seen them.

    Attributes:
        head: [N, C] float32 of a ridge head, floored at log(1e-12); NaN for a row never held out.
        knn: [N, C] float32 of the neighbours, likewise.
        asked: [N] bool, which rows were held out.
    """

    head: Tensor
    knn: Tensor
    asked: Tensor

    @property
    def blend(self) -> Tensor:
        """[N, C] of both together."""
        return blend_log_probs(self.head, self.knn, WEIGHT)


def out_of_fold(
    features: Tensor,
    labels: Tensor,
    num_labels: int,
    folds: Sequence[Fold],
    on_progress: Callable[[int], object] = lambda done: None,
) -> Voices:
    """Asks both voices about the held-out rows of each fold.

    Args:
        features: [N, D] raw features.
        labels: [N] int64 in [0, num_labels).
        num_labels: C.
        folds: from `stratified_folds`.
        on_progress: called with 1 after each fold.
    """
    empty = torch.full((len(labels), num_labels), math.nan)
    found = Voices(empty, empty.clone(), torch.zeros(len(labels), dtype=torch.bool))
    cell = None
    for fold in folds:
        fitted, held_out = torch.from_numpy(fold.fitted), torch.from_numpy(fold.held_out)
        rows, own = features[fitted], labels[fitted]
        cell = cell or choose_cell(rows, own, num_labels)
        head, knn = ask(rows, own, num_labels, features[held_out], cell)
        found.head[held_out], found.knn[held_out] = head, knn
        found.asked[held_out] = True
        on_progress(1)
    return found


def choose_cell(features: Tensor, labels: Tensor, num_labels: int) -> HeadCell:
    """The best regulariser and temperature by exact leave-one-out.

    Args:
        features: [N, D] raw features.
        labels: [N] int64 in [0, num_labels).
        num_labels: C.
    """
    fit = fit_ridge(_unit(features, features.mean(0)), labels, num_labels)
    return HeadCell(fit.regularizer / scale_of(fit.state), fit.temperature)


def ask(
    features: Tensor, labels: Tensor, num_labels: int, queries: Tensor, cell: HeadCell
) -> tuple[Tensor, Tensor]:
    """Fits both voices on some rows and asks them about others.

    Args:
        features: [N, D] raw features.
        labels: [N] int64 in [0, num_labels).
        num_labels: C.
        queries: [B, D].
        cell: of the head.

    Returns:
        [B, C] float32 log-probabilities of the head and of the neighbours, floored at log(1e-12).
    """
    mean = features.mean(0)
    state = RidgeState.from_rows(_unit(features, mean), labels, num_labels)
    regularizer = cell.regularizer * scale_of(state)
    fit = RidgeFit(*state.solve(regularizer), cell.temperature, regularizer, [], state)
    head = fit.log_probs(_unit(queries, mean))
    near = Datastore.from_features(features, labels).search(queries, K)
    knn = knn_log_probs(near.similarities, near.labels, num_labels, TEMPERATURE)
    floor = math.log(PROBABILITY_FLOOR)
    return head.float().clamp_min(floor), knn.float().clamp_min(floor)


def _unit(rows: Tensor, mean: Tensor) -> Tensor:
    """As the datastore sees them, also rows of untrained weights, of length 1e-20."""
    unit = normalize_rows(rows.numpy(), mean.double().numpy(), Normalization.L2_CENTERED)
    return torch.from_numpy(unit).float()


VOTES_NAME = "knn_votes.safetensors"
_ROWS, _ROWS_TO_CHOOSE_ON = 4096, 20_000


class OwnVotes(NamedTuple):
    """Leave-one-out log p_knn of each training row's own label.

    Attributes:
        ids: [N] int64, ascending.
        log_probs: [N] float32.
        k: neighbours that voted.
        temperature: of the vote.
    """

    ids: Tensor
    log_probs: Tensor
    k: int
    temperature: float

    @classmethod
    def of(
        cls,
        store: SearchBackend,
        features: ImageFeatures,
        config: KnnConfig,
        cell: tuple[int, float] | None = None,
    ) -> "OwnVotes":
        """Asks the datastore about the rows it was built from.

        Args:
            store: built from these features.
            features: N rows.
            config: of the model.
            cell: k and temperature; None chooses them by leave-one-out log-likelihood.
        """
        _, queries = split_features(features.features, config)
        cell = cell or _choose(store, queries, features, config)
        parts = []
        for rows in even_parts(len(features), -(-len(features) // _ROWS)):
            neighbors = store.search(queries[rows], cell[0], exclude_ids=features.ids[rows])
            parts.append(own_log_probs(neighbors, features.labels[rows], store, config, cell))
        order = features.ids.argsort()
        return cls(features.ids[order], torch.cat(parts)[order], *cell)

    def at(self, sample_ids: Tensor) -> Tensor:
        """[B] log p_knn of some rows.

        Args:
            sample_ids: [B] int64 on any device.

        Raises:
            ValueError: for an id that the rows do not have.
        """
        wanted = sample_ids.cpu()
        places = torch.searchsorted(self.ids, wanted).clamp(max=max(0, len(self.ids) - 1))
        if not torch.equal(self.ids[places], wanted):
            raise ValueError(
                "Expected sample ids of the rows that the datastore was built from, but got others."
            )
        return self.log_probs[places].to(sample_ids.device)

    def save(self, folder: Path) -> None:
        """Writes the votes into a folder."""
        facts = {"k": str(self.k), "temperature": repr(self.temperature)}
        tensors = {"ids": self.ids, "log_probs": self.log_probs}
        write_durably(folder / VOTES_NAME, lambda path: save_file(tensors, path, facts))

    @classmethod
    def load(cls, folder: Path) -> "OwnVotes | None":
        """Reads the votes of a folder, or None if it has none."""
        if not (folder / VOTES_NAME).is_file():
            return None
        with safe_open(folder / VOTES_NAME, "pt") as file:
            facts = file.metadata()
            ids, log_probs = file.get_tensor("ids"), file.get_tensor("log_probs")
        return cls(ids, log_probs, int(facts["k"]), float(facts["temperature"]))


def own_log_probs(
    neighbors: Neighbors,
    labels: Tensor,
    store: SearchBackend,
    config: KnnConfig,
    cell: tuple[int, float],
) -> Tensor:
    """[B] log p_knn of each row's own label.

    Args:
        neighbors: of the rows, without themselves; at least k of them, or all there are.
        labels: [B] int64.
        store: that was asked.
        config: of the model.
        cell: k and temperature.
    """
    k, temperature = cell
    votes = knn_log_probs(
        neighbors.similarities[:, :k], neighbors.labels[:, :k], config.classes, temperature,
        metric=store.metric, weighting=config.knn_weighting,
    )  # fmt: skip
    return votes.gather(1, labels.to(votes.device).unsqueeze(1)).squeeze(1)


def _choose(
    store: SearchBackend, queries: Tensor, features: ImageFeatures, config: KnnConfig
) -> tuple[int, float]:
    """K and temperature by leave-one-out log-likelihood, on a sample of many rows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(features), generator=generator)[:_ROWS_TO_CHOOSE_ON].sort().values
    grid = default_grid(len(store), config.classes)._replace(knn_weights=(1.0,))
    neighbors = store.search(queries[rows], max(grid.k), exclude_ids=features.ids[rows])
    silent_head = torch.zeros(len(rows), config.classes)
    best = tune(
        neighbors, silent_head, features.labels[rows], config.classes, "log_likelihood",
        metric=store.metric, weighting=config.knn_weighting, grid=grid,
    )  # fmt: skip
    return max(1, best.k), best.temperature
