"""`hf-knn sort --move`, killed while it moves: no file is lost or doubled, and all come back."""

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from support.commands import hf_knn, wide_terminal  # noqa: F401
from support.forks import die_at_step, outcome, touches
from support.pictures import write_folder
from support.tiny import tiny_model

from hf_knn.commands.placing import JOURNAL_NAME
from hf_knn.data import carrying
from hf_knn.data.moving import LOCK_NAME
from hf_knn.store import folders

KILLS, PICTURES = 50, 70
"""In three batches."""

OURS = {JOURNAL_NAME, LOCK_NAME, carrying.PART_NAME}
NO_KILL = 10**9


def here(source: Path, target: Path) -> None:
    sys.audit("test.rename", str(target))
    folders.rename_new(source, target)
    sys.audit("test.rename", str(target))


def over_there(source: Path, target: Path) -> None:
    """As if the two folders were on two file systems."""
    if source.parent != target.parent:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    here(source, target)


def files_of(root: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.relative_to(root).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in OURS
    }


@pytest.mark.faults
@pytest.mark.parametrize("rename", [here, over_there])
@pytest.mark.parametrize("option", ["--move", "--link", None])
def test_fifty_kills_lose_and_double_nothing(
    option: str | None, rename: Callable[[Path, Path], None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Killed at points all over the work; then the same command goes on, or all is taken back."""
    monkeypatch.setattr(carrying, "rename_new", rename)
    tiny_model("vit", k=4).save_pretrained(tmp_path / "model")
    inbox, out = tmp_path / "inbox", tmp_path / "out"
    write_folder(inbox, {"ant": PICTURES // 2, "bee": PICTURES // 2})
    (inbox / "ant" / "3.xmp").write_text("stars")
    before = files_of(inbox)
    words = ["sort", inbox, "--model", tmp_path / "model", "--into", out, "--max-error", "1"]
    words += [option] if option else []
    steps = [0]

    def count(event: str, values: tuple[object, ...]) -> None:
        steps[0] += touches(values, out)

    def sort(step: int = NO_KILL) -> None:
        if step < NO_KILL:
            die_at_step(step, out)
        else:
            sys.addaudithook(count)
        done = hf_knn(*words)
        if done.exit_code:
            raise RuntimeError(done.output)
        if step == NO_KILL:
            raise InterruptedError(str(steps[0]))

    def take_back() -> None:
        done = hf_knn("sort", "--undo", out)
        assert done.exit_code == 0, done.output
        assert files_of(inbox) == before
        assert not out.exists()

    total = int(outcome(sort).removeprefix("InterruptedError: "))
    wanted = files_of(out)
    assert len(wanted) == len(before) == PICTURES + 1
    assert total > PICTURES
    take_back()
    contents = sorted(content for content, _ in before.values())
    for kill in range(KILLS):
        step = (2 * kill + 1) * total // (2 * KILLS)
        assert outcome(partial(sort, step)) == f"ended by {-signal.SIGKILL}"
        there = files_of(inbox) | {f"out/{name}": one for name, one in files_of(out).items()}
        assert {content for content, _ in there.values()} == {*contents}
        if option == "--move":
            most = len(before) + (rename is over_there)  # whole in both places, for a moment
            assert len(before) <= len(there) <= most
        else:
            assert files_of(inbox) == before
        if kill % 2:
            done = hf_knn(*words)
            assert done.exit_code == 0, done.output
            assert files_of(out) == wanted
            assert {path.name for path in out.rglob(".*")} == set()
            assert files_of(inbox) == ({} if option == "--move" else before)
        if out.exists() and (out / JOURNAL_NAME).exists():
            take_back()
        shutil.rmtree(out, ignore_errors=True)  # killed before the journal: empty
        assert files_of(inbox) == before
