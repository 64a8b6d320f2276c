"""What is made when it is first asked for, and once: names of a package, values of an object."""

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from importlib import import_module
from types import TracebackType
from typing import Any, Generic, TypeVar

Made = TypeVar("Made")

_LOCKS: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def lazy_names(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package.

    Args:
        package: its name.
        homes: public name to the module that defines it, relative to the package: `html`, or
            `.fit.html` for one beside the package.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f".{homes[name]}", package), name)

    return get, lambda: sorted(homes)


class Lock:
    """A re-entrant lock that can be copied and pickled; the copy is free.

    It is free in a forked process too: whoever held it runs on in the parent alone.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _LOCKS.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["Lock"], tuple[()]]:
        return Lock, ()


def _free_all() -> None:
    for lock in list(_LOCKS):
        lock._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_all)


class Once(Generic[Made]):
    """A value that is made when it is first asked for; who asks meanwhile waits for it.

    Args:
        make: makes it; after an error the next one tries again.
    """

    def __init__(self, make: Callable[[], Made]) -> None:
        self._make, self._lock = make, Lock()
        self._made: tuple[Made] | None = None

    def __call__(self) -> Made:
        """The value."""
        if self._made is None:
            with self._lock:
                if self._made is None:
                    self._made = (self._make(),)
        return self._made[0]
