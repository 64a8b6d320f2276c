"""Everything that can be found out about features with labels, or about a datastore."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ..core.votes import squared_distances
from ..data.decode import BadImageError, decode_image
from ..data.keys import Print, print_of
from ..data.splits import stratified_folds
from ..data.walk import StoredPictures
from ..fit.html import plain
from ..fit.voices import Voices, out_of_fold
from ..store.backend import RowStore
from .duplicates import (
    Pairs,
    clusters_of,
    duplicate_findings,
    feature_pairs,
    find_pairs,
    near_rows,
)
from .findings import STORED, Finding, Ints, Kind, Pictures
from .labels import (
    NEIGHBOR,
    LabelScores,
    balance_findings,
    label_findings,
    look_alike_findings,
    outlier_findings,
    score_labels,
)
from .learning_curve import FRACTIONS, LearningCurve, measure_curve

FOLDS = 5

Watch = Callable[[str, int], Callable[[int], object]]
"""From the name of a phase and how many steps it has to what is called when some are done."""


def unwatched(name: str, total: int) -> Callable[[int], object]:
    """Shows no progress."""
    return lambda done: None


@dataclass
class Checkup:
    """What was found out.

    Attributes:
        pictures: all pictures, also those that cannot be used.
        usable: [M] the numbers of those that have features.
        features: [M, D] float32 raw features.
        findings: in no order.
        scores: of the M labels; None where labels cannot be compared.
        voices: what was said about the M rows out of fold; None likewise.
        curve: what more pictures would bring; None likewise.
        skipped: what was not looked at, and why.
        unseen: the kinds of findings that could not have been made, so that none is no good news.
        seconds: by phase.
    """

    pictures: Pictures
    usable: Ints
    features: Tensor
    findings: list[Finding] = field(default_factory=list)
    scores: LabelScores | None = None
    voices: Voices | None = None
    curve: LearningCurve | None = None
    skipped: list[str] = field(default_factory=list)
    unseen: set[Kind] = field(default_factory=set)
    seconds: dict[str, float] = field(default_factory=dict)

    def counts(self) -> dict[Kind, int]:
        """How many findings there are of each kind that was looked for, the most urgent first."""
        found = Counter(finding.kind for finding in self.findings)
        return {kind: found[kind] for kind in Kind if kind not in self.unseen or found[kind]}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Notes how long something took."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def examine(
    checkup: Checkup,
    prints: Sequence[Print] | None,
    groups: Ints | None,
    seed: int,
    watch: Watch = unwatched,
    *,
    with_curve: bool = True,
) -> None:
    """Looks for everything that pictures with features can have.

    Args:
        checkup: with pictures, `usable` and features; filled in.
        prints: of the M usable pictures; None compares features alone.
        groups: [M] which of them belong together; None: each is its own.
        seed: of folds and parts.
        watch: told of the progress.
        with_curve: measure what more pictures would bring, which takes longest.
    """
    usable = checkup.usable
    rows = checkup.pictures.take(usable)
    with checkup.phase("duplicates"):
        if prints is None:
            pairs = feature_pairs(checkup.features)
        else:
            pairs = find_pairs(prints, checkup.features, watch)
        found = duplicate_findings(pairs, rows)
    if len(set(checkup.pictures.splits)) < 2:
        checkup.unseen |= {Kind.CROSS_SPLIT, Kind.GROUP_ACROSS}
    if groups is not None:
        found += group_findings(groups, rows)
    else:
        checkup.unseen.add(Kind.GROUP_ACROSS)
    with checkup.phase("outliers"):
        found += _outliers(checkup, rows)
    found += balance_findings(rows)
    found += look_alike_findings(checkup.pictures)
    found += _look_at_labels(checkup, rows, pairs, groups, seed, watch, with_curve)
    for one in found:  # the numbers of usable pictures become those of all
        others = tuple(usable[list(one.others)].tolist())
        picture = int(usable[one.picture]) if one.picture >= 0 else one.picture
        checkup.findings.append(replace(one, picture=picture, others=others))


def group_findings(groups: Ints, pictures: Pictures) -> list[Finding]:
    """Groups, of one patient say, that lie on two sides of a split.

    Args:
        groups: [M].
        pictures: the same M.
    """
    firsts: dict[int, dict[str, int]] = {}  # of each group its first picture in each split
    for picture, (group, split) in enumerate(zip(groups.tolist(), pictures.splits, strict=True)):
        firsts.setdefault(group, {}).setdefault(split, picture)
    found = []
    for ones in firsts.values():
        if len(ones) > 1:
            detail = (
                f"Its group has pictures in {' and '.join(ones)}: keep a group on one side, or "
                "what is measured lies."
            )
            first, *others = ones.values()
            found.append(Finding(Kind.GROUP_ACROSS, first, 1.0, detail, tuple(others)))
    return found


def _outliers(checkup: Checkup, rows: Pictures) -> list[Finding]:
    if len(rows) <= NEIGHBOR + 1:
        checkup.skipped.append(f"Outliers: {len(rows)} pictures are too few.")
        checkup.unseen.add(Kind.OUTLIER)
        return []
    similarities = near_rows(checkup.features, NEIGHBOR).similarities
    distances = squared_distances(similarities[:, -1].double()).sqrt()
    return outlier_findings(distances.numpy(), rows)


def _look_at_labels(
    checkup: Checkup, rows: Pictures, pairs: Pairs, groups: Ints | None, seed: int, watch: Watch,
    with_curve: bool,
) -> list[Finding]:  # fmt: skip
    """Likely label errors and the learning curve, where there are labels to compare."""
    labels = torch.from_numpy(rows.labels)
    classes = len(rows.label_names)
    if not classes:
        checkup.unseen |= {Kind.NO_LABEL, Kind.CONFLICT, Kind.LABEL_ERROR}
        checkup.unseen |= {Kind.LOOK_ALIKE, Kind.IMBALANCE}
        checkup.skipped.append(
            "Label errors, label conflicts, balance and learning curve: the pictures have no "
            "labels (one sub-folder per label, or a column `label`)."
        )
        return []
    if int((torch.bincount(labels, minlength=classes) > 1).sum()) < 2:
        checkup.unseen.add(Kind.LABEL_ERROR)
        checkup.skipped.append(
            "Label errors and learning curve: fewer than two classes have two pictures."
        )
        return []
    folds = stratified_folds(labels, FOLDS, seed, _owners(pairs, groups, len(rows)))
    with checkup.phase("label errors"):
        done = watch("Asking out of fold", len(folds))
        voices = out_of_fold(checkup.features, labels, classes, folds, done)
        scores = score_labels(voices, labels)
    if with_curve:
        with checkup.phase("learning curve"):
            done = watch("Learning curve", len(folds) * len(FRACTIONS))
            checkup.curve = measure_curve(
                checkup.features, labels, classes, folds, voices, seed, done
            )
    checkup.voices, checkup.scores = voices, scores
    return label_findings(scores, voices, rows)


def _owners(pairs: Pairs, groups: Ints | None, count: int) -> Tensor | None:
    """Copies of a picture would vouch for each other's labels, so they stay in one fold."""
    clusters = clusters_of(pairs, count)
    if groups is None:
        return torch.from_numpy(clusters) if len(pairs.first) else None
    shift = int(clusters.max(initial=0)) + 1
    size = shift + int(groups.max(initial=0)) + 1
    links = coo_array((np.ones(count, bool), (clusters, groups + shift)), (size, size))
    joined = connected_components(links, directed=False)[1]
    return torch.from_numpy(joined[clusters].astype(np.int64))


def inspect_datastore(
    store: RowStore,
    label_names: Sequence[str],
    *,
    root: Path | None = None,
    seed: int = 0,
    watch: Watch = unwatched,
    with_curve: bool = True,
) -> Checkup:
    """Looks for copies, likely label errors, outliers and small classes among stored rows.

    Args:
        store: N rows.
        label_names: of the classes.
        root: the folder that the stored paths are relative to, where copies are confirmed by their
            pixels; None compares features alone.
        seed: of folds and parts.
        watch: told of the progress.
        with_curve: measure what more pictures would bring, which takes longest.

    Returns:
        What was found; its pictures are the rows, in order.

    Raises:
        ValueError: for an empty datastore, or a `root` that has none of its pictures.
    """
    if not len(store):
        raise ValueError("Expected `store` to hold rows, but it is empty; add some first.")
    pictures = pictures_of(store, label_names)
    prints: list[Print] | None = None
    checkup = Checkup(pictures, np.arange(len(pictures)), store.features.float())
    checkup.unseen |= {
        Kind.BROKEN,
        Kind.UNREAD,
        Kind.NO_LABEL,
    }  # every row has features and a label
    if root is None:
        checkup.skipped.append("Pixels: without the folder of the pictures, features are compared.")
    else:
        with checkup.phase("decoding"):
            prints, found = prints_of_stored(root, pictures, watch)
        if prints is None:
            checkup.skipped.append(
                "Pixels: not every picture of the datastore can be opened "
                f"({found} of {len(pictures)} found under {plain(str(root))})."
            )
    examine(checkup, prints, None, seed, watch, with_curve=with_curve)
    return checkup


def pictures_of(store: RowStore, names: Sequence[str]) -> Pictures:
    """The rows of a datastore as pictures of one split.

    Args:
        store: N rows.
        names: of the classes.
    """
    paths = store.paths or [""] * len(store)
    rows = np.arange(len(store))
    return Pictures(
        [STORED] * len(store), rows, store.ids.numpy(), paths, store.labels.numpy(), names
    )


def check_root(stored: StoredPictures, root: Path, pictures: Pictures) -> int:
    """How many of the pictures are in a folder.

    Args:
        stored: of the folder.
        root: the folder.
        pictures: with paths.

    Raises:
        ValueError: if it has none, naming the folder and a path.
    """
    found = sum(stored.find(path) is not None for path in pictures.paths)
    if not found:
        example = next((path for path in pictures.paths if path), "")
        wanted = f"looked for {plain(example)} there" if example else "the datastore knows no paths"
        raise ValueError(
            f"Expected the folder of the stored pictures, but got 0 of {len(pictures)} found under "
            f"{root} ({wanted}); pass the folder that the model was trained on."
        )
    return found


def open_picture(stored: StoredPictures, path: str) -> Image.Image | None:
    """The picture of a row; None where it is not there, cannot be read or lies outside.

    Args:
        stored: the pictures of a folder.
        path: as it is stored.
    """
    return decoded_or_none(stored.find(path))


def decoded_or_none(picture: Path | bytes | None) -> Image.Image | None:
    """A decoded picture; None where there is none that can be read."""
    try:
        return None if picture is None else decode_image(picture)
    except BadImageError:
        return None


def prints_of_stored(
    root: Path, pictures: Pictures, watch: Watch = unwatched
) -> tuple[list[Print] | None, int]:
    """Prints of the pictures of rows, if every one of them can be opened.

    Args:
        root: the folder that their paths are relative to.
        pictures: the rows.
        watch: told of the progress.

    Returns:
        One print per row, or None; and how many files were found.

    Raises:
        ValueError: if there is none of them.
    """
    stored = StoredPictures(root)
    count = check_root(stored, root, pictures)
    if count < len(pictures):
        return None, count
    done = watch("Decoding", len(pictures))
    found = []
    for path in pictures.paths:
        image = open_picture(stored, path)
        if image is None:
            return None, count
        found.append(print_of(image))
        done(1)
    return found, count


def stored_copies(
    store: RowStore, pictures: Pictures, root: Path | None, watch: Watch = unwatched
) -> list[Finding]:
    """Rows that are there twice, as `inspect_datastore` finds them, and nothing else.

    Args:
        store: N rows.
        pictures: what `pictures_of` makes of them.
        root: as for `inspect_datastore`.
        watch: told of the progress.

    Raises:
        ValueError: for a `root` whose pictures cannot all be opened.
    """
    features = store.features.float()
    if root is None:
        return duplicate_findings(feature_pairs(features), pictures)
    prints, found = prints_of_stored(root, pictures, watch)
    if prints is None:
        raise ValueError(
            f"Expected every stored picture under {root}, to compare their pixels, but only "
            f"{found} of {len(pictures)} can be opened; leave --pictures out to compare features."
        )
    return duplicate_findings(find_pairs(prints, features, watch), pictures)
