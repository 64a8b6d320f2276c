"""From the name of a task to its pictures, at a known revision."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset

from catalog.cache import cache_root
from catalog.hub_loading import load_hub, normalised, roles_of
from catalog.label_maps import positions_of
from catalog.loaded_task import LoadedTask
from catalog.offline_tasks import MIN_PICTURES, load_pictures
from catalog.splits import ANY, TEST, TRAIN
from catalog.tasks import Source, Task, find_task
from hf_knn import load_splits


def load_task(
    name: str,
    *,
    cache_dir: Path | None = None,
    limit: int | None = None,
    streaming: bool | None = None,
    revision: str | None = None,
) -> LoadedTask:
    """Loads a task by its name.

    Args:
        name: see `catalog.tasks.find_task`.
        cache_dir: where pictures of offline tasks are drawn to.
        limit: about so many pictures, the same ones each time.
        streaming: let the pictures of a Hub task go through instead of storing them; None as the
            registry says.
        revision: another commit on the Hub than the registry's.

    Raises:
        ValueError: for an unknown name or a missing column, with what there is.
        FileNotFoundError: for a folder that is not there.
        PermissionError: for a gated or private dataset without access.
    """
    entry = find_task(name)
    if entry.source is Source.NOWHERE:
        raise ValueError(f"Expected pictures of {name}, but {entry.note}.")
    if entry.source is Source.OFFLINE:
        rows = load_pictures(entry.location, cache_dir, limit)
        folder = _origin(rows) or cache_root(cache_dir).name
        return LoadedTask(entry, folder, rows.features["label"].names, {ANY: rows})
    if entry.source is Source.FOLDER:
        loaded = _load_folder(entry)
    else:
        entry = replace(entry, revision=revision or entry.revision)
        loaded = load_hub(entry, entry.streamed if streaming is None else streaming)
        if entry.train_from is not None:
            loaded = _with_training(loaded, entry.train_from, streaming)
    return loaded if limit is None else _limited(loaded, limit)


def _load_folder(entry: Task) -> LoadedTask:
    folder = Path(entry.location)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Expected a folder with a sub-folder per label at {folder}, but there is none."
        )
    found = load_splits(folder)
    listing = sorted(
        (path, os.stat(cell["path"]).st_size)
        for rows in found.values()
        for path, cell in zip(rows["path"][:], rows["image"][:], strict=True)
    )
    revision = "files-" + hashlib.sha256(repr(listing).encode()).hexdigest()[:16]
    return normalised(
        entry, revision, {role: found[name] for role, name in roles_of(found).items()}
    )


def _with_training(loaded: LoadedTask, name: str, streaming: bool | None) -> LoadedTask:
    """Adds the training pictures of another task, whose numbers the labels then have."""
    trained = load_task(name, streaming=streaming)
    moved = positions_of(loaded.label_names, trained.label_names, loaded.entry.label_map)
    test = loaded.sources[TEST]
    if isinstance(test, Dataset):
        labels = [moved[label] for label in test["label"][:]]
        kind = ClassLabel(names=trained.label_names)
        test = test.remove_columns("label").add_column("label", labels, feature=kind)
    else:
        test = test.map(lambda row: {"label": moved[row["label"]]})
    revision = f"{loaded.revision}, {name} {trained.revision}"
    sources = {TRAIN: trained.sources[TRAIN], TEST: test}
    return LoadedTask(loaded.entry, revision, trained.label_names, sources)


def _limited(loaded: LoadedTask, limit: int) -> LoadedTask:
    """The first classes, and the first pictures of each, in the proportions of the splits."""
    if loaded.is_streamed:
        total = sum(1 for _ in loaded.sources)
        share = max(1, limit // total)
        return replace(
            loaded, sources={role: rows.take(share) for role, rows in loaded.sources.items()}
        )
    if limit < MIN_PICTURES:
        raise ValueError(f"Expected limit to be at least {MIN_PICTURES}, but got {limit}.")
    total = sum(len(rows) for rows in loaded.sources.values())
    names = loaded.label_names[: max(1, limit // MIN_PICTURES)]
    chosen = {}
    for role, rows in loaded.sources.items():
        quota = max(2, round(limit / len(names) * len(rows) / total))
        values = np.asarray(rows["label"][:])
        kept = [np.flatnonzero(values == label)[:quota] for label in range(len(names))]
        part = rows.select(np.sort(np.concatenate(kept)))
        labels = part["label"][:]
        part = part.remove_columns("label")
        chosen[role] = part.add_column("label", labels, feature=ClassLabel(names=names))
    return replace(loaded, label_names=names, sources=chosen)


def _origin(rows: Dataset) -> str | None:
    """The folder that drawn pictures lie in, whose name says the versions they are of."""
    files = rows.cache_files
    return Path(files[0]["filename"]).parent.name if files else None
