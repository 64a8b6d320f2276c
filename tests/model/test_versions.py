"""The version before a training: kept whole, put back whole, and without what was forgotten."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from store.test_storage_kills import die_at_step
from support.forks import outcome
from support.stored import names_in
from support.tiny import LABELS, all_files, tiny_model
from torch import Tensor

from hf_knn import KnnForImageClassification
from hf_knn.data.batches import CONTENT_BYTES
from hf_knn.model.before import BEFORE_NAME, keep_version, rows_alike
from hf_knn.model.contents import Contents
from hf_knn.model.memory import Gone
from hf_knn.model.receipts import Change, Receipt, describe_changes, standing
from hf_knn.model.versions import check_free, exchange_versions, mark_training, occupant_of
from hf_knn.store.hub import KEPT_TO_ONESELF
from hf_knn.store.remote import DatastoreReference, write_reference

PICTURES = "0" * 64
ROW_BYTES = 16 * 2  # of a tiny model's features


def trained(folder: Path, seed: int = 0, **options: Any) -> Any:
    """A model as a training leaves it; the seed is that of its rows, and of all weights."""
    model: Any = tiny_model("vit", seed=seed, **options)
    mark_training(model.datastore, PICTURES)
    model.save_pretrained(folder, keep_replaced=True)
    return model


def retrained(folder: Path, **options: Any) -> Any:
    """Another training on the same backbone and pictures, with other options."""
    model = opened(folder)
    model.memory = model.memory.started_with(model.datastore)
    for name, value in options.items():
        setattr(model.config, name, value)
    mark_training(model.datastore, PICTURES)
    model.save_pretrained(folder, keep_replaced=True)
    return model


def opened(folder: Path) -> Any:
    return KnnForImageClassification.from_pretrained(folder)


def state_of(folder: Path) -> dict[str, bytes]:
    """What a version says of itself: all but receipts and card, which know of an exchange."""
    left_out = ("changes.json", "README.md", ".gitignore")
    return {
        name: (folder / name).read_bytes()
        for name in all_files(folder)
        if name not in left_out and not name.startswith(BEFORE_NAME)
    }


def content_of(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in all_files(folder)]


def raw_rows(store: Any, ids: Any) -> list[bytes]:
    return [row.tobytes() for row in store.rows_of(ids).features]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trained(tmp_path / "model", k=5)
    return tmp_path / "model"


# ---- kept ---------------------------------------------------------------------------------------


def test_the_version_replaced_is_kept_once_as_hard_links(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "report.json").write_text("of the first")
    inode, first = (folder / "model.safetensors").stat().st_ino, state_of(folder)
    trained(folder, seed=1, k=6)
    assert (folder / BEFORE_NAME / "model.safetensors").stat().st_ino == inode
    first.pop("notes.txt")
    assert state_of(folder / BEFORE_NAME) == first
    assert not (folder / "report.json").exists()  # it told of the other version
    assert (folder / "notes.txt").read_text() == "mine"
    second = state_of(folder)
    second.pop("notes.txt")
    trained(folder, seed=2, k=7)
    assert state_of(folder / BEFORE_NAME) == second
    assert [path.name for path in folder.rglob(BEFORE_NAME)] == [BEFORE_NAME]
    assert opened(folder / BEFORE_NAME).config.k == 6


def test_other_saves_hand_the_kept_version_on(folder: Path) -> None:
    retrained(folder, k=6)
    kept = state_of(folder / BEFORE_NAME)
    model = opened(folder)
    model.teach(features=torch.ones(1, 16), labels=["fox"])
    model.save_pretrained(folder)
    tiny_model("vit", seed=4).save_pretrained(folder)  # a Python user saves where he wants
    assert state_of(folder / BEFORE_NAME) == kept


def test_what_is_written_later_does_not_reach_the_kept_version(folder: Path) -> None:
    for name in ("report.json", "training_args.json", "reliability.png"):
        (folder / name).write_text("first")
    trained(folder, seed=1)
    for name in ("report.json", "training_args.json", "reliability.png"):
        (folder / name).write_text("second")
    assert {(folder / BEFORE_NAME / f"{n}").read_text() for n in ("report.json",)} == {"first"}
    exchange_versions(folder)
    for name in ("report.json", "training_args.json", "reliability.png"):
        assert (folder / name).read_text() == "first"
        assert (folder / BEFORE_NAME / name).read_text() == "second"


def test_a_folder_of_a_users_own_files_is_no_version(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "report.json").write_text("mine")
    assert check_free(tmp_path / "model", PICTURES) is None
    assert check_free(tmp_path / "nothing", PICTURES) is None
    trained(tmp_path / "model")
    assert (tmp_path / "model" / "report.json").read_text() == "mine"
    assert not (tmp_path / "model" / BEFORE_NAME).exists()


def test_it_is_never_pushed(folder: Path) -> None:
    trained(folder, seed=1)
    names = [f"{place}{name}" for name in all_files(folder) for place in ("", "last-checkpoint/")]
    assert any(BEFORE_NAME in name for name in names)
    pushed = list(filter_repo_objects(names, ignore_patterns=list(KEPT_TO_ONESELF)))
    assert "model.safetensors" in pushed
    assert not [name for name in pushed if BEFORE_NAME in name]
    assert (folder / BEFORE_NAME / ".gitignore").read_text() == "*\n"


def test_rows_on_a_server_are_not_kept(folder: Path, tmp_path: Path) -> None:
    reference = DatastoreReference(
        "rows.db", "rows", 3, "0" * 64, 16, "float16", "cosine", "l2_centered"
    )
    write_reference(folder, reference)
    (tmp_path / "staging").mkdir()
    keep_version(folder, tmp_path / "staging")
    assert names_in(tmp_path / "staging") == set()
    found = occupant_of(folder)
    assert found is not None
    assert not found.is_kept
    assert "stays on the server" not in str(found)
    assert "its rows stay on the server" in str(found)
    (folder / BEFORE_NAME).mkdir()
    with pytest.raises(ValueError, match="lie on a server"):
        exchange_versions(folder)


# ---- put back -----------------------------------------------------------------------------------


def test_versions_are_exchanged_and_exchanged_again(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    model = opened(folder)
    model.teach(features=torch.ones(2, 16), labels=["fox", "fox"])
    model.save_pretrained(folder)
    first = state_of(folder)
    trained(folder, seed=1, k=6)
    second = state_of(folder)
    receipt = exchange_versions(folder)
    assert state_of(folder) == first
    assert (receipt.action, receipt.rows_before, receipt.rows_after) == (Change.EXCHANGE, 40, 42)
    assert receipt.hash_after == opened(folder).fingerprint_rows()
    assert [one.action for one in opened(folder).changes] == [Change.TEACH, Change.EXCHANGE]
    assert "2 pictures were taught" in receipt.notes[0]
    assert "42 rows" in (folder / "README.md").read_text()
    again = exchange_versions(folder)
    assert state_of(folder) == second
    assert (again.hash_before, again.hash_after) == (receipt.hash_after, receipt.hash_before)
    assert opened(folder / BEFORE_NAME).changes[0].labels == ["fox", "fox"]
    assert "40 rows" in (folder / "README.md").read_text()


def test_an_edited_card_stays_as_it_is(folder: Path) -> None:
    trained(folder, seed=1)
    card = folder / "README.md"
    card.write_text("Mine, above.\n" + card.read_text())
    exchange_versions(folder)
    assert "\nMine, above.\n" in card.read_text()
    card.write_text("all mine")
    exchange_versions(folder)
    assert card.read_text() == "all mine"


def test_a_damaged_version_is_not_put_back(folder: Path) -> None:
    trained(folder, seed=1)
    (blob,) = (folder / BEFORE_NAME).glob("datastore-*.safetensors")
    data = blob.read_bytes()
    blob.unlink()
    blob.write_bytes(data[:-1] + b"!")
    second = state_of(folder)
    with pytest.raises(ValueError, match="Expected"):
        exchange_versions(folder)
    assert state_of(folder) == second


def test_a_damaged_checkpoint_is_rescued(folder: Path) -> None:
    first = state_of(folder)
    trained(folder, seed=1)
    (folder / "datastore.json").write_text("{")
    exchange_versions(folder)
    assert state_of(folder) == first


# ---- what is there ------------------------------------------------------------------------------


def change_rows(model: Any) -> None:
    model.datastore.remove(model.datastore.ids[:1])  # in Python, without a receipt


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.teach(features=torch.ones(3, 16), labels=["fox"] * 3),
         r"3 pictures were taught \(\d{4}-\d\d-\d\d: 3 of fox\); pass --overwrite .*undo"),
        (lambda m: m.forget(m.datastore.ids[:1]), "1 picture was forgotten"),
        (lambda m: m.relabel(m.datastore.ids[:2], ["fox"] * 2), "2 pictures were relabelled"),
        (lambda m: m.merge(m.datastore.subset(m.datastore.ids[:4])), "4 pictures were merged"),
        (change_rows, "its rows were changed"),
        (lambda m: m.datastore.source.pop("pictures"), "does not say which pictures"),
        (lambda m: m.datastore.source.update(pictures="1" * 64), "40 rows.*other pictures"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_refused(
    folder: Path, change: Callable[[Any], object], match: str
) -> None:
    model = opened(folder)
    change(model)
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=match):
        check_free(folder, PICTURES)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: (f / "datastore.json").write_text("{"), "cannot be opened"),
        (lambda f: next(f.glob("datastore-*")).write_bytes(b"?"), "cannot be opened"),
        (lambda f: (f / "datastore.json").unlink(), "did not make"),
        (lambda f: (f / "pending-change.safetensors").touch(), "interrupted"),
    ],
)
def test_what_nobody_can_tell_is_refused(
    folder: Path, damage: Callable[[Path], object], match: str
) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=match):
        check_free(folder, PICTURES)


def test_what_was_taken_back_is_no_reason_to_refuse(folder: Path) -> None:
    assert check_free(folder, PICTURES) is not None
    model = opened(folder)
    for label in ("fox", "owl"):
        model.teach(features=torch.ones(1, 16), labels=[label])
    model.undo()
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"1 picture was taught .*1 of fox"):
        check_free(folder, PICTURES)
    model.undo()
    model.config.k = 3  # as `tune` chooses
    model.save_pretrained(folder)
    assert check_free(folder, PICTURES) is not None
    trained(folder, seed=1)
    exchange_versions(folder)
    assert check_free(folder, PICTURES) is not None


def test_a_kept_version_that_will_be_lost_is_named(folder: Path) -> None:
    model = opened(folder)
    model.teach(features=torch.ones(2, 16), labels=["fox"] * 2)
    model.save_pretrained(folder)
    trained(folder)
    found = check_free(folder, PICTURES)
    assert "in it 2 pictures were taught" in str(found)


def receipt(action: Change, ids: list[int], labels: list[str]) -> Receipt:
    return Receipt(action, ids, labels, 0, 0, "", "", "", "2026-11-30T12:00:00")


def test_changes_are_told_in_words() -> None:
    taught = receipt(Change.TEACH, [1, 2, 3], ["fox", "fox", "owl"])
    gone = receipt(Change.FORGET, [7], ["<b>"])
    back = receipt(Change.UNDO, [7], ["<b>"])
    assert describe_changes([]) == ""
    assert describe_changes([gone, back]) == ""
    said = "3 pictures were taught (2026-11-30: 2 of fox, 1 of owl)"
    assert describe_changes([taught, gone, back]) == said
    assert (
        describe_changes([gone, taught])
        == f"{said} and 1 picture was forgotten (2026-11-30: 1 of <b>)"
    )
    assert standing([back, taught, gone, back, back]) == []  # older receipts may be cut off


# ---- forgotten ----------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["linear", "ridge"])
def test_what_is_forgotten_is_erased_in_the_version_before(tmp_path: Path, head: str) -> None:
    folder = tmp_path / "model"
    model = trained(folder, head=head)
    images = {
        int(i): torch.zeros(3, 8, 8).byte().numpy().transpose(1, 2, 0) for i in model.datastore.ids
    }
    model.keep_thumbnails(images)
    model.neighbor_picture = b"\x89PNG of training pictures"
    model.save_pretrained(folder)
    retrained(folder, k=6)
    store = opened(folder).datastore
    gone, paths = store.ids[3:5], store.paths_of(store.ids[3:5])
    rows, kept = raw_rows(store, gone), raw_rows(store, store.ids[:1])
    found = content_of(folder)
    assert all(any(row in data for data in found) for row in rows)
    model = opened(folder)
    receipt_ = model.forget(gone)
    model.teach(features=torch.ones(1, 16), labels=["fox"])
    model.save_pretrained(folder)
    found = content_of(folder)
    assert not any(row in data for data in found for row in rows)
    assert not any(path.encode() in data for data in found for path in paths)
    assert any(kept[0] in data for data in content_of(folder / BEFORE_NAME))
    assert not list(folder.rglob("neighbors.png"))
    assert receipt_.action == "forget"
    assert (
        "erased in the version before the last training too: 2 of its rows"
        in model.changes[-1].notes[-1]
    )
    assert opened(folder).changes == model.changes
    earlier = opened(folder / BEFORE_NAME)
    assert len(earlier.datastore) == 38
    assert earlier.changes[-1].ids == gone.tolist()
    assert sorted(earlier.thumbnails._pictures) == sorted(earlier.datastore.ids.tolist())
    assert "README.md" not in names_in(folder / BEFORE_NAME)
    assert ".gitignore" in names_in(folder / BEFORE_NAME)
    exchange_versions(folder)
    assert not torch.isin(gone, opened(folder).datastore.ids).any()
    assert opened(folder).config.k == 20


def test_rows_under_other_ids_and_labels_are_erased_too(folder: Path) -> None:
    """Taught, replaced by a training, taught again under another id, and forgotten."""
    model = opened(folder)
    fox = torch.linspace(-2, 2, 16).repeat(2, 1)
    model.teach(features=fox, labels=["fox", "fox"], ids=[5000, 5001], paths=["a.png", "b.png"])
    raw = raw_rows(model.datastore, [5000])[0]
    model.save_pretrained(folder)
    model.undo()
    model.memory = model.memory.started_with(model.datastore)
    model.save_pretrained(folder, keep_replaced=True)
    assert any(raw in data for data in content_of(folder / BEFORE_NAME))
    model = opened(folder)
    model.teach(features=fox[:1] * 1.001, labels=[LABELS[0]], ids=[7])  # as another backend has it
    model.relabel([7], ["fox"])
    model.forget([7])
    model.save_pretrained(folder)
    assert not any(raw in data for data in content_of(folder))
    assert len(opened(folder / BEFORE_NAME).datastore) == 40
    model.save_pretrained(folder)  # there is nothing more to erase, or to say
    assert len([n for r in model.changes for n in r.notes if "version before" in n]) == 1


def test_what_is_brought_back_is_not_erased(folder: Path) -> None:
    retrained(folder)
    kept = state_of(folder / BEFORE_NAME)
    model = opened(folder)
    model.forget(model.datastore.ids[:3])
    model.undo()
    model.save_pretrained(folder)
    assert state_of(folder / BEFORE_NAME) == kept


def test_a_training_after_forgetting_keeps_no_forgotten_row(folder: Path) -> None:
    model = opened(folder)
    gone, count = model.datastore.ids[:2], len(model.datastore)
    rows = raw_rows(model.datastore, gone)
    near = rows_alike(model.datastore, None, [went(model.datastore, gone)], is_same_maker=True)
    assert 2 <= len(near) < count // 2
    model.forget(gone)
    model.memory = model.memory.started_with(model.datastore)
    model.save_pretrained(folder, keep_replaced=True)  # the forgetting was never saved
    assert not any(row in data for data in content_of(folder) for row in rows)
    assert len(opened(folder / BEFORE_NAME).datastore) == count - len(near)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_where_nobody_can_tell_the_whole_version_goes(folder: Path, is_damaged: bool) -> None:
    trained(folder, seed=0 if is_damaged else 1)
    if is_damaged:
        (folder / BEFORE_NAME / "config.json").write_text("{")
    model = opened(folder)
    model.forget(model.datastore.ids[:1])
    model.save_pretrained(folder)
    assert not (folder / BEFORE_NAME).exists()
    assert "undo cannot bring it back" in model.changes[-1].notes[-1]
    assert len(opened(folder).datastore) == 39


def went(store: Any, ids: Tensor, contents: Contents | None = None, scale: float = 1.0) -> Gone:
    """Rows as `forget` takes them away, perhaps as another backend would have made them."""
    rows = store.rows_of(ids)
    features = (rows.features * scale).astype(rows.features.dtype)
    return Gone(rows._replace(features=features), store.mean, None, contents, None)


def some_contents(store: Any, ids: Tensor, first: int) -> Contents:
    prints = torch.arange(first, first + len(ids)).repeat(CONTENT_BYTES, 1).T.byte()
    found = Contents.of(store.blocks(), ids, prints)
    assert found is not None
    return found


@pytest.mark.parametrize("is_same_maker", [True, False])
def test_rows_alike_are_those_of_the_same_print_or_nearby(
    folder: Path, is_same_maker: bool
) -> None:
    store = opened(folder).datastore
    some, others = store.ids[2:4], store.ids[10:12]

    def alike(contents: Contents | None, *gone: Gone) -> list[int]:
        return sorted(rows_alike(store, contents, gone, is_same_maker).tolist())

    all_ids = sorted(store.ids.tolist())
    assert alike(None, went(store, some)) == (sorted(some.tolist()) if is_same_maker else all_ids)
    near = alike(None, went(store, some, scale=1.01))
    assert near == (sorted(some.tolist()) if is_same_maker else all_ids)
    # the pictures of `some` are stored as `others` in the earlier version, by its prints
    mine, theirs = some_contents(store, some, 7), some_contents(store, others, 7)
    found = alike(theirs, went(store, some, mine))
    assert set(others.tolist()) <= set(found)
    assert len(found) == (4 if is_same_maker else 40)
    everything = some_contents(store, store.ids, 0)  # the picture of each row is another one
    places = [i for i, row in enumerate(store.ids.tolist()) if row in everything.ids[7:9]]
    wanted = sorted(store.ids[places].tolist())
    shifted = some_contents(store, some, 7)
    found = alike(everything, went(store, some, shifted))
    assert found == sorted({*wanted, *(some.tolist() if is_same_maker else [])})


# ---- kills --------------------------------------------------------------------------------------


def train_again(folder: Path) -> None:
    trained(folder, seed=1, rows=20)


def forget_a_row(folder: Path) -> None:
    model = opened(folder)
    model.forget(model.datastore.ids[:1])
    model.save_pretrained(folder)


KILLED: dict[str, Callable[[Path], object]] = {
    "training": train_again,
    "undo": exchange_versions,
    "forget": forget_a_row,
}


@pytest.mark.parametrize("kind", KILLED)
@pytest.mark.parametrize("stride", [47, pytest.param(4, marks=pytest.mark.faults)])
def test_a_kill_at_any_step_leaves_both_versions_whole(
    tmp_path: Path, kind: str, stride: int
) -> None:
    place, end = tmp_path / "place", ""
    folder, template = place / "model", tmp_path / "template" / "model"
    trained(template)
    retrained(template, k=6)
    copies = shutil.copytree(template.parent, tmp_path / "after")
    KILLED[kind](copies / "model")

    def versions_in(folder: Path) -> tuple[str, str]:
        models = [opened(folder), opened(folder / BEFORE_NAME)]
        return tuple(f"{m.config.k} {m.fingerprint_rows()}" for m in models)  # type: ignore[return-value]

    wanted = [versions_in(template), versions_in(copies / "model")]
    assert wanted[0] != wanted[1]
    found: list[int] = []
    while end != "InterruptedError: done":
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(template.parent, place)

        def work() -> None:
            die_at_step(stride * len(found), place)
            KILLED[kind](folder)
            raise InterruptedError("done")  # there was no such step

        end = outcome(work)
        assert end in (f"ended by {-signal.SIGKILL}", "InterruptedError: done")
        found.append(wanted.index(versions_in(folder)))
        beside = {"model", ".model.staging", ".model.lock", "..model.staging.lock"}
        assert names_in(place) <= beside
    commit = found.index(1)
    assert found == [0] * commit + [1] * (len(found) - commit)
    assert commit > 0
    assert os.listdir(tmp_path / "template") == ["model"]
