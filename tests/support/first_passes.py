"""Ways to search exactly, each forced whatever is fast here and however few rows there are."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from hf_knn.core import search
from hf_knn.core.search import Rows, RowSpace
from hf_knn.store import effort, products
from hf_knn.store import index as indexing
from hf_knn.store import searcher as first_pass
from hf_knn.store.datastore import Datastore
from hf_knn.store.faiss import FaissFlat
from hf_knn.store.quickest import Make

SPACES = [
    ("cosine", "l2_centered"),
    ("cosine", "l2"),
    ("l2", "l2_centered"),
    ("l2", "l2"),
    ("l2", "none"),
]
"""Every (metric, normalization) that has a meaning."""

MADE: dict[str, Make] = {
    "faiss": FaissFlat,
    "float32": partial(products.Products, number_format=products.FloatFormat(torch.float32)),
    "bfloat16": partial(products.Products, number_format=products.FloatFormat(torch.bfloat16)),
    "int8": partial(products.Products, number_format=products.Int8Format()),
    "torch": partial(first_pass.PlacedFirstPass, devices=(torch.device("cpu"),) * 2),
    "float16": partial(first_pass.PlacedFirstPass, dtype=torch.float16),
}

FIRST_PASSES = tuple(MADE)


def force(name: str, patch: pytest.MonkeyPatch, block: int = 64) -> None:
    """Stores that are built from now on propose candidates that way, whatever is fast here.

    Everything is cut into small blocks, so that a few times `block` rows make several of each.
    """

    def build(features: Rows, space: RowSpace) -> first_pass.GrowingFirstPass:
        return MADE[name](space.first_pass_rows(features))

    patch.setattr(indexing, "build_quickest", build)
    patch.setattr(effort, "TorchFirstPass", MADE[name])
    patch.setattr(first_pass, "ROW_BLOCK", block)
    patch.setattr(products, "_BLOCK_ROWS", block)
    patch.setattr(products, "_SLAB_BLOCKS", 2)
    patch.setattr(products, "_PRODUCTS", 4 * block)
    patch.setattr(products, "_QUERIES", block // 20)
    patch.setattr(search, "_CANDIDATES_PER_ROW", 1)
    patch.setattr(search, "_PAIRS_AT_ONCE", 10 * block)
    patch.setattr(search, "_COMPARE_BYTES", 64 * block)


@contextmanager
def forced(name: str, block: int = 64) -> Iterator[None]:
    """Stores that are built and placed in this context propose candidates that way, see `force`."""
    with pytest.MonkeyPatch.context() as patch:
        force(name, patch, block)
        yield


def placed(store: Datastore, name: str) -> Datastore:
    """The store, placed by its caller if only that leads to this first pass."""
    if name == "torch":
        return store.to(["cpu", "cpu"])
    return store.to("cpu", float16=name == "float16")
