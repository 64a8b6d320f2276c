"""Whole files and folders are exchanged in one step, whatever happens meanwhile."""

import os
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from support.forks import Errand, Fork, die, outcome
from support.stored import make_store, names_in, version_of

from hf_knn.store import folders as storage
from hf_knn.store.datastore import Datastore
from hf_knn.store.folders import (
    exclusive_lock,
    replaced_folder,
    restore,
    write_durably,
    written_whole,
)
from store.test_storage_kills import die_at_step


def test_an_error_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_durably(path, fail)
    assert names_in(tmp_path) == {"file"}
    assert path.read_text() == "old"


def test_a_file_that_can_be_made_again_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"

    def fail() -> None:
        with written_whole(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names_in(path.parent) == set()
    for text in ("whole", "anew"):
        with written_whole(path) as temporary:
            temporary.write_text(text)
        assert names_in(path.parent) == {"file"}
        assert path.read_text() == text


@pytest.fixture
def version(tmp_path: Path) -> Path:
    folder = tmp_path / "place" / "version"
    (folder / "own").mkdir(parents=True)
    (folder / "runs" / "deep").mkdir(parents=True)
    for name in ("model", "stale", "own/part", "notes", "runs/log", "runs/deep/log"):
        (folder / name).write_text("old")
    (folder / "link").symlink_to("notes")
    (folder / "broken").symlink_to("nowhere")
    return folder


def is_owned(name: str) -> bool:
    return name in ("model", "stale", "own")


def replace_version(folder: Path) -> None:
    with replaced_folder(folder, is_owned) as staging:
        assert names_in(staging) == set()
        (staging / "model").write_text("new")


def test_a_folder_is_replaced_and_foreign_files_stay(version: Path) -> None:
    version.chmod(0o750)
    inode = (version / "runs" / "log").stat().st_ino
    with (version / "runs" / "log").open("a") as log:
        replace_version(version)
        log.write(", and more")  # a program that has a file open goes on writing to it
    assert names_in(version) == {"model", "notes", "runs", "link", "broken"}
    assert (version / "model").read_text() == "new"
    assert (version / "runs" / "log").read_text() == "old, and more"
    assert (version / "runs" / "log").stat().st_ino == inode
    assert (version / "runs" / "deep" / "log").read_text() == "old"
    assert (version / "link").readlink() == Path("notes")
    assert (version / "broken").readlink() == Path("nowhere")
    assert version.stat().st_mode & 0o777 == 0o750
    assert names_in(version.parent) == {"version"}


def test_the_new_version_wins_over_a_foreign_file(version: Path) -> None:
    with replaced_folder(version, is_owned) as staging:
        (staging / "notes").write_text("new")
    assert (version / "notes").read_text() == "new"


def test_foreign_files_beside_new_ones_in_a_sub_folder_stay(version: Path) -> None:
    with replaced_folder(version, is_owned) as staging:
        (staging / "runs").mkdir()
        (staging / "runs" / "new").write_text("new")
    assert names_in(version / "runs") == {"new", "log", "deep"}


def test_a_new_folder_is_made(tmp_path: Path) -> None:
    replace_version(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "model").read_text() == "new"
    assert names_in(tmp_path / "a") == {"b"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_keeps_the_old_folder(version: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), replaced_folder(version, is_owned) as staging:  # noqa: PT012
        (staging / "model").write_text("new")
        raise error
    assert (version / "model").read_text() == "old"
    assert "stale" in names_in(version)
    assert names_in(version.parent) == {"version"}


def test_an_old_staging_folder_is_cleared(version: Path) -> None:
    staging = version.parent / ".version.staging"
    (staging / "sub").mkdir(parents=True)
    (staging / "model").write_text("half")
    replace_version(version)
    assert names_in(version) == {"model", "notes", "runs", "link", "broken"}
    assert names_in(version.parent) == {"version"}


def test_everything_is_flushed_before_the_exchange(
    version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, exchange = storage.fsync_path, storage.exchange

    def log_fsync(path: Path) -> None:
        events.append(path.name)
        fsync(path)

    def log_exchange(first: Path, second: Path) -> bool:
        events.append("exchange")
        return exchange(first, second)

    monkeypatch.setattr(storage, "fsync_path", log_fsync)
    monkeypatch.setattr(storage, "exchange", log_exchange)
    replace_version(version)
    middle = events.index("exchange")
    assert {"model", "notes", ".version.staging"} <= set(events[:middle])
    assert events[middle:] == ["exchange", version.parent.name]


def test_without_an_atomic_exchange_two_renames_do(
    version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "exchange", lambda first, second: False)
    replace_version(version)
    assert names_in(version) == {"model", "notes", "runs", "link", "broken"}
    assert (version / "model").read_text() == "new"
    assert names_in(version.parent) == {"version"}


def test_the_old_folder_is_taken_back_after_a_kill_between_two_renames(version: Path) -> None:
    version.rename(version.parent / ".version.old")  # what such a kill leaves
    with pytest.raises(ValueError, match="stop"), replaced_folder(version, is_owned):
        raise ValueError("stop")
    assert (version / "model").read_text() == "old"


def test_whoever_reads_finds_it_after_a_kill_between_two_renames(version: Path) -> None:
    """Also by another name, and twice at once; where there never was a folder, nothing is made."""
    (version.parent / "latest").symlink_to(version)
    version.rename(version.parent / ".version.old")
    (version.parent / ".version.staging").mkdir()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(restore, [version.parent / "latest", version] * 4))
    assert (version / "model").read_text() == "old"
    assert not (version.parent / ".version.old").exists()
    restore(version.parent / "nothing")
    restore(version)
    assert names_in(version.parent) == {"version", "latest", ".version.staging"}
    replace_version(version)
    assert names_in(version.parent) == {"version", "latest"}


def kill_steps(version: Path, exchanges: bool, stride: int) -> list[str]:
    """Kills an exchange at each step; what is found then, by whoever reads, and its notes."""
    found: list[str] = []
    end, place = "", version.parent
    template = shutil.copytree(place, place.with_name("template"), symlinks=True)

    def replace_in_steps(step: int) -> None:
        if not exchanges:
            storage.exchange = lambda first, second: False  # in this process, which ends here
        die_at_step(step, place)
        replace_version(version)
        raise InterruptedError("saved")

    while end != "InterruptedError: saved":
        shutil.rmtree(place)
        shutil.copytree(template, place, symlinks=True)
        end = outcome(partial(replace_in_steps, stride * len(found)))
        restore(version)
        found.append((version / "model").read_text())
        assert (version / "runs" / "deep" / "log").read_text() == "old"
        assert (version / "notes").read_text() == "old"
        replace_version(version)  # clears what is left, and loses nothing
        assert names_in(version) == {"model", "notes", "runs", "link", "broken"}
        assert names_in(place) == {"version"}
    return found


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.faults)])
def test_a_kill_at_any_step_leaves_one_version_and_all_notes(
    version: Path, exchanges: bool, stride: int
) -> None:
    found = kill_steps(version, exchanges, stride)
    commit = found.index("new")
    assert found == ["old"] * commit + ["new"] * (len(found) - commit)
    assert commit > 15 // stride
    assert len(found) - commit > 5 // stride


class Libc:
    """A C library that has one call, which it makes by another of Linux."""

    def __init__(self, name: str) -> None:
        self.calls: list[tuple[object, ...]] = []
        setattr(self, name, self.swap)

    def swap(self, *arguments: object) -> int:
        self.calls.append(arguments)
        return 0


@pytest.mark.parametrize(
    ("system", "name", "wanted"),
    [
        ("linux", "renameat2", (-100, b"a", -100, b"b", 2)),
        ("darwin", "renamex_np", (b"a", b"b", 2)),
    ],
)
def test_each_system_is_asked_by_its_own_call(
    system: str, name: str, wanted: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Libc(name)
    monkeypatch.setattr(storage.sys, "platform", system)
    monkeypatch.setattr(storage.ctypes, "CDLL", lambda *_, **__: library)
    assert storage.exchange(Path("a"), Path("b"))
    assert library.calls == [wanted]
    monkeypatch.setattr(library, name, lambda *_: -1)  # the file system cannot
    assert not storage.exchange(Path("a"), Path("b"))
    monkeypatch.setattr(storage.ctypes, "CDLL", lambda *_, **__: object())
    assert not storage.exchange(Path("a"), Path("b"))
    monkeypatch.setattr(storage.sys, "platform", "win32")
    assert not storage.exchange(Path("a"), Path("b"))


# ---- what others write meanwhile ----------------------------------------------------------------


def write_log(version: Path) -> None:
    (version / "runs" / "new").mkdir()
    (version / "runs" / "new" / "log").write_text("theirs")


def edit_note(version: Path) -> None:
    (version / "notes").unlink()
    (version / "notes").write_text("theirs")


def edit_deep_log(version: Path) -> None:
    write_durably(version / "runs" / "deep" / "log", lambda path: path.write_text("theirs"))


def append(version: Path) -> None:
    with (version / "notes").open("a") as file:
        file.write("theirs")


def remove(version: Path) -> None:
    shutil.rmtree(version / "runs")
    (version / "link").unlink()


def turn_into_a_file(version: Path) -> None:
    shutil.rmtree(version / "runs")
    (version / "runs").write_text("theirs")


def turn_into_a_folder(version: Path) -> None:
    (version / "notes").unlink()
    (version / "notes" / "empty").mkdir(parents=True)


def foreign(version: Path) -> dict[str, str]:
    """What others have there, by name, and what it holds."""
    found = {}
    for path in sorted(version.rglob("*")):
        name = path.relative_to(version).as_posix()
        if name.split("/")[0] in ("model", "stale", "own"):
            continue
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        else:
            found[name] = "" if path.is_dir() else path.read_text()
    return found


MOMENTS = ["while it is built", "before the exchange", "after the exchange"]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    "change",
    [
        write_log,
        edit_note,
        edit_deep_log,
        append,
        remove,
        turn_into_a_file,
        turn_into_a_folder,
    ],
)
def test_what_others_do_meanwhile_stays_done(
    version: Path, change: Callable[[Path], None], moment: str, exchanges: bool, links: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """They wrote into the folder that was there when they began; it is on its way out now."""
    wanted_in = Path(shutil.copytree(version, version.parent.parent / "wanted", symlinks=True))
    change(wanted_in)
    done: list[str] = []

    def once(now: str, place: Path) -> None:
        if now == moment and not done:
            done.append(now)
            change(place)

    fsync_tree, swap_in = storage.fsync_tree, storage._swap_in

    def flush(place: Path) -> None:
        once(MOMENTS[1], version)
        fsync_tree(place)

    def swap(staging: Path, folder: Path) -> Path | None:
        old = swap_in(staging, folder)
        assert old is not None
        once(MOMENTS[2], old)
        return old

    monkeypatch.setattr(storage, "fsync_tree", flush)
    monkeypatch.setattr(storage, "_swap_in", swap)
    if not exchanges:
        monkeypatch.setattr(storage, "exchange", lambda first, second: False)
    if not links:
        monkeypatch.setattr(storage.os, "link", refuse_to_link)
    with replaced_folder(version, is_owned) as staging:
        (staging / "model").write_text("new")
        once(MOMENTS[0], version)
    assert done
    assert foreign(version) == foreign(wanted_in)
    assert (version / "model").read_text() == "new"
    assert names_in(version.parent) == {"version"}


def test_what_comes_when_all_has_left_is_brought_too(
    version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmdir, turns = Path.rmdir, iter(range(2))

    def write_first(path: Path) -> None:
        if path.name == ".version.staging" and (turn := next(turns, None)) is not None:
            (path / "runs").mkdir()
            (path / "runs" / f"made-{turn}").write_text("theirs")
            (path / "notes").write_text(f"theirs {turn}")
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", write_first)
    replace_version(version)
    found = foreign(version)
    assert found["runs/made-0"] == found["runs/made-1"] == "theirs"
    assert found["notes"] == "theirs 1"
    assert found["runs/deep/log"] == "old"
    assert names_in(version.parent) == {"version"}


def refuse_to_link(*_: object, **__: object) -> None:
    raise OSError("this file system has no hard links")


def test_a_file_that_goes_while_it_is_carried_over_is_no_error(
    version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = storage.link_or_copy

    def vanish(source: str, target: str) -> None:
        if source.endswith("log"):
            Path(source).unlink()
        link(source, target)

    monkeypatch.setattr(storage, "link_or_copy", vanish)
    replace_version(version)
    assert names_in(version) == {"model", "notes", "runs", "link", "broken"}
    assert foreign(version)["runs/deep"] == ""
    assert "runs/deep/log" not in foreign(version)


def test_what_is_edited_in_the_new_folder_already_is_not_reverted(
    version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap_in = storage._swap_in

    def swap(staging: Path, folder: Path) -> Path | None:
        old = swap_in(staging, folder)
        assert old is not None
        write_durably(old / "notes", lambda path: path.write_text("earlier"))
        os.utime(old / "notes", ns=(0, 0))
        edit_note(folder)
        (folder / "runs" / "log").unlink()
        return old

    monkeypatch.setattr(storage, "_swap_in", swap)
    replace_version(version)
    assert (version / "notes").read_text() == "theirs"
    assert not (version / "runs" / "log").exists()


def test_an_edit_while_the_new_version_writes_the_same_file_wins(version: Path) -> None:
    with replaced_folder(version, is_owned) as staging:
        (staging / "notes").write_text("made of the old one")
        edit_note(version)
    assert (version / "notes").read_text() == "theirs"


def test_what_came_before_a_kill_is_found_by_the_next_save(version: Path) -> None:
    """Killed after the exchange, with a log in the old folder that nobody had moved yet."""

    def killed() -> None:
        swap_in = storage._swap_in

        def swap(staging: Path, folder: Path) -> Path | None:
            old = swap_in(staging, folder)
            assert old is not None
            write_log(old)
            edit_note(old)
            die()
            return old

        storage._swap_in = swap
        replace_version(version)

    assert outcome(killed) == "ended by -9"
    assert names_in(version.parent) == {"version", ".version.staging", ".version.lock"}
    replace_version(version)
    assert (version / "runs" / "new" / "log").read_text() == "theirs"
    assert (version / "notes").read_text() == "theirs"
    assert names_in(version) == {"model", "notes", "runs", "link", "broken"}
    assert names_in(version.parent) == {"version"}


def test_logs_of_another_process_are_all_there_after_many_saves(version: Path) -> None:
    """Each line acknowledged is there at the end: files that are made, appended to and replaced."""
    child = Fork.repeating(partial(write_logs, version))
    for _ in range(15):
        replace_version(version)
        child.wait_for(2)
    count = child.kill()
    for number in range(count):
        assert (version / "runs" / f"made-{number}").read_text() == str(number), number
    assert int((version / "replaced").read_text()) in (count - 1, count)
    lines = (version / "runs" / "log").read_text().split()
    assert lines[1 : count + 1] == [str(number) for number in range(count)]


def write_logs(version: Path, number: int) -> None:
    time.sleep(0.01)
    made = version / "runs" / f"made-{number}"
    for attempt in range(10_000):
        try:
            made.write_text(str(number))
            break
        except FileNotFoundError:  # the folder was exchanged between two looks at the path
            assert attempt < 9_999
    with (version / "runs" / "log").open("a") as log:
        log.write(f" {number}")
    temporary = version.parent / "temporary"
    temporary.write_text(str(number))
    temporary.replace(version / "replaced")


# ---- one lock, whatever the folder is called ----------------------------------------------------


@pytest.mark.parametrize(
    "name", ["link", "alias/version", "alias/version/../version", "./version", "rel"]
)
def test_one_folder_has_one_lock_by_all_its_names(
    version: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (version.parent / "link").symlink_to(version)
    (version.parent / "alias").symlink_to(version.parent)
    monkeypatch.chdir(version.parent)
    place = Path("version") if name == "rel" else version.parent / name
    with exclusive_lock(version):
        locks = {path.name for path in version.parent.glob(".*.lock")}
        child = Errand.start(lambda: replace_version(place))
        with exclusive_lock(place):  # whoever holds it may ask again, by another name too
            assert {path.name for path in version.parent.glob(".*.lock")} == locks
        time.sleep(0.3)
        assert not child.has_ended()
        assert (version / "model").read_text() == "old"
    assert child.outcome() == ""
    assert (version / "model").read_text() == "new"


def test_a_folder_above_a_link_is_the_real_one(tmp_path: Path) -> None:
    """`link/..` is not where the link lies."""
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    replace_version(tmp_path / "link" / ".." / "version")
    assert (tmp_path / "real" / "version" / "model").read_text() == "new"
    assert names_in(tmp_path) == {"real", "link"}


@pytest.mark.parametrize("where", [".", "runs/deep"])
def test_the_working_folder_may_lie_inside(
    version: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(version / where)
    replace_version(version if where != "." else Path("."))
    assert Path.cwd() == version / where
    wanted = {"model", "notes", "runs", "link", "broken"} if where == "." else {"log"}
    assert names_in(Path(".")) == wanted
    Path("made").touch()  # the folder that exists now, not a deleted one
    assert (version / where / "made").exists()


def test_the_working_folder_may_lie_inside_by_another_name(
    version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (version.parent / "alias").symlink_to(version.parent)
    monkeypatch.chdir(version)
    replace_version(version.parent / "alias" / "version")
    assert Path.cwd() == version


def test_the_working_folder_may_be_gone(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = version.parent / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    replace_version(version)


def test_a_symbolic_link_to_the_folder_stays_one(version: Path) -> None:
    link = version.parent / "latest"
    link.symlink_to(version)
    replace_version(link)
    assert link.is_symlink()
    assert (version / "model").read_text() == "new"


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="to be a folder, but got a file"):
        replace_version(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert names_in(tmp_path) == {"file"}


def kill_exchanges(folder: Path, kills: int, seed: int) -> set[str]:
    """Kills exchanges of whole folders; returns the versions found."""
    parts = ["a", "b", "sub/c"]

    def write(version: int) -> None:
        with replaced_folder(folder, lambda name: name in ("a", "b", "sub")) as staging:
            (staging / "sub").mkdir()
            for part in parts:
                (staging / part).write_text(str(version))

    write(0)
    (folder / "notes.txt").write_text("mine")
    (folder / "runs").mkdir()
    (folder / "runs" / "log").write_text("mine too")
    generator, found = random.Random(seed), set()
    beside = {folder.name, f".{folder.name}.lock", f".{folder.name}.staging"}
    for _ in range(kills):
        child = Fork.repeating(lambda number: write(number % 2))
        child.kill_at_random(generator)
        versions = {(folder / part).read_text() for part in parts}
        assert len(versions) == 1
        found |= versions
        assert (folder / "notes.txt").read_text() == "mine"
        assert (folder / "runs" / "log").read_text() == "mine too"
        assert names_in(folder.parent) <= beside
    write(7)
    assert names_in(folder.parent) == {folder.name}
    assert names_in(folder) == {"a", "b", "sub", "notes.txt", "runs"}
    return found


def test_a_kill_during_an_exchange_leaves_one_version(folder: Path) -> None:
    assert kill_exchanges(folder, 25, 0) == {"0", "1"}


@pytest.mark.faults
@pytest.mark.slow
def test_many_kills_during_an_exchange_leave_one_version(folder: Path) -> None:
    assert kill_exchanges(folder, 300, 1) == {"0", "1"}


def test_saves_and_loads_by_two_names_never_meet(folder: Path) -> None:
    """A dozen saves by each, in processes of their own, and loads by both meanwhile."""
    stores = [make_store(version) for version in range(2)]
    stores[0].save(folder)
    link = folder.with_name("link")
    link.symlink_to(folder)

    def save(store: Datastore, place: Path) -> None:
        for _ in range(12):
            store.save(place)

    writers = [
        Errand.start(partial(save, store, place))
        for store, place in zip(stores, (link, folder), strict=True)
    ]
    loads = 0
    while not all(writer.has_ended() for writer in writers):
        assert version_of(Datastore.load((folder, link)[loads % 2])) in (0, 1)
        loads += 1
    assert [writer.outcome() for writer in writers] == ["", ""]
    assert loads > 3
    assert names_in(folder.parent) == {folder.name, "link"}
