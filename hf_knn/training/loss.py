"""The loss of a training run: the plain one, or reweighted by what k-NN finds hard."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ..core.backbone import split_features
from ..core.config import KnnConfig
from ..core.model import KnnImageClassifierOutput
from ..core.votes import ClassWeighting
from ..features.extract import ImageFeatures
from ..fit.grids import LossNormalization
from ..fit.voices import OwnVotes, own_log_probs
from ..fit.weights import class_weights, focal_loss_weights, knn_loss_weights
from ..store.datastore import Datastore
from .arguments import KnnTrainingArguments

SNAPSHOT = "knn_snapshot"
"""Folder in a training checkpoint with the datastore that live queries ask."""


class KnnLoss:
    """Cross-entropy with a factor per row: what k-NN finds hard, and the size of its class.

    ``L = mean_i w_{y_i} CE_i (1 + alpha min(-log p_knn(y_i | x_i), clamp)) (1 - p_knn)^gamma``
    (arXiv 2112.08459), without gradient through k-NN.

    Args:
        args: of the run.
        config: of the model.

    Attributes:
        votes: leave-one-out votes on the training rows at the last refresh; None before.
        store: the datastore of that refresh.
        weights: [C] of the classes; None weighs all alike.
        mean_factor: what factors are divided by.
    """

    def __init__(self, args: KnnTrainingArguments, config: KnnConfig) -> None:
        self.args, self.config = args, config
        self.votes: OwnVotes | None = None
        self.store: Datastore | None = None
        self.weights: Tensor | None = None
        self.mean_factor = 1.0

    @property
    def is_plain(self) -> bool:
        """Whether it is the loss of the model itself.

        With label smoothing `Trainer` would smooth `logits`, which end at log(1e-12).
        """
        smooths = self.args.label_smoothing_factor != 0
        return not (self.args.reweights or smooths) and self.weights is None

    def weigh_classes(self, labels: Tensor) -> None:
        """Fixes the weights of the classes.

        Args:
            labels: [N] of all training rows.
        """
        if self.args.class_weights != ClassWeighting.NONE:
            self.weights = class_weights(labels, self.config.classes, self.args.class_weights)

    def forget(self) -> None:
        """Drops votes and datastore, which the next run must not ask."""
        self.votes = self.store = None

    def refresh(self, store: Datastore, features: ImageFeatures) -> dict[str, float]:
        """Takes a datastore of the weights as they are, and what it says about each row.

        Args:
            store: of the training rows.
            features: of those rows.

        Returns:
            What a log shows.
        """
        cell = None
        if self.votes is not None and not self.args.knn_refresh_tune:
            cell = self.votes.k, self.votes.temperature
        self.store = store
        return self.take(OwnVotes.of(store, features, self.config, cell))

    def take(self, votes: OwnVotes) -> dict[str, float]:
        """Takes votes, and fixes the mean factor; returns what a log shows.

        Args:
            votes: on the training rows.
        """
        self.votes = votes
        factors = self.factors(votes.log_probs)
        if self.args.knn_loss_normalize == LossNormalization.MEAN:
            self.mean_factor = float(factors.mean()) or 1.0
        return {
            "knn_mean_p": float(votes.log_probs.exp().mean()),
            "knn_loss_factor_mean": float(factors.mean()),
            "knn_loss_factor_max": float(factors.max()),
            "knn_loss_k": votes.k,
            "knn_loss_temperature": votes.temperature,
        }

    def save(self, folder: Path) -> None:
        """Writes what a resumed run needs into a training checkpoint."""
        if self.votes is None:
            return
        self.votes.save(folder)
        if self.args.knn_queries == "live" and self.store is not None:
            self.store.save(folder / SNAPSHOT)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        votes = OwnVotes.load(folder)
        if votes is None:
            self.votes = None
            return
        self.take(votes)
        if self.args.knn_queries == "live":
            trusts = self.args.names_index
            self.store = Datastore.load(folder / SNAPSHOT, trust_faiss_index=trusts)

    def of_batch(
        self,
        outputs: KnnImageClassifierOutput,
        labels: Tensor,
        sample_ids: Tensor,
        surprise: Tensor | None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            outputs: of the model.
            labels: [B] int64.
            sample_ids: [B] int64.
            surprise: [B] leave-one-out log p_knn, if the rows tell it.
        """
        assert outputs.head_logits is not None
        if self.args.reweights and surprise is None:
            surprise = self.ask(outputs, labels, sample_ids)
        return self.mean(outputs.head_logits, labels, surprise)

    def ask(self, outputs: KnnImageClassifierOutput, labels: Tensor, sample_ids: Tensor) -> Tensor:
        """[B] leave-one-out log p_knn of a batch, of the last refresh or of this step.

        Args:
            outputs: of the model.
            labels: [B] int64.
            sample_ids: [B] int64.
        """
        assert self.votes is not None
        if self.args.knn_queries == "snapshot":
            return self.votes.at(sample_ids)
        assert self.store is not None
        assert outputs.pooler_output is not None
        _, queries = split_features(outputs.pooler_output.detach().float(), self.config)
        cell = (self.votes.k, self.votes.temperature)
        neighbors = self.store.search(queries, cell[0], exclude_ids=sample_ids)
        return own_log_probs(neighbors, labels, self.store, self.config, cell)

    def mean(self, logits: Tensor, labels: Tensor, surprise: Tensor | None) -> Tensor:
        """The mean loss of some rows, reweighted.

        Args:
            logits: [B, C_head].
            labels: [B] int64; a class taught later has no logit to train and counts nothing.
            surprise: [B] leave-one-out log p_knn; None leaves it out.
        """
        known = labels < logits.shape[1]
        losses = functional.cross_entropy(
            logits[known].float(), labels[known],
            reduction="none", label_smoothing=self.args.label_smoothing_factor,
        )  # fmt: skip
        factors = torch.ones_like(losses)
        if surprise is not None:
            factors = self.factors(surprise[known]) / self.mean_factor
        if self.weights is not None:
            factors = factors * self.weights.to(labels.device)[labels[known]]
        return (factors * losses).sum() / known.sum().clamp_min(1)

    def factors(self, surprise: Tensor) -> Tensor:
        """[B] factors of rows with leave-one-out log p_knn `surprise` [B]."""
        column, first = surprise.unsqueeze(1), torch.zeros(len(surprise), dtype=torch.int64)
        first = first.to(surprise.device)
        factors = knn_loss_weights(
            column, first, self.args.knn_loss_alpha, self.args.knn_loss_clamp
        )
        if self.args.knn_loss_gamma:
            factors = factors * focal_loss_weights(column, first, self.args.knn_loss_gamma)
        return factors


def check_finite(loss: Tensor, step: int, sample_ids: Tensor | None) -> None:
    """Refuses a loss that is not finite, before it reaches the weights.

    Args:
        loss: of a batch.
        step: that it belongs to.
        sample_ids: [B] of the batch, if known.

    Raises:
        FloatingPointError: with the step and the sample ids.
    """
    if not loss.isfinite():
        shown = [] if sample_ids is None else sample_ids.tolist()
        raise FloatingPointError(
            f"Expected a finite loss, but got {float(loss.detach())} at step {step}, sample ids "
            f"{shown[:64]}; lower the learning rate or look at these pictures. The last checkpoint "
            "is whole."
        )
