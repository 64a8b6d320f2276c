"""Teaching and forgetting rows in Milvus: as beside the model, whole or not at all."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model.test_teaching import CLASSES, assert_is_refit, cloud, trained
from support.commands import hf_knn as run
from support.pictures import picture, write_folder
from support.stored import content
from support.tiny import LABELS, tiny_model

from hf_knn import Datastore, KnnForImageClassification, MilvusDatastore
from hf_knn.core.manifest import DatastoreError
from hf_knn.milvus.pending import read_pending, write_pending
from hf_knn.milvus.server import DatastoreConnectionError, MilvusServer
from hf_knn.model.stored import StoredOtherwiseError
from hf_knn.store.remote import PENDING_NAME

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

WRITES = ("upsert", "delete")
ROW = ("ids", "labels")
COMMANDS = ["teach", "forget", pytest.param("relabel", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("milvus") / "rows.db")


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return f"c{abs(hash(request.node.nodeid))}"


def elsewhere(model: Any, uri: str, name: str) -> Any:
    """The same model with its rows in Milvus."""
    other = copy.deepcopy(model)
    other.datastore = MilvusDatastore.from_datastore(model.datastore, uri, name, progress=False)
    return other


def facts(receipt: Any) -> dict[str, Any]:
    """What must be the same wherever the rows lie."""
    values = vars(receipt) if not isinstance(receipt, dict) else receipt
    rows = zip(values["ids"], values["labels"], strict=True)
    return {"rows": sorted(rows)} | {n: values[n] for n in values if n not in ("at", "notes", *ROW)}


@pytest.mark.parametrize("head", ["ridge", pytest.param("linear", marks=pytest.mark.slow)])
def test_every_change_is_that_of_embedded_rows(head, uri, name, tmp_path, monkeypatch):
    model = trained(head, tmp_path)
    model.datastore.source["split"] = "train"
    other, merged = elsewhere(model, uri, name), model.datastore.subset(model.datastore.ids[:9])
    monkeypatch.setattr(MilvusDatastore, "features", property(lambda _: pytest.fail("all rows")))
    paths = list("abcdefghijkl")
    more, ids = cloud(12).features + 0.3, list(range(5000, 5012))
    first = model.datastore.ids[:20].tolist()
    steps: list[Callable[[Any], Any]] = [
        lambda one: one.teach(
            features=more,
            labels=["fox"] * 8 + [CLASSES[0]] * 4,
            ids=ids,
            paths=paths,
        ),
        lambda one: one.relabel(ids[:3], [CLASSES[1], "elk", "elk"]),
        lambda one: one.undo(),
        lambda one: one.forget(first),
        lambda one: one.undo(),
        lambda one: one.forget(label="fox"),
        lambda one: one.merge(merged),
        lambda one: one.undo(),
        lambda one: one.forget(ids[9:]),
    ]
    for step in steps:
        mine, theirs = step(model), step(other)
        assert facts(mine) == facts(theirs)
        assert "the rows lie in the collection" in " ".join(theirs.notes)
        assert other.config.class_names == model.config.class_names
        features = cloud(30).features
        with torch.inference_mode():
            pair = [one(features=features, return_neighbors=True) for one in (model, other)]
        assert torch.equal(pair[0].neighbors.ids, pair[1].neighbors.ids)
        torch.testing.assert_close(pair[0].logits, pair[1].logits, rtol=1e-5, atol=1e-5)
        if head == "ridge":
            weight = model.config.head_regularizer
            solved = [one.memory.tally.state.solve(weight) for one in (model, other)]
            for wanted, found in zip(*solved, strict=True):
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)
    other.datastore.verify()
    monkeypatch.undo()
    if head == "ridge":
        assert_is_refit(other)


def test_rows_of_several_splits_come_back_as_they_were(uri, name):
    model = elsewhere(tiny_model(), uri, name)
    rows = model.datastore.rows_of(model.datastore.ids[:4]).features.astype("float32") + 1
    ids = model.datastore.add(rows, [0] * 4, split=["a", "b", "", "a"])
    before = model.fingerprint_rows()
    model.forget(ids)
    assert model.undo().hash_after == before
    assert model.datastore.rows_of(ids).splits == ["a", "b", "", "a"]
    model.datastore.verify()
    with pytest.raises(ValueError, match=r"one split per row \(4\), but got 1"):
        model.datastore.add(rows, [0] * 4, split=["a"])


def test_the_mean_is_not_moved_there(uri, name):
    model = elsewhere(tiny_model(), uri, name)
    before = model.fingerprint_rows()
    with pytest.raises(ValueError, match="Expected `recenter` to be False"):
        model.forget(model.datastore.ids[:1], recenter=True)
    assert (model.fingerprint_rows(), len(model.datastore), model.changes) == (before, 40, [])


def test_a_checkpoint_refuses_to_open_until_the_model_is_saved(uri, name, tmp_path):
    model, folder = elsewhere(tiny_model(), uri, name), tmp_path / "model"
    model.save_pretrained(folder)
    receipt = model.forget(model.datastore.ids[:2])
    assert "opens when this model was saved over it" in receipt.notes[-1]
    with pytest.raises(DatastoreError, match="was changed since the checkpoint was saved"):
        KnnForImageClassification.from_pretrained(folder, datastore_uri=uri)
    model.save_pretrained(folder)
    assert len(KnnForImageClassification.from_pretrained(folder, datastore_uri=uri).datastore) == 38


@pytest.mark.parametrize("what", ["teach", "forget", "relabel"])
def test_a_change_whose_head_cannot_follow_is_taken_back(what, uri, name, tmp_path, monkeypatch):
    model = elsewhere(trained("ridge", tmp_path), uri, name)
    ids, before = model.datastore.ids[:3], model.fingerprint_rows()
    changes = {
        "teach": lambda: model.teach(features=cloud(2).features, labels=["fox", "fox"]),
        "forget": lambda: model.forget(ids),
        "relabel": lambda: model.relabel(ids, ["fox"] * 3),
    }

    def fail(*_: Any) -> Any:
        raise RuntimeError("no solution")

    with monkeypatch.context() as patched:
        patched.setattr("hf_knn.model.teaching.solve_head", fail)
        with pytest.raises(RuntimeError, match="no solution"):
            changes[what]()
    assert (model.changes, model.config.class_names) == ([], list(CLASSES))
    assert model.fingerprint_rows() == before
    model.datastore.verify()
    assert changes[what]().hash_before == before
    assert_is_refit(model)


# ---- commands -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pictures") / "new", {"elk": 3, "fox": 2})


@pytest.fixture
def pair(uri: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The same checkpoint with rows of its own, and with rows in Milvus."""
    here, there = tmp_path / "here", tmp_path / "there"
    model = tiny_model("vit", k=5)
    model.save_pretrained(here)
    elsewhere(model, uri, name).save_pretrained(there)
    monkeypatch.setenv("HF_KNN_MILVUS_URI", uri)
    return here, there


def opened(folder: Path) -> Any:
    return KnnForImageClassification.from_pretrained(folder)


def done(*arguments: Any) -> dict[str, Any]:
    found = run(*arguments, "--json")
    assert found.exit_code == 0, found.output
    return facts(json.loads(found.stdout))


def assert_settled(folder: Path, wanted: str, count: int) -> Any:
    """A checkpoint that opens, with these rows once each, and without the file."""
    assert [entry for entry in folder.iterdir() if PENDING_NAME in entry.name] == []
    model = opened(folder)
    model.datastore.verify()
    assert (model.fingerprint_rows(), len(model.datastore)) == (wanted, count)
    assert len(model.datastore.ids.unique()) == count
    return model


def test_commands_change_rows_and_checkpoint_as_one(pair, pictures, tmp_path):
    here, there = pair
    store, backup = opened(here).datastore, tmp_path / "backup"
    ids = [flag for row_id in store.ids[:2].tolist() for flag in ("--ids", row_id)]
    path = store.paths[3]
    for command, *options in [
        ("teach", pictures),
        ("undo",),
        ("relabel", *ids, "--label", "yak"),
        ("undo",),
        ("forget", "--label", LABELS[1]),
        ("forget", *ids, "--path", path),
    ]:
        mine, theirs = (done(command, folder, *options) for folder in pair)
        assert theirs == mine
        assert_settled(there, theirs["hash_after"], theirs["rows_after"])
    before = opened(there).fingerprint_rows()
    gone = done("forget", there, "--label", LABELS[0], "--backup", backup)
    assert len(gone["rows"]) > 0
    assert done("merge", there, backup)["hash_after"] == before
    picture = pictures / "elk" / "1.png"
    said = [json.loads(run("predict", folder, picture, "--json").stdout) for folder in pair]
    assert said[0] == said[1]


# ---- interrupted changes ------------------------------------------------------------------------


def go_away(patch: pytest.MonkeyPatch, writes: int, arrives: bool) -> None:
    """After so many writes of rows or record nobody answers any more.

    Args:
        patch: undone when the server is back.
        writes: how many are answered.
        arrives: whether the server still gets the next one, and only its answer is lost.
    """
    call, answered = MilvusServer.call, iter(range(writes))
    gone: list[str] = []

    def cut(self: MilvusServer, method: str, *args: Any, **options: Any) -> Any:
        if not gone and method in WRITES and next(answered, None) is None:
            gone.append(method)
            if arrives:
                call(self, method, *args, **options)
        if gone:
            raise DatastoreConnectionError("Expected Milvus to answer, but it did not.")
        return call(self, method, *args, **options)

    patch.setattr(MilvusServer, "call", cut)


@pytest.fixture
def changes(pair: tuple[Path, Path], pictures: Path) -> dict[str, list[Any]]:
    rows = opened(pair[0]).datastore.ids[:2].tolist()
    ids = [flag for row_id in rows for flag in ("--ids", row_id)]
    return {
        "teach": ["teach", pictures],
        "forget": ["forget", *ids],
        "relabel": ["relabel", *ids, "--label", "yak"],
    }


def typed(folder: Path, command: list[Any]) -> tuple[Any, ...]:
    return (command[0], folder, *command[1:])


@pytest.mark.parametrize("name_of", COMMANDS)
def test_a_server_that_goes_away_in_the_middle(name_of, changes, pair, monkeypatch):
    """The record is marked, rows are written, the record is written: 3 writes."""
    here, there = pair
    command, before, files = changes[name_of], opened(there).fingerprint_rows(), content(there)
    moments = [(0, False), (0, True), (1, False), (1, True), (2, True)]
    for step, (writes, arrives) in enumerate(moments):
        with monkeypatch.context() as patch:
            go_away(patch, writes, arrives)
            failed = run(*typed(there, command))
        assert failed.exit_code == 1
        assert f"hf-knn undo {there}" in " ".join(failed.output.split())
        left = content(there)
        assert left.pop(PENDING_NAME)
        assert left == files
        if step:
            with pytest.raises(DatastoreError, match=f"hf-knn undo {there}"):
                opened(there)
            with monkeypatch.context() as patch:  # nor does taking back come to its end
                go_away(patch, step % 3, arrives)
                again = run("undo", there)
            assert (again.exit_code, PENDING_NAME in content(there)) == (1, True)
            assert f"hf-knn undo {there}" in " ".join(again.output.split())
        if step < len(moments) - 1:
            found = run("undo", there)
            assert "half-done change was taken back" in found.stderr
            assert "nothing else was undone" in found.stdout
            assert_settled(there, before, 40)
            assert content(there) == files
    wanted = done(*typed(here, command))
    assert done(*typed(there, command)) == wanted  # right after an interrupted one
    assert_settled(there, wanted["hash_after"], wanted["rows_after"])


@pytest.mark.parametrize("name_of", COMMANDS)
def test_an_error_while_saving_takes_the_rows_back(name_of, changes, pair, monkeypatch):
    _, there = pair
    before, files = opened(there).fingerprint_rows(), content(there)
    with monkeypatch.context() as patch:
        patch.setattr(
            "hf_knn.store.folders._swap_in", lambda *_: (_ for _ in ()).throw(OSError("full"))
        )
        failed = run(*typed(there, changes[name_of]))
    assert (failed.exit_code, "full" in failed.output) == (1, True)
    assert "hf-knn undo" not in failed.output
    assert content(there) == files
    assert_settled(there, before, 40)


@pytest.fixture
def interrupted(changes, pair, monkeypatch) -> Path:
    """A checkpoint in the middle of a `forget`, all of whose rows are gone."""
    with monkeypatch.context() as patch:
        go_away(patch, 2, False)
        assert run(*typed(pair[1], changes["forget"])).exit_code == 1
    return pair[1]


def test_nothing_is_saved_over_an_interrupted_change(interrupted, uri, tmp_path):
    """The file is all that still knows the rows."""
    reference = json.loads((interrupted / "datastore.json").read_text())
    model = tiny_model("vit", k=5)
    for store in (
        model.datastore,
        MilvusDatastore.connect(uri, reference["collection"], recover=True),
    ):
        model.datastore = store
        with pytest.raises(DatastoreError, match=f"to be whole.* `hf-knn undo {interrupted}`"):
            model.save_pretrained(interrupted)
        model.save_pretrained(tmp_path / "elsewhere")


def test_rows_that_were_accepted_meanwhile_are_not_taken_back(interrupted, uri):
    reference = json.loads((interrupted / "datastore.json").read_text())
    store = MilvusDatastore.connect(uri, reference["collection"], recover=True)
    store.add(store.rows_of(store.ids[:1]).features.astype("float32"), [0])
    failed = run("undo", interrupted)
    assert failed.exit_code == 1
    said = " ".join(failed.output.split())
    assert "40 or 38 rows), but it is whole, 39 rows" in said
    assert f"remove {interrupted / PENDING_NAME}" in said


def test_another_server_with_the_same_rows_is_not_asked(interrupted, uri, tmp_path, monkeypatch):
    """It needs nothing, and the file would be lost for the one that does."""
    other = str(tmp_path / "other.db")
    rows = tiny_model().datastore
    assert isinstance(rows, Datastore)
    MilvusDatastore.from_datastore(rows, other, "rows", progress=False)
    monkeypatch.setenv("HF_KNN_MILVUS_URI", other)
    failed = run("undo", interrupted)
    assert failed.exit_code == 1
    assert f"set HF_KNN_MILVUS_URI to {uri}" in " ".join(failed.output.split())
    assert (interrupted / PENDING_NAME).exists()


def test_what_the_checkpoint_names_already_stays(interrupted, uri):
    """Somebody made the reference one to the rows of after the change."""
    reference = json.loads((interrupted / "datastore.json").read_text())
    store = MilvusDatastore.connect(uri, reference["collection"], recover=True)
    store.save(interrupted)
    found = run("undo", interrupted)
    assert found.exit_code == 0, found.output
    assert_settled(interrupted, opened(interrupted).fingerprint_rows(), 38)


def test_a_file_of_other_rows_or_a_damaged_one(interrupted, pair, tmp_path):
    path = interrupted / PENDING_NAME
    shutil.copy(path, pair[0])
    failed = run("undo", pair[0])
    assert (failed.exit_code, "speaks of others" in " ".join(failed.output.split())) == (1, True)
    pending, data = read_pending(path), path.read_bytes()
    with pytest.raises(DatastoreError, match="one change at a time"):
        write_pending(path, *pending)
    for position in range(0, len(data), 97):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(DatastoreError, match="is taken back, but"):
            read_pending(path)
    path.write_bytes(data[:-3])
    assert run("forget", interrupted, "--label", LABELS[0]).exit_code == 1
    path.write_bytes(data)
    assert run("undo", interrupted).exit_code == 0
    assert len(opened(interrupted).datastore) == 40


def test_the_file_goes_with_the_change(changes, pair):
    """No byte of a forgotten row, also where a process was killed while it wrote the file."""
    _, there = pair
    store = opened(there).datastore
    raw = store.rows_of(store.ids[:2]).features.tobytes()
    litter = there / f".{PENDING_NAME}.tmp"
    litter.write_bytes(raw)
    done(*typed(there, changes["forget"]))
    assert not any(raw[:32] in data for data in content(there).values())
    assert not litter.exists()


def test_a_stored_picture_is_known_again(uri, name, tmp_path, monkeypatch):
    model = elsewhere(tiny_model("vit", k=3), uri, name)
    pictures = [picture(label, 5, (40, 30)) for label in range(4)]
    monkeypatch.setattr(MilvusDatastore, "ids", property(lambda _: pytest.fail("all ids")))
    first = model.teach(pictures[:2], ["ant", "bee"])
    before = model.fingerprint_rows()
    assert model.teach(pictures[:2], ["ant", "bee"]).skipped == [0, 1]
    with pytest.raises(StoredOtherwiseError, match="found 1 stored under another one"):
        model.teach(pictures[1:3], ["cat", "cat"])
    with pytest.raises(ValueError, match="relabel first"):  # a journal holds one kind of change
        model.teach(pictures[1:3], ["cat", "cat"], relabel=True)
    assert model.fingerprint_rows() == before
    moved = model.teach(pictures[1:2], ["cat"], relabel=True)
    assert (moved.ids, moved.old_labels) == (first.ids[1:], ["bee"])
    assert model.undo().hash_after == before
    model.save_pretrained(tmp_path / "model")
    again = KnnForImageClassification.from_pretrained(
        tmp_path / "model", trust_remote_datastore=True
    )
    assert again.memory.contents.ids.tolist() == first.ids
    assert again.teach(pictures, ["ant", "bee", "cat", "dog"]).skipped == [0, 1]
    monkeypatch.undo()
    again.datastore.remove(first.ids[:1])  # behind its back
    assert again.teach(pictures[:1], ["dog"]).skipped == []
    again.datastore.verify()
