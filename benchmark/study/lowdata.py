"""Few labelled pictures per class, those to choose on among them."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_knn import Datastore, Neighbors, tune
from hf_knn.data import few_rows, stratified_folds
from hf_knn.fit import ProbeConfig, ProbeScore, choose_probe, fit_ridge, score_probes
from study.arms import Arm
from study.arms_of import FIXED, PLAIN, Split, Voices, directions, fit_heads, leave_one_out
from study.losses import linear_arms, loss_settings
from study.phases import HEADS, TUNE
from study.pool import Rows
from study.study import Study

FOLDS = 3
LEAST_TO_HOLD_OUT = 4
"""Shots from which a backbone that is trained itself gives a quarter away to choose on."""


class Fold(NamedTuple):
    """Some of the few pictures, and the others that are held out to choose on."""

    fitted: Rows
    asked: Rows
    store: Datastore


def measure_lowdata(study: Study, seed: int, shots: int) -> tuple[Voices, dict[str, Arm]]:
    """Head, ridge, neighbours, blend and fixed cell with so many pictures per class.

    Heads and neighbours are chosen on the same folds of the few pictures. With one picture per
    class there is nothing to choose on: the middle of the grid and the fixed cell are taken. A
    backbone that is trained itself has seen the labels of any fold, so it gives pictures away.
    """
    voices = few_voices(study, seed, shots)
    if voices.has_validation or not can_choose(voices):
        arms = {"head": voices.head, "knn": voices.knn, "blend": voices.blend}
    else:
        arms = _chosen(voices)
    return voices, arms | {"ridge": _ridge(voices), "fixed": mixed_fixed(voices, arms["head"])}


def measure_few_heads(study: Study, seed: int, shots: int) -> tuple[Voices, dict[str, Arm]]:
    """The losses of `linear`, and ridge beside k-NN: all chosen on the same folds."""
    voices = few_voices(study, seed, shots)
    folds = folds_of(voices) if can_choose(voices) and not voices.has_validation else []
    arms = {}
    for name, configs in {"plain": PLAIN, **linear_arms()}.items():
        settings = loss_settings(name)
        own = None if name == "plain" else voices.own_votes
        if folds:
            configs = [ask_heads(voices, folds, configs, **settings)[0]]
        arms[name] = voices.probe(configs, own, **settings)
    ridge = _ridge(voices)
    return voices, arms | {"ridge": ridge, "blend_ridge": _beside_ridge(voices, ridge, folds)}


def few_voices(study: Study, seed: int, shots: int) -> Voices:
    """Voices that know a few pictures per class; those to choose on are among them."""
    few, test = study.few(seed, shots)
    if study.backbone.is_scratch:
        return _trained(study, few, test, seed, shots)
    rows = study.pool.rows
    train = rows.select(few)
    split = Split(train, train.select([]), rows.select(test))
    return study.voices_of(split, seed)


def can_choose(voices: Voices) -> bool:
    """Whether a class has a second picture to choose on."""
    return int(torch.bincount(voices.split.train.labels).max()) > 1


def mixed_fixed(voices: Voices, head: Arm) -> Arm:
    """The blend at the fixed cell."""
    return voices.mix(head, **FIXED)


def _trained(study: Study, few: Tensor, test: NDArray[np.int64], seed: int, shots: int) -> Voices:
    train, held = few, few[:0]
    if shots >= LEAST_TO_HOLD_OUT:
        chosen = torch.as_tensor(few_rows(study.labels[few], 0.25, seed))
        is_held = torch.zeros(len(few), dtype=torch.bool)
        is_held[chosen] = True
        train, held = few[~is_held], few[is_held]
    rows = study.trained_rows(train, seed)
    split = Split(rows.select(train), rows.select(held), rows.select(test))
    return study.voices_of(split, seed)


def _chosen(voices: Voices) -> dict[str, Arm]:
    """Arms of a frozen backbone, everything chosen on folds."""
    folds = folds_of(voices)
    labels = torch.cat([fold.asked.labels for fold in folds])
    neighbors = _ask_neighbors(voices, folds)
    config, log_probs = ask_heads(voices, folds, PLAIN)
    head = voices.probe([config])
    with voices.phases.phase(TUNE):
        found = tune(neighbors, log_probs, labels, voices.num_labels)
    best = found.best_knn
    return {
        "head": head,
        "knn": voices.votes(max(1, best.k), best.temperature),
        "blend": _mix(voices, head, found),
    }


def _mix(voices: Voices, head: Arm, found: Any) -> Arm:
    """A head and the neighbours at the cell of a `TuneResult`."""
    return voices.mix(head, max(1, found.k), found.temperature, found.knn_weight)


def folds_of(voices: Voices) -> list[Fold]:
    """The few pictures, each held out once."""
    train = voices.split.train
    found = []
    for fold in stratified_folds(train.labels, FOLDS, voices.seed):
        fitted = train.select(fold.fitted)
        store = Datastore.from_features(fitted.store, fitted.labels)
        found.append(Fold(fitted, train.select(fold.held_out), store))
    return found


def ask_heads(
    voices: Voices, folds: list[Fold], configs: Sequence[ProbeConfig], **settings: Any
) -> tuple[ProbeConfig, Tensor]:
    """The best configuration, and [N, C] log-probabilities of what was held out from it."""
    answers, tables = [], []
    count = voices.num_labels
    weighs = any(config.alpha or config.gamma for config in configs)
    for fold in folds:
        own = leave_one_out(fold.store, fold.fitted, count) if weighs else None
        with voices.phases.phase(HEADS):
            heads = fit_heads(fold.fitted, count, configs, voices.seed, own, **settings)
        tables.append(score_probes(heads, fold.asked.head, fold.asked.labels))
        answers.append(heads.logits(fold.asked.head).log_softmax(2))
    sizes = [len(fold.asked.labels) for fold in folds]
    pooled = [_pooled(same, sizes) for same in zip(*tables, strict=True)]
    best = choose_probe(pooled, sum(sizes)).best
    return configs[best], torch.cat([part[best] for part in answers])


def _pooled(scores: Sequence[ProbeScore], sizes: list[int]) -> ProbeScore:
    """One configuration on all folds: means over their pictures."""

    def mean(values: Iterable[float]) -> float:
        return sum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes)

    return scores[0]._replace(
        accuracy=mean(score.accuracy for score in scores),
        log_likelihood=mean(score.log_likelihood for score in scores),
        diverged=any(score.diverged for score in scores),
    )


def _ask_neighbors(voices: Voices, folds: list[Fold]) -> Neighbors:
    """Of what was held out, among what was not."""
    near = [voices.search(fold.store, fold.asked) for fold in folds]
    width = min(part.labels.shape[1] for part in near)
    fields = zip(*near, strict=True)
    return Neighbors(*(torch.cat([part[:, :width] for part in same]) for same in fields))


def _beside_ridge(voices: Voices, ridge: Arm, folds: list[Fold]) -> Arm:
    """The ridge head and the neighbours, at a cell chosen on validation or on folds."""
    if ridge.validation is not None:
        near, asked, labels = (
            voices.near_validation, ridge.validation, voices.split.validation.labels,
        )  # fmt: skip
    elif folds:
        near = _ask_neighbors(voices, folds)
        asked = torch.cat([_ridge_of(voices, fold.fitted, fold.asked)[0] for fold in folds])
        labels = torch.cat([fold.asked.labels for fold in folds])
    else:
        return voices.mix(ridge, **FIXED)
    with voices.phases.phase(TUNE):
        return _mix(voices, ridge, tune(near, asked, labels, voices.num_labels))


def _ridge(voices: Voices) -> Arm:
    """The closed form, its regulariser by exact leave-one-out of the few pictures."""
    train, validation, test = voices.split
    answer, regularizer = _ridge_of(voices, train, test)
    held = _ridge_of(voices, train, validation)[0] if voices.has_validation else None
    return Arm(held, answer, {"regularizer": regularizer})


def _ridge_of(voices: Voices, train: Rows, asked: Rows) -> tuple[Tensor, float]:
    """[B, C] log-probabilities, and the regulariser."""
    mean = train.head.mean(0)
    unit, others = (directions(rows.head, mean) for rows in (train, asked))
    with voices.phases.phase(HEADS):
        fit = fit_ridge(unit, train.labels, voices.num_labels)
    return fit.log_probs(others).float(), fit.regularizer
