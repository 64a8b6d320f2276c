"""Pictures with labels, from wherever `datasets` can read them. The only file that imports it."""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    List,
    Value,
    disable_progress_bars,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from torch import Tensor

from ..store.datastore import Datastore
from .batches import IMAGE, LABEL, SAMPLE_ID

PREDICTION_FEATURES = Features(
    {"predictions": List(Value("float32")), "references": Value("int64")}
)
"""What the metrics read: a row of log-probabilities and a label per picture."""

_HUB_ID = re.compile(r"[\w-]+|[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_COMMIT = re.compile(r"^hf://datasets/[^@]+@([0-9a-f]{40})/")
_GENERIC_NAME = re.compile(r"LABEL_\d+")
_SPLIT_NAMES = {"val": "validation", "valid": "validation", "dev": "validation"}


def hide_progress_bars() -> None:
    """Turns off the bars of `datasets` for this process."""
    disable_progress_bars()


def load_splits(source: str | Path, **options: Any) -> dict[str, Dataset]:
    """Opens a set of labelled pictures.

    Args:
        source: a folder with one sub-folder per label (or with `metadata.csv`, or with `train`,
            `validation` and `test` inside), a csv of `path,label` or `file_name,label`, a parquet
            file, a folder written by `Dataset.save_to_disk`, or a Hub id.
        options: `revision`, `name`, `token`, … for a Hub id.

    Returns:
        The splits by name, each with `image`, `label` (ClassLabel) and `sample_id`; a source
        without splits is one split, `train`.

    Raises:
        FileNotFoundError: if a local source is not there.
        ValueError: if it holds no pictures or no labels, listing the columns there are.
    """
    return _labelled(_read_splits(source, options, needs_labels=True))


def load_pictures(source: str | Path, **options: Any) -> tuple[dict[str, Dataset], bool]:
    """Opens a set of pictures, with labels or without.

    Args:
        source: as for `load_splits`; also a folder of pictures without sub-folders, and a csv
            without a column `label`.
        options: as for `load_splits`.

    Returns:
        The splits by name, as `load_splits` returns them, and whether they have labels; without,
        all pictures are of one class.

    Raises:
        FileNotFoundError: if a local source is not there.
        ValueError: if it holds no pictures, or some of its splits have labels and others none.
    """
    splits = _read_splits(source, options, needs_labels=False)
    if not _is_plain_folder(Path(source)) and any(map(_has_labels, splits.values())):
        return _labelled(splits), True
    return {name: _with_columns(_of_one_class(rows)) for name, rows in splits.items()}, False


def from_files(files: Sequence[Path], label: str) -> Dataset:
    """Picture files under one label, as `load_splits` would return them.

    Args:
        files: of pictures.
        label: of all of them.
    """
    columns = {IMAGE: [str(file) for file in files], LABEL: [0] * len(files)}
    kinds = Features({IMAGE: Image(), LABEL: ClassLabel(names=[label])})
    return _with_columns(Dataset.from_dict(columns, features=kinds))


def prepare(dataset: Dataset, names: Sequence[str] | None = None) -> Dataset:
    """Brings a dataset to `image` (undecoded), `label` (ClassLabel) and a stable `sample_id`.

    Args:
        dataset: with one image column and one label column, whatever they are called.
        names: the classes in the order of their numbers; named labels are numbered by it. Plain
            numbers stay as they are.

    Returns:
        The dataset; `sample_id` is the row number unless there is one already.

    Raises:
        ValueError: if there is no image or label column, listing the columns there are, or for
            named labels that are not among `names`.
    """
    dataset = _with_columns(dataset)
    if names is not None:
        own = {str(value) for value in _values(dataset) if not _is_missing(value)}
        is_text = not all(value.isdigit() for value in own)
        has_names = not all(_GENERIC_NAME.fullmatch(name) for name in names)
        if own & set(names) or (is_text and has_names):
            foreign = sorted(own - set(names))
            if foreign:
                raise ValueError(
                    f"Expected the labels to be among the model's {len(names)} classes, but got "
                    f"{foreign[:10]} too; drop those pictures or train with them."
                )
            return _with_labels(dataset, list(names))
    if isinstance(dataset.features[LABEL], ClassLabel):
        return _with_labels(dataset, None)
    return _with_labels(dataset, _class_names(_values(dataset)))


def label_names(dataset: Dataset) -> list[str]:
    """The class names of a prepared dataset, in the order of their numbers."""
    return list(dataset.features[LABEL].names)


def labels_of(dataset: Dataset) -> Tensor:
    """[N] int64 labels of a prepared dataset.

    Raises:
        ValueError: if some picture has no label (-1 or missing).
    """
    labels = dataset.with_format("numpy")[LABEL][:]
    labels = torch.from_numpy(np.asarray(labels, dtype=np.float64)).nan_to_num(-1).long()
    if len(labels) and int(labels.min()) < 0:
        missing = (labels < 0).nonzero().flatten().tolist()
        raise ValueError(f"Expected a label for every picture, but rows {missing[:10]} have none.")
    return labels


def ids_of(dataset: Dataset) -> Tensor:
    """[N] int64 sample ids of a prepared dataset."""
    return torch.from_numpy(np.asarray(dataset.with_format("numpy")[SAMPLE_ID][:], np.int64))


def groups_of(dataset: Dataset, column: str) -> Tensor:
    """[N] int64: which rows of a dataset belong together.

    Args:
        dataset: any.
        column: of texts or numbers; equal values are one group, a missing one a group of its own.

    Raises:
        ValueError: if there is no such column, listing those there are, or it holds other things.
    """
    if column not in dataset.column_names or not isinstance(dataset.features[column], Value):
        raise ValueError(
            f"Expected a column {column!r} of texts or numbers to group by, but the columns are "
            f"{dataset.column_names}."
        )
    values = dataset.with_format(None)[column][:]
    numbers: dict[Any, int] = {}
    keys = [(row,) if _is_missing(value) else value for row, value in enumerate(values)]
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.int64)


def paths_of(dataset: Dataset) -> list[str]:
    """Where each picture lies, relative to the folder that holds them all; empty if unknown."""
    paths = _raw_paths(dataset)
    parents = {str(Path(path).parent) for path in paths if path}
    if not parents or any(not path for path in paths):
        return [Path(path).name for path in paths]
    if not all(Path(path).is_absolute() for path in paths):
        return [Path(path).name if Path(path).is_absolute() else path for path in paths]
    root = _common_root(sorted(parents))
    return [str(Path(path).relative_to(root)) if root else path for path in paths]


def fingerprint_of(dataset: Any) -> str | None:
    """A name for the content of a dataset, its files included; None for other kinds of dataset."""
    known = getattr(dataset, "_fingerprint", None)
    if known is None:
        return None
    # `datasets` knows files by their paths only: one that was replaced has another size or time
    total = hashlib.sha256(known.encode())
    for path in _raw_paths(dataset):
        if os.path.isfile(path):
            status = os.stat(path)
            total.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return total.hexdigest()


def source_of(pictures: str | Path, dataset: Dataset, split: str = "train") -> dict[str, str]:
    """Where pictures came from, as a datastore and a model card say it.

    Args:
        pictures: what `load_splits` was given.
        dataset: one of the splits that it returned.
        split: its name.

    Returns:
        `dataset` (the Hub id, or the name of the folder or file), `split`, and where they are
        known `revision` (the commit on the Hub) and `license`.
    """
    commits = {
        found.group(1)
        for place in dataset.info.download_checksums or {}
        if (found := _HUB_COMMIT.search(str(place)))
    }
    facts = {"dataset": Path(pictures).name, "split": split}
    if commits:
        facts |= {"dataset": str(pictures), "revision": ", ".join(sorted(commits))}
    if dataset.info.license:
        facts["license"] = dataset.info.license
    return facts


def datastore_as_dataset(
    store: Datastore, class_names: Sequence[str] | None = None, root: str | Path | None = None
) -> Dataset:
    """The rows of a datastore as a dataset, to be looked at, filtered or pushed.

    Args:
        store: N rows.
        class_names: of the labels; None leaves them numbers.
        root: the folder that the stored paths are relative to, for a column of pictures.

    Returns:
        N rows of `id`, `label`, `embedding` (the stored raw feature, float32), `path` where it is
        known, and `image` with `root`.

    Raises:
        ValueError: for a `root` that does not hold the pictures, or rows without paths.
    """
    columns: dict[str, Any] = {"id": store.ids.numpy(), LABEL: store.labels.numpy()}
    columns["embedding"] = store.features.float().numpy()
    kinds: dict[str, Any] = {"id": Value("int64"), LABEL: Value("int64")}
    kinds["embedding"] = List(Value("float32"), length=store.dim)
    if class_names is not None:
        kinds[LABEL] = ClassLabel(names=list(class_names))
    if store.paths is not None:
        columns["path"], kinds["path"] = store.paths, Value("string")
    if root is not None:
        columns[IMAGE] = [str(Path(root) / path) for path in store.paths or []]
        missing = [path for path in columns[IMAGE] if not Path(path).is_file()]
        if missing or len(columns[IMAGE]) != len(store):
            raise ValueError(
                f"Expected `root` to be the folder of the {len(store)} pictures, but "
                f"{missing[:3] or 'the datastore knows no paths'} are missing."
            )
        kinds[IMAGE] = Image()
    dataset = Dataset.from_dict(columns, features=Features(kinds))
    store.verify()  # afterwards: what was copied is what was stored
    return dataset


def _read_splits(
    source: str | Path, options: dict[str, Any], *, needs_labels: bool
) -> dict[str, Dataset]:
    """What `datasets` reads, split by split, with the columns as they are."""
    path = Path(source)
    if path.is_dir():
        splits = _load_folder(path)
    elif path.suffix == ".csv" and path.is_file():
        splits = {"train": _load_csv(path, needs_labels)}
    elif path.suffix == ".parquet" and path.is_file():
        splits = load_dataset("parquet", data_files=str(path))
    elif not _HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(
            f"Expected {source} to be a folder, a csv, a parquet file or a Hub id, "
            "but there is nothing there."
        )
    else:
        splits = _load_from_hub(str(source), options)
    return {_SPLIT_NAMES.get(str(name), str(name)): rows for name, rows in splits.items()}


def _labelled(splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """Splits whose labels are numbered alike."""
    columns = {name: _with_columns(rows) for name, rows in splits.items()}
    classes = None
    kinds = [rows.features[LABEL] for rows in columns.values()]
    if not all(isinstance(kind, ClassLabel) and kind.names == kinds[0].names for kind in kinds):
        classes = _class_names(value for rows in columns.values() for value in _values(rows))
    return {name: _with_labels(rows, classes) for name, rows in columns.items()}


def _has_labels(dataset: Dataset) -> bool:
    """Whether there is a column of labels, of any kind, with a value in it."""
    if LABEL in dataset.column_names:
        kind = dataset.features[LABEL]
        is_plain = isinstance(kind, ClassLabel | Value)
        return not is_plain or any(not _is_missing(value) for value in _values(dataset))
    kinds = dataset.features.items()
    return any(isinstance(kind, ClassLabel) or _holds_classes(name, kind) for name, kind in kinds)


def _of_one_class(dataset: Dataset) -> Dataset:
    if LABEL in dataset.column_names:
        dataset = dataset.remove_columns(LABEL)
    kind = ClassLabel(names=["picture"])
    return dataset.add_column(LABEL, [0] * len(dataset), feature=kind)


def _is_plain_folder(path: Path) -> bool:
    """Whether a folder holds files only, so that its own name would be taken for their label."""
    if not path.is_dir() or any(entry.is_dir() for entry in path.iterdir()):
        return False
    return not any(path.glob("metadata.*")) and not any(path.glob("dataset_*.json"))


def _load_folder(path: Path) -> Any:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        return saved if isinstance(saved, DatasetDict) else {"train": saved}
    try:
        return load_dataset("imagefolder", data_dir=str(path.resolve()), drop_labels=False)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"Expected {path} to hold one sub-folder of pictures per label, or a metadata.csv, "
            f"but: {error}"
        ) from error


def _load_from_hub(name: str, options: dict[str, Any]) -> Any:
    try:
        return load_dataset(name, **options)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"Expected {name} to be a folder, a csv, a parquet file or a Hub id, but there is "
            f"nothing of that name here, and the Hub says: {error}"
        ) from error


def _load_csv(path: Path, needs_labels: bool) -> Dataset:
    try:
        rows = load_dataset("csv", data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError) as error:
        raise ValueError(
            f"Expected {path} to be a csv of path,label with at least one row, but: {error}"
        ) from error
    if len(rows) == 0:
        raise ValueError(f"Expected {path} to have at least one row, but it has none.")
    places = next((name for name in ("path", "file_name", IMAGE) if name in rows.column_names), "")
    if not places or (needs_labels and LABEL not in rows.column_names):
        raise ValueError(
            f"Expected {path} to have the columns path,label, but it has {rows.column_names}."
        )
    files = [str((path.parent / place).resolve()) for place in rows[places]]
    missing = [file for file in files if not Path(file).is_file()]
    if len(missing) == len(files):
        raise ValueError(f"Expected the paths in {path} to exist, but {missing[0]} does not.")
    others = {name: rows[name][:] for name in rows.column_names if name not in (places, IMAGE)}
    return Dataset.from_dict({IMAGE: files, **others}).cast_column(IMAGE, Image(decode=False))


def _raw_paths(dataset: Dataset) -> list[str]:
    """The path that each picture came with; empty strings where there is none."""
    chunks = dataset.data.column(IMAGE).chunks  # not combined: that would copy every picture
    paths = [path or "" for chunk in chunks for path in chunk.field("path").to_pylist()]
    if dataset._indices is None:
        return paths
    return [paths[row] for row in dataset._indices.column(0).to_pylist()]


def _with_columns(dataset: Dataset) -> Dataset:
    dataset = _rename(dataset, IMAGE, _find_images(dataset))
    dataset = _rename(dataset, LABEL, _find_labels(dataset))
    kind = dataset.features[LABEL]
    if not isinstance(kind, ClassLabel | Value):
        raise ValueError(
            f"Expected the column {LABEL!r} to be one class per picture, but it holds {kind}; "
            "multi-label data is not supported."
        )
    if SAMPLE_ID not in dataset.column_names:
        dataset = dataset.add_column(SAMPLE_ID, np.arange(len(dataset), dtype=np.int64))
    # a cast renames the content for `datasets`, so none that changes nothing
    if dataset.features[IMAGE].decode:
        dataset = dataset.cast_column(IMAGE, Image(decode=False))
    return dataset


def _class_names(values: Iterable[Any]) -> list[Any]:
    """The classes of a plain label column: numbers in their order, names in theirs.

    Whole numbers from 0 on stay what they are, also where one of them does not occur.
    """
    found = {value for value in values if not _is_missing(value)}
    negative = sorted(value for value in found if isinstance(value, int) and value < 0)
    if negative:
        raise ValueError(f"Expected labels >= 0, but got {negative[:10]}.")
    if found and all(isinstance(value, int) and not isinstance(value, bool) for value in found):
        highest = max(found)
        return list(range(highest + 1)) if highest < 2 * len(found) + 100 else sorted(found)
    return sorted({str(value) for value in found})


def _with_labels(dataset: Dataset, classes: list[Any] | None) -> Dataset:
    """Numbers the labels by the list of classes; -1 where a label is missing."""
    kind = dataset.features[LABEL]
    if isinstance(kind, ClassLabel) and (
        classes is None or [str(name) for name in classes] == kind.names
    ):
        return dataset
    assert classes is not None
    numbers = {str(name): number for number, name in enumerate(classes)}
    labels = [-1 if _is_missing(value) else numbers[str(value)] for value in _values(dataset)]
    names = ClassLabel(names=[str(name) for name in classes])
    columns = dataset.column_names
    dataset = dataset.remove_columns(LABEL).add_column(LABEL, labels, feature=names)
    return dataset.select_columns(columns)


def _values(dataset: Dataset) -> list[Any]:
    """The labels as names, or as the plain values there are; None where one is missing."""
    values = dataset.with_format(None)[LABEL][:]
    kind = dataset.features[LABEL]
    if not isinstance(kind, ClassLabel):
        # a csv column of whole numbers with an empty cell comes as floats
        return [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]
    return [None if value is None or value < 0 else kind.names[value] for value in values]


def _is_missing(value: Any) -> bool:
    return value is None or value == -1 or value != value  # NaN is what a csv's empty cell becomes


def _find_images(dataset: Dataset) -> str:
    found = [name for name, kind in dataset.features.items() if isinstance(kind, Image)]
    if not found:
        raise ValueError(
            f"Expected a column of pictures, but the columns are {dataset.column_names}."
        )
    return IMAGE if IMAGE in found else found[0]


def _find_labels(dataset: Dataset) -> str:
    if LABEL in dataset.column_names:
        return LABEL
    found = [name for name, kind in dataset.features.items() if isinstance(kind, ClassLabel)]
    several = [name for name, kind in dataset.features.items() if _holds_classes(name, kind)]
    if several and not found:
        raise ValueError(
            f"Expected one class per picture, but the column {several[0]!r} holds several per "
            "picture; multi-label data is not supported."
        )
    if len(found) != 1:
        raise ValueError(
            f"Expected a column `{LABEL}` or exactly one ClassLabel column, "
            f"but the columns are {dataset.column_names}; rename yours."
        )
    return found[0]


def _holds_classes(name: str, kind: Any) -> bool:
    """Whether a column holds a list of classes per row: multi-label data."""
    is_named = name.startswith(LABEL) and isinstance(getattr(kind, "feature", None), Value)
    return isinstance(kind, List) and (is_named or isinstance(kind.feature, ClassLabel))


def _rename(dataset: Dataset, name: str, present: str) -> Dataset:
    return dataset if present == name else dataset.rename_column(present, name)


def _common_root(parents: list[str]) -> str:
    """The folder above all label folders, so that a path keeps its label."""
    common = os.path.commonpath(parents)
    return common if len(parents) > 1 else str(Path(common).parent)
