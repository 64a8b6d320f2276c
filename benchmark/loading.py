"""From the name of a task to its pictures, at a known revision."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from cache import cache_root
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    Value,
    concatenate_datasets,
    get_dataset_split_names,
    load_dataset,
)
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from label_maps import positions_of
from numpy.typing import NDArray
from offline_tasks import MIN_PICTURES, load_pictures
from splits import ANY, TEST, TRAIN, VALIDATION, Parts, split_pool
from tasks import Source, Task, find_task

SPLIT_NAMES = ("train", "validation", "test")

CHUNK_ROWS = 2_048
"""Pictures of a stream that are held at once."""

Pictures = Any
"""A `Dataset` or an `IterableDataset`."""


@dataclass(frozen=True)
class LoadedTask:
    """A task with its pictures.

    Attributes:
        entry: what is known of it.
        revision: commit, folder or package versions that the pictures are of.
        label_names: the classes in the order of their numbers.
        sources: pictures with `image`, `label` and perhaps `group`, by what they are for.
    """

    entry: Task
    revision: str
    label_names: list[str]
    sources: dict[int, Pictures]

    @property
    def is_streamed(self) -> bool:
        """Whether pictures come one after the other and are not kept."""
        return any(isinstance(rows, IterableDataset) for rows in self.sources.values())

    @property
    def rows(self) -> Dataset:
        """All pictures, numbered as the pool of features is.

        Raises:
            ValueError: for a stream.
        """
        if self.is_streamed:
            raise ValueError(
                f"Expected the pictures of {self.entry.name} on the disk, but they are streamed; "
                "do leave streaming out for protocols that need pictures again."
            )
        return concatenate_datasets(list(self.sources.values()))

    @property
    def roles(self) -> NDArray[np.int8]:
        """[N] what the source says each picture is for."""
        sizes = {role: len(rows) for role, rows in self.sources.items()}
        return np.repeat(np.array(list(sizes), np.int8), list(sizes.values()))

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """[N] which pictures belong together; None: each is its own."""
        rows = self.rows
        if "group" not in rows.column_names:
            return None
        return np.unique(rows["group"][:], return_inverse=True)[1].astype(np.int64)

    def parts(self, seed: int = 0) -> Parts:
        """Row numbers of the split of a seed."""
        return split_pool(np.asarray(self.rows["label"][:]), self.groups, self.roles, seed)

    def chunks(self) -> Iterator[tuple[int, Dataset]]:
        """What pictures are for, and some of them; all at once where they are on the disk."""
        for role, rows in self.sources.items():
            if isinstance(rows, Dataset):
                yield role, rows
                continue
            held: list[dict[str, Any]] = []
            for row in rows:
                held.append(row)
                if len(held) == CHUNK_ROWS:
                    yield role, self._chunk(held)
                    held = []
            if held:
                yield role, self._chunk(held)

    def _chunk(self, held: list[dict[str, Any]]) -> Dataset:
        kinds: dict[str, Any] = {"image": Image(), "label": ClassLabel(names=self.label_names)}
        if "group" in held[0]:
            kinds["group"] = Value("string")
            held = [row | {"group": str(row["group"])} for row in held]
        return Dataset.from_list(held, features=Features(kinds))

    def part(self, name: str, seed: int = 0) -> Dataset:
        """The pictures of `train`, `validation` or `test` of a seed's split."""
        return self.rows.select(getattr(self.parts(seed), name))

    @property
    def train(self) -> Dataset:
        """The training pictures of seed 0."""
        return self.part("train")

    @property
    def validation(self) -> Dataset:
        """The validation pictures of seed 0."""
        return self.part("validation")

    @property
    def test(self) -> Dataset:
        """The test pictures of seed 0."""
        return self.part("test")


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
        name: see `tasks.find_task`.
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
        loaded = _load_hub(entry, entry.streamed if streaming is None else streaming)
        if entry.train_from is not None:
            loaded = _with_training(loaded, entry.train_from, streaming)
    return loaded if limit is None else _limited(loaded, limit)


def resolve_revision(entry: Task) -> str:
    """The commit of a Hub dataset that the entry's revision, or the newest, is.

    Raises:
        PermissionError: if it is not there for us, with how to get access.
        ValueError: if there is no such revision.
    """
    try:
        return str(HfApi().dataset_info(entry.location, revision=entry.revision).sha)
    except RevisionNotFoundError as error:
        raise ValueError(
            f"Expected the revision {entry.revision} of {entry.location} on the Hub, but it is "
            "not there (moved or squashed); do look at its history and pin another."
        ) from error
    except RepositoryNotFoundError as error:
        raise _no_access(entry) from error


def _load_folder(entry: Task) -> LoadedTask:
    folder = Path(entry.location)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Expected a folder with a sub-folder per label at {folder}, but there is none."
        )
    found = load_dataset("imagefolder", data_dir=str(folder))
    listing = sorted(
        (str(path.relative_to(folder)), path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    )
    revision = "files-" + hashlib.sha256(repr(listing).encode()).hexdigest()[:16]
    assert isinstance(found, DatasetDict)
    return _normalised(entry, revision, {role: found[name] for role, name in _roles(found).items()})


def _roles(offered: Iterable[str], named: Sequence[str | None] = SPLIT_NAMES) -> dict[int, str]:
    """The split of each role. Without a test split that of validation is it, else the seed's."""
    there = set(offered)
    found = {role: name for role, name in enumerate(named) if name in there and name is not None}
    if TEST not in found and VALIDATION in found:
        found[TEST] = found.pop(VALIDATION)
    if TEST not in found and TRAIN in found:
        found[ANY] = found.pop(TRAIN)
    return found


def _load_hub(entry: Task, streaming: bool) -> LoadedTask:
    revision = resolve_revision(entry)
    options = {"name": entry.config, "revision": revision}
    try:
        offered = get_dataset_split_names(
            entry.location, config_name=entry.config, revision=revision
        )
        wanted = _roles(offered, entry.splits)
        needed = entry.splits[2] if entry.train_from else entry.splits[0]
        if needed not in wanted.values():
            raise ValueError(
                f"Expected a split {needed!r} of {entry.location}, but it has {offered}."
            )
        sources = {
            role: load_dataset(entry.location, split=name, streaming=streaming, **options)
            for role, name in wanted.items()
        }
    except (DatasetNotFoundError, HfHubHTTPError) as error:
        raise _no_access(entry) from error
    return _normalised(entry, revision, sources)


def _no_access(entry: Task) -> PermissionError:
    page = f"https://huggingface.co/datasets/{entry.location}"
    return PermissionError(
        f"Expected access to the dataset {entry.location}, but the Hub shows none: it is gated, "
        f"private or gone. Do accept its terms at {page}, make a token with read access at "
        "https://huggingface.co/settings/tokens, and set HF_TOKEN or run `hf auth login`."
    )


def _normalised(entry: Task, revision: str, sources: dict[int, Pictures]) -> LoadedTask:
    """Columns under our names, labels as `ClassLabel` with the same numbers everywhere."""
    columns = {entry.image: "image", entry.label: "label"}
    if entry.group:
        columns[entry.group] = "group"
    chosen = {}
    for role, rows in sources.items():
        missing = [name for name in columns if name not in (rows.column_names or [])]
        if missing:
            raise ValueError(
                f"Expected the columns {list(columns)} in {entry.location} at {revision[:12]}, "
                f"but {missing} is not among {rows.column_names}; do correct the entry in tasks.py."
            )
        renames = {old: new for old, new in columns.items() if old != new}
        rows = rows.select_columns(list(columns)).rename_columns(renames)
        chosen[role] = rows.cast_column("image", Image(decode=isinstance(rows, Dataset)))
    names = _class_names(entry, chosen)
    for role, rows in chosen.items():
        if not isinstance(rows.features["label"], ClassLabel):
            chosen[role] = _as_classes(rows, names)
    return LoadedTask(entry, revision, names, chosen)


def _class_names(entry: Task, sources: dict[int, Pictures]) -> list[str]:
    kinds = [rows.features["label"] for rows in sources.values()]
    if isinstance(kinds[0], ClassLabel):
        return list(kinds[0].names)
    values: set[Any] = set()
    for rows in sources.values():
        if not isinstance(rows, Dataset):
            raise ValueError(
                f"Expected the label column of {entry.location} to be a ClassLabel, but got "
                f"{kinds[0]}, whose classes a stream does not tell; do leave streaming out."
            )
        values |= set(rows.unique("label"))
    return [str(value) for value in sorted(values)]


def _as_classes(rows: Pictures, names: list[str]) -> Pictures:
    number = {name: label for label, name in enumerate(names)}
    labels = [number[str(value)] for value in rows["label"][:]]
    kept = rows.remove_columns("label")
    return kept.add_column("label", labels, feature=ClassLabel(names=names))


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
