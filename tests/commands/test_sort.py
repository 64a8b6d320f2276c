"""`hf-knn sort`, as a user types it: every picture is where it belongs, once, and comes back."""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.commands import hf_knn, wide_terminal  # noqa: F401
from support.forks import as_nobody
from support.pictures import encoded, picture, write_folder
from support.tiny import tiny_model

from hf_knn import KnnConfig
from hf_knn.commands.placing import JOURNAL_NAME, Promise, Shelves, promise_of
from hf_knn.data import carrying
from hf_knn.data.moving import LOCK_NAME, open_folder

NAMES = ["ant", "Elk/moose", "fox"]
"""The second is no name of a folder."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was taught three classes; each picture of the inbox is a stored one."""
    root = tmp_path_factory.mktemp("sorting")
    write_folder(root / "known", {"ant": 6, "bee": 6, "cat": 6})
    found = tiny_model("vit", k=3, knn_weight=1.0, knn_temperature=0.01)
    files = sorted((root / "known").rglob("*.png"))
    labels = {"ant": NAMES[0], "bee": NAMES[1], "cat": NAMES[2]}
    found.teach(files, [labels[file.parent.name] for file in files])
    found.changes = []
    found.config.answer_thresholds = {"0.05": 0.6, "0.2": 0.3}
    found.save_pretrained(root / "model")
    return root / "model"


@pytest.fixture
def inbox(model: Path, tmp_path: Path) -> Path:
    """Stored pictures under other names, one broken, one with company, and other things."""
    root, known = tmp_path / "inbox", model.with_name("known")
    for name, source in {
        "1.png": "ant/0", "a/1.png": "ant/1", "b/1.png": "bee/0", "b/x.png": "bee/1",
        "c/deep/x.png": "cat/0",
    }.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(known / f"{source}.png", root / name)
    os.utime(root / "1.png", ns=(10**18, 10**18))
    (root / "broken.png").write_bytes(b"no picture")
    (root / "b" / "x.xmp").write_text("stars")
    (root / "b" / "x.png.json").write_text("{}")
    (root / "notes.txt").write_text("mine")
    return root


def state_of(root: Path) -> dict[str, tuple[str | bytes, int]]:
    """Every file, its bytes or where the link leads, and its time."""
    return {
        path.relative_to(root).as_posix(): (
            os.readlink(path) if path.is_symlink() else path.read_bytes(),
            0 if path.is_symlink() else path.stat().st_mtime_ns,
        )
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def sorted_by(*words: object) -> Any:
    done = hf_knn("sort", *words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture
def words(model: Path, inbox: Path, tmp_path: Path) -> list[object]:
    return [inbox, "--model", model, "--into", tmp_path / "out", "--max-error", "1"]


WANTED = {
    "1.png": "ant/1.png", "a/1.png": "ant/1 (2).png", "b/1.png": "Elk_moose/1.png",
    "b/x.png": "Elk_moose/x.png", "b/x.xmp": "Elk_moose/x.xmp",
    "b/x.png.json": "Elk_moose/x.png.json", "c/deep/x.png": "fox/x.png",
}  # fmt: skip


@pytest.mark.parametrize("option", ["--move", "--link", None])
def test_each_picture_goes_into_the_folder_of_its_class_and_back(
    option: str | None, words: list[object], inbox: Path, tmp_path: Path
) -> None:
    before, out = state_of(inbox), tmp_path / "out"
    options = [option] if option else []
    done = hf_knn("sort", *words, *options)
    assert done.exit_code == 0, done.output
    there = state_of(out)
    assert there.keys() == {*WANTED.values(), JOURNAL_NAME}
    for source, target in WANTED.items():
        is_link = option == "--link"
        assert there[target] == ((str(inbox / source), 0) if is_link else before[source])
    stays = {"broken.png", "notes.txt"} if option == "--move" else before.keys()
    assert state_of(inbox).keys() == stays
    assert f"{inbox}/broken.png: " in done.stdout
    assert "the folder of the class 'Elk/moose' is called Elk_moose" in done.stdout
    assert "5 pictures were" in done.stdout
    assert "2 files beside them" in done.stdout
    assert f"hf-knn sort --undo {out}" in done.stdout
    again = hf_knn("sort", *words, *options)
    assert again.exit_code == 0, again.output
    assert "Nothing is left to sort." in again.stdout
    assert state_of(out).keys() == there.keys()
    back = hf_knn("sort", "--undo", out)
    assert back.exit_code == 0, back.output
    assert ("7 files put back" if option == "--move" else "7 files removed") in back.stdout
    assert state_of(inbox) == before
    assert not out.exists()


def test_unsure_and_strange_pictures_go_into_folders_of_their_own(
    words: list[object], inbox: Path, tmp_path: Path
) -> None:
    (inbox / "noise.png").write_bytes(encoded(picture(4, 3, (64, 64)).rotate(45)))
    found = sorted_by(*words[:-1], "0.1")
    assert (found["max_error"], found["threshold"]) == (0.05, pytest.approx(0.6))
    for one in found["files"].values():
        folder = one["to"].partition("/")[0]
        is_strange = one["p_value"] < 0.05
        assert (folder == "strange") == is_strange
        assert (folder == "unsure") == (one["probability"] < 0.6 and not is_strange)
    counts = {name: shelf["pictures"] for name, shelf in found["folders"].items()}
    assert sum(counts.values()) == len(found["files"]) == 6
    assert found["folders"]["fox"]["stored_asked"] == 3
    assert 1 <= found["folders"]["fox"]["stored_saying_so"] <= 3


def test_a_dry_run_shows_the_table_and_touches_nothing(
    words: list[object], inbox: Path, tmp_path: Path
) -> None:
    before = state_of(tmp_path)
    done = hf_knn("sort", *words, "--dry-run", "--move")
    assert done.exit_code == 0, done.output
    assert state_of(tmp_path) == before
    assert not (tmp_path / "out").exists()
    for shown in ("ant/1 (2).png", "Elk_moose/x.png", "would be moved", "3.0 of 3"):
        assert shown in done.stdout
    assert f"hf-knn sort {inbox} --model {words[2]} --into {tmp_path / 'out'} --move" in done.stdout
    planned = sorted_by(*words, "--dry-run")["files"]
    assert {name: one["to"] for name, one in planned.items()} == {
        name: one["to"] for name, one in sorted_by(*words)["files"].items()
    }


def test_a_folder_that_holds_pictures_already_keeps_them(
    words: list[object], inbox: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "ant").mkdir(parents=True)
    (out / "empty").mkdir()
    (out / "ant" / "1.PNG").write_bytes(b"mine")
    (out / "fox").write_bytes(b"a file that is called like a class")
    mine = state_of(out)
    found = sorted_by(*words)
    assert found["files"][f"{inbox}/1.png"]["to"] == "ant/1 (2).png"
    assert [*found["left"]] == [f"{inbox}/c/deep/x.png"]
    assert state_of(out).items() > mine.items()
    assert hf_knn("sort", "--undo", out).exit_code == 0
    assert state_of(out) == mine
    assert (out / "empty").is_dir()


def test_into_a_folder_in_the_inbox_and_twice(
    words: list[object], inbox: Path, model: Path, tmp_path: Path
) -> None:
    before = state_of(inbox)
    here = [*words[:4], inbox / "x" / "sorted", *words[5:]]
    assert len(sorted_by(*here)["files"]) == 5
    other = write_folder(tmp_path / "other", {"ant": 2}, 50)
    more = sorted_by(other, *here[1:])
    assert len(more["files"]) == 2
    shutil.copy(model.with_name("known") / "cat" / "5.png", inbox / "new.png")
    assert [*sorted_by(*here)["files"]] == [f"{inbox}/new.png"]  # the others are known
    (inbox / "new.png").unlink()
    back = sorted_by("--undo", here[4])
    assert len(back["removed"]) == 9
    assert [one["file"] for one in back["left"]] == ["fox/new.png"]
    assert "is gone" in back["left"][0]["reason"]
    (inbox / "x" / "sorted" / "fox" / "new.png").unlink()
    sorted_by("--undo", here[4])
    assert state_of(inbox) == before
    assert not (inbox / "x").exists()


def test_undo_keeps_what_was_made_since(words: list[object], inbox: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sorted_by(*words)
    (out / "ant" / "1.png").write_bytes(b"edited")
    (out / "ant" / "mine.txt").write_text("mine")
    (out / "Elk_moose" / "x.png").unlink()
    (out / "fox" / "x.png").rename(out / "ant" / "renamed.png")
    back = hf_knn("sort", "--undo", out)
    assert "ant/1.png: it was changed since it was copied, so it stays." in back.stdout
    assert {*state_of(out)} == {"ant/1.png", "ant/mine.txt", "ant/renamed.png", JOURNAL_NAME}
    shutil.rmtree(out)
    sorted_by(*words, "--move")
    (out / "ant" / "1.png").write_bytes(b"edited")
    (inbox / "b" / "x.png").write_bytes(b"another one")
    shutil.rmtree(inbox / "c")
    back = sorted_by("--undo", out)
    assert [one["file"] for one in back["left"]] == ["Elk_moose/x.png"]
    assert (inbox / "1.png").read_bytes() == b"edited"
    assert (inbox / "b" / "x.png").read_bytes() == b"another one"
    assert (inbox / "c" / "deep" / "x.png").is_file()
    assert {*state_of(out)} == {"Elk_moose/x.png", JOURNAL_NAME}


def test_links_are_copied_as_pictures_and_never_moved(
    words: list[object], inbox: Path, tmp_path: Path
) -> None:
    elsewhere = write_folder(tmp_path / "elsewhere", {"ant": 1})
    (inbox / "album").symlink_to(elsewhere)
    (inbox / "link.png").symlink_to("c/deep/x.png")
    (inbox / "nothing.png").symlink_to("none.png")
    before, out = state_of(tmp_path), tmp_path / "out"
    found = sorted_by(*words)["files"]
    copied = found[f"{inbox}/link.png"]["to"]
    assert not (out / copied).is_symlink()
    assert (out / copied).read_bytes() == (inbox / "link.png").read_bytes()
    assert f"{inbox}/album/ant/0.png" in found
    sorted_by("--undo", out)
    moved = sorted_by(*words, "--move")
    assert {*moved["left"]} == {f"{inbox}/link.png", f"{inbox}/album/ant/0.png"}
    sorted_by("--undo", out)
    assert state_of(tmp_path) == before


def test_a_full_disk_ends_it_and_the_same_command_goes_on(
    words: list[object], inbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    real = shutil.copyfile

    def copy(source: Path, target: Path, **options: bool) -> None:
        if len(copied) == 3:
            target.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        copied.append(str(source))
        real(source, target, **options)

    before, out = state_of(inbox), tmp_path / "out"
    monkeypatch.setattr(shutil, "copyfile", copy)
    done = hf_knn("sort", *words)
    assert done.exit_code == 1
    assert "No space left on device" in done.stderr
    assert "Sorted until now: 3 files." in done.stderr
    assert len(state_of(out)) == 3 + 1
    monkeypatch.setattr(shutil, "copyfile", real)
    assert "Going on: " in hf_knn("sort", *words).stdout
    assert state_of(out).keys() == {*WANTED.values(), JOURNAL_NAME}
    sorted_by("--undo", out)
    assert state_of(inbox) == before
    assert not out.exists()


def test_what_may_not_be_taken_away_stays_and_is_not_doubled(
    words: list[object], inbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder that may only be read, on another file system."""
    real = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if inbox in path.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        real(path, missing_ok)

    def over_there(source: Path, target: Path) -> None:
        if source.parent != target.parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        os.rename(source, target)

    before, out = state_of(inbox), tmp_path / "out"
    monkeypatch.setattr(carrying, "rename_new", over_there)
    monkeypatch.setattr(Path, "unlink", refused)
    found = sorted_by(*words, "--move")
    assert found["files"] == {}
    assert found["left"][f"{inbox}/1.png"] == "Permission denied"
    assert state_of(inbox) == before
    assert not out.exists()


def test_a_place_that_may_not_be_written_is_named_before_the_work(tmp_path: Path) -> None:
    place = tmp_path / "read_only"
    place.mkdir(mode=0o555)
    (place / "in").mkdir()

    def work() -> None:
        with open_folder(place / "out", JOURNAL_NAME, is_shared=True):
            pass

    assert as_nobody(work).startswith("PermissionError")
    assert {path.name for path in place.iterdir()} == {"in"}


def test_one_command_at_a_time(words: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_folder(out, JOURNAL_NAME, is_shared=True):
        done = hf_knn("sort", *words)
        assert done.exit_code == 1
        assert "another one is at it" in done.stderr
    assert not out.exists()
    assert not (tmp_path / LOCK_NAME).exists()


@pytest.mark.parametrize(
    ("typed", "code", "said"),
    [
        (["{in}", "--model", "{model}", "--into", "{in}"], 1, "another folder than the pictures"),
        (["{in}", "--model", "{model}", "--into", "{out}", "--max-error", "0.01"], 1,
         "it can promise 5 % (--max-error 0.05)"),
        (["{in}", "--model", "{model}", "--into", "{out}", "--max-error", "0"], 1, "above 0"),
        (["{empty}", "--model", "{model}", "--into", "{out}"], 1, "Expected pictures in"),
        (["{broken}", "--model", "{model}", "--into", "{out}"], 1, "none of 1 can"),
        (["{model}", "--model", "{model}", "--into", "{out}"], 1, "it is a checkpoint"),
        (["{in}/1.png", "--model", "{model}", "--into", "{out}"], 1, "it is a file"),
        (["{in}/no", "--model", "{model}", "--into", "{out}"], 1, "there is nothing there"),
        (["--undo", "{empty}"], 1, "has no sort-journal.jsonl; pass the one that --into named"),
        (["--undo", "{empty}", "--into", "{out}"], 2, "--undo DIR alone"),
        (["{in}", "--model", "{model}"], 2, "Expected INBOX --model CHECKPOINT --into DIR"),
        (["{in}", "--model", "{model}", "--into", "{out}", "--move", "--link"], 2, "one of them"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_sorts_nothing(
    typed: list[str], code: int, said: str, model: Path, inbox: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").touch()
    before = state_of(tmp_path)
    places = {"in": inbox, "model": model, "out": tmp_path / "out"}
    places |= {name: tmp_path / name for name in ("empty", "broken")}
    done = hf_knn("sort", *(word.format(**places) for word in typed))
    assert done.exit_code == code, done.output
    assert said in " ".join(done.stderr.replace("│", " ").split())
    assert state_of(tmp_path) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("known", "asked", "kept"),
    [
        ({"0.05": 0.8, "0.1": 0.6}, 0.05, Promise(0.05, 0.8)),
        ({"0.05": 0.8, "0.1": 0.6}, 0.07, Promise(0.05, 0.8)),
        ({"0.05": 0.8, "0.1": 0.6}, 0.9, Promise(0.1, 0.6)),
        ({}, 1, Promise(1, 0)),
        ({"0.1": 0.6}, 0.05, "promise 10 % (--max-error 0.1); `hf-knn tune model PICTURES`"),
        ({}, 0.05, "can promise nothing; `hf-knn tune model PICTURES` counts on more"),
        ({}, 1.1, "at most 1, but got 1.1"),
        ({}, float("nan"), "at most 1, but got nan"),
    ],
)
def test_what_can_be_promised(
    known: dict[str, float], asked: float, kept: Promise | str
) -> None:  # fmt: skip
    config = KnnConfig(answer_thresholds=known)
    if isinstance(kept, Promise):
        assert promise_of(config, asked, "hf-knn tune model PICTURES") == kept
        return
    with pytest.raises(ValueError, match=re.escape(kept)):
        promise_of(config, asked, "hf-knn tune model PICTURES")


def test_folders_of_classes_are_not_those_of_the_others() -> None:
    shelves = Shelves(["unsure", "strange", "cat", JOURNAL_NAME], Promise(0.05, 0.9))
    folders = ["unsure (2)", "strange (2)", "cat", f"{JOURNAL_NAME} (2)"]
    assert shelves.folders == folders
    assert [*shelves.renamed()] == ["unsure", "strange", JOURNAL_NAME]
