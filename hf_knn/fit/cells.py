"""Accuracy and likelihood of every cell of a grid, from one search at the largest k."""

from functools import partial
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional
from transformers.utils import logging as transformers_logging

from ..core.search import Neighbors
from ..core.votes import PROBABILITY_FLOOR, Weighting, neighbor_log_weights
from ..features.encoders import in_order, one_torch_thread

_NUMBERS = 2048  # rows times temperatures in a block: its votes stay in the cache
_MOST_THREADS = 4
_NEIGHBORS = 64  # whose votes are counted at once
_FACTORS = 16  # probabilities that are multiplied before a logarithm is taken: 1e-12 ** 16 > 0
_TIE = 1e-7  # the head comes as float32 log-probabilities, which tell no smaller difference
_SMALLEST = 1e-300


class Grid(NamedTuple):
    """The cells that are tried: every combination."""

    k: tuple[int, ...]
    temperatures: tuple[float, ...]
    knn_weights: tuple[float, ...]


class Cell(NamedTuple):
    """One combination and what it scored on the held-out rows.

    Attributes:
        k: neighbours that really voted, at most as many as there are.
        temperature: divides squared distances.
        knn_weight: λ.
        accuracy: top-1.
        mean_class: mean per-class accuracy.
        log_likelihood: mean ``log p(label)``, p floored at 1e-12.
    """

    k: int
    temperature: float
    knn_weight: float
    accuracy: float
    mean_class: float
    log_likelihood: float


class CellScorer:
    """Scores cells without ever building [N, C] votes, and all T and λ of a k at once.

    A class can only win a row if one of its neighbours has it or if it is the head's first choice.
    So each row keeps one slot for the latter, and one per class among its neighbours, in the order
    of first appearance: those of the nearest k come first.

    A score is linear in λ. So the λ at which a class beats the label of a row are a half-line, and
    those at which the label wins are an interval.

    Slots come first in every tensor, rows last, so that what is done along slots is done for many
    rows at once.

    Args:
        neighbors: [N, K] of each row.
        head_log_probs: [N, C_head].
        labels: [N] int64 in [0, num_labels).
        num_labels: C.
        metric: of the similarities.
        weighting: of the votes; only `softmax` has a temperature.
    """

    def __init__(
        self,
        neighbors: Neighbors,
        head_log_probs: Tensor,
        labels: Tensor,
        num_labels: int,
        metric: str,
        weighting: str,
    ) -> None:
        self.similarities = neighbors.similarities
        self.neighbor_labels = neighbors.labels
        self.head = head_log_probs.detach()
        self.labels, self.num_labels = labels, num_labels
        self.metric, self.weighting = metric, weighting
        # blocks of rows that the head gets right have one side of the interval only
        self.order = (head_log_probs.argmax(dim=1) == labels).argsort(stable=True)

    def score(self, grid: Grid, progress: bool = False) -> list[Cell]:
        """The cells of a grid, k fastest, then temperature, then weight.

        Args:
            grid: ascending k, none above K.
            progress: show a progress bar.

        Raises:
            ValueError: for NaN, or for another temperature, metric or weighting than there are.
        """
        for temperature in grid.temperatures:
            self._log_weights(self.order[:0], temperature)
        present, targets = self.labels.unique(return_inverse=True)
        sums = _Sums.of(grid, len(present))
        with transformers_logging.tqdm(
            total=len(targets) * len(grid.temperatures), unit=" rows", unit_scale=True,
            desc="Choosing k, temperature and λ", disable=not progress,
        ) as bar:  # fmt: skip
            blocks = self.order.split(-(-_NUMBERS // len(grid.temperatures)))
            threads = min(_MOST_THREADS, torch.get_num_threads())
            with one_torch_thread():
                answers = in_order(partial(self._ask, grid), blocks, threads)
                for rows, said in zip(blocks, answers, strict=True):
                    sums.add(said, targets[rows])
                    bar.update(len(rows) * len(grid.temperatures))
        return sums.cells(grid, torch.bincount(targets))

    def _log_weights(self, rows: Tensor, temperature: float) -> Tensor:
        return neighbor_log_weights(
            self.similarities[rows], temperature, metric=self.metric, weighting=self.weighting
        )

    def _ask(self, grid: Grid, rows: Tensor) -> "_Said":
        """What the voices say about some rows, at every k and temperature of a grid."""
        has_temperature = Weighting(self.weighting) is Weighting.SOFTMAX
        rates = torch.tensor(
            [1 / temperature for temperature in grid.temperatures] if has_temperature else [1.0],
            dtype=torch.float64,
        )
        log_weights = self._log_weights(rows, 1.0)[:, : grid.k[-1]].T.contiguous()  # [K, B]
        if len(log_weights):
            log_weights -= log_weights.amax(dim=0).clamp_min(torch.finfo(torch.float64).min)
        neighbor_labels = self.neighbor_labels[rows, : grid.k[-1]].T.contiguous()
        slots, slot_labels = _assign_slots(neighbor_labels, self.num_labels)
        head = _Head.of(self.head[rows], self.labels[rows], slot_labels, self.num_labels)
        shape = (len(rates), len(rows))
        votes = torch.zeros(1 + len(slot_labels), *shape, dtype=torch.float64)
        total = torch.zeros(shape, dtype=torch.float64)
        found, done = [], 0
        for k in grid.k:
            for start in range(done, k, _NEIGHBORS):
                near = slice(start, min(start + _NEIGHBORS, k))
                weights = (log_weights[near, None] * rates[:, None]).exp_()  # [n, T, B]
                index = (slots[near, None] + 1).expand_as(weights)
                votes.scatter_add_(0, index, weights)
                total += weights.sum(dim=0)
            done = k
            found.append(head.blended(votes, _slots_used(slots, k) + 1, total))
        return _Said(*(torch.stack(parts) for parts in zip(*found, strict=True)))


class _Said(NamedTuple):
    """What is known of B rows at each k and temperature: all that a cell's score depends on.

    Attributes:
        lowest: [k, T, B] from which λ on their label wins.
        highest: [k, T, B] up to which λ it does; below `lowest` if it never does.
        own_head: [k, T, B] probability of the label at λ = 0.
        own_knn: [k, T, B] probability of the label at λ = 1.
    """

    lowest: Tensor
    highest: Tensor
    own_head: Tensor
    own_knn: Tensor


class _Sums:
    """Hits and likelihood of all cells, over the rows so far.

    Args:
        knn_weights: [W] λ, ascending.
        hits: [k, T, C, W + 1] int64 of rows of each class, as differences along λ.
        likelihood: [W, k, T] sum of log p(label).
    """

    def __init__(self, knn_weights: Tensor, hits: Tensor, likelihood: Tensor) -> None:
        self.knn_weights, self.hits, self.likelihood = knn_weights, hits, likelihood

    @classmethod
    def of(cls, grid: Grid, classes: int) -> Self:
        """No rows yet, of so many classes."""
        weights = torch.tensor(sorted(grid.knn_weights), dtype=torch.float64)
        shape, count = (len(grid.k), len(grid.temperatures)), len(weights)
        return cls(
            weights,
            torch.zeros(*shape, classes, count + 1, dtype=torch.int64),
            torch.zeros(count, *shape, dtype=torch.float64),
        )

    def add(self, said: _Said, targets: Tensor) -> None:
        """More rows, of the classes `targets` [B]."""
        *shape, classes, width = self.hits.shape
        cells = torch.arange(len(said.lowest.flatten(0, 1))).view(*shape, 1)
        places = (cells * classes + targets) * width  # [k, T, B]
        first = torch.bucketize(said.lowest, self.knn_weights)
        after = torch.bucketize(said.highest, self.knn_weights, right=True).clamp_min(first)
        one = torch.ones(places.numel(), dtype=torch.int64)
        flat = self.hits.view(-1)
        flat.index_add_(0, (places + first).flatten(), one)
        flat.index_add_(0, (places + after).flatten(), -one)
        head, knn = (own.flatten(0, 1).T.contiguous() for own in said[2:])  # [B, cells]
        for number, weight in enumerate(self.knn_weights.tolist()):
            own = torch.lerp(head, knn, weight).clamp_min_(PROBABILITY_FLOOR)
            self.likelihood[number] += _log_sum(own).view(*shape)

    def cells(self, grid: Grid, counts: Tensor) -> list[Cell]:
        """The scores: k fastest, then temperature, then weight.

        Args:
            grid: as given to `of`.
            counts: [C] rows of each class, all > 0.
        """
        accuracy, mean_class = (
            torch.stack(parts)  # [k, T, W]
            for parts in zip(*(_scores(part, counts) for part in self.hits), strict=True)
        )
        likelihood = self.likelihood.movedim(0, -1) / counts.sum()
        scores = torch.stack([accuracy, mean_class, likelihood], dim=-1).tolist()
        places = [self.knn_weights.tolist().index(weight) for weight in grid.knn_weights]
        return [
            Cell(k, temperature, weight, *scores[i][t][place])
            for weight, place in zip(grid.knn_weights, places, strict=True)
            for t, temperature in enumerate(grid.temperatures)
            for i, k in enumerate(grid.k)
        ]


def _scores(hits: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy and mean-per-class accuracy [T, W], from differences [T, C, W + 1] along λ."""
    hits = hits.cumsum(dim=-1)[..., :-1].double()
    return hits.sum(dim=-2) / counts.sum(), (hits / counts.unsqueeze(1)).mean(dim=-2)


class _Head(NamedTuple):
    """What the head says about some rows: about their labels, and about the class of each slot.

    Attributes:
        slots: [1 + S, 1, B] probability of the head's first choice, and of the neighbours' classes.
        own: [B] probability of the label.
        ties: [1 + S, 1, B] how far each class may be ahead of the label.
        is_taught: [1 + S, 1, B] which classes the head does not have; None: none at all.
        is_own_taught: [B] whether the label is one of them.
        own_slot: [1, B] where the votes for the label are counted; 0 if none of them is for it.
        lines: as `_Lines.of` makes them from the above; None where they depend on the votes.
    """

    slots: Tensor
    own: Tensor
    ties: Tensor
    is_taught: Tensor | None
    is_own_taught: Tensor
    own_slot: Tensor
    lines: "_Lines | None"

    @classmethod
    def of(cls, log_probs: Tensor, targets: Tensor, slot_labels: Tensor, num_labels: int) -> Self:
        """From what the head says about all classes that it has.

        Args:
            log_probs: [B, C_head].
            targets: [B] the labels.
            slot_labels: [S, B] classes of the neighbours; before them comes the first choice.
            num_labels: C, which is the class of a slot that is not used.
        """
        probs = log_probs.double().exp()
        width = probs.shape[1]
        # of equal classes the lowest
        choice = (probs >= probs.amax(dim=1, keepdim=True) - _TIE).to(torch.int8).argmax(dim=1)
        classes = torch.cat([choice.unsqueeze(0), slot_labels])  # [1 + S, B]
        is_outside, is_own_taught = classes >= width, targets >= width
        slots = probs.T.gather(0, classes.clamp(max=width - 1)).masked_fill_(is_outside, 0)
        own = probs.gather(1, targets.clamp(max=width - 1).unsqueeze(1)).squeeze(1)
        own = own.masked_fill(is_own_taught, 0)
        is_own = classes == targets
        # how far a class may be ahead of the label: of those that float32 cannot tell apart, the
        # lowest wins
        ties = torch.where(classes < targets, -_TIE, _TIE).double().masked_fill_(is_own, torch.inf)
        is_taught = (is_outside & (classes < num_labels)).unsqueeze(1)
        has_taught = bool(is_taught.any())
        is_own[0] = False
        slots, ties = slots.unsqueeze(1), ties.unsqueeze(1)
        return cls(
            slots, own, ties, is_taught if has_taught else None, is_own_taught,
            is_own.to(torch.int8).argmax(dim=0, keepdim=True),
            None if has_taught else _Lines.of(slots - own, ties),
        )  # fmt: skip

    def blended(self, votes: Tensor, used: int, total: Tensor) -> _Said:
        """What the blend says at one k.

        Args:
            votes: [1 + S, T, B]; nobody votes for the very first slot.
            used: how many slots there are at this k; nobody votes for the others.
            total: [T, B] of all votes.
        """
        share = total.clamp_min(torch.finfo(torch.float64).tiny).reciprocal()
        own_votes = votes.gather(0, self.own_slot.expand_as(total).unsqueeze(0)).squeeze(0)
        own_knn, own_head = own_votes * share, self.own.expand_as(total)
        votes, lines = votes[:used], self.lines
        lead = (votes - own_votes).mul_(share)  # of each class over the label, at λ = 1
        if self.is_taught is not None:  # their votes count in full, whatever λ is
            shares, is_taught = votes * share, self.is_taught[:used]
            rest = 1 - (shares * is_taught).sum(dim=0)
            own_head = torch.where(self.is_own_taught, own_knn, self.own * rest)
            slots = torch.where(is_taught, shares, self.slots[:used] * rest)
            lines = _Lines.of(slots - own_head, self.ties[:used])
        assert lines is not None
        is_silent = total <= 0
        if bool(is_silent.any()):  # the head alone, whatever λ is
            own_knn = torch.where(is_silent, self.own, own_knn)
            lead = torch.where(is_silent, self.slots[:used] - self.own, lead)
        return _Said(*lines.interval(lead), own_head, own_knn)


class _Lines(NamedTuple):
    """Leads of classes over the label of a row, which are linear in λ.

    A class that leads by ``gap`` at λ = 0 and by ``lead`` at λ = 1 is ahead where ``gap + λ (lead -
    gap) > tie``, that is where ``λ (lead - gap) / (tie - gap)`` is more than 1, or less than 1 if
    it is ahead at λ = 0. The quotient is ``lead * rate + offset``, of which only `lead` differs
    from cell to cell.

    Attributes:
        rate: [S, ..., B] of classes that are not ahead at λ = 0; 0 for the others.
        offset: likewise; -inf for the others, which so are never the largest.
        rate_behind: [S, ..., n] of classes that are ahead at λ = 0, for the first n rows: no other
            row has such a class.
        offset_behind: likewise; inf for the others.
    """

    rate: Tensor
    offset: Tensor
    rate_behind: Tensor
    offset_behind: Tensor

    @classmethod
    def of(cls, gap: Tensor, ties: Tensor) -> Self:
        """From leads [S, ..., B] at λ = 0, and from how far each class may be ahead [S, 1, B]."""
        room = ties - gap
        is_ahead = room < 0
        rows = is_ahead.flatten(0, -2).any(dim=0).nonzero()
        behind = slice(int(rows[-1]) + 1 if len(rows) else 0)
        rates = room.clamp_min(_SMALLEST).reciprocal_().masked_fill_(is_ahead, 0)
        offsets = (gap * rates).neg_().masked_fill_(is_ahead, -torch.inf)
        gap, room, is_ahead = (part[..., behind] for part in (gap, room, is_ahead))
        rates_behind = room.clamp_max(-_SMALLEST).reciprocal_().masked_fill_(~is_ahead, 0)
        offsets_behind = (gap * rates_behind).neg_().masked_fill_(~is_ahead, torch.inf)
        return cls(rates, offsets, rates_behind, offsets_behind)

    def interval(self, lead: Tensor) -> tuple[Tensor, Tensor]:
        """Between which λ no class is ahead of the label.

        Args:
            lead: [S', T, B] at λ = 1, of the first S' <= S classes.

        Returns:
            The lowest and the highest [T, B].
        """
        used, behind = len(lead), self.rate_behind.shape[-1]
        largest = torch.addcmul(self.offset[:used], lead, self.rate[:used]).amax(dim=0)
        lowest = torch.zeros_like(largest)
        if behind:
            smallest = torch.addcmul(
                self.offset_behind[:used], lead[..., :behind], self.rate_behind[:used]
            ).amin(dim=0)
            lowest[:, :behind] = smallest.clamp_min_(_SMALLEST).reciprocal_()
        return lowest, largest.clamp_min_(_SMALLEST).reciprocal_()


def _assign_slots(neighbor_labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """[K, B] labels -> the slot of each neighbour [K, B] and the class of each slot [S, B].

    Slots are in the order of first appearance; unused ones carry the class `num_labels`, which no
    row has.
    """
    width, rows = neighbor_labels.shape
    if width == 0:
        return neighbor_labels, neighbor_labels
    places = torch.arange(width).unsqueeze(1).expand(width, rows)
    first = torch.full((num_labels, rows), width, dtype=torch.int64)
    first.scatter_reduce_(0, neighbor_labels, places, "amin")
    appears = first.gather(0, neighbor_labels)  # [K, B] where each label appears first
    slots = ((appears == places).cumsum(dim=0) - 1).gather(0, appears)
    classes = torch.full((int(slots.amax()) + 1, rows), num_labels, dtype=torch.int64)
    return slots, classes.scatter_(0, slots, neighbor_labels)


def _slots_used(slots: Tensor, k: int) -> int:
    """How many slots the nearest k fill at most."""
    return int(slots[:k].amax()) + 1 if k and slots.numel() else 0


def _log_sum(values: Tensor) -> Tensor:
    """[B, M] in [1e-12, 1] -> [M] sums of their logarithms; several at once, as a product."""
    missing = -len(values) % _FACTORS
    if missing:
        values = functional.pad(values, (0, 0, 0, missing), value=1.0)
    return values.view(_FACTORS, -1, values.shape[1]).prod(dim=0).log_().sum(dim=0)
