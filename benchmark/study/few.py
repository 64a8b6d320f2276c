"""Voices that know a few pictures per class; labels to choose on are among them."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_knn import Datastore, Neighbors
from hf_knn.data import stratified_folds
from hf_knn.fit import ProbeConfig, ProbeScore, choose_probe, score_probes
from study.arms import Arm
from study.arms_of import PLAIN, Held, Part, Split, Voices, fit_heads, leave_one_out
from study.phases import HEADS, Phases

FOLDS = 3


class FewVoices(Voices):
    """Everything is chosen on folds of the few pictures, or on those that were given away.

    With one picture per class there is nothing to choose on: the middle of a grid and the fixed
    cell are taken.

    Args:
        split: the few pictures, and of a backbone that was trained on them those given away.
        num_labels: C.
        seed: of the folds and the heads.
        phases: told how long things take.
        has_seen: whether the features were trained on the labels of `split.train`, so that a fold
            of them would be no stranger.
    """

    def __init__(
        self, split: Split, num_labels: int, seed: int, phases: Phases, *, has_seen: bool
    ) -> None:
        super().__init__(split, num_labels, seed, None, phases)
        if not (self.has_validation or has_seen) and (torch.bincount(split.train.labels) > 1).any():
            self.folds = stratified_folds(split.train.labels, FOLDS, seed)

    @cached_property
    def held(self) -> Held | None:
        """The validation pictures, or the few in folds; None if there is nothing to choose on."""
        if not self.folds:
            return super().held
        train, parts = self.split.train, []
        for fold in self.folds:
            fitted = train.select(fold.fitted)
            store = Datastore.from_features(fitted.store, fitted.labels)
            parts.append(Part(fitted, train.select(fold.held_out), store))
        near = [self.search(part.store, part.asked) for part in parts]
        width = min(found.labels.shape[1] for found in near)
        fields = zip(*near, strict=True)
        return Held(parts, Neighbors(*(torch.cat([p[:, :width] for p in same]) for same in fields)))

    @cached_property
    def head(self) -> Arm:
        """A linear head chosen among `PLAIN`."""
        return self.chosen_probe(PLAIN)

    @property
    def head_answers(self) -> Tensor | None:
        """[V, C] what the head says of `held`."""
        return self._plain[1] if self.folds else super().head_answers

    @cached_property
    def _plain(self) -> tuple[ProbeConfig, Tensor]:
        return self._ask(PLAIN)

    def chosen_probe(
        self, configs: Sequence[ProbeConfig], own: Tensor | None = None, **settings: Any
    ) -> Arm:
        """The best of some heads, chosen on what is held out."""
        if self.folds:
            found = self._plain if configs is PLAIN else self._ask(configs, **settings)
            configs = [found[0]]
        return self.probe(configs, own, **settings)

    def _ask(self, configs: Sequence[ProbeConfig], **settings: Any) -> tuple[ProbeConfig, Tensor]:
        """The best configuration, and [V, C] log-probabilities of what was held out from it."""
        assert self.held is not None
        answers, tables = [], []
        weighs = any(config.alpha or config.gamma for config in configs)
        for part in self.held.parts:
            own = leave_one_out(part.store, part.fitted, self.num_labels) if weighs else None
            with self.phases.phase(HEADS):
                heads = fit_heads(part.fitted, self.num_labels, configs, self.seed, own, **settings)
            tables.append(score_probes(heads, part.asked.head, part.asked.labels))
            answers.append(heads.logits(part.asked.head).log_softmax(2))
        sizes = [len(part.asked.labels) for part in self.held.parts]
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
