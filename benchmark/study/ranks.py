"""What the processes of one run tell each other, so that none waits for one that is gone.

Messages go through a gloo group of their own: a rank that left a collective of the library half way
can still say so. A rank that dies is noticed by the launcher, by the closed connection, and at last
by the time that anything is waited for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import distributed

PATIENCE = timedelta(hours=2)
"""How long a rank waits for another: shares of the cells of one group take unequally long."""

HURRY = timedelta(minutes=1)
"""How long a rank that failed waits for the others to fail likewise."""

T = TypeVar("T")


class RunEndedError(RuntimeError):
    """A rank is gone or did what the others did not: the whole run ends."""


def start() -> PartialState:
    """Joins the other processes of this run, if there are any, with bounded waiting."""
    # without a device accelerate overlooks the other ranks unless it is told
    cpu = not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=PATIENCE)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run.

    Attributes:
        group: of their messages; None for one process alone.
        hurry: how long a rank that failed waits for the others to fail likewise.
    """

    group: Any = None
    hurry: timedelta = HURRY

    @classmethod
    def join(cls, patience: timedelta = PATIENCE, hurry: timedelta = HURRY) -> "Ranks":
        """Makes the group; all ranks call this together."""
        if start().num_processes == 1:
            return cls(None, hurry)
        return cls(distributed.new_group(backend="gloo", timeout=patience), hurry)

    @property
    def index(self) -> int:
        """The number of this rank, from 0."""
        return PartialState().process_index

    @property
    def count(self) -> int:
        """How many ranks there are."""
        return PartialState().num_processes

    @property
    def is_first(self) -> bool:
        """Whether this one prints, locks and decides."""
        return self.index == 0

    def first(self, work: Callable[[], T]) -> T:
        """The first rank works while the others wait; all get what it found.

        Raises:
            RunEndedError: on the others, if it failed; itself it raises what it met.
        """
        found: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_first:
            try:
                found[0] = work()
            except Exception as met:
                error, found[1] = met, _words(met)
        if self.group is not None:
            self._exchange(lambda: distributed.broadcast_object_list(found, 0, self.group))
        if error is not None:
            raise error
        if found[1] is not None:
            raise RunEndedError(f"Rank 0 ended the run. {found[1]}")
        result: T = found[0]
        return result

    def together(self, work: Callable[[], T]) -> T:
        """All ranks work on the same thing, which may need the others.

        Raises:
            RunEndedError: if it went well on some ranks and not on others, or one is gone.
            Exception: what it met, if it failed on all ranks.
        """
        if self.group is None:
            return work()
        self.wait()
        result, error = None, None
        try:
            result = work()
        except Exception as met:
            error = met
        self._agree(error)
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """What each rank says, in their order."""
        if self.group is None:
            return [value]
        said: list[Any] = [None] * self.count
        self._exchange(lambda: distributed.all_gather_object(said, value, group=self.group))
        return said

    def wait(self) -> None:
        """Returns when all ranks are here."""
        self.gather(None)

    def _agree(self, error: Exception | None) -> None:
        """Raises unless all ranks failed, or none."""
        try:
            self._meet(None if error is None else self.hurry)
        except RuntimeError as missing:
            if error is not None:
                raise RunEndedError(
                    f"Rank {self.index} failed, and others are in the middle of it. {_words(error)}"
                ) from error
            raise self._lost(missing) from missing
        said = self.gather(None if error is None else _words(error))
        failed = [rank for rank, words in enumerate(said) if words is not None]
        if failed and len(failed) < self.count:
            raise RunEndedError(
                f"Rank {failed[0]} failed where others did not. {said[failed[0]]}"
            ) from error

    def _meet(self, limit: timedelta | None) -> None:
        """A barrier that this rank may leave early: those of torch keep one limit per group."""
        token = torch.zeros(1)
        others = range(1, self.count) if self.is_first else (0,)
        steps = [distributed.irecv, distributed.isend]
        for step in steps if self.is_first else reversed(steps):
            for rank in others:
                message = step(token, rank, self.group)
                assert message is not None
                message.wait(*([] if limit is None else [limit]))

    def _exchange(self, talk: Callable[[], None]) -> None:
        try:
            talk()
        except RuntimeError as missing:
            raise self._lost(missing) from missing

    def _lost(self, missing: RuntimeError) -> RunEndedError:
        first_line = str(missing).splitlines()[0][:200]
        return RunEndedError(
            f"Expected all {self.count} ranks to be here, but one is gone or too late "
            f"({first_line}); do look at what it said last, and run the same command again: "
            "finished cells stay."
        )


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
