"""Jobs that come together are done together, and each gets its own result."""

import threading
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass

import pytest

from hf_knn.serving.batches import Batcher, Job


@dataclass
class Sum(Job):
    """A number to be doubled."""

    number: int = 0

    @property
    def size(self) -> int:
        return self.number


def test_what_comes_meanwhile_is_the_next_batch() -> None:
    batches: list[list[int]] = []
    goes_on = threading.Event()

    def double(jobs: Sequence[Sum]) -> None:
        batches.append([job.number for job in jobs])
        goes_on.wait(60)
        for job in jobs:
            job.future.set_result(2 * job.number)

    batcher: Batcher[Sum] = Batcher("test", double, 4, 60.0, lambda: 1)
    futures = [batcher.put(Sum(1))]
    while not batches:  # alone, since no other is coming
        goes_on.wait(0.001)
    futures += [batcher.put(Sum(number)) for number in (2, 1, 9, 3, 1)]
    dropped = batcher.put(Sum(1))
    assert dropped.cancel()
    goes_on.set()
    batcher.close()
    assert [future.result() for future in futures] == [2, 4, 2, 18, 6, 2]
    assert batches == [[1], [2, 1], [9], [3, 1]]
    with pytest.raises(RuntimeError, match="after the server was closed"):
        batcher.put(Sum(1))


def test_one_waits_for_those_that_are_coming() -> None:
    batches: list[int] = []

    def double(jobs: Sequence[Sum]) -> None:
        batches.append(len(jobs))
        for job in jobs:
            job.future.set_result(job.number)

    batcher: Batcher[Sum] = Batcher("test", double, 100, 60.0, lambda: 3)
    wait([batcher.put(Sum(number)) for number in (1, 2, 3)], 60)
    batcher.close()
    assert batches == [3]


def test_an_error_is_heard_by_all_who_wait_and_the_thread_lives_on() -> None:
    def fail(jobs: Sequence[Sum]) -> None:
        jobs[0].future.set_result(0)
        if jobs[0].number == 1:
            raise KeyError("x")

    batcher: Batcher[Sum] = Batcher("test", fail, 10, 60.0, lambda: 2)
    first, second = batcher.put(Sum(1)), batcher.put(Sum(2))
    assert first.result(60) == 0
    with pytest.raises(KeyError):
        second.result(60)
    third = batcher.put(Sum(3))
    batcher.close()
    assert third.result(60) == 0
