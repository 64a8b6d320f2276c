"""The pictures of a folder that are to be labelled: features once, and which of them are copies."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checkup.duplicates import clusters_of, find_pairs
from ..checkup.examine import Watch, unwatched
from ..core.plain_json import parse_json
from ..data.batches import BadRow
from ..data.folders import Layout, Rows
from ..data.keys import Print, prints_of
from ..data.loading import source_of_layout
from ..data.walk import find_pictures
from ..features.extract import extract_features, progress_bars
from ..model.modeling import KnnForImageClassification
from ..store.folders import write_durably

_NO_LABEL = "?"
_COPIES_NAME = "copies.json"


@dataclass(frozen=True)
class Pool:
    """N pictures.

    Attributes:
        folder: that they lie in, absolute.
        names: their paths relative to it, with `/`.
        features: [N, D] float32, as in `pooler_output`.
        contents: [N, 16] uint8, the print of each, see `content_of`.
        copies: names of pictures that show the same, two or more at a time.
        skipped: pictures that cannot be read.
        notes: what was left out, in sentences.
        backend: what made the features.
    """

    folder: Path
    names: list[str]
    features: Tensor
    contents: Tensor
    copies: list[tuple[str, ...]]
    skipped: list[BadRow]
    notes: list[str]
    backend: str = ""

    def path(self, name: str) -> Path:
        """Where a picture lies."""
        return self.folder / name


def open_pool(
    folder: Path,
    home: Path | None,
    model: KnnForImageClassification,
    *,
    batch_size: int = 32,
    watch: Watch = unwatched,
    progress: bool = False,
    with_copies: bool = True,
) -> Pool:
    """Finds the pictures below a folder, and makes their features, unless they are cached.

    Args:
        folder: with the pictures, in sub-folders or not.
        home: where the session writes, which is left out if it lies in the folder, and where copies
            are remembered; None writes nothing.
        model: whose backbone makes features.
        batch_size: pictures per forward pass.
        watch: told of the progress of the search for copies.
        progress: show a bar while features are made.
        with_copies: look for pictures that show the same.

    Raises:
        ValueError: if there is no picture, or none that can be read.
        OSError: if the folder cannot be read.
    """
    root = folder.resolve()
    found = find_pictures(str(root))
    names = found.pictures
    if home is not None:
        own = home.resolve()
        names = [name for name in names if not (root / name).is_relative_to(own)]
    if not names:
        raise ValueError(
            " ".join(
                (f"Expected {folder} to hold pictures, but there is none in it.", *found.notes)
            )
        )
    files = [str(root / name) for name in names]
    rows = Rows(files, names, [_NO_LABEL] * len(names), {})
    dataset = source_of_layout(Layout({"train": rows}, found.notes)).splits["train"]
    with progress_bars() if progress else nullcontext():
        made = extract_features(
            model, dataset, batch_size=batch_size, on_bad_image="skip", progress=progress
        )
    assert made.contents is not None  # they were decoded
    pool = Pool(
        root, [names[row] for row in made.ids.tolist()], made.features, made.contents, [],
        made.skipped, found.notes, made.backend,
    )  # fmt: skip
    if with_copies and len(pool.names) > 1:
        copies = None if home is None else _known_copies(pool, home)
        if copies is None:
            done = watch("Looking for copies", len(pool.names))
            prints = prints_of(dataset.select(made.ids.tolist()), done)
            copies = _copies(pool, prints, watch)
            if home is not None:
                _remember(pool, home, copies)
        pool.copies.extend(copies)
    return pool


def _copies(
    pool: Pool, prints: Sequence[object], watch: Watch
) -> list[tuple[str, ...]]:  # fmt: skip
    good = [number for number, one in enumerate(prints) if isinstance(one, Print)]
    whole = [one for one in prints if isinstance(one, Print)]
    pairs = find_pairs(whole, pool.features[good], watch)
    clusters = clusters_of(pairs, len(whole))
    members: dict[int, list[str]] = {}
    for number, cluster in zip(good, clusters.tolist(), strict=True):
        members.setdefault(cluster, []).append(pool.names[number])
    return [tuple(names) for names in members.values() if len(names) > 1]


def _mark(pool: Pool) -> str:
    """A name of all that copies depend on."""
    total = hashlib.sha256(pool.contents.numpy().tobytes())
    total.update("\n".join(pool.names).encode())
    total.update(np.ascontiguousarray(pool.features.numpy()).tobytes())
    return total.hexdigest()


def _known_copies(pool: Pool, home: Path) -> list[tuple[str, ...]] | None:
    """Those that were found before, of the same pictures."""
    try:
        data = parse_json((home / _COPIES_NAME).read_bytes(), _COPIES_NAME)
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict) or data.get("of") != _mark(pool):
        return None
    return [tuple(names) for names in data["copies"]]


def _remember(pool: Pool, home: Path, copies: list[tuple[str, ...]]) -> None:
    text = json.dumps({"of": _mark(pool), "copies": copies})
    write_durably(home / _COPIES_NAME, lambda place: place.write_text(text, encoding="ascii"))


def sample_of(count: int, most: int) -> Tensor:
    """[<= most] int64 ascending: all of some numbers, or a part of them, always the same.

    Args:
        count: how many numbers there are.
        most: of the part.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:most].sort().values
