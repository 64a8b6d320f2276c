"""Answers on disk: half a line goes, a whole one stays, whatever byte a kill comes at."""

import errno
import os
from pathlib import Path

import pytest

from hf_knn.labelling.journal import Journal
from hf_knn.labelling.state import Record

FACTS = {"folder": "/somewhere", "backbone": "tiny"}
RECORDS = [
    Record("group", ("a.png", "b.png"), "ant", (), ("a.png", "b.png", "c.png")),
    Record("copies", ("a.png",), None, ("b.png",), ("a.png", "b.png")),
    Record("picture", ("ü.png",), None, (), ("ü.png",)),
]


def written(path: Path) -> bytes:
    journal = Journal(path, FACTS)
    for record in RECORDS:
        journal.add(record)
    journal.close()
    return path.read_bytes()


def test_what_was_added_is_read_again(tmp_path: Path) -> None:
    written(tmp_path / "a")
    again = Journal(tmp_path / "a", FACTS)
    assert again.records == RECORDS
    assert again.undo() == RECORDS[-1]
    again.close()
    assert Journal(tmp_path / "a", FACTS).records == RECORDS[:-1]


def test_a_kill_at_any_byte_loses_the_answer_under_way_at_most(tmp_path: Path) -> None:
    whole, path = written(tmp_path / "a"), tmp_path / "b"
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        lines = whole[:end].count(b"\n")
        journal = Journal(path, FACTS)
        assert journal.records == RECORDS[: max(0, lines - 1)]
        if end % 29 == 0 or whole[end - 1 : end + 1].count(b"\n"):  # and it goes on behind it
            journal.add(RECORDS[0])
            assert Journal(path, FACTS).records == [*RECORDS[: max(0, lines - 1)], RECORDS[0]]
        journal.close()


def test_another_folder_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "a")
    with pytest.raises(ValueError, match="begun with the folder /somewhere; run the command"):
        Journal(tmp_path / "a", FACTS | {"folder": "/elsewhere"})
    with pytest.raises(ValueError, match="begun with the backbone tiny and model None"):
        Journal(tmp_path / "a", {"folder": "/somewhere", "model": "m"})


@pytest.mark.parametrize(
    "line",
    [b"nothing", b"[]", b'{"kind": "other"}', b'{"undo": true}', b'{"kind": "group"}'],
)
def test_a_line_that_is_no_answer_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a"
    Journal(path, FACTS).close()
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match="line 2 is none"):
        Journal(path, FACTS)


def test_a_full_disk_adds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    journal = Journal(path, FACTS)
    journal.add(RECORDS[0])
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            journal.add(RECORDS[1])
    assert (path.read_bytes(), journal.records) == (before, RECORDS[:1])
    journal.add(RECORDS[2])
    assert Journal(path, FACTS).records == [RECORDS[0], RECORDS[2]]
