"""Labelled pictures from every kind of source, with labels and ids that stay what they are."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, concatenate_datasets
from datasets import Image as ImageColumn
from PIL import Image
from support.pictures import (
    NAMES,
    dataset_of,
    encoded,
    picture,
    small_processor,
    string_dataset,
    write_folder,
)

from hf_knn.data import loading as data
from hf_knn.data.batches import BadRow, process_rows, read_batch
from hf_knn.data.decode import decode_image
from hf_knn.data.loading import ids_of, label_names, labels_of, load_splits, prepare
from hf_knn.data.places import fingerprint_of, paths_of


def as_named(rows: Dataset) -> list[str]:
    """The name of each row's label."""
    return [label_names(rows)[number] for number in labels_of(rows).tolist()]


def keep_images(images: list[Image.Image], return_tensors: str) -> dict[str, Any]:
    """Stands in for an image processor: hands the decoded pictures through."""
    assert return_tensors == "pt"
    return {"pixel_values": images}


def first_pixels(rows: Dataset) -> list[tuple[int, ...]]:
    """What the pictures of a dataset really are."""
    batch = read_batch(rows, range(len(rows)), keep_images)
    assert not batch.bad
    assert batch.pixel_values is not None
    images: Any = batch.pixel_values
    return [image.getpixel((0, 0)) for image in images]


def wanted_pixels(labels: Sequence[int], seeds: Sequence[int]) -> list[Any]:
    pairs = zip(labels, seeds, strict=True)
    return [picture(label, seed).getpixel((0, 0)) for label, seed in pairs]


# sources


def test_a_folder_of_labels(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets", {"cat": 2, "ant": 3})
    splits = load_splits(tmp_path / "pets")
    assert list(splits) == ["train"]
    rows = splits["train"]
    assert set(rows.column_names) == {"image", "label", "sample_id", "path"}
    assert label_names(rows) == ["ant", "cat"]
    assert as_named(rows) == ["ant"] * 3 + ["cat"] * 2
    assert labels_of(rows).dtype == ids_of(rows).dtype == torch.int64
    assert ids_of(rows).tolist() == [0, 1, 2, 3, 4]
    assert paths_of(rows) == ["ant/0.png", "ant/1.png", "ant/2.png", "cat/0.png", "cat/1.png"]
    assert first_pixels(rows) == wanted_pixels([0, 0, 0, 2, 2], [0, 1, 2, 0, 1])


@pytest.mark.parametrize("validation", ["val", "valid", "validation", "Val", "VALIDATION"])
def test_a_folder_with_splits(validation: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"ant": 2, "bee": 1, "cat": 1})
    write_folder(tmp_path / validation, {"ant": 1, "cat": 2})
    write_folder(tmp_path / "test", {"bee": 1, "cat": 1})
    splits = load_splits(str(tmp_path))
    assert set(splits) == {"train", "validation", "test"}
    assert as_named(splits["train"]) == ["ant", "ant", "bee", "cat"]
    assert as_named(splits["validation"]) == ["ant", "cat", "cat"]
    assert as_named(splits["test"]) == ["bee", "cat"]
    for rows in splits.values():  # also where a class has no picture
        assert label_names(rows) == ["ant", "bee", "cat"]
        assert ids_of(rows).tolist() == list(range(len(rows)))
        assert all(not Path(path).is_absolute() for path in paths_of(rows))
    assert paths_of(splits["test"]) == ["test/bee/0.png", "test/cat/0.png"]


def write_metadata(folder: Path, labels: Sequence[str], header: str = "file_name,label") -> None:
    folder.mkdir(parents=True)
    lines = [header]
    for row, label in enumerate(labels):
        number = NAMES.index(label) if label in NAMES else 0
        (folder / f"{row}.png").write_bytes(encoded(picture(number, row)))
        lines.append(f"{row}.png,{label}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def test_a_folder_with_metadata(tmp_path: Path) -> None:
    write_metadata(tmp_path / "all", ["cat", "ant", "cat", "bee"])
    rows = load_splits(tmp_path / "all")["train"]
    assert label_names(rows) == ["ant", "bee", "cat"]
    by_path = dict(zip(paths_of(rows), as_named(rows), strict=True))
    wanted = {"0.png": "cat", "1.png": "ant", "2.png": "cat", "3.png": "bee"}
    assert {Path(path).name: label for path, label in by_path.items()} == wanted
    seeds = [int(Path(path).stem) for path in paths_of(rows)]
    numbers = [NAMES.index(label) for label in as_named(rows)]
    assert first_pixels(rows) == wanted_pixels(numbers, seeds)


@pytest.mark.parametrize(
    "source",
    [
        "metadata",
        "saved",
        pytest.param(
            "class labels",
        ),
    ],
)
def test_splits_with_named_labels_share_their_numbers(source: str, tmp_path: Path) -> None:
    train, test = ["ant", "bee", "cat"], ["ant", "cat"]
    if source == "metadata":
        write_metadata(tmp_path / "all" / "train", train)
        write_metadata(tmp_path / "all" / "test", test)
    else:
        both = {"train": string_dataset(train), "test": string_dataset(test)}
        if source == "class labels":
            both = {name: rows.class_encode_column("label") for name, rows in both.items()}
        DatasetDict(both).save_to_disk(tmp_path / "all")
    splits = load_splits(tmp_path / "all")
    assert as_named(splits["train"]) == train
    assert as_named(splits["test"]) == test
    assert label_names(splits["test"]) == label_names(splits["train"])


@pytest.mark.parametrize("column", ["path", "file_name", "image"])
def test_a_csv(column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "pictures" / "deep", {"ant": 2, "bee": 1})
    table = tmp_path / "pictures" / "list.csv"
    absolute = tmp_path / "pictures" / "deep" / "bee" / "0.png"
    lines = [f"{column},label", "deep/ant/1.png,small", f"{absolute},large", "deep/ant/0.png,small"]
    table.write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)  # the paths are relative to the csv, not to here
    for source in (table, "pictures/list.csv"):
        rows = load_splits(source)["train"]
        assert as_named(rows) == ["small", "large", "small"]
        assert first_pixels(rows) == wanted_pixels([0, 1, 0], [1, 0, 0])
        assert paths_of(rows) == ["deep/ant/1.png", "deep/bee/0.png", "deep/ant/0.png"]
        assert ids_of(rows).tolist() == [0, 1, 2]


def test_a_parquet_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    dataset_of([2, 0, 1]).to_parquet(file)
    rows = load_splits(file)["train"]
    assert label_names(rows) == list(NAMES)
    assert labels_of(rows).tolist() == [2, 0, 1]
    assert first_pixels(rows) == wanted_pixels([2, 0, 1], [0, 1, 2])
    assert paths_of(rows) == ["cat/0.png", "ant/1.png", "bee/2.png"]


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    train, test = dataset_of([2, 0, 1]), dataset_of([1, 1], seed=3)
    train.save_to_disk(tmp_path / "one")
    DatasetDict({"train": train, "val": test}).save_to_disk(tmp_path / "two")
    one, two = load_splits(tmp_path / "one"), load_splits(tmp_path / "two")
    assert list(one) == ["train"]
    assert set(two) == {"train", "validation"}
    for rows in (one["train"], two["train"]):
        assert labels_of(rows).tolist() == [2, 0, 1]
        assert first_pixels(rows) == wanted_pixels([2, 0, 1], [0, 1, 2])
    assert labels_of(two["validation"]).tolist() == [1, 1]


@pytest.mark.parametrize("name", ["mnist", "user/pictures", "user/cifar-10.1", "some-org/a_b.c"])
def test_a_hub_id_is_passed_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any, **options: Any) -> DatasetDict:
        calls.append((*args, options))
        return DatasetDict({"train": dataset_of([0, 1]), "dev": dataset_of([1])})

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    splits = load_splits(name, revision="abc", token="secret")
    assert calls == [(name, {"revision": "abc", "token": "secret"})]
    assert {split: labels_of(rows).tolist() for split, rows in splits.items()} == {
        "train": [0, 1],
        "validation": [1],
    }


# sources that are not there, or hold nothing


@pytest.mark.parametrize(
    "name", ["/nowhere/at/all", "./gone", "../gone", "gone.csv", "a/b/c", "gone.parquet", "~/gone"]
)
def test_nothing_there(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="nothing there") as caught:
        load_splits(name)
    assert name in str(caught.value)


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "ant").mkdir()
    with pytest.raises(ValueError, match="one sub-folder of pictures per label") as caught:
        load_splits(tmp_path)
    assert str(tmp_path) in str(caught.value)
    (tmp_path / "ant" / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="one sub-folder of pictures per label"):
        load_splits(tmp_path)


def test_a_csv_with_other_columns_or_paths(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("thing,class\n0,ant\n")
    with pytest.raises(ValueError, match=r"\['thing', 'class'\]"):
        load_splits(table)
    table.write_text("path,label\n0.png,ant\n1.png,bee\n")
    with pytest.raises(ValueError, match=r"0\.png does not"):
        load_splits(table)


@pytest.mark.parametrize("text", ["", "path,label\n"])
def test_a_csv_without_rows(text: str, tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text(text)
    with pytest.raises(ValueError, match=r"empty\.csv"):
        load_splits(tmp_path / "empty.csv")


def test_a_csv_where_one_file_is_missing_has_a_bad_row(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 1})
    (tmp_path / "a.csv").write_text("path,label\nant/0.png,ant\nant/9.png,ant\n")
    rows = load_splits(tmp_path / "a.csv")["train"]
    batch = read_batch(rows, [0, 1], keep_images)
    assert batch.rows == [0]
    assert [(bad.row, bad.sample_id, Path(bad.path).name) for bad in batch.bad] == [(1, 1, "9.png")]
    assert "No such file" in batch.bad[0].reason


def test_a_csv_that_names_a_folder_has_a_bad_row(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 1})
    (tmp_path / "a.csv").write_text("path,label\nant/0.png,ant\nant,ant\n")
    batch = read_batch(load_splits(tmp_path / "a.csv")["train"], [0, 1], keep_images)
    assert (batch.rows, len(batch.bad)) == ([0], 1)


# labels


def relabelled(kind: Any, values: list[Any], column: str = "label") -> Dataset:
    images = dataset_of([0] * len(values)).to_dict()["image"]
    kinds = Features({"image": ImageColumn(), column: kind})
    return Dataset.from_dict({"image": images, column: values}, features=kinds)


def test_no_label_column_lists_the_columns() -> None:
    rows = relabelled(Value("string"), ["a"], "kind").add_column("size", [1])
    with pytest.raises(ValueError, match=r"column `label`.*\['image', 'kind', 'size'\]"):
        prepare(rows)
    two = dataset_of([0, 1]).rename_column("label", "fine")
    two = two.add_column("coarse", [0, 1]).cast_column("coarse", ClassLabel(names=["x", "y"]))
    with pytest.raises(ValueError, match=r"exactly one ClassLabel.*\['image', 'fine', 'coarse'\]"):
        prepare(two)


def test_no_picture_column_lists_the_columns() -> None:
    with pytest.raises(ValueError, match=r"column of pictures.*\['text', 'label'\]"):
        prepare(Dataset.from_dict({"text": ["a"], "label": ["b"]}))


def test_columns_of_other_names() -> None:
    rows = dataset_of([1, 0]).rename_columns({"image": "img", "label": "species"})
    found = prepare(rows.add_column("extra", [5, 6]))
    assert labels_of(found).tolist() == [1, 0]
    assert label_names(found) == list(NAMES)
    assert first_pixels(found) == wanted_pixels([1, 0], [0, 1])


@pytest.mark.parametrize(
    "kind", [List(Value("int64")), List(ClassLabel(names=["a", "b"])), List(Value("string"))]
)
def test_several_labels_are_refused_by_name(kind: Any) -> None:
    values = [["a"], ["b", "a"]] if kind == List(Value("string")) else [[0], [1, 0]]
    with pytest.raises(ValueError, match=r"'label'.*multi-label data is not supported"):
        prepare(relabelled(kind, values))


def test_rows_without_a_label_are_named() -> None:
    kind = ClassLabel(names=["a", "b"])
    rows = prepare(relabelled(kind, [0, -1, 1, None, 0]))
    with pytest.raises(ValueError, match=r"rows \[1, 3\] have none"):
        labels_of(rows)
    many = prepare(relabelled(kind, [-1] * 30))
    with pytest.raises(ValueError, match=r"rows \[0, 1, 2, 3, 4, 5, 6, 7, 8, 9\] have none"):
        labels_of(many)
    with pytest.raises(ValueError, match=r"rows \[1\] have none"):
        labels_of(prepare(relabelled(Value("string"), ["a", None, "b"])))
    assert labels_of(prepare(relabelled(kind, [0, 1]))).tolist() == [0, 1]


def test_minus_one_in_a_plain_column_is_no_class() -> None:
    with pytest.raises(ValueError, match=r"rows \[1\] have none"):
        labels_of(prepare(relabelled(Value("int64"), [0, -1, 1])))


def test_a_csv_row_without_a_label_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 3})
    (tmp_path / "a.csv").write_text("path,label\nant/0.png,x\nant/1.png,\nant/2.png,y\n")
    with pytest.raises(ValueError, match=r"rows \[1\] have none"):
        labels_of(load_splits(tmp_path / "a.csv")["train"])


def test_names_are_sorted_and_numbered() -> None:
    rows = prepare(relabelled(Value("string"), ["dog", "ant", "dog", "cat"]))
    assert label_names(rows) == ["ant", "cat", "dog"]
    assert labels_of(rows).tolist() == [2, 0, 2, 1]


@pytest.mark.parametrize("count", [3, 10])
def test_whole_numbers_stay_what_they_are(count: int) -> None:
    rows = prepare(relabelled(Value("int64"), list(reversed(range(count)))))
    assert labels_of(rows).tolist() == list(reversed(range(count)))
    assert label_names(rows) == [str(number) for number in range(count)]


def test_twelve_whole_numbers_stay_what_they_are() -> None:
    rows = prepare(relabelled(Value("int64"), list(range(12))))
    assert labels_of(rows).tolist() == list(range(12))


def test_whole_numbers_with_a_gap_keep_their_places() -> None:
    rows = prepare(relabelled(Value("int64"), [3, 1, 3]))
    assert labels_of(rows).tolist() == [3, 1, 3]
    assert label_names(rows) == ["0", "1", "2", "3"]


def test_whole_numbers_that_only_name_things() -> None:
    rows = prepare(relabelled(Value("int64"), [70_000, 9, 70_000]))
    assert as_named(rows) == ["70000", "9", "70000"]


def test_a_negative_number_is_no_class() -> None:
    with pytest.raises(ValueError, match="-2"):
        labels_of(prepare(relabelled(Value("int64"), [0, -2, 1])))


@pytest.mark.parametrize("layout", ["numpy", "torch"])
def test_a_format_does_not_change_the_labels(layout: str) -> None:
    rows = relabelled(Value("int64"), list(range(12)))
    assert labels_of(prepare(rows.with_format(layout))).tolist() == list(range(12))


def test_strange_names_stay_text() -> None:
    names = ["<b>cat</b>", "../../etc", "a\tb\n", "Ü 🦊", "None", "0"]
    rows = prepare(relabelled(Value("string"), names))
    assert label_names(rows) == sorted(names)
    assert as_named(rows) == names


# ids and paths


def test_ids_stay_with_their_pictures() -> None:
    rows = prepare(dataset_of([0, 1, 2, 3, 4, 0, 1]))
    assert ids_of(rows).tolist() == list(range(7))
    mixed = rows.shuffle(seed=3).select([5, 0, 2])
    ids = ids_of(mixed).tolist()
    assert ids != [0, 1, 2]
    wanted = [[0, 1, 2, 3, 4, 0, 1][number] for number in ids]
    assert labels_of(mixed).tolist() == wanted
    assert first_pixels(mixed) == wanted_pixels(wanted, ids)
    assert paths_of(mixed) == [f"{NAMES[label]}/{i}.png" for label, i in zip(wanted, ids)]  # noqa: B905
    assert ids_of(prepare(mixed)).tolist() == ids  # prepared again: not numbered again
    assert ids_of(rows.filter(lambda row: row["label"] == 1)).tolist() == [1, 6]
    assert ids_of(concatenate_datasets([mixed, rows])).tolist() == ids + list(range(7))


def test_ids_that_are_there_are_kept() -> None:
    rows = dataset_of([0, 1, 2]).add_column("sample_id", [70, 5, 2**40])
    assert ids_of(prepare(rows)).tolist() == [70, 5, 2**40]


def test_preparing_twice_changes_nothing() -> None:
    once = prepare(dataset_of([0, 1, 2]))
    twice = prepare(once)
    assert once.features == twice.features
    assert once.to_dict() == twice.to_dict()


def test_preparing_twice_keeps_the_fingerprint() -> None:
    once = prepare(dataset_of([0, 1, 2]))
    assert fingerprint_of(prepare(once)) == fingerprint_of(once)


def test_fingerprints_tell_content_apart() -> None:
    first = fingerprint_of(prepare(dataset_of([0, 1, 2])))
    assert first is not None
    assert fingerprint_of(prepare(dataset_of([0, 1, 2]))) == first
    others = [dataset_of([0, 1, 2], seed=1), dataset_of([0, 1, 1]), dataset_of([0, 1])]
    others.append(dataset_of([0, 1, 2]).select([2, 1, 0]))
    found = {fingerprint_of(prepare(rows)) for rows in others}
    assert first not in found
    assert len(found) == len(others)
    assert fingerprint_of([1, 2, 3]) is None


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_a_replaced_picture_changes_the_fingerprint(kind: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "all", {"ant": 2, "bee": 1})
    source = tmp_path / "all"
    if kind == "csv":
        source = tmp_path / "a.csv"
        source.write_text("path,label\nall/ant/0.png,ant\nall/bee/0.png,bee\n")
    before = fingerprint_of(load_splits(source)["train"])
    assert fingerprint_of(load_splits(source)["train"]) == before
    replaced = tmp_path / "all" / "ant" / "0.png"
    replaced.write_bytes(encoded(picture(3, 77), "BMP"))
    second = fingerprint_of(load_splits(source)["train"])
    assert second != before
    replaced.write_bytes(encoded(picture(3, 78), "BMP"))  # of the same size
    status = replaced.stat()
    os.utime(replaced, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    assert fingerprint_of(load_splits(source)["train"]) not in (before, second)


def test_paths_are_relative_and_keep_the_label_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", {"ant": 2})
    assert paths_of(load_splits(tmp_path / "one")["train"]) == ["ant/0.png", "ant/1.png"]
    rows = dataset_of([0, 1])
    assert paths_of(prepare(rows)) == ["ant/0.png", "bee/1.png"]


def test_unknown_paths_are_empty() -> None:
    kinds = Features({"image": ImageColumn(), "label": ClassLabel(names=["a", "b"])})
    images = [picture(0, 0), picture(1, 1)]
    rows = prepare(Dataset.from_dict({"image": images, "label": [0, 1]}, features=kinds))
    assert paths_of(rows) == ["", ""]
    assert first_pixels(rows) == wanted_pixels([0, 1], [0, 1])


def test_a_missing_path_leaves_no_folder_of_this_machine() -> None:
    kinds = Features({"image": ImageColumn(), "label": ClassLabel(names=["a", "b"])})
    data_of_one = encoded(picture(0, 0))
    values = [{"bytes": data_of_one, "path": path} for path in ("/home/me/cats/1.png", None)]
    rows = prepare(Dataset.from_dict({"image": values, "label": [0, 1]}, features=kinds))
    assert paths_of(rows) == ["1.png", ""]


def test_absolute_and_relative_paths_together() -> None:
    kinds = Features({"image": ImageColumn(), "label": ClassLabel(names=["a", "b"])})
    data_of_one = encoded(picture(0, 0))
    values = [{"bytes": data_of_one, "path": path} for path in ("/home/me/a/1.png", "b/2.png")]
    rows = prepare(Dataset.from_dict({"image": values, "label": [0, 1]}, features=kinds))
    assert not any(Path(path).is_absolute() for path in paths_of(rows))


def test_paths_of_concatenated_datasets() -> None:
    rows = concatenate_datasets([prepare(dataset_of([0, 1])), prepare(dataset_of([2], seed=1))])
    assert paths_of(rows) == ["ant/0.png", "bee/1.png", "cat/0.png"]


# batches


def test_a_batch_is_decoded_and_processed_in_order() -> None:
    labels = [0, 1, 2, 3, 4]
    rows = prepare(dataset_of(labels, sizes=[(8, 8), (20, 5), (3, 30)]))
    batch = read_batch(rows, [4, 1, 2], small_processor())
    assert (batch.rows, batch.bad) == ([4, 1, 2], [])
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape == (3, 3, 8, 8)
    assert batch.pixel_values.dtype == torch.float32
    entries = rows[:]["image"]
    images = [decode_image(entries[row]["bytes"]) for row in (4, 1, 2)]
    wanted = small_processor()(images=images, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch.pixel_values, wanted)


def test_bad_rows_are_named_and_left_out() -> None:
    rows = prepare(dataset_of([0, 1, 2, 3, 4, 0], broken=[1, 5]))
    rows = rows.select([5, 4, 1, 0])
    batch = read_batch(rows, [3, 2, 0, 1], keep_images)
    assert batch.rows == [3, 1]
    reason = "not a picture in one of the formats JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF, HEIF"
    assert batch.bad == [BadRow(2, 1, "bee/1.png", reason), BadRow(0, 5, "ant/5.png", reason)]
    images: Any = batch.pixel_values
    found = [image.getpixel((0, 0)) for image in images]
    assert found == wanted_pixels([0, 4], [0, 4])
    empty = read_batch(rows, [0, 2], keep_images)
    assert empty.pixel_values is None
    assert (empty.rows, [bad.row for bad in empty.bad]) == ([], [0, 2])


def test_a_row_without_a_picture_is_bad() -> None:
    kinds = Features({"image": ImageColumn(), "label": ClassLabel(names=["a", "b"])})
    values = {"image": [{"bytes": encoded(picture(0, 0)), "path": None}, None], "label": [0, 1]}
    rows = prepare(Dataset.from_dict(values, features=kinds))
    batch = read_batch(rows, [0, 1], keep_images)
    assert batch.rows == [0]
    assert batch.bad == [BadRow(1, 1, "", "the row has no picture")]


@pytest.mark.parametrize("layout", ["torch", "numpy"])
def test_a_format_of_the_dataset_does_not_matter(layout: str) -> None:
    rows = prepare(dataset_of([2, 0, 1])).with_format(layout)
    assert labels_of(rows).tolist() == [2, 0, 1]
    assert ids_of(rows).tolist() == [0, 1, 2]
    assert first_pixels(rows) == wanted_pixels([2, 0, 1], [0, 1, 2])


def test_rows_that_were_read_already() -> None:
    rows = prepare(dataset_of([0, 1, 2], broken=[1]))
    items: list[Any] = [rows[2], rows[1], rows[0]]
    batch = process_rows(items, keep_images)
    assert batch.rows == [0, 2]
    assert [(bad.row, bad.sample_id) for bad in batch.bad] == [(1, 1)]


def test_a_processor_that_fails_is_not_a_bad_picture() -> None:
    def failing(images: list[Image.Image], return_tensors: str) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    rows = prepare(dataset_of([0]))
    with pytest.raises(RuntimeError, match="out of memory"):
        read_batch(rows, [0], failing)


@pytest.mark.parametrize("read", [labels_of, ids_of])
def test_an_empty_dataset(read: Callable[[Dataset], torch.Tensor]) -> None:
    rows = prepare(dataset_of([0, 1])).select([])
    assert read(rows).shape == (0,)
    assert read(rows).dtype == torch.int64
    assert paths_of(rows) == []
    assert np.array_equal(rows.column_names, ["image", "label", "sample_id"])


def test_numbers_beside_an_empty_cell_keep_their_names(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 3})
    (tmp_path / "a.csv").write_text("path,label\nant/0.png,10\nant/1.png,\nant/2.png,2\n")
    rows = load_splits(tmp_path / "a.csv")["train"]
    assert [label_names(rows)[label] for label in rows["label"] if label >= 0] == ["10", "2"]


def test_class_labels_that_the_model_has_none_of_are_refused() -> None:
    rows = relabelled(ClassLabel(names=["dog", "eel"]), [0, 1])
    with pytest.raises(ValueError, match=r"model's 2 classes, but got \['dog', 'eel'\]"):
        prepare(rows, ["ant", "bee"])
    assert labels_of(prepare(rows, ["LABEL_0", "LABEL_1"])).tolist() == [0, 1]
