"""Pictures that are there twice: equal pixels, or copies: resized, recompressed, cropped."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn import functional

from ..core.search import Neighbors
from ..data.keys import Print
from ..store.datastore import Datastore
from .findings import Finding, Floats, Ints, Kind, Pictures

MARGIN = 0.08
"""How much of each border is left out, as a share of the side: there a crop has no match."""

LARGEST_DIFFERENCE = 0.13
"""Above it pictures are look-alikes, not copies; see `benchmark/claims/planted_duplicates.py`."""

NEIGHBORS = 5
"""How many neighbours of each picture are compared with it, for each of the two kinds."""

SAME_FEATURES = 0.9995
"""Cosine above which two stored rows are taken for one picture, where there are no pixels."""

_LARGEST_ROUGH = 2.5 * LARGEST_DIFFERENCE
"""Pairs that differ more at half the size are not compared at full size: of planted copies none
differed by more than 1.6 times the limit there, and four of five candidates do."""

_BLURS = (5, 3)  # widths in pixels, coarse to fine
_GREY_BLUR, _COLOUR_BLUR, _COLOUR_WEIGHT = 5, 9, 1.5
_STEPS = 5
_LARGEST_STEP, _WIDEST = 0.1, 0.25  # of half the side
_BLOCK = 4
_DAMPING = 1e-3
_FLATTEST = 0.02
_COARSE = 16
_LEAST_CORRELATION = 0.8
_LARGEST_STRETCH = 1.2  # of one aspect ratio by another
_BATCH = 1024
_ROUGH_SIDE = 24
_KEPT_FIRST = {"test": 0, "validation": 1}


def differences(first: Tensor, second: Tensor) -> Tensor:
    """The largest local difference of each pair after fitting, relative to the contrast.

    Args:
        first: [P, 3, S, S] float in [0, 1].
        second: [P, 3, S, S].

    Returns:
        [P] float32 >= 0; 0 for equal pictures, about 1 for unrelated ones: the mean difference
        over the worst block of 4 x 4 pixels, divided by the mean standard deviation of the two
        pictures' pixels (at least 0.02 of the range, so that empty pictures are equal).

    Raises:
        ValueError: for shapes that differ.
    """
    if first.shape != second.shape or first.ndim != 4:
        raise ValueError(
            f"Expected two batches [P, 3, S, S], but got {tuple(first.shape)} and "
            f"{tuple(second.shape)}."
        )
    moved = _sample(second, _fit(first, second))
    blocks = functional.avg_pool2d(_gap(moved - first), _BLOCK, stride=1)
    cut = max(1, round(MARGIN * first.shape[-1]))
    worst = blocks[:, :, cut:-cut, cut:-cut].amax(dim=(1, 2, 3))  # [P]
    contrast = (_contrast(first) + _contrast(second)) / 2
    return worst / contrast.clamp_min(_FLATTEST)


def _gap(difference: Tensor) -> Tensor:
    """[P, 1, S, S] how much pixels differ, slightly blurred; in colour more, as JPEG stores it."""
    grey = difference.mean(1, keepdim=True)
    colour = _blur(difference - grey, _COLOUR_BLUR).abs().mean(1, keepdim=True)
    return torch.maximum(_blur(grey, _GREY_BLUR).abs(), _COLOUR_WEIGHT * colour)


def _contrast(pictures: Tensor) -> Tensor:
    return pictures.flatten(2).std(dim=2).mean(dim=1)


def _blur(pictures: Tensor, width: int) -> Tensor:
    edge = width // 2
    padded = functional.pad(pictures, (edge, edge, edge, edge), mode="replicate")
    return functional.avg_pool2d(padded, width, stride=1)


def _fit(first: Tensor, second: Tensor) -> Tensor:
    """[P, 4] scale minus 1 in x and y, shift in x and y, that take `second` to `first`."""
    grey = first.mean(1, keepdim=True), second.mean(1, keepdim=True)
    frames = first.new_zeros(len(first), 4)
    for width in _BLURS:
        frames = _descend(_blur(grey[0], width), _blur(grey[1], width), frames)
    return frames


def _descend(first: Tensor, second: Tensor, frames: Tensor) -> Tensor:
    """The best frames seen in some steps from those given."""
    line = torch.linspace(-1, 1, first.shape[-1])
    y, x = torch.meshgrid(line, line, indexing="ij")
    inner = ((x.abs() <= 1 - 2 * MARGIN) & (y.abs() <= 1 - 2 * MARGIN)).float()
    best, least = frames, first.new_full((len(first),), torch.inf)
    for step in range(_STEPS + 1):
        moved = _sample(second, frames)
        error = (moved - first) * inner  # [P, 1, S, S]
        loss = error.square().sum(dim=(1, 2, 3))
        better = loss < least
        best, least = torch.where(better[:, None], frames, best), torch.where(better, loss, least)
        if step < _STEPS:
            change = _newton(moved, error, inner, x, y)
            frames = (frames - change).clamp(-_WIDEST, _WIDEST)
    return best


def _newton(moved: Tensor, error: Tensor, inner: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """[P, 4] one damped Gauss-Newton step."""
    spacing = 2 / (moved.shape[-1] - 1)
    slope_y, slope_x = torch.gradient(moved, spacing=spacing, dim=(2, 3))
    columns = [slope_x * x, slope_y * y, slope_x, slope_y]
    jacobian = torch.stack([(column * inner).flatten(1) for column in columns], dim=2)
    normal = jacobian.mT @ jacobian  # [P, 4, 4]
    trace = normal.diagonal(dim1=1, dim2=2).mean(1)
    damping = (_DAMPING * trace + 1e-6)[:, None, None] * torch.eye(4)
    right = jacobian.mT @ error.flatten(1)[:, :, None]
    return torch.linalg.solve(normal + damping, right)[:, :, 0].clamp(-_LARGEST_STEP, _LARGEST_STEP)


def _sample(pictures: Tensor, frames: Tensor) -> Tensor:
    zero = torch.zeros(len(frames))
    top = torch.stack([1 + frames[:, 0], zero, frames[:, 2]], dim=1)
    bottom = torch.stack([zero, 1 + frames[:, 1], frames[:, 3]], dim=1)
    grid = functional.affine_grid(
        torch.stack([top, bottom], dim=1), list(pictures.shape), align_corners=True
    )
    return functional.grid_sample(pictures, grid, padding_mode="border", align_corners=True)


class Pairs(NamedTuple):
    """Pairs of equal or nearly equal pictures.

    Attributes:
        first: [P] picture numbers.
        second: [P].
        difference: [P] 0 for equal pixels, else see `differences`.
        exact: [P] whether the pixels are equal.
    """

    first: Ints
    second: Ints
    difference: Floats
    exact: NDArray[np.bool_]

    def only(self, kept: NDArray[np.bool_]) -> "Pairs":
        """Those whose `kept` [P] is True."""
        return Pairs(self.first[kept], self.second[kept], self.difference[kept], self.exact[kept])


def find_pairs(
    prints: Sequence[Print],
    features: Tensor | None,
    watch: Callable[[str, int], Callable[[int], object]] = lambda name, total: lambda done: None,
) -> Pairs:
    """Finds all pairs of equal pictures and of nearly equal ones.

    Args:
        prints: N pictures.
        features: [N, D] of a backbone; None looks at pixels only.
        watch: told how many candidates there are; what it returns, how many more were compared.
    """
    digests = np.array([one.digest for one in prints], dtype=object)
    _, firsts, places = np.unique(digests, return_index=True, return_inverse=True)
    firsts, places = firsts.astype(np.int64), places.astype(np.int64)
    copies = np.flatnonzero(firsts[places] != np.arange(len(prints)))
    equal = Pairs(firsts[places[copies]], copies, np.zeros(len(copies)), np.ones(len(copies), bool))
    chosen = np.sort(firsts)  # one of each group of equal ones, else they fill all places
    if len(chosen) < 2:
        return equal
    tiny = torch.from_numpy(np.stack([prints[row].tiny for row in chosen])).permute(0, 3, 1, 2)
    coarse = functional.adaptive_avg_pool2d(tiny.float(), _COARSE).flatten(1)
    coarse = coarse - coarse.mean(1, keepdim=True)
    candidates = _neighbor_pairs(coarse)
    if features is not None:
        more = _neighbor_pairs(features[torch.from_numpy(chosen)])
        candidates = np.unique(np.concatenate([candidates, more]), axis=0)
    candidates = _plausible(candidates, coarse, [prints[row] for row in chosen])
    gaps = _compare(tiny, candidates, watch("Comparing look-alikes", len(candidates)))
    near = gaps <= LARGEST_DIFFERENCE
    first, second = chosen[candidates[near].T]
    return Pairs(
        np.concatenate([equal.first, first]),
        np.concatenate([equal.second, second]),
        np.concatenate([equal.difference, gaps[near]]),
        np.concatenate([equal.exact, np.zeros(len(first), bool)]),
    )


def feature_pairs(features: Tensor) -> Pairs:
    """Pairs of rows with the same, or nearly the same, features.

    Args:
        features: [M, D].
    """
    if len(features) < 2:
        nothing = np.empty(0, np.int64)
        return Pairs(nothing, nothing, np.empty(0), np.empty(0, bool))
    near = near_rows(features, NEIGHBORS)
    row, place = (near.similarities >= SAME_FEATURES).nonzero(as_tuple=True)
    both = np.sort(torch.stack([row, near.ids[row, place]], dim=1).numpy(), axis=1)
    pairs, kept = np.unique(both, axis=0, return_index=True)
    gaps = 1 - near.similarities[row, place].double().clamp(max=1).numpy()
    same = np.array([torch.equal(features[a], features[b]) for a, b in pairs.tolist()], bool)
    return Pairs(pairs[:, 0], pairs[:, 1], gaps[kept], same)


def near_rows(features: Tensor, k: int) -> Neighbors:
    """The k nearest other rows of each row; ids are the numbers of rows.

    Args:
        features: [N, D], N >= 2.
        k: >= 1.
    """
    store = Datastore.from_features(features, torch.zeros(len(features), dtype=torch.int64))
    return Neighbors(*map(torch.cat, zip(*store.leave_one_out(k), strict=True)))


def clusters_of(pairs: Pairs, count: int) -> Ints:
    """[count] int64: pictures that are linked by pairs have the same number."""
    shape = (count, count)
    links = coo_array((np.ones(len(pairs.first), bool), (pairs.first, pairs.second)), shape)
    return connected_components(links, directed=False)[1].astype(np.int64)


def duplicate_findings(pairs: Pairs, pictures: Pictures) -> list[Finding]:
    """What is wrong about pictures that are there twice.

    Of each group one is kept, one of the test split first, then of validation; all others are
    findings. A group with several labels is one more, and its pictures of the same split with
    another label than the one that is kept are not called copies: either may be the right one.

    Args:
        pairs: from `find_pairs`.
        pictures: those that were compared.
    """
    clusters = clusters_of(pairs, len(pictures))
    equal = clusters_of(pairs.only(pairs.exact), len(pictures))
    closest = np.full(len(pictures), np.inf)  # the smallest difference to another picture
    for ends in (pairs.first, pairs.second):
        np.minimum.at(closest, ends, pairs.difference)
    members: dict[int, list[int]] = {}
    for picture in np.unique(np.concatenate([pairs.first, pairs.second])).tolist():
        members.setdefault(int(clusters[picture]), []).append(picture)
    found = []
    for group in members.values():
        kept = min(group, key=lambda p: (_KEPT_FIRST.get(pictures.splits[p], 2), p))
        for picture in group:
            if picture != kept and not _is_only_a_conflict(picture, kept, pictures):
                same = bool(equal[picture] == equal[kept])
                found.append(_duplicate(picture, kept, same, float(closest[picture]), pictures))
        if len({int(pictures.labels[p]) for p in group} - {-1}) > 1:
            found.append(_conflict(kept, group, pictures))
    return found


def _is_only_a_conflict(picture: int, kept: int, pictures: Pictures) -> bool:
    """Whether one of the two cannot be called the copy, since it may have the right label."""
    mine, other = int(pictures.labels[picture]), int(pictures.labels[kept])
    is_within = pictures.splits[picture] == pictures.splits[kept]
    return is_within and mine != other and min(mine, other) >= 0


def _duplicate(
    picture: int, kept: int, same: bool, difference: float, pictures: Pictures
) -> Finding:
    what = "The same pixels as" if same else "Nearly the same picture as"
    score = 1.0 if same else max(0.0, 1 - difference)
    mine, other = pictures.splits[picture], pictures.splits[kept]
    name = pictures.name_of(kept)
    if mine != other:
        detail = f"{what} {name} in {other}: remove it from {mine}, or what {other} measures lies."
        return Finding(Kind.CROSS_SPLIT, picture, score, detail, (kept,))
    kind = Kind.EXACT if same else Kind.NEAR
    return Finding(kind, picture, score, f"{what} {name}: one of them is enough.", (kept,))


def _conflict(kept: int, group: list[int], pictures: Pictures) -> Finding:
    labels = sorted({pictures.label_of(p) for p in group if pictures.labels[p] >= 0})
    others = tuple(p for p in group if p != kept)
    detail = f"One picture, {len(labels)} labels: {', '.join(labels)}. Decide on one."
    return Finding(Kind.CONFLICT, kept, 1.0, detail, others)


def _neighbor_pairs(features: Tensor) -> Ints:
    """[P, 2] pairs of rows of which one is among the nearest of the other, the lower first."""
    near = near_rows(features, NEIGHBORS).ids.numpy()  # [N, k]
    rows = np.arange(len(near))[:, None].repeat(near.shape[1], axis=1)
    pairs = np.stack([rows.ravel(), near.ravel()], axis=1)
    return np.unique(np.sort(pairs, axis=1), axis=0)


def _plausible(candidates: Ints, coarse: Tensor, prints: Sequence[Print]) -> Ints:
    """Pairs whose shapes and coarse pixels do not rule out that they are copies."""
    unit = functional.normalize(coarse, dim=1).numpy()
    left, right = candidates[:, 0], candidates[:, 1]
    correlation = np.empty(len(candidates))
    for start in range(0, len(candidates), 65_536):
        part = slice(start, start + 65_536)
        correlation[part] = np.einsum("ij,ij->i", unit[left[part]], unit[right[part]])
    flat = np.linalg.norm(coarse.numpy(), axis=1) < 1e-3 * coarse.shape[1]
    alike = (correlation >= _LEAST_CORRELATION) | (flat[left] & flat[right])
    shapes = np.log([one.width / one.height for one in prints])
    stretch = np.abs(shapes[left] - shapes[right])
    kept: Ints = candidates[alike & (stretch <= np.log(_LARGEST_STRETCH))]
    return kept


def _compare(tiny: Tensor, candidates: Ints, on_progress: Callable[[int], object]) -> Floats:
    """[P] the difference of each pair; the other way round too where it is a close call.

    Pairs that are far apart at half the size keep that difference, which is above every limit here.
    """
    parts = [np.empty(0)]
    for start in range(0, len(candidates), _BATCH):
        pairs = torch.from_numpy(candidates[start : start + _BATCH])
        first, second = tiny[pairs[:, 0]].float() / 255, tiny[pairs[:, 1]].float() / 255
        smaller = [functional.adaptive_avg_pool2d(side, _ROUGH_SIDE) for side in (first, second)]
        gap = differences(*smaller)
        likely = gap <= _LARGEST_ROUGH
        gap[likely] = _fine(first[likely], second[likely])
        parts.append(gap.double().numpy())
        on_progress(len(pairs))
    return np.concatenate(parts)


def _fine(first: Tensor, second: Tensor) -> Tensor:
    if not len(first):
        return torch.empty(0)
    gap = differences(first, second)
    close = (gap > LARGEST_DIFFERENCE) & (gap <= 2 * LARGEST_DIFFERENCE)
    if close.any():
        gap[close] = torch.minimum(gap[close], differences(second[close], first[close]))
    return gap
