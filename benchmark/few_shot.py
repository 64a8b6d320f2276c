"""One split with few labelled pictures: every way to train a head, each with as many trials.

Everything is chosen on folds of the few labelled pictures themselves, head and neighbours out of
the same folds; with one picture per class there is nothing to choose on, and the middle of the
grids is taken.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hf_knn import (
    Datastore,
    FactorControl,
    Neighbors,
    ProbeConfig,
    ProbeGrid,
    ProbeScore,
    ProbeSettings,
    blend_log_probs,
    choose_probe,
    fit_ridge,
    knn_log_probs,
    stratified_folds,
    train_probes,
    tune,
)

FOLDS, EPOCHS, CLAMP = 5, 60, 10.0
FLOOR = 1e-12
DEFAULT_CELL = (20, 0.14, 0.5)
PLAIN = ProbeGrid((0.3, 0.1, 0.03, 0.01, 0.003, 0.001), (0.0, 1e-3)).configs()
"""12 trials, as each arm has."""


def _reweighted(control: str = FactorControl.NONE) -> list[ProbeConfig]:
    return ProbeGrid((0.1, 0.03), (0.0, 1e-3), (0.03, 0.1, 0.3), controls=(control,)).configs()


ARMS: dict[str, tuple[list[ProbeConfig], str]] = {
    "head": (PLAIN, "none"),
    "reweighted": (_reweighted(), "none"),
    "normalised": (_reweighted(), "mean"),
    "shuffled": (_reweighted(FactorControl.SHUFFLED), "none"),
    "constant": (_reweighted(FactorControl.CONSTANT), "none"),
}
"""Linear heads: their configurations, and how factors are normalised.

`reweighted` is the published loss. `shuffled` gives each picture another one's factor, `constant`
all of them the mean: what remains of the gain there has nothing to do with what k-NN finds hard.
"""

BLENDS = {"blend": "head", "blend_ridge": "ridge", "blend_reweighted": "reweighted"}
"""Which head each blend has beside the neighbours."""

VOICES = ("ridge", "knn", *BLENDS)

ChosenCell = tuple[int, float, float]
"""k, temperature and λ."""


class Rows(NamedTuple):
    """Features [N, D] and labels [N] int64."""

    features: Tensor
    labels: Tensor

    def select(self, rows: object) -> "Rows":
        """Some of them."""
        index = torch.as_tensor(rows)
        return Rows(self.features[index], self.labels[index])


class Answers(NamedTuple):
    """What was said about rows held out, by pieces fitted on others.

    Attributes:
        arms: log-probabilities [M, B, C] of each arm's configurations.
        ridge: [B, C].
        neighbors: of the largest k.
        labels: [B].
    """

    arms: dict[str, Tensor]
    ridge: Tensor
    neighbors: Neighbors
    labels: Tensor


def measure_split(train: Rows, test: Rows, classes: int, seed: int) -> dict[str, float]:
    """Test top-1 of every head and voice, everything chosen on the training pictures.

    Args:
        train: the labelled pictures.
        test: pictures that nothing is chosen on.
        classes: C.
        seed: of folds and heads.
    """
    chosen = {name: configs[len(configs) // 2] for name, (configs, _) in ARMS.items()}
    cells = dict.fromkeys(BLENDS.values(), DEFAULT_CELL)
    knn_cell = DEFAULT_CELL
    if int(torch.bincount(train.labels).max()) > 1:
        chosen, cells, knn_cell = _choose(train, classes, seed)
    answers = _answer(train, test, classes, seed, {name: [c] for name, c in chosen.items()})
    heads = {name: log_probs[0] for name, log_probs in answers.arms.items()}
    heads["ridge"] = answers.ridge
    found = {name: _top1(log_probs, test.labels) for name, log_probs in heads.items()}
    found["knn"] = _top1(_votes(answers.neighbors, classes, *knn_cell[:2]), test.labels)
    for name, head in BLENDS.items():
        k, temperature, weight = cells[head]
        votes = _votes(answers.neighbors, classes, k, temperature)
        found[name] = _top1(blend_log_probs(heads[head], votes, weight), test.labels)
    return found


def _choose(
    train: Rows, classes: int, seed: int
) -> tuple[dict[str, ProbeConfig], dict[str, ChosenCell], ChosenCell]:
    """The configuration of each arm, the cell beside each head, and that of k-NN alone."""
    parts = []
    every = {name: configs for name, (configs, _) in ARMS.items()}
    for fold in stratified_folds(train.labels, FOLDS, seed):
        fitted, held_out = train.select(fold.fitted), train.select(fold.held_out)
        parts.append(_answer(fitted, held_out, classes, seed, every))
    labels = torch.cat([part.labels for part in parts])
    width = min(part.neighbors.labels.shape[1] for part in parts)
    fields = zip(*(part.neighbors for part in parts), strict=True)
    neighbors = Neighbors(*(torch.cat([part[:, :width] for part in field]) for field in fields))
    chosen, heads = {}, {"ridge": torch.cat([part.ridge for part in parts])}
    for name, configs in every.items():
        log_probs = torch.cat([part.arms[name] for part in parts], dim=1)  # [M, N, C]
        best = _best(configs, log_probs, labels)
        chosen[name], heads[name] = configs[best], log_probs[best]
    results = {name: tune(neighbors, heads[name], labels, classes) for name in BLENDS.values()}
    cells = {name: (r.k, r.temperature, r.knn_weight) for name, r in results.items()}
    best_knn = results["head"].best_knn
    return chosen, cells, (best_knn.k, best_knn.temperature, 1.0)


def _best(configs: list[ProbeConfig], log_probs: Tensor, labels: Tensor) -> int:
    """By the rule of `choose_probe`, on the pooled folds."""
    own = log_probs.gather(2, labels.expand(len(configs), -1).unsqueeze(2)).squeeze(2)
    likelihood = own.double().clamp_min(math.log(FLOOR)).mean(1)
    accuracy = (log_probs.argmax(2) == labels).double().mean(1)
    table = [
        ProbeScore(config, float(share), float(mean), diverged=math.isnan(mean))
        for config, share, mean in zip(configs, accuracy, likelihood, strict=True)
    ]
    return choose_probe(table, len(labels)).best


def _answer(
    fitted: Rows, asked: Rows, classes: int, seed: int, arms: dict[str, list[ProbeConfig]]
) -> Answers:
    """Fits everything on some rows and asks it about others."""
    store = Datastore.from_features(fitted.features, fitted.labels)
    own = _own_votes(store, fitted, classes)
    found: dict[str, Tensor] = {}
    for normalize in ("none", "mean"):
        names = [name for name in arms if ARMS[name][1] == normalize]
        configs = [config for name in names for config in arms[name]]
        settings = ProbeSettings(
            EPOCHS, batch_size=512, seed=seed, knn_loss_clamp=CLAMP, knn_loss_normalize=normalize
        )
        heads = train_probes(fitted.features, fitted.labels, classes, configs, settings, own)
        log_probs = heads.logits(asked.features).log_softmax(2)
        sizes = [len(arms[name]) for name in names]
        found |= dict(zip(names, log_probs.split(sizes), strict=True))
    mean = fitted.features.mean(0)
    unit, queries = (functional.normalize(rows.features - mean, dim=1) for rows in (fitted, asked))
    ridge = fit_ridge(unit, fitted.labels, classes).log_probs(queries).float()
    neighbors = store.search(asked.features, len(store))
    return Answers(found, ridge, neighbors, asked.labels)


def _own_votes(store: Datastore, rows: Rows, classes: int) -> Tensor:
    """[N] leave-one-out log p_knn of each row's own label, at the likeliest k and temperature."""
    ids = torch.arange(len(rows.labels))
    neighbors = store.search(rows.features, len(store) - 1, ids)
    silent = torch.zeros(len(rows.labels), classes)
    best = tune(neighbors, silent, rows.labels, classes, "log_likelihood").best_knn
    votes = _votes(neighbors, classes, max(1, best.k), best.temperature)
    return votes.gather(1, rows.labels.unsqueeze(1)).squeeze(1)


def _votes(neighbors: Neighbors, classes: int, k: int, temperature: float) -> Tensor:
    return knn_log_probs(
        neighbors.similarities[:, :k], neighbors.labels[:, :k], classes, temperature
    )


def _top1(log_probs: Tensor, labels: Tensor) -> float:
    return float((log_probs.argmax(1) == labels).double().mean())
