"""Ways to search exactly, each forced whatever the processor has and however few rows there are."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hf_knn.core import search
from hf_knn.store import index as indexing
from hf_knn.store import searcher as first_pass
from hf_knn.store.datastore import Datastore

SPACES = [
    ("cosine", "l2_centered"),
    ("cosine", "l2"),
    ("l2", "l2_centered"),
    ("l2", "l2"),
    ("l2", "none"),
]
"""Every (metric, normalization) that has a meaning."""

FIRST_PASSES = ("faiss", "torch", "bfloat16", "float16")


@contextmanager
def forced(name: str, block: int = 64) -> Iterator[None]:
    """Stores that are built and placed in this context propose candidates that way.

    Everything is cut into small blocks, so that a few times `block` rows make several of each.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "has_fast_bfloat16", lambda: name == "bfloat16")
        patch.setattr(indexing, "_SMALLEST_BFLOAT16", 0)
        patch.setattr(first_pass, "ROW_BLOCK", block)
        patch.setattr(first_pass, "_QUERY_BLOCK", block // 20)
        patch.setattr(search, "_RESCORE_BYTES", 640 * block)
        yield


def placed(store: Datastore, name: str) -> Datastore:
    """The store, searched as `forced` says: only torch can share rows or shorten them."""
    if name == "torch":
        return store.to(["cpu", "cpu"])
    return store.to("cpu", float16=name == "float16")
