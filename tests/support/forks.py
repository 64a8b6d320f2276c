"""Children of the test process: warm (everything is imported), ready at once, and killed."""

import errno
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

PIPE_BYTES = 2**15
"""What fits into a pipe that nobody reads."""


def in_child(work: Callable[[], object]) -> int:
    """Forks; the child works and leaves without clean-up of this process's things."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


class Errand(NamedTuple):
    """A child with one thing to do, and the pipe on which it tells its error."""

    pid: int
    pipe: int

    @classmethod
    def start(cls, work: Callable[[], object]) -> "Errand":
        reader, writer = os.pipe()

        def report() -> None:
            try:
                work()
            except BaseException as error:
                os.write(writer, f"{type(error).__name__}: {error}".encode()[:PIPE_BYTES])

        child = cls(in_child(report), reader)
        os.close(writer)
        return child

    def has_ended(self) -> bool:
        return bool(select.select([self.pipe], [], [], 0)[0])

    def outcome(self) -> str:
        """Waits, and returns its error (`PermissionError: text`), or nothing."""
        with os.fdopen(self.pipe) as pipe:
            text = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return text or ("" if status == 0 else f"ended by {status}")


def outcome(work: Callable[[], object]) -> str:
    """Runs in a child and returns its error (`PermissionError: text`), or nothing."""
    return Errand.start(work).outcome()


def as_nobody(work: Callable[[], object]) -> str:
    def drop() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        work()

    return outcome(drop)


@dataclass
class Fork:
    """A child that does `work(0)`, `work(1)`, … until it is killed, and says when one is done."""

    pid: int
    done: int
    begun: int = 0

    @classmethod
    def repeating(cls, work: Callable[[int], object]) -> "Fork":
        reader, writer = os.pipe()

        def repeat() -> None:
            for number in range(PIPE_BYTES):  # it must never wait for us
                os.write(writer, b".")
                work(number)

        child = cls(in_child(repeat), reader)
        os.close(writer)
        child.wait_for(1)  # it runs
        return child

    def wait_for(self, count: int) -> None:
        """Waits until so many more calls have returned."""
        for _ in range(count):
            assert os.read(self.done, 1) == b".", "the child ended by an error"
            self.begun += 1

    def kill(self) -> int:
        """Kills it and returns how many calls had returned; fails if it ended by itself."""
        os.kill(self.pid, signal.SIGKILL)
        while dots := os.read(self.done, PIPE_BYTES):
            self.begun += len(dots)
        os.close(self.done)
        assert os.WTERMSIG(os.waitpid(self.pid, 0)[1]) == signal.SIGKILL
        return self.begun - 1

    def kill_at_random(self, generator: random.Random) -> None:
        """Kills it after 0 to 3 calls and, on a machine that is not busy, somewhere in the next."""
        self.wait_for(generator.randrange(4))
        time.sleep(generator.uniform(0, 0.008))
        self.kill()


def stop_before(name: str, stop: Callable[[], object]) -> None:
    """From now on, in this process, something happens when a file is to be put in place."""
    replace = os.replace

    def replace_or_stop(source: Any, target: Any) -> None:
        if Path(target).name == name:
            stop()
        replace(source, target)

    os.replace = replace_or_stop  # type: ignore[assignment]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def find_no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def touches(values: tuple[object, ...], place: Path) -> bool:
    """Whether the values of an audit event name a path below a folder."""
    paths = (str(value) for value in values if isinstance(value, str | Path))
    return any(path.startswith(str(place)) for path in paths)


def die_at_step(number: int, place: Path) -> None:
    """The end of this process comes before it touches a path below a folder once more."""
    left = number

    def count(event: str, values: tuple[object, ...]) -> None:
        nonlocal left
        if touches(values, place):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(count)
