"""Pictures with labels, from wherever `datasets` can read them. The only file that imports it."""

import glob
import logging
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

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
from .batches import IMAGE, LABEL, PATH, SAMPLE_ID
from .folders import (
    SPLIT_NAMES,
    Layout,
    Rows,
    read_folder,
    read_list,
    read_under_label,
    whole_numbers,
)
from .places import check_options, find_local, is_saved, names_beside, why_no_labels
from .tables import is_table
from .walk import nfc

PREDICTION_FEATURES = Features(
    {"predictions": List(Value("float32")), "references": Value("int64")}
)
"""What the metrics read: a row of log-probabilities and a label per picture."""

logger = logging.getLogger(__name__)

_GENERIC_NAME = re.compile(r"LABEL_\d+")
_NUMBER = re.compile(r"0|[1-9][0-9]*")


def hide_progress_bars() -> None:
    """Turns off the bars of `datasets` for this process."""
    disable_progress_bars()


class Source(NamedTuple):
    """Pictures, with labels or without.

    Attributes:
        splits: by name, each with `image`, `label` (ClassLabel), `sample_id` and, where it is
            known, `path`; a source without splits is one split, `train`.
        has_labels: whether the labels mean something; else all pictures are of one class.
        notes: what was left out or assumed, in sentences.
    """

    splits: dict[str, Dataset]
    has_labels: bool
    notes: list[str]


def load_splits(
    source: str | Path, *, splits: bool | None = None, **options: Any
) -> dict[str, Dataset]:
    """Opens a set of labelled pictures.

    Args:
        source: a folder with one sub-folder per label (or such folders in `train`, `validation`
            and `test`, or a `metadata.csv`), a csv of `path,label`, a parquet file, a folder
            written by `Dataset.save_to_disk`, or a Hub id.
        splits: False reads folders called like splits as classes, and a csv as one split; None
            finds out, and refuses what may be either.
        options: `revision`, `name`, `token`, … for a Hub id.

    Returns:
        The splits by name, each with `image`, `label` (ClassLabel) and `sample_id`; a source
        without splits is one split, `train`. What was left out is logged as a warning.

    Raises:
        FileNotFoundError: if a local source is not there.
        ValueError: if it holds no pictures or no labels, saying what there is instead.
    """
    found = read_labelled(source, splits, **options)
    for note in found.notes:
        logger.warning("%s: %s", source, note)
    return found.splits


def read_labelled(
    source: str | Path, splits: bool | None = None, needed: str = "", **options: Any
) -> Source:
    """Opens a set of labelled pictures, as `load_splits` does, with what was left out.

    Args:
        source: as for `load_splits`.
        splits: likewise.
        needed: a split that is not left out: it is refused if it has no labels.
        options: likewise.

    Returns:
        The splits that have labels.

    Raises:
        FileNotFoundError: if a local source is not there.
        ValueError: if it holds no pictures or no labels.
    """
    found = read_source(source, splits, **options)
    if not found.has_labels:
        raise ValueError(why_no_labels(source, found.splits, found.notes))
    bare = [name for name, rows in found.splits.items() if not _has_labels(rows)]
    if needed in bare:
        raise ValueError(why_no_labels(source, {needed: found.splits[needed]}, found.notes))
    kept = {name: rows for name, rows in found.splits.items() if name not in bare}
    said = [
        f"The split {name} was left out: its {len(found.splits[name])} pictures have no labels."
        for name in bare
    ]
    return Source(kept, True, [*found.notes, *said])


def read_source(source: str | Path, splits: bool | None = None, **options: Any) -> Source:
    """Opens a set of pictures, with labels or without.

    Args:
        source: as for `load_splits`; also a folder of pictures without sub-folders, and a csv
            without a column of labels.
        splits: as for `load_splits`.
        options: likewise.

    Returns:
        The splits, whether there are labels, and what was left out.

    Raises:
        FileNotFoundError: if a local source is not there.
        ValueError: if it holds no pictures, or cannot be read, saying why.
    """
    path = find_local(source)
    check_options(source, path, splits, options)
    if path is None:
        return _source_of_columns(_load_from_hub(str(source), options), source)
    if is_table(path):
        return source_of_layout(read_list(path, splits))
    if path.is_dir() and not is_saved(path):
        return source_of_layout(read_folder(path, splits))
    return _source_of_columns(_load_saved(path), source)


def read_pictures(source: str | Path) -> dict[str, Dataset]:
    """The splits of a parquet file, a saved folder or a Hub id, each with its `image` alone."""
    path = find_local(source)
    found = _load_from_hub(str(source), {}) if path is None else _load_saved(path)
    columns = {str(name): (rows, _find_images(rows)) for name, rows in found.items()}
    alone = {n: _rename(rows.select_columns(c), IMAGE, c) for n, (rows, c) in columns.items()}
    return {name: rows.cast_column(IMAGE, Image(decode=False)) for name, rows in alone.items()}


def from_files(place: Path, label: str) -> Source:
    """One picture, or all below a folder, under one label, as `load_splits` returns them.

    Args:
        place: a picture, or a folder.
        label: of all of them.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: for a folder without pictures.
    """
    return source_of_layout(read_under_label(place, label))


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
        known = {nfc(name) for name in names}
        is_numbers = bool(own) and all(_NUMBER.fullmatch(value) for value in own)
        has_names = not all(_GENERIC_NAME.fullmatch(name) for name in names)
        is_in_range = is_numbers and all(int(value) < len(names) for value in own)
        if {nfc(value) for value in own} & known or (has_names and not is_in_range):
            foreign = sorted(value for value in own if nfc(value) not in known)
            if foreign:
                raise ValueError(
                    f"Expected the labels to be among the model's {len(names)} classes, but got "
                    f"{foreign[:10]} too; drop those pictures or train with them."
                )
            return _with_labels(dataset, list(names))
        if is_in_range:
            return _with_labels(dataset, list(range(len(names))))
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


def _load_saved(path: Path) -> dict[str, Dataset]:
    """A folder of `save_to_disk`, or a parquet file."""
    try:
        if not path.is_dir():
            return dict(load_dataset("parquet", data_files=glob.escape(str(path.absolute()))))
        saved = load_from_disk(str(path))
    except (DatasetGenerationError, OSError, ValueError) as error:
        raise ValueError(
            f"Expected {path} to be whole, but it cannot be read: {error.__cause__ or error}"
        ) from error
    return dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}


def _load_from_hub(name: str, options: dict[str, Any]) -> dict[str, Dataset]:
    try:
        return dict(load_dataset(name, **options))
    except (FileNotFoundError, ConnectionError) as error:
        near = get_close_matches(name, names_beside(Path(name)), 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise FileNotFoundError(
            f"Expected {name} to be a folder, a csv, a parquet file or a Hub id, but there is "
            f"nothing of that name here{hint}, and the Hub says: {error}"
        ) from error


def source_of_layout(layout: Layout) -> Source:
    """Datasets of lists of files, whose labels are numbered alike."""
    names = _class_names(label for rows in layout.splits.values() for label in rows.labels)
    splits = {name: _dataset_of(rows, names) for name, rows in layout.splits.items()}
    return Source(splits, bool(names), layout.notes)


def _dataset_of(rows: Rows, names: Sequence[str]) -> Dataset:
    """The files of one split; without names of classes all are of one."""
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(names)}
    numbers[None] = -1 if names else 0
    columns: dict[str, Any] = {IMAGE: rows.files, LABEL: [numbers[one] for one in rows.labels]}
    columns |= {SAMPLE_ID: list(range(len(rows.files))), PATH: rows.paths}
    kinds: dict[str, Any] = {IMAGE: Value("string"), LABEL: ClassLabel(names=names or ["picture"])}
    kinds |= {SAMPLE_ID: Value("int64"), PATH: Value("string")}
    for name, cells in rows.columns.items():
        if name == SAMPLE_ID:
            columns[name] = whole_numbers(cells, name)
        elif name not in columns:
            columns[name], kinds[name] = cells, Value("string")
    dataset = Dataset.from_dict(columns, features=Features(kinds))
    return dataset.cast_column(IMAGE, Image(decode=False))


def _source_of_columns(found: dict[str, Dataset], source: str | Path) -> Source:
    """Datasets as somebody saved them, with the columns brought to ours."""
    splits: dict[str, Dataset] = {}
    for given, rows in found.items():
        name = SPLIT_NAMES.get(str(given), str(given))
        if name in splits:
            raise ValueError(
                f"Expected one split {name} in {source}, but got {list(found)}; rename one."
            )
        splits[name] = rows
    if any(map(_has_labels, splits.values())):
        return Source(_labelled(splits), True, [])
    bare = {name: _with_columns(_of_one_class(rows)) for name, rows in splits.items()}
    return Source(bare, False, [])


def _labelled(splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """Splits whose labels are numbered alike."""
    columns = {name: _with_columns(rows) for name, rows in splits.items()}
    kinds = [rows.features[LABEL] for rows in columns.values()]
    if all(isinstance(kind, ClassLabel) and kind.names == kinds[0].names for kind in kinds):
        classes: list[Any] = list(dict.fromkeys(map(nfc, kinds[0].names)))
    else:
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
    names = sorted({nfc(str(value)) for value in found})
    return sorted(names, key=int) if all(map(_NUMBER.fullmatch, names)) else names


def _with_labels(dataset: Dataset, classes: list[Any] | None) -> Dataset:
    """Numbers the labels by the list of classes; -1 where a label is missing."""
    kind = dataset.features[LABEL]
    if isinstance(kind, ClassLabel) and (
        classes is None or [str(name) for name in classes] == kind.names
    ):
        return dataset
    assert classes is not None
    numbers = {str(name): number for number, name in enumerate(classes)}
    numbers = {nfc(name): number for name, number in numbers.items()} | numbers
    labels = [
        -1 if _is_missing(value) else numbers.get(str(value), numbers.get(nfc(str(value)), -1))
        for value in _values(dataset)
    ]
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
