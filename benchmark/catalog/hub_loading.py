"""Tasks on the Hub: revisions, splits and columns, under our names."""

from collections.abc import Iterable, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, Image, get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from catalog.loaded_task import LoadedTask, Pictures
from catalog.splits import ANY, TEST, TRAIN, VALIDATION
from catalog.tasks import Task

SPLIT_NAMES = ("train", "validation", "test")


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


def roles_of(offered: Iterable[str], named: Sequence[str | None] = SPLIT_NAMES) -> dict[int, str]:
    """The split of each role. Without a test split that of validation is it, else the seed's."""
    there = set(offered)
    found = {role: name for role, name in enumerate(named) if name in there and name is not None}
    if TEST not in found and VALIDATION in found:
        found[TEST] = found.pop(VALIDATION)
    if TEST not in found and TRAIN in found:
        found[ANY] = found.pop(TRAIN)
    return found


def load_hub(entry: Task, streaming: bool) -> LoadedTask:
    """The pictures of a Hub task, stored or streamed.

    Raises:
        ValueError: for a split or a column that is not there.
        PermissionError: without access.
    """
    revision = resolve_revision(entry)
    options = {"name": entry.config, "revision": revision}
    try:
        offered = get_dataset_split_names(
            entry.location, config_name=entry.config, revision=revision
        )
        wanted = roles_of(offered, entry.splits)
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
    return normalised(entry, revision, sources)


def _no_access(entry: Task) -> PermissionError:
    page = f"https://huggingface.co/datasets/{entry.location}"
    return PermissionError(
        f"Expected access to the dataset {entry.location}, but the Hub shows none: it is gated, "
        f"private or gone. Do accept its terms at {page}, make a token with read access at "
        "https://huggingface.co/settings/tokens, and set HF_TOKEN or run `hf auth login`."
    )


def normalised(entry: Task, revision: str, sources: dict[int, Pictures]) -> LoadedTask:
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
                f"but {missing} is not among {rows.column_names}; do correct the entry in "
                "catalog/tasks.py."
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
