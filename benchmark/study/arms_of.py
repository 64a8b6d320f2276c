"""The head and the neighbours of one split, everything chosen on its validation pictures."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from hf_knn import Datastore, Neighbors, knn_log_probs, tune
from hf_knn.data import Fold
from hf_knn.fit import (
    ProbeConfig,
    ProbeGrid,
    ProbeSettings,
    TuneResult,
    choose_probe,
    default_grid,
    score_probes,
    train_probes,
)
from study.arms import Arm, mixed
from study.phases import HEADS, STORE, TUNE, Phases
from study.pool import Rows

EPOCHS, BATCH, WARMUP = 25, 256, 2.0
PLAIN = ProbeGrid((0.03, 0.01, 0.003), (0.0, 1e-3)).configs()
"""Six trials, as every arm of every protocol has."""

FIXED = {"k": 20, "temperature": 0.14, "knn_weight": 0.5}
"""Nothing chosen; what low-data cells without labels to choose on take too."""

FIXED_K = int(FIXED["k"])
DINO_TEMPERATURE = 0.14  # 0.07 on cosines is 0.14 on squared distances
FEW_LABELS = 16  # per class, below which `hf_knn.tune` takes its coarse grid


class Split(NamedTuple):
    """The pictures of one seed; `validation` may be empty."""

    train: Rows
    validation: Rows
    test: Rows


class BlendCell(Protocol):
    """Where a blend was found to be best."""

    @property
    def k(self) -> int:
        """Neighbours that vote."""

    @property
    def temperature(self) -> float:
        """Divides squared distances."""

    @property
    def knn_weight(self) -> float:
        """λ."""


class Part(NamedTuple):
    """Pictures to fit voices on, with a datastore of them, and others to choose on."""

    fitted: Rows
    asked: Rows
    store: Datastore


class Held(NamedTuple):
    """What things are chosen on: pictures whose labels no voice has seen.

    Attributes:
        parts: the validation pictures, or folds.
        near: the neighbours of all that is asked about, in the order of the parts.
    """

    parts: list[Part]
    near: Neighbors

    @property
    def labels(self) -> Tensor:
        """[V] of all that is asked about."""
        return torch.cat([part.asked.labels for part in self.parts])


class Voices:
    """Head, neighbours and their blend, fitted when first asked for.

    Args:
        split: the pictures.
        num_labels: C.
        seed: of the heads.
        head: one that was trained already; None fits a linear one.
        phases: told how long things take.

    Attributes:
        fitted: other heads by name, for the next protocol.
        folds: of the training pictures, where things are chosen on them.
    """

    def __init__(
        self,
        split: Split,
        num_labels: int,
        seed: int,
        head: Arm | None = None,
        phases: Phases | None = None,
    ) -> None:
        self.given_head, self.phases = head, phases or Phases()
        self.split, self.num_labels, self.seed = split, num_labels, seed
        self.has_validation = len(split.validation.labels) > 0
        self.fitted: dict[str, Arm] = {}
        self.folds: Sequence[Fold] = ()

    @cached_property
    def store(self) -> Datastore:
        """The training pictures."""
        with self.phases.phase(STORE):
            return Datastore.from_features(self.split.train.store, self.split.train.labels)

    @cached_property
    def near_validation(self) -> Neighbors:
        """Of the validation pictures."""
        return self.search(self.store, self.split.validation)

    @cached_property
    def near_test(self) -> Neighbors:
        """Of the test pictures."""
        return self.search(self.store, self.split.test)

    def search(self, store: Datastore, rows: Rows) -> Neighbors:
        """The nearest rows of a store, as many as any cell asks for."""
        chosen_on = len(self.split.validation.labels) or len(self.split.train.labels)
        with self.phases.phase(TUNE):
            return store.search(rows.store, widest(len(store), self.num_labels, chosen_on))

    @cached_property
    def held(self) -> Held | None:
        """The validation pictures; None without any."""
        if not self.has_validation:
            return None
        return Held(
            [Part(self.split.train, self.split.validation, self.store)], self.near_validation
        )

    @cached_property
    def head(self) -> Arm:
        """The head: a linear one chosen among `PLAIN`, unless another was given."""
        return self.given_head or self.probe(PLAIN)

    def probe(
        self,
        configs: Sequence[ProbeConfig],
        own: Tensor | None = None,
        **settings: Any,
    ) -> Arm:
        """Linear heads of some configurations; the best on validation answers."""
        with self.phases.phase(HEADS):
            return self._probe(configs, own, **settings)

    def _probe(self, configs: Sequence[ProbeConfig], own: Tensor | None, **settings: Any) -> Arm:
        train, validation, test = self.split
        heads = fit_heads(train, self.num_labels, configs, self.seed, own, **settings)
        if not self.has_validation:
            best = len(configs) // 2
            lone = heads.select(best)
            return Arm(None, log_probs_of(lone, test), _named(configs[best]))
        table = score_probes(heads, validation.head, validation.labels)
        best = choose_probe(table, len(validation.labels)).best
        lone = heads.select(best)
        return Arm(log_probs_of(lone, validation), log_probs_of(lone, test), _named(configs[best]))

    @property
    def head_answers(self) -> Tensor | None:
        """[V, C] what the head says of `held`."""
        return self.head.validation

    @cached_property
    def tuned(self) -> TuneResult | None:
        """The plain head beside the neighbours; None if there is nothing to choose on."""
        answers = self.head_answers
        if self.held is None or answers is None:
            return None
        near, labels = self.held.near, self.held.labels
        with self.phases.phase(TUNE):
            return tune(near, answers, labels, self.num_labels)

    @cached_property
    def knn(self) -> Arm:
        """The neighbours alone, at the best pure cell."""
        if self.tuned is None:
            return self.votes(FIXED["k"], FIXED["temperature"])
        return self.votes(max(1, self.tuned.best_knn.k), self.tuned.best_knn.temperature)

    def votes(self, k: float, temperature: float) -> Arm:
        """The neighbours alone, at some cell."""
        sets = (self.near_validation if self.has_validation else None, self.near_test)
        answers = [
            None if near is None else votes_of(near, self.num_labels, int(k), temperature)
            for near in sets
        ]
        assert answers[1] is not None
        return Arm(answers[0], answers[1], {"k": int(k), "temperature": temperature})

    @cached_property
    def blend(self) -> Arm:
        """Both, at the tuned cell."""
        return self.at_cell(self.head, self.tuned)

    def at_cell(self, head: Arm, found: BlendCell | None) -> Arm:
        """A head and the neighbours at the cell that was chosen; None is the fixed one."""
        if found is None:
            return self.mix(head, **FIXED)
        return self.mix(head, max(1, found.k), found.temperature, found.knn_weight)

    @cached_property
    def fixed(self) -> Arm:
        """Both, at the fixed cell."""
        return self.mix(self.head, **FIXED)

    def mix(self, head: Arm, k: float, temperature: float, knn_weight: float) -> Arm:
        """A head and the neighbours at some cell."""
        return mixed(head, self.votes(k, temperature), knn_weight)

    @cached_property
    def dino(self) -> Arm:
        """The vote of DINO: cosines of uncentred features, k 20, temperature 0.07."""
        train, validation, test = self.split
        store = Datastore.from_features(train.store, train.labels, normalization="l2")
        answers = [
            votes_of(self.search(store, rows), self.num_labels, 20, DINO_TEMPERATURE)
            if len(rows.labels) else None
            for rows in (validation, test)
        ]  # fmt: skip
        assert answers[1] is not None
        return Arm(answers[0], answers[1], {"k": 20, "temperature": DINO_TEMPERATURE})

    @cached_property
    def own_votes(self) -> Tensor:
        """[N] leave-one-out log p_knn of each training picture, at the likeliest k and T."""
        store = self.store
        with self.phases.phase(TUNE):
            return leave_one_out(store, self.split.train, self.num_labels)


def fit_heads(
    train: Rows,
    num_labels: int,
    configs: Sequence[ProbeConfig],
    seed: int,
    own: Tensor | None = None,
    **settings: Any,
) -> Any:
    """Linear heads, one per configuration."""
    chosen = ProbeSettings(EPOCHS, batch_size=BATCH, warmup_epochs=WARMUP, seed=seed, **settings)
    return train_probes(train.head, train.labels, num_labels, configs, chosen, own)


def log_probs_of(heads: Any, rows: Rows) -> Tensor:
    """[B, C] of a collection of one head."""
    logits: Tensor = heads.logits(rows.head)[0]
    return logits.log_softmax(1)


def directions(features: Tensor, mean: Tensor) -> Tensor:
    """[B, D] of length 1 around a mean, as neighbours see them, however small the features are.

    In float64: those of untrained weights have lengths of 1e-20, which `normalize` would take for
    zero and float32 cannot square.
    """
    centred = features.double() - mean.double()
    return functional.normalize(centred, dim=1, eps=torch.finfo(torch.float64).tiny).float()


def votes_of(near: Neighbors, num_labels: int, k: int, temperature: float) -> Tensor:
    """[B, C] log-probabilities of the nearest k, -inf for a class without a vote."""
    return knn_log_probs(near.similarities[:, :k], near.labels[:, :k], num_labels, temperature)


def widest(rows: int, num_labels: int, chosen_on: int) -> int:
    """The largest k of the grid that `tune` takes: 512 neighbours cost ten times 128."""
    is_coarse = chosen_on < FEW_LABELS * num_labels
    largest = max(default_grid(rows, num_labels, coarse=is_coarse).k)
    return min(rows, max(FIXED_K, largest))


def leave_one_out(store: Datastore, rows: Rows, num_labels: int) -> Tensor:
    """[N] leave-one-out log p_knn of each row's own label; `rows` are those of the store."""
    ids = torch.arange(len(rows.labels))
    width = min(len(store) - 1, widest(len(store), num_labels, len(ids)))
    near = store.search(rows.store, width, ids)
    silent = torch.zeros(len(rows.labels), num_labels)
    best = tune(near, silent, rows.labels, num_labels, "log_likelihood").best_knn
    votes = votes_of(near, num_labels, max(1, best.k), best.temperature)
    return votes.gather(1, rows.labels.unsqueeze(1)).squeeze(1)


def _named(config: ProbeConfig) -> dict[str, Any]:
    facts = {"learning_rate": config.learning_rate, "weight_decay": config.weight_decay}
    extra = {"alpha": config.alpha, "gamma": config.gamma}
    return facts | {name: value for name, value in extra.items() if value}
