"""Ranks of a benchmark: they share the work, and none waits for one that failed or is gone."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from support.forks import Errand
from support.pictures import write_folder

from catalog.offline_backbones import build_backbone
from study import runner
from study import scratch as scratch_module
from study.cells import Cell
from study.protocols import PROTOCOLS
from study.ranks import Ranks, start
from study.runner import Options, Run


def on_two_ranks(work: Callable[[int], object]) -> list[str]:
    """What each of two forks of this process met: `ValueError: text`, or nothing."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}

    def work_as(rank: int) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ |= place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        start()
        work(rank)

    started = [Errand.start(partial(work_as, rank)) for rank in (0, 1)]
    return [child.outcome() for child in started]


def join() -> Ranks:
    return Ranks.join(patience=timedelta(seconds=20), hurry=timedelta(seconds=1))


def fail(rank: int, *failing: int) -> str:
    if rank in failing:
        raise ValueError(f"planted on {rank}")
    return "fine"


# ---- what ranks say to each other ---------------------------------------------------------------


def test_values_are_gathered_and_the_first_decides() -> None:
    def work(rank: int) -> None:
        ranks = join()
        assert (ranks.index, ranks.count, ranks.is_first) == (rank, 2, rank == 0)
        assert ranks.gather(rank * 10) == [0, 10]
        assert ranks.first(lambda: f"from {rank}") == "from 0"
        assert ranks.together(lambda: rank) == rank

    assert on_two_ranks(work) == ["", ""]


def test_one_rank_alone_says_nothing() -> None:
    alone = Ranks.join()
    assert alone.group is None
    assert alone.gather(7) == [7]
    with pytest.raises(ValueError, match="planted on 0"):
        alone.together(lambda: fail(0, 0))


def test_what_fails_on_all_ranks_ends_nothing() -> None:
    def work(rank: int) -> None:
        ranks = join()
        with pytest.raises(ValueError, match=f"planted on {rank}"):
            ranks.together(lambda: fail(rank, 0, 1))
        assert ranks.together(lambda: fail(rank)) == "fine"

    assert on_two_ranks(work) == ["", ""]


def test_what_fails_on_one_rank_ends_the_run_on_both() -> None:
    found = on_two_ranks(lambda rank: join().together(lambda: fail(rank, 1)))
    words = "RunEndedError: Rank 1 failed where others did not. ValueError: planted on 1"
    assert found == [words, words]


def test_a_failing_first_rank_tells_the_others() -> None:
    found = on_two_ranks(lambda rank: join().first(lambda: fail(rank, 0)))
    ended = "RunEndedError: Rank 0 ended the run. ValueError: planted on 0"
    assert found == ["ValueError: planted on 0", ended]


@pytest.mark.parametrize("gone", [0, 1])
def test_a_killed_rank_is_not_waited_for(gone: int) -> None:
    def work(rank: int) -> None:
        ranks = join()
        ranks.wait()
        if rank == gone:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.wait()

    began = time.monotonic()
    found = on_two_ranks(work)
    assert time.monotonic() - began < 15
    assert found[gone] == f"ended by -{signal.SIGKILL.value}"
    assert "Expected all 2 ranks to be here, but one is gone" in found[1 - gone]
    assert "finished cells stay" in found[1 - gone]


def test_a_rank_that_fails_while_the_other_is_in_the_middle_gives_up() -> None:
    """The other would wait for it in a collective of the library: the launcher then ends it."""

    def work(rank: int) -> None:
        ranks = join()
        if rank == 1:
            ranks.together(lambda: fail(1, 1))
        ranks.together(lambda: time.sleep(4))

    began = time.monotonic()
    found = on_two_ranks(work)
    assert time.monotonic() - began < 15
    assert "Rank 1 failed, and others are in the middle of it. ValueError: planted" in found[1]
    assert "one is gone" in found[0]


# ---- what they do together ----------------------------------------------------------------------


def test_the_rank_that_saves_weights_makes_an_offline_backbone(tmp_path: Path) -> None:
    """Transformers writes weights on the first rank only, here the one that comes last."""

    def work(rank: int) -> None:
        time.sleep(0.5 * (1 - rank))
        folder = build_backbone("tiny-vit-digits", tmp_path)
        assert len(load_file(folder / "model.safetensors")) > 50

    assert on_two_ranks(work) == ["", ""]


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Three splits of a backbone that is trained on each: ranks open it in turns of their own."""
    monkeypatch.setattr(scratch_module, "LEAST_STEPS", 2)
    write_folder(tmp_path / "pictures", {"a": 12, "b": 12})
    task = f"imagefolder:{tmp_path / 'pictures'}"
    return [Cell(task, "tiny-vit-digits", "complementarity", seed) for seed in range(3)]


def run(place: Path, output: str, cells: list[Cell]) -> Run:
    found = Run(place / output, Options(cache_dir=place / "cache", epochs=1))
    found.run("test", cells)
    return found


def arms_in(folder: Path) -> dict[str, Any]:
    paths = sorted((folder / "cells").glob("*.json"))
    return {path.name: json.loads(path.read_text())["arms"] for path in paths}


def test_two_ranks_share_the_splits_of_a_trained_backbone(
    tmp_path: Path, cells: list[Cell]
) -> None:
    def work(rank: int) -> None:
        done = run(tmp_path, "two", cells)
        (progress,) = done.progress.values()
        assert progress.done == 2 - rank  # seeds 0 and 2, and seed 1
        assert done.told == []

    assert on_two_ranks(work) == ["", ""]
    run(tmp_path, "one", cells)
    assert len(arms_in(tmp_path / "one")) == 3
    assert arms_in(tmp_path / "two") == arms_in(tmp_path / "one")


def test_a_task_that_one_rank_cannot_load_ends_the_run(
    tmp_path: Path, cells: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(rank: int) -> None:
        if rank == 1:
            monkeypatch.setattr(runner, "load_task", lambda *_, **__: fail(1, 1))
        run(tmp_path, "out", cells)

    found = on_two_ranks(work)
    assert all("but rank 1 has {}; do give them the same HF_HOME" in words for words in found)


def test_failures_of_every_rank_are_told(
    tmp_path: Path, cells: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROTOCOLS, "complementarity", lambda *_: fail(0, 0))

    def work(rank: int) -> None:
        told = run(tmp_path, "out", cells).told
        assert sorted(name for name, _ in told) == sorted(cell.name for cell in cells)
        assert {words for _, words in told} == {"ValueError: planted on 0"}

    assert on_two_ranks(work) == ["", ""]
