"""Rows that change: the datastore, its index, its files, and the Hub."""

from typing import TYPE_CHECKING

from ..core.lazy import lazy_names

if TYPE_CHECKING:
    from .backend import SearchBackend as SearchBackend
    from .datastore import Datastore as Datastore
    from .sharded import ShardedDatastore as ShardedDatastore

_HOMES = {
    "Datastore": "datastore",
    "SearchBackend": "backend",
    "ShardedDatastore": "sharded",
}
__all__ = [*_HOMES]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
