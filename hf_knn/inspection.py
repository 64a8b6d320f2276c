"""What a datastore remembers, and what is wrong with it."""

from pathlib import Path

import numpy as np
from PIL import Image

from .checkup import Checkup, Watch, examine, unwatched
from .datastore import Datastore
from .findings import STORED, Kind, Pictures
from .images import BadImageError, decode_image
from .pages import plain
from .prints import Print, print_of


def inspect_datastore(
    store: Datastore,
    label_names: list[str],
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
    checkup.unseen |= {Kind.BROKEN, Kind.NO_LABEL}  # every row has features and a label
    if root is None:
        checkup.skipped.append("Pixels: without the folder of the pictures, features are compared.")
    else:
        check_root(root, pictures)
        with checkup.phase("decoding"):
            prints = _prints(root, pictures, watch)
        if prints is None:
            checkup.skipped.append("Pixels: not every picture of the datastore can be opened.")
    examine(checkup, prints, None, seed, watch, with_curve=with_curve)
    return checkup


def pictures_of(store: Datastore, names: list[str]) -> Pictures:
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


def check_root(root: Path, pictures: Pictures) -> None:
    """Refuses a folder that has none of the pictures.

    Args:
        root: the folder.
        pictures: with paths.

    Raises:
        ValueError: naming the folder and a path.
    """
    if not any(place_of(root, path) is not None for path in pictures.paths):
        example = next((path for path in pictures.paths if path), "")
        wanted = f"such as {plain(example)}" if example else "but the datastore knows no paths"
        raise ValueError(f"Expected {root} to hold the pictures of the datastore, {wanted}.")


def open_picture(root: Path, path: str) -> Image.Image | None:
    """The picture of a row; None where it is not there, cannot be read or lies outside.

    Args:
        root: the folder.
        path: as it is stored.
    """
    place = place_of(root, path)
    if place is None:
        return None
    try:
        return decode_image(place)
    except BadImageError:
        return None


def place_of(root: Path, path: str) -> Path | None:
    """The file of a stored path, which a stranger may have written, if it lies in the folder."""
    place = (root / path).resolve()
    is_inside = path and place.is_relative_to(root.resolve())
    return place if is_inside and place.is_file() else None


def _prints(root: Path, pictures: Pictures, watch: Watch) -> list[Print] | None:
    done = watch("Decoding", len(pictures))
    found = []
    for path in pictures.paths:
        image = open_picture(root, path)
        if image is None:
            return None
        found.append(print_of(image))
        done(1)
    return found
