"""Files that are moved aside and put back: whatever happens, each is there once, as it was."""

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.forks import die_at_step, outcome

from hf_knn.data import carrying
from hf_knn.data.journal import JOURNAL_NAME, Move
from hf_knn.data.moving import move_aside, put_back
from hf_knn.store import folders


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for name in ("ant/1.png", "ant/2.png", "bee/1.png", "bee/deep/x y.png", "keep.png"):
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(name.encode() * 1000)
    os.utime(root / "ant" / "1.png", ns=(10**18, 10**18))
    (root / "bee" / "link.png").symlink_to("1.png")
    return root


def state_of(root: Path) -> dict[str, tuple[str | bytes, int]]:
    """Every file: its bytes, or where the link leads, and its time."""
    return {
        path.relative_to(root).as_posix(): (
            os.readlink(path) if path.is_symlink() else path.read_bytes(),
            path.lstat().st_mtime_ns if not path.is_symlink() else 0,
        )
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def some(root: Path) -> list[Move]:
    """All but one, two of them to one name."""
    names = ["ant/1.png", "ant/2.png", "bee/1.png", "bee/deep/x y.png", "bee/link.png"]
    return [Move(root / name, f"broken/{Path(name).name}", "it is broken") for name in names]


def over_there(source: Path, target: Path) -> None:
    """As if the two folders were on two file systems: what is copied is put in place beside."""
    sys.audit("test.rename", str(source))
    if source.parent != target.parent:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    folders.rename_new(source, target)
    sys.audit("test.rename", str(target))


def here(source: Path, target: Path) -> None:
    sys.audit("test.rename", str(source))
    folders.rename_new(source, target)
    sys.audit("test.rename", str(target))


@pytest.mark.parametrize("rename", [here, over_there])
def test_what_is_moved_aside_comes_back_as_it_was(
    rename: Callable[[Path, Path], None], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carrying, "rename_new", rename)
    before, folder = state_of(pictures), pictures.with_name("aside")
    found = move_aside(folder, some(pictures))
    assert found.left == []
    targets = ["broken/1.png", "broken/2.png", "broken/1 (2).png", "broken/x y.png"]
    assert [move.target for move in found.done] == [*targets, "broken/link.png"]
    assert {*state_of(pictures)} == {"keep.png"}
    assert {*state_of(folder)} == {*targets, "broken/link.png", JOURNAL_NAME}
    assert (folder / "broken/1 (2).png").read_bytes() == before["bee/1.png"][0]
    back = put_back(folder)
    assert [move.target for move in back.done] == [move.target for move in found.done]
    assert state_of(pictures) == before
    assert not folder.exists()
    assert [path.name for path in pictures.parent.iterdir()] == ["pictures"]  # no lock either


def test_two_calls_share_a_folder_and_one_undo(pictures: Path) -> None:
    before, folder = state_of(pictures), pictures.with_name("aside")
    first, *others = some(pictures)
    move_aside(folder, [first])
    found = move_aside(folder, others)
    assert [move.target for move in found.done][1] == "broken/1 (2).png"
    put_back(folder)
    assert state_of(pictures) == before


def test_nothing_is_overwritten_on_the_way_back(pictures: Path) -> None:
    before, folder = state_of(pictures), pictures.with_name("aside")
    move_aside(folder, some(pictures))
    new = pictures / "ant" / "1.png"
    new.write_bytes(b"another picture")
    (folder / "notes.txt").write_text("mine")
    back = put_back(folder)
    ((left, reason),) = back.left
    assert (left.source, reason) == (new, f"{new} is there already")
    assert new.read_bytes() == b"another picture"
    assert (folder / "broken" / "1.png").read_bytes() == before["ant/1.png"][0]
    new.unlink()
    assert [move.source for move in put_back(folder).done] == [new]
    assert state_of(pictures) == before
    assert state_of(folder).keys() == {"notes.txt"}


def test_what_cannot_be_moved_stays_and_is_named(pictures: Path) -> None:
    folder = pictures.with_name("aside")
    gone = Move(pictures / "ant" / "none.png", "broken/none.png", "")
    found = move_aside(folder, [gone, *some(pictures)[:1]])
    assert len(found.done) == 1
    ((move, reason),) = found.left
    assert move.source == gone.source
    assert "is not there" in reason
    (folder / "broken" / "1.png").unlink()  # somebody looked, and deleted it
    back = put_back(folder)
    assert back.done == []
    assert "neither" in back.left[0][1]
    assert not folder.exists()


def test_a_copy_that_is_not_the_original_is_not_believed(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(source: Path, target: Path, follow_symlinks: bool) -> None:
        target.write_bytes(source.read_bytes()[:-1] + b"!")

    before, folder = state_of(pictures), pictures.with_name("aside")
    monkeypatch.setattr(carrying, "rename_new", over_there)
    monkeypatch.setattr(shutil, "copyfile", copy)
    found = move_aside(folder, some(pictures)[:2])
    assert found.done == []
    assert "changed while it was copied" in found.left[0][1]
    assert state_of(pictures) == before
    assert not folder.exists()


def test_another_folder_is_refused(pictures: Path) -> None:
    with pytest.raises(ValueError, match="holds other things"):
        move_aside(pictures, some(pictures))
    with pytest.raises(ValueError, match="has no journal"):
        put_back(pictures)


@pytest.mark.parametrize(
    "line",
    ["[]", "{}", "no json", '{"source": "x", "target": "y", "why": ""}',
     '{"source": "/x", "target": "../y", "why": ""}',
     '{"source": "/x", "target": "/y", "why": ""}'],
)  # fmt: skip
def test_a_journal_that_was_damaged_moves_nothing(line: str, pictures: Path) -> None:
    folder = pictures.with_name("aside")
    move_aside(folder, some(pictures))
    before = state_of(folder)
    with (folder / JOURNAL_NAME).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match="journal of moved files"):
        put_back(folder)
    assert state_of(folder) | {JOURNAL_NAME: 0} == before | {JOURNAL_NAME: 0}


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no second file system is known here")
def test_another_file_system(pictures: Path) -> None:
    before, folder = state_of(pictures), Path("/dev/shm") / f"hf-knn-aside-{os.getpid()}"
    if os.stat("/dev/shm").st_dev == os.stat(pictures).st_dev:
        pytest.skip("it is the same one")
    try:
        assert move_aside(folder, some(pictures)).left == []
        assert {*state_of(pictures)} == {"keep.png"}
        assert put_back(folder).left == []
        assert state_of(pictures) == before
        assert not folder.exists()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- kills --------------------------------------------------------------------------------------


def each_once(place: Path, before: dict[str, tuple[str | bytes, int]]) -> None:
    """No file is lost; at most one is doubled, and then both are whole."""
    there = [content for content, _ in state_of(place).values()]
    wanted = [content for content, _ in before.values()]
    assert all(there.count(content) >= wanted.count(content) for content in wanted)
    doubled = sum(max(0, there.count(one) - wanted.count(one)) for one in {*wanted})
    assert doubled <= 1


@pytest.mark.parametrize(
    ("rename", "stride"),
    [
        (here, 4),
        pytest.param(here, 1, marks=pytest.mark.faults),
        pytest.param(over_there, 1, marks=pytest.mark.faults),
    ],
)
@pytest.mark.parametrize("is_back", [False, True], ids=["aside", "back"])
def test_a_kill_at_any_step_loses_and_doubles_nothing(
    rename: Callable[[Path, Path], None], stride: int, is_back: bool, pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Killed, then either called again or taken back: every file is where it belongs, once."""
    monkeypatch.setattr(carrying, "rename_new", rename)
    before, place = state_of(pictures), pictures.parent
    folder, copy = place / "aside", place.with_name(f"{place.name}-copy")
    if is_back:
        move_aside(folder, some(pictures))
    shutil.copytree(place, copy, symlinks=True)
    kills, end = 0, ""
    while end == "" or end == f"ended by {-signal.SIGKILL}":
        shutil.rmtree(place)
        shutil.copytree(copy, place, symlinks=True)

        def work(step: int = kills * stride) -> None:
            die_at_step(step, place)
            if is_back:
                put_back(folder)
            else:
                move_aside(folder, some(pictures))
            raise InterruptedError("done")  # there was no such step

        end = outcome(work)
        each_once(place, before)
        if rename is here:
            assert {name for name, _ in state_of(place).values()} >= {n for n, _ in before.values()}
            names = [*state_of(place)]
            assert len([name for name in names if "." in name and "journal" not in name
                        and "lock" not in name]) == len(before)  # fmt: skip
        if kills % 2 and not is_back:  # called again, with what is left, as a second look finds it
            left = [move for move in some(pictures) if os.path.lexists(move.source)]
            move_aside(folder, left)
            assert {*state_of(pictures)} == {"keep.png"}
            there = [one for one, _ in state_of(folder).values()]
            assert len(there) == len(before)  # all but one, and the journal
        if folder.is_dir() and (folder / JOURNAL_NAME).is_file():
            assert put_back(folder).left == []
        assert state_of(pictures) == before, kills
        kills += 1
    assert end == "InterruptedError: done"
    assert kills * stride > (12 if is_back else 15)
