"""What the datastore says about its own rows, each left out of the vote on itself: for the loss."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.backbone import split_features
from ..core.config import KnnConfig
from ..core.search import Neighbors
from ..core.votes import knn_log_probs
from ..features.extract import ImageFeatures
from ..store.backend import SearchBackend
from ..store.folders import write_durably
from .blend import default_grid, tune

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
        for rows in torch.arange(len(features)).split(_ROWS):
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
