"""Nobody keeps others out of teaching: who makes room when a Space is full, and what it says."""

import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.space_app import published, write_picture

pytest.importorskip("gradio")

from hf_knn import KnnForImageClassification
from hf_knn.data import LARGE_PIXELS, MAX_FILES
from hf_knn.data.decode import MAX_JPEG_PIXELS, MAX_PIXELS
from hf_knn_space import guard, uploads, visitors
from hf_knn_space import overlay as overlays
from hf_knn_space.service import Service
from hf_knn_space.uploads import SpaceError
from hf_knn_space.visitors import Kept, Visitors, first_to_go

README = Path(__file__).parents[2] / "space" / "README.md"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> KnnForImageClassification:
    return published(tmp_path_factory.mktemp("room") / "pictures")


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_picture(tmp_path_factory.mktemp("lesson") / "one.png", 9))


_seeds = itertools.count(1000)


def teach(service: Service, lesson: str, count: int = 1, token: str = "") -> str:
    for _ in range(count):
        path = write_picture(Path(lesson).with_name(f"{next(_seeds)}.png"), 9, next(_seeds))
        token = service.teach([str(path)], "dog", token, "")["visitor"]
    return token


def knows(service: Service, token: str) -> int:
    with service.visitors.hold(token) as overlay:
        return 0 if overlay is None else len(overlay.examples)


@pytest.mark.parametrize("keeps", [True, False])
def test_a_crowd_of_new_visitors_keeps_nobody_out(
    model: Any, lesson: str, tmp_path: Path, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visitors, "MAX_ON_DISK", 6)
    monkeypatch.setattr(visitors, "FEW_EXAMPLES", 2)
    monkeypatch.setattr(visitors, "SMALL_JOURNAL", 2500)
    service = Service(model, Visitors(model, tmp_path if keeps else None, max_in_memory=6))
    honest = [teach(service, lesson, 5) for _ in range(2)]
    crowd = [teach(service, lesson) for _ in range(20)]  # one client with many tokens
    late = teach(service, lesson)  # somebody new is not refused
    assert knows(service, late) == 1
    assert [knows(service, token) for token in honest] == [5, 5]
    assert sum(knows(service, token) for token in crowd) == 3
    assert knows(service, crowd[-1]) == 1
    if keeps:
        assert len(list(tmp_path.rglob("*.journal"))) == 6
        restarted = Service(model, Visitors(model, tmp_path))
        assert [knows(restarted, token) for token in (late, *honest)] == [1, 5, 5]


def test_a_crowd_that_teaches_much_leaves_half_to_those_who_begin(
    model: Any, lesson: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visitors, "MAX_ON_DISK", 4)
    monkeypatch.setattr(visitors, "SMALL_JOURNAL", 2500)
    service = Service(model, Visitors(model, tmp_path))
    begun = [teach(service, lesson) for _ in range(2)]
    for _ in range(6):
        teach(service, lesson, 5)
        assert len(list(tmp_path.rglob("*.journal"))) <= 4
    assert [knows(service, token) for token in begun] == [0, 1]
    assert knows(service, teach(service, lesson)) == 1


def test_all_journals_together_stay_below_a_size(
    model: Any, lesson: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(model, Visitors(model, tmp_path))
    first = teach(service, lesson, 3)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.journal"))
    monkeypatch.setattr(visitors, "MAX_BYTES_ON_DISK", int(2.5 * size))
    tokens = [teach(service, lesson, 3) for _ in range(5)]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.journal")) <= 3.5 * size
    assert knows(service, tokens[-1]) == 3
    assert knows(service, first) == 0


def test_whoever_is_being_answered_is_not_interrupted(
    model: Any, lesson: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    monkeypatch.setattr(visitors, "MAX_ON_DISK", 1)
    service = Service(model, Visitors(model, tmp_path, max_in_memory=1))
    busy = teach(service, lesson)
    problems: list[str] = []

    def come_late() -> None:
        try:
            teach(service, lesson)
        except SpaceError as error:
            problems.append(str(error))

    with service.visitors.hold(busy) as overlay:
        assert overlay is not None
        late = threading.Thread(target=come_late)
        late.start()
        late.join()
        assert not overlay.is_closed
        assert len(overlay.examples) == 1
    assert len(problems) == 1
    assert "try again in a while" in problems[0]
    assert knows(service, busy) == 1
    come_late()
    assert len(problems) == 1


def test_a_visitor_who_made_room_begins_anew(model: Any, lesson: str) -> None:
    service = Service(model, Visitors(model, None, max_in_memory=1))
    first = teach(service, lesson)
    teach(service, lesson)
    assert knows(service, first) == 0
    with pytest.raises(SpaceError, match="teach first"):
        service.forget([0], first)
    assert knows(service, teach(service, lesson, 2, first)) == 2


def test_a_damaged_or_foreign_file_in_the_folder_is_no_visitor(
    model: Any, lesson: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visitors, "MAX_ON_DISK", 1)
    service = Service(model, Visitors(model, tmp_path))
    (folder,) = tmp_path.iterdir()
    (folder / "note.txt").write_text("of the owner")
    os.utime(folder / "note.txt")
    first = teach(service, lesson)
    teach(service, lesson)
    assert (folder / "note.txt").read_text() == "of the owner"
    assert knows(service, first) == 0


def test_the_larger_crowd_makes_room_and_the_longest_unused_of_it() -> None:
    kept = [Kept(False, float(n), f"few {n}") for n in (3, 1, 2)]
    kept += [Kept(True, float(n), f"much {n}") for n in (0, 9)]
    gone = [each.name for each in first_to_go(kept)]
    assert gone == ["few 1", "few 2", "much 0", "few 3", "much 9"]
    assert Counter(gone) == Counter(each.name for each in kept)
    assert list(first_to_go([])) == []


def test_the_limits_are_stated() -> None:
    text = " ".join(README.read_text(encoding="utf-8").split())
    for stated in (
        f"{overlays.MAX_EXAMPLES} pictures and {overlays.MAX_NEW_CLASSES} new classes",
        f"in {overlays.MAX_REQUESTS:,} requests of at most {MAX_FILES} pictures",
        f"of {uploads.MAX_BYTES // 2**20} MB", f"what {visitors.MAX_ON_DISK:,} visitors taught",
        f"in about {visitors.MAX_BYTES_ON_DISK // 2**30} GB", f"what {visitors.MAX_IN_MEMORY} did",
        f"at most {visitors.FEW_EXAMPLES} pictures",
        f"{guard.MAX_UPLOAD // 2**20} MB together",
        f"up to {MAX_JPEG_PIXELS // 10**6} megapixels, other formats up to {MAX_PIXELS // 10**6}",
        f"more than {LARGE_PIXELS // 10**6} megapixels is decoded alone",
        f"for {visitors.KEPT_ON_DISK / 86400:.0f} days at most",
    ):  # fmt: skip
        assert stated in text
