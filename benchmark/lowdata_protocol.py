"""Few labelled pictures per class, those to choose on among them."""

import torch
from study import Study
from torch import Tensor
from torch.nn import functional
from voices import FIXED, PLAIN, Arm, Split, Voices, fit_heads

from hf_knn import (
    Datastore,
    Neighbors,
    ProbeConfig,
    choose_probe,
    few_rows,
    fit_ridge,
    score_probes,
    stratified_folds,
    tune,
)

FOLDS = 3
LEAST_TO_HOLD_OUT = 4
"""Shots from which a backbone that is trained itself gives a quarter away to choose on."""


def measure_lowdata(study: Study, seed: int, shots: int) -> tuple[Voices, dict[str, Arm]]:
    """Head, ridge, neighbours, blend and fixed cell with so many pictures per class.

    Head and neighbours are chosen on the same folds of the few pictures. With one picture per
    class there is nothing to choose on: the middle of the grid and the fixed cell are taken. A
    backbone that is trained itself has seen the labels of any fold, so it gives pictures away.
    """
    few, test = study.few(seed, shots)
    if study.backbone.is_scratch:
        voices = _trained(study, few, test, seed, shots)
        arms = {"head": voices.head, "knn": voices.knn, "blend": voices.blend}
    else:
        rows = study.pool.rows
        train = rows.select(few)
        empty = train.select([])
        voices = Voices(Split(train, empty, rows.select(test)), study.num_labels, seed)
        arms = _chosen(voices, shots)
    return voices, arms | {"ridge": _ridge(voices), "fixed": mixed_fixed(voices, arms["head"])}


def mixed_fixed(voices: Voices, head: Arm) -> Arm:
    """The blend at the fixed cell."""
    return voices.mix(head, **FIXED)


def _trained(study: Study, few: Tensor, test: Tensor, seed: int, shots: int) -> Voices:
    train, held = few, few[:0]
    if shots >= LEAST_TO_HOLD_OUT:
        chosen = torch.as_tensor(few_rows(study.labels[few], 0.25, seed))
        is_held = torch.zeros(len(few), dtype=torch.bool)
        is_held[chosen] = True
        train, held = few[~is_held], few[is_held]
    rows = study.trained_rows(train, seed)
    split = Split(rows.select(train), rows.select(held), rows.select(test))
    return Voices(split, study.num_labels, seed)


def _chosen(voices: Voices, shots: int) -> dict[str, Arm]:
    """Arms of a frozen backbone, everything chosen on folds."""
    train = voices.split.train
    if int(torch.bincount(train.labels).max()) < 2:
        return {"head": voices.head, "knn": voices.knn, "blend": voices.blend}
    config, log_probs, neighbors, labels = _ask_folds(voices)
    found = tune(neighbors, log_probs, labels, voices.num_labels)
    head = voices.probe([config])
    best = found.best_knn
    return {
        "head": head,
        "knn": voices.votes(max(1, best.k), best.temperature),
        "blend": voices.mix(head, max(1, found.k), found.temperature, found.knn_weight),
    }


def _ask_folds(voices: Voices) -> tuple[ProbeConfig, Tensor, Neighbors, Tensor]:
    """The best configuration, and what head and neighbours say about held-out pictures."""
    train, seed = voices.split.train, voices.seed
    hits: list[Tensor] = []
    near: list[Neighbors] = []
    labels: list[Tensor] = []
    tables = []
    for fold in stratified_folds(train.labels, FOLDS, seed):
        fitted, asked = train.select(fold.fitted), train.select(fold.held_out)
        heads = fit_heads(fitted, voices.num_labels, PLAIN, seed)
        tables.append((score_probes(heads, asked.head, asked.labels), len(asked.labels)))
        hits.append(heads.logits(asked.head).log_softmax(2))
        store = Datastore.from_features(fitted.store, fitted.labels)
        near.append(voices.search(store, asked))
        labels.append(asked.labels)
    total = sum(count for _, count in tables)
    pooled = [
        same[0][0]._replace(
            accuracy=sum(score.accuracy * count for score, count in same) / total,
            log_likelihood=sum(score.log_likelihood * count for score, count in same) / total,
            diverged=any(score.diverged for score, _ in same),
        )
        for same in zip(*([(s, count) for s in table] for table, count in tables), strict=True)
    ]
    best = choose_probe(pooled, total).best
    width = min(part.labels.shape[1] for part in near)
    fields = zip(*near, strict=True)
    neighbors = Neighbors(*(torch.cat([part[:, :width] for part in same]) for same in fields))
    return PLAIN[best], torch.cat([part[best] for part in hits]), neighbors, torch.cat(labels)


def _ridge(voices: Voices) -> Arm:
    """The closed form, its regulariser by exact leave-one-out of the few pictures."""
    train, _, test = voices.split
    mean = train.head.mean(0)
    unit, asked = (functional.normalize(rows.head - mean, dim=1) for rows in (train, test))
    fit = fit_ridge(unit, train.labels, voices.num_labels)
    return Arm(None, fit.log_probs(asked).float(), {"regularizer": fit.regularizer})
