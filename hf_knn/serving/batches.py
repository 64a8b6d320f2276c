"""What comes at the same time is done at the same time: a queue, and one thread that empties it."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar


@dataclass
class Job:
    """Something that somebody waits for.

    Attributes:
        future: gets the result; whoever cancels it before it is begun does not get it done.
    """

    future: Future[Any] = field(default_factory=Future, kw_only=True)

    @property
    def size(self) -> int:
        """How much of a batch it fills."""
        return 1


Work = TypeVar("Work", bound=Job)


class Batcher(Generic[Work]):
    """A thread that does jobs together; those that come meanwhile are the next batch.

    Args:
        name: of the thread.
        run: does some jobs and gives each future its result; what it raises, all of them get.
        most: the size of a batch; a job that is larger is a batch of its own.
        wait: seconds that the first job waits for others.
        coming: how many requests there are; nobody waits if all of them are in the queue.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[Sequence[Work]], None],
        most: int,
        wait: float = 0.0,
        coming: Callable[[], int] = lambda: 0,
    ) -> None:
        self._run, self._most, self._wait, self._coming = run, most, wait, coming
        self._jobs: deque[Work] = deque()
        self._ready = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Work) -> Future[Any]:
        """Adds a job; returns its future.

        Raises:
            RuntimeError: after `close`.
        """
        with self._ready:
            if self._is_closed:
                raise RuntimeError("Expected no job after the server was closed.")
            self._jobs.append(job)
            self._ready.notify()
        return job.future

    def close(self) -> None:
        """Waits until everything that was put is done."""
        with self._ready:
            self._is_closed = True
            self._ready.notify()
        self._thread.join()

    def _loop(self) -> None:
        while (batch := self._next()) is not None:
            begun = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if not begun:
                continue
            try:
                self._run(begun)
            except BaseException as error:  # the thread lives on, and whoever waits hears of it
                for job in begun:
                    if not job.future.done():
                        job.future.set_exception(error)

    def _next(self) -> list[Work] | None:
        """The next batch; None when there will be none."""
        with self._ready:
            while not self._jobs:
                if self._is_closed:
                    return None
                self._ready.wait()
            until = time.monotonic() + self._wait
            while not self._is_closed and self._is_worth_waiting():
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._ready.wait(left)
            batch = [self._jobs.popleft()]
            size = batch[0].size
            while self._jobs and size + self._jobs[0].size <= self._most:
                batch.append(self._jobs.popleft())
                size += batch[-1].size
            return batch

    def _is_worth_waiting(self) -> bool:
        waiting = sum(job.size for job in self._jobs)
        return waiting < self._most and len(self._jobs) < self._coming()
