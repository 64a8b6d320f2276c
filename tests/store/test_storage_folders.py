"""Whole files and folders are exchanged in one step, whatever happens meanwhile."""

import random
from pathlib import Path

import pytest
from support.forks import Fork
from support.stored import names_in

from hf_knn.store import folders as storage
from hf_knn.store.folders import replaced_folder, write_durably, written_whole


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
    folder = tmp_path / "version"
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
