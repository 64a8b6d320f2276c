"""The stored datastore: damaged, missing and exchanged files, and lies that are hashed rightly."""

import copy
import hashlib
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.stored import (
    MANIFEST,
    NAMES_A_FILE,
    blob_of,
    content,
    flipped,
    make_store,
    read_manifest,
    version_of,
    write_manifest,
)
from torch import Tensor

from hf_knn.core.manifest import DatastoreError, FileRecord, hash_blocks
from hf_knn.store import disk as datastore_files
from hf_knn.store import table as row_table
from hf_knn.store.datastore import Datastore


def test_a_folder_without_datastore_is_not_found(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=rf"{folder}.*no datastore\.json"):
            Datastore.load(folder)


def spots(size: int, count: int, seed: int) -> list[tuple[int, int]]:
    generator = random.Random(seed)
    return [(generator.randrange(size), generator.randrange(8)) for _ in range(count)]


def test_every_flipped_bit_of_a_blob_is_found(saved: Path) -> None:
    blob = blob_of(saved)
    data = blob.read_bytes()
    for position, bit in spots(len(data), 300, 0):
        blob.write_bytes(flipped(data, position, bit))
        with pytest.raises(DatastoreError, match=re.escape(blob.name)):
            Datastore.load(saved)


def load_or_error(folder: Path) -> Datastore | DatastoreError:
    try:
        return Datastore.load(folder)
    except DatastoreError as error:
        return error


def test_a_flipped_bit_of_the_manifest_is_found_or_means_nothing(saved: Path) -> None:
    data = (saved / MANIFEST).read_bytes()
    found = 0
    for position, bit in spots(len(data), 600, 1):
        (saved / MANIFEST).write_bytes(flipped(data, position, bit))
        result = load_or_error(saved)
        if isinstance(result, Datastore):
            assert version_of(result) == 0
        else:
            found += 1
            assert NAMES_A_FILE.search(str(result)), result
    assert found > 300


def test_a_flipped_bit_in_the_source_is_found(folder: Path) -> None:
    store = make_store()
    store.source = {"revision": "0123456789abcdef"}
    store.save(folder)
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace("0123456789", "0123456798"))
    with pytest.raises(DatastoreError, match=r"datastore\.json"):
        Datastore.load(folder)


@pytest.mark.parametrize("name", ["blob", MANIFEST])
def test_truncated_files_are_found(saved: Path, name: str) -> None:
    path = blob_of(saved) if name == "blob" else saved / MANIFEST
    data = path.read_bytes()
    lengths = {0, 1, 7, 8, len(data) - 2} | set(range(0, len(data) - 1, 17))
    for length in lengths:  # the last byte of the manifest is a line end
        path.write_bytes(data[:length])
        with pytest.raises(DatastoreError, match=re.escape(path.name)):
            Datastore.load(saved)
    path.write_bytes(data + b"x")
    with pytest.raises(DatastoreError, match=re.escape(path.name)):
        Datastore.load(saved)


def test_missing_blobs_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_table, "SHARD_BYTES", 12)
    for index in range(3):
        manifest = make_store().save(folder)
        name = manifest.blobs[index].name
        (folder / name).unlink()
        with pytest.raises(DatastoreError, match=rf"{name}.*missing"):
            Datastore.load(folder)
        (folder / name).mkdir()
        with pytest.raises(DatastoreError, match=rf"{name}.*missing"):
            Datastore.load(folder)
        (folder / name).rmdir()


def test_files_from_another_save_are_found(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_store(1).save(other)
    mine, others = content(saved), content(other)
    # its manifest beside my blob
    (saved / MANIFEST).write_bytes(others[MANIFEST])
    with pytest.raises(DatastoreError, match=rf"{blob_of(other).name}.*missing"):
        Datastore.load(saved)
    # its blob, of the same size, under my name
    (saved / MANIFEST).write_bytes(mine[MANIFEST])
    assert blob_of(saved).stat().st_size == blob_of(other).stat().st_size
    blob_of(saved).write_bytes(others[blob_of(other).name])
    with pytest.raises(DatastoreError, match=rf"{blob_of(saved).name} to have sha256"):
        Datastore.load(saved)


def test_a_size_that_differs_is_told_with_both_numbers(saved: Path) -> None:
    size = blob_of(saved).stat().st_size
    with blob_of(saved).open("ab") as file:
        file.write(b"more")
    with pytest.raises(DatastoreError, match=rf"{size} bytes, but got {size + 4}"):
        Datastore.load(saved)


# stores that are hashed later


@pytest.fixture
def hashed_later(saved: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datastore_files, "LARGEST_VERIFIED_AT_ONCE", 0)
    return saved


USES: dict[str, Callable[[Datastore], object]] = {
    "search": lambda store: store.search(torch.ones(1, 3), 2),
    "leave_one_out": lambda store: next(store.leave_one_out(2)),
    "features": lambda store: store.features,
    "labels": lambda store: store.labels,
    "ids": lambda store: store.ids,
    "paths": lambda store: store.paths,
    "path_of": lambda store: store.path_of(0),
    "add": lambda store: store.add(torch.ones(1, 3), [0]),
    "remove": lambda store: store.remove([0]),
    "relabel": lambda store: store.relabel([0], [1]),
    "recenter": lambda store: store.recenter(),
    "subset": lambda store: store.subset([0]),
    "merge": lambda store: make_store(7).merge(store),
    "copy": lambda store: copy.deepcopy(store).search(torch.ones(1, 3), 2),
    "save": lambda store: store.save("elsewhere"),
}


@pytest.mark.parametrize("use", USES)
def test_nothing_is_used_before_it_is_hashed(
    hashed_later: Path, use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blob = blob_of(hashed_later)
    USES[use](Datastore.load(hashed_later))
    data = blob.read_bytes()
    blob.unlink()  # a file of its own, not the one that is mapped
    blob.write_bytes(flipped(data, len(data) - 1, 0))
    store = Datastore.load(hashed_later)
    assert len(store) == 6
    for _ in range(2):  # and it does not become right by asking again
        with pytest.raises(DatastoreError, match=re.escape(blob.name)):
            USES[use](store)
    with pytest.raises(DatastoreError, match=re.escape(blob.name)):
        Datastore.load(hashed_later, verify="full")


def test_what_needs_no_hash_is_found_at_once(hashed_later: Path) -> None:
    blob = blob_of(hashed_later)
    data = blob.read_bytes()
    blob.write_bytes(data[:-1])
    with pytest.raises(DatastoreError, match=rf"{blob.name} to have {len(data)} bytes"):
        Datastore.load(hashed_later)
    blob.unlink()
    with pytest.raises(DatastoreError, match=rf"{blob.name}.*missing"):
        Datastore.load(hashed_later)
    with pytest.raises(ValueError, match=r"`verify`.*'none'"):
        Datastore.load(hashed_later, verify="none")


def test_files_hashed_later_are_hashed_once(
    hashed_later: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, seen = FileRecord.compare, []

    def count(record: FileRecord, *request: Any) -> None:
        seen.append(record.name)
        compare(record, *request)

    monkeypatch.setattr(FileRecord, "compare", count)
    store = Datastore.load(hashed_later)
    assert not seen
    for _ in range(2):
        store.search(torch.ones(1, 3), 2)
    assert len(seen) == 1


def test_damage_in_a_later_file_is_found_each_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datastore_files, "LARGEST_VERIFIED_AT_ONCE", 0)
    monkeypatch.setattr(row_table, "SHARD_BYTES", 12)
    blob = folder / make_store().save(folder).blobs[1].name
    blob.write_bytes(flipped(blob.read_bytes(), blob.stat().st_size - 1, 0))
    store = Datastore.load(folder)
    for _ in range(3):
        with pytest.raises(DatastoreError, match=re.escape(blob.name)):
            store.search(torch.ones(1, 3), 2)


def test_a_store_and_its_copy_are_both_hashed(hashed_later: Path) -> None:
    store = Datastore.load(hashed_later)
    twin = copy.deepcopy(store)
    assert version_of(store) == version_of(twin) == 0


def test_a_version_that_was_opened_stays_usable_when_it_is_replaced(hashed_later: Path) -> None:
    store = Datastore.load(hashed_later)
    make_store(1).save(hashed_later)
    assert version_of(store) == 0


# lies inside a blob whose hash is right


def forge(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Gives the blob other tensors, and the manifest the right hash of it."""
    blob = blob_of(folder)
    tensors = {name: tensor.clone() for name, tensor in load_file(blob).items()}
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    blob.unlink()
    temporary = folder / "forged"
    save_file(tensors, temporary)
    name = f"datastore-{hash_blocks(temporary)[0][:12]}.safetensors"
    temporary.rename(folder / name)
    record = FileRecord.of(folder / name)
    write_manifest(folder, read_manifest(folder) | {"blobs": [vars(record)]})


SIX = torch.arange(6)


ROWS = make_store().features


BAD_TENSORS: list[Any] = [
    ("negative label", {"labels": SIX - 1}, "`labels` to be >= 0, but got -1"),
    ("float labels", {"labels": SIX.float()}, r"`labels`.*float32"),
    ("bool labels", {"labels": SIX > 2}, r"`labels`.*bool"),
    ("few labels", {"labels": SIX[:5]}, r"row \(6\).*5 labels"),
    ("many labels", {"labels": torch.arange(7)}, r"row \(6\).*7 labels"),
    ("square labels", {"labels": SIX.reshape(6, 1)}, r"`labels`.*\(6, 1\)"),
    ("doubled ids", {"ids": torch.tensor([0, 1, 2, 3, 4, 4])}, r"unique `ids`.*\[4\]"),
    ("negative ids", {"ids": SIX - 1}, "`ids` to be >= 0, but got -1"),
    ("few ids", {"ids": SIX[:5]}, "5 ids"),
    ("NaN", {"features": ROWS.clone().index_fill_(0, SIX[1:2], torch.nan)}, r"rows \[1\]"),
    ("infinity", {"features": ROWS.clone().index_fill_(0, SIX[5:], torch.inf)}, r"rows \[5\]"),
    ("few rows", {"features": ROWS[:5].clone()}, r"\(6, 3\).*\(5, 3\)"),
    ("narrow rows", {"features": ROWS[:, :2].clone()}, r"\(6, 3\).*\(6, 2\)"),
    ("flat rows", {"features": ROWS.flatten()}, r"\(6, 3\).*\(18,\)"),
    ("float32 rows", {"features": ROWS.float()}, r"float16.*float32"),
    ("NaN mean", {"mean": torch.full((3,), torch.nan)}, "`mean`"),
    ("infinite mean", {"mean": torch.full((3,), torch.inf)}, "`mean`"),
    ("short mean", {"mean": torch.zeros(2)}, r"`mean`.*\(3,\).*\(2,\)"),
    ("flat mean", {"mean": torch.zeros(1, 3)}, "`mean`"),
    ("no features", {"features": None}, r"datastore-.*`features`"),
    ("no labels", {"labels": None}, r"datastore-.*`labels`"),
    ("no ids", {"ids": None}, r"datastore-.*`ids`"),
    ("no mean", {"mean": None}, r"datastore-.*`mean`"),
    ("no path bytes", {"path_bytes": None}, r"datastore-.*`path_bytes`"),
    ("few paths", {"path_ends": torch.tensor([3, 60])}, r"datastore-|path per row \(6\).*2"),
    ("paths beyond", {"path_ends": SIX * 1000}, "paths.*order"),
    ("square path ends", {"path_ends": SIX.reshape(2, 3)}, "`path_ends`.*list"),
    ("paths in disorder", {"path_ends": torch.tensor([9, 3, 9, 9, 9, 60])}, "paths.*order"),
]


UNCHECKED: list[Any] = [
    ("scalar mean", {"mean": torch.tensor(0.0)}, "`mean`"),
    ("scalar path ends", {"path_ends": torch.tensor(6)}, "path"),
    ("float path ends", {"path_ends": (SIX + 1) * 10.0}, "path"),
    ("bfloat16 path bytes", {"path_bytes": torch.zeros(27).bfloat16()}, "path"),
    ("negative path ends", {"path_ends": torch.tensor([-9, 3, 9, 9, 9, 60])}, "path"),
]


@pytest.mark.parametrize(("changes", "message"), [case[1:] for case in BAD_TENSORS],
                         ids=[case[0] for case in BAD_TENSORS])  # fmt: skip
def test_lies_in_a_rightly_hashed_blob_are_refused(
    saved: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    forge(saved, changes)
    with pytest.raises(DatastoreError, match=message):
        Datastore.load(saved)


@pytest.mark.parametrize(("changes", "message"), [case[1:] for case in UNCHECKED],
                         ids=[case[0] for case in UNCHECKED])  # fmt: skip
def test_tensors_of_another_kind_are_refused(
    saved: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    forge(saved, changes)
    with pytest.raises(DatastoreError, match=message):
        Datastore.load(saved)


def test_a_forged_blob_with_nothing_changed_loads(saved: Path) -> None:
    forge(saved, {})
    assert version_of(Datastore.load(saved)) == 0


def test_a_hashed_blob_that_is_no_safetensors_file_is_refused(saved: Path) -> None:
    blob_of(saved).unlink()
    for number, data in enumerate((b"\x80\x04N.", b"\xff" * 400, b"")):
        sha256 = hashlib.sha256(data).hexdigest()
        path = saved / f"datastore-{sha256[:12]}.safetensors"
        path.write_bytes(data)
        values = read_manifest(saved) | {"blobs": [vars(FileRecord.of(path))]}
        write_manifest(saved, values | {"num_rows": 0})
        with pytest.raises(DatastoreError, match=path.name):
            Datastore.load(saved)
        assert number < 3
