"""A datastore with a learned map: stored, opened, refused where it was tampered with, indexed."""

import copy
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.stored import MANIFEST, blob_of, content, read_manifest, write_manifest

from hf_knn.core.learned import LearnedMap
from hf_knn.core.manifest import DatastoreError, FileRecord, Manifest
from hf_knn.store import disk
from hf_knn.store.datastore import Datastore
from hf_knn.store.faiss import has_faiss

DIM, WIDTH = 12, 4


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_store(rows: int = 60, index: str = "flat", **options: Any) -> Datastore:
    store = Datastore.from_features(
        drawn(rows, DIM) + 1, torch.arange(rows) % 5, index=index, **options
    )
    store.remap(drawn(WIDTH, DIM, seed=1))
    return store


QUERIES = drawn(9, DIM, seed=2)


def assert_same_answers(one: Datastore, other: Datastore, k: int = 7) -> None:
    for mine, theirs in zip(one.search(QUERIES, k), other.search(QUERIES, k), strict=True):
        assert torch.equal(mine, theirs)


def test_the_next_format_version_names_it(tmp_path: Path) -> None:
    store = make_store()
    manifest = store.save(tmp_path)
    values = json.loads((tmp_path / MANIFEST).read_text())
    assert store.learned_map is not None
    assert (values["format_version"], values["learned_map"]) == (2, store.learned_map.sha256)
    assert torch.equal(load_file(blob_of(tmp_path))["learned_map"], store.learned_map.weight)
    opened = Datastore.load(tmp_path)
    assert opened.manifest == manifest
    assert opened.learned_map is not None
    assert torch.equal(opened.learned_map.weight, store.learned_map.weight)
    assert f"learned_map={DIM} → {WIDTH}" in repr(opened)
    assert_same_answers(opened, store)


def test_a_store_without_one_is_written_as_ever(tmp_path: Path) -> None:
    store = make_store()
    store.remap(None)
    store.save(tmp_path)
    values = read_manifest(tmp_path)
    assert values["format_version"] == 1
    assert "learned_map" not in values
    assert "learned_map" not in load_file(blob_of(tmp_path))


def test_a_new_map_is_a_new_first_file(tmp_path: Path) -> None:
    store = make_store()
    store.save(tmp_path)
    before = blob_of(tmp_path).name
    store.remap(drawn(WIDTH, DIM, seed=5))
    store.save(tmp_path)
    assert blob_of(tmp_path).name != before
    assert_same_answers(Datastore.load(tmp_path), store)


@pytest.mark.parametrize("mapped", [False, True])
def test_changes_go_on_with_it(tmp_path: Path, mapped: bool, monkeypatch: Any) -> None:
    if mapped:
        monkeypatch.setattr(disk, "LARGEST_VERIFIED_AT_ONCE", 0)
    make_store().save(tmp_path)
    store = Datastore.load(tmp_path)
    store.search(QUERIES, 3)  # an index that stands follows what comes
    store.add(drawn(5, DIM, seed=3), [0] * 5)
    store.remove([3, 8])
    store.relabel([4], [2])
    fresh = Datastore.from_features(store.features, store.labels, store.ids, index="flat")
    fresh.recenter(store.mean)
    assert store.learned_map is not None
    fresh.remap(store.learned_map.weight)
    assert_same_answers(store, fresh)
    for other in (copy.deepcopy(store), pickle.loads(pickle.dumps(store)), store.subset(store.ids)):
        assert_same_answers(other, store)
    store.recenter()
    assert store.learned_map is not None
    store.save(tmp_path)
    assert_same_answers(Datastore.load(tmp_path), store)


def test_rows_of_some_labels_go_through_it_too() -> None:
    store = make_store()
    near = store.search(QUERIES, 60)
    some = store.search(QUERIES, 5, labels=[1, 2])
    for row in range(len(QUERIES)):
        wanted = [i for i, label in zip(near.ids[row], near.labels[row], strict=True)
                  if label in (1, 2)][:5]  # fmt: skip
        assert some.ids[row].tolist() == [int(i) for i in wanted]


def difference_store() -> Datastore:
    """A map that leaves what a float16 of the large values cannot hold."""
    store = Datastore.from_features(drawn(200, 2), torch.arange(200) % 5, index="flat")
    store.remap(torch.tensor([[1.0, -1.0]]))
    return store


def nearly_equal_pairs(rows: int) -> torch.Tensor:
    large = 100 * drawn(rows, 1, seed=4)
    return torch.cat([large, large + 0.01 * drawn(rows, 1, seed=5)], dim=1)


def test_rows_that_float16_holds_but_not_behind_the_map_are_stored_as_float32() -> None:
    store = difference_store()
    store.add(nearly_equal_pairs(4), [0, 1, 2, 3])
    assert store.dtype == "float32"
    plain = difference_store()
    plain.remap(None)
    plain.add(nearly_equal_pairs(4), [0, 1, 2, 3])
    assert plain.dtype == "float16"


def test_a_map_that_makes_much_of_what_the_cast_lost_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Datastore.from_features(nearly_equal_pairs(200), torch.arange(200) % 5, index="flat")
    assert store.dtype == "float16"
    store.remap(torch.tensor([[1.0, 1.0]]))
    assert "behind the learned map" not in caplog.text
    store.remap(torch.tensor([[1.0, -1.0]]))
    assert "behind the learned map, that float16" in caplog.text


def test_merge_of_stores_with_other_maps_is_refused() -> None:
    store, other = make_store(), make_store()
    other.remap(drawn(WIDTH, DIM, seed=6))
    with pytest.raises(ValueError, match="Expected both to have learned_map '"):
        store.merge(other, renumber=True)
    other.remap(None)
    with pytest.raises(ValueError, match="Expected both to have learned_map"):
        store.merge(other, renumber=True)
    store.merge(make_store(), renumber=True)
    assert len(store) == 120


@pytest.mark.skipif(not has_faiss(), reason="an inverted file needs faiss")
@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("index", ["IVF8,Flat", "flat"])
def test_an_index_is_of_mapped_rows(tmp_path: Path, index: str, metric: str, trust: bool) -> None:
    store = make_store(600, index, metric=metric)
    store.save(tmp_path)
    if index != "flat":
        assert store.index.recall is not None  # measured among mapped rows
        assert store.index.recall >= 0.99
        assert load_file(blob_of(tmp_path))["centroids"].shape == (8, WIDTH)
    opened = Datastore.load(tmp_path, trust_faiss_index=trust)
    assert opened.index == store.index
    assert_same_answers(opened, store)
    opened.add(drawn(3, DIM, seed=8), [1, 1, 1])
    exact = make_store(600, metric=metric)
    exact.add(drawn(3, DIM, seed=8), [1, 1, 1])
    found, wanted = opened.search(QUERIES, 5).ids, exact.search(QUERIES, 5).ids
    assert (found == wanted).float().mean() > 0.9


# ---- the format for ever -------------------------------------------------------------------------

GOLDEN = Path(__file__).parents[1] / "golden" / "datastore-v2"


def golden_store() -> Datastore:
    features = torch.tensor(
        [[1.0, 2.0, -1.0], [0.0, -3.0, 0.5], [4.0, 0.25, 2.0], [-5.0, 1.0, 8.0]]
    )
    store = Datastore.from_features(
        features, [0, 1, 1, 2], [7, 3, 2**40, 5], normalization="l2", paths=["a", "", "c.png", "d"]
    )
    store.source = {"dataset": "golden", "split": "train"}
    store.remap(torch.tensor([[1.0, 0.5, -2.0], [0.0, 4.0, 0.25]]))
    return store


@pytest.mark.skipif(
    "HF_KNN_WRITE_GOLDEN" not in os.environ,
    reason="writes the golden files: only with a new format version",
)
@pytest.mark.usefixtures("without_faiss")
def test_write_golden_files() -> None:
    assert not GOLDEN.exists(), f"delete {GOLDEN} first"
    golden_store().save(GOLDEN)


@pytest.mark.usefixtures("without_faiss")  # the index's bytes depend on faiss's version
def test_golden_files_load_and_save_to_the_same_bytes(tmp_path: Path) -> None:
    copied = shutil.copytree(GOLDEN, tmp_path / "copied")  # a save may link to what was loaded
    loaded = Datastore.load(copied)
    assert loaded.learned_map is not None
    assert loaded.learned_map.weight.tolist() == [[1.0, 0.5, -2.0], [0.0, 4.0, 0.25]]
    # mapped: (4, 7.75), (-2.5, -11.875), (0.125, 1.5), (-20.5, 6)
    found = loaded.search(torch.tensor([[1.0, 1.0, 1.0]]), 4)  # -> (-0.5, 4.25)
    assert found.ids.tolist() == [[2**40, 7, 5, 3]]
    wanted = [0.98002, 0.82895, 0.39111, -0.94778]
    assert found.similarities[0].tolist() == pytest.approx(wanted, abs=1e-5)
    loaded.save(tmp_path / "again")
    golden_store().save(tmp_path / "anew")  # has no file to link, writes every byte
    assert content(tmp_path / "again") == content(tmp_path / "anew") == content(GOLDEN)


# ---- tampering ----------------------------------------------------------------------------------


def rewrite(folder: Path, change: Any, *, name_it: bool) -> None:
    """Other tensors in the row file, which the manifest then records; maybe the map by its hash."""
    blob = blob_of(folder)
    tensors = change(load_file(blob))
    blob.unlink()
    save_file(tensors, blob)
    record = FileRecord.of(blob)
    named = blob.with_name(f"datastore-{record.sha256[:12]}.safetensors")
    blob.rename(named)
    values = read_manifest(folder)
    values["blobs"] = [vars(FileRecord.of(named))]
    if name_it:
        values["learned_map"] = LearnedMap(tensors["learned_map"]).sha256
    write_manifest(folder, values)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("other", "name_it", "message"),
    [
        (lambda w: w + 1, False, "from another save"),
        (lambda w: w[:, :-1].contiguous(), True, "12 columns.*but got 11"),
        (lambda w: w * float("nan"), False, "Expected a learned map to be"),
        (lambda w: w * 1e20, False, "Expected a learned map to be"),
        (lambda w: w.double(), False, "Expected a learned map to be"),
        (lambda w: w.repeat(4, 1), False, "Expected a learned map to be"),
        (None, False, "to hold `learned_map`"),
    ],
)
def test_another_map_in_the_file_is_refused(
    tmp_path: Path, other: Any, name_it: bool, message: str, mapped: bool, monkeypatch: Any
) -> None:
    make_store().save(tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weight = tensors.pop("learned_map")
        return tensors if other is None else tensors | {"learned_map": other(weight)}

    rewrite(tmp_path, change, name_it=name_it)
    if mapped:
        monkeypatch.setattr(disk, "LARGEST_VERIFIED_AT_ONCE", 0)
    with pytest.raises(DatastoreError, match=message):
        Datastore.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learned_map": "x"}, "learned_map"), ({"learned_map": None}, "learned_map"),
        ({"learned_map": 3}, "learned_map"),
        ({"format_version": 1}, "format version 2, but got version 1"),
        ({"format_version": 3}, "format version 2, but got version 3; upgrade"),
        ({"learned_map": KeyError}, "format version 1, but got version 2; upgrade"),
    ],
)  # fmt: skip
def test_lies_about_it_are_refused(tmp_path: Path, changes: Any, message: str) -> None:
    make_store().save(tmp_path)
    values = read_manifest(tmp_path) | changes
    write_manifest(tmp_path, {k: v for k, v in values.items() if v is not KeyError})
    with pytest.raises(DatastoreError, match=message):
        Manifest.read(tmp_path / MANIFEST)


def test_code_of_before_refuses_it_with_its_sentence(tmp_path: Path) -> None:
    """What version 0.1 and 0.2 compare is the number alone."""
    make_store().save(tmp_path)
    text = (Path(__file__).parents[1] / "golden" / "code-v1" / "manifest.py").read_text()
    assert "if version != FORMAT_VERSION:" in text
    assert "FORMAT_VERSION = 1" in text
    assert read_manifest(tmp_path)["format_version"] != 1
