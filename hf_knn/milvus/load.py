"""A datastore's rows on their way into Milvus, opened there, and on their way home.

The load shows its progress, and is called again after a kill.
"""

import dataclasses
import logging

import numpy as np
import torch
from transformers.utils.logging import tqdm

from ..core.learned import LearnedMap
from ..core.manifest import DatastoreError
from ..core.rows import RowParts
from ..core.search import Ints
from ..store.datastore import Datastore
from ..store.index import MIN_RECALL
from ..store.kinds import FLAT
from ..store.recall import Find, Queries, RecallTest, worst
from ..store.remote import DatastoreReference
from ..store.searcher import IndexSpace
from ..store.table import StoredRows, sum_of
from .about import CHANGING, LOADING, WHOLE, About
from .collection import (
    ROW_FIELDS,
    MilvusCollection,
    check_rows,
    decode_rows,
    encode_rows,
    rows_per_call,
)
from .kinds import (
    FLOAT32,
    MilvusIndex,
    build_parameters,
    check_offered,
    index_of,
    set_effort,
    vector_dtype,
)
from .maps import map_of, write_map
from .search import search_collection

logger = logging.getLogger(__name__)

BATCH_ROWS = 1000
_BLOCK, _ID_PAGE = 16_384, 16_384
_HEADROOM = 4.0  # rows that are added later may be so much longer than the longest of now

INTERRUPTED = {
    LOADING: "its load was interrupted; call MilvusDatastore.from_datastore again to finish it",
    CHANGING: "a change of it was interrupted; MilvusDatastore.connect(…, recover=True) takes the "
    "rows that are there",
}
"""What to do about a collection that is not whole."""


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """How rows are loaded.

    Attributes:
        index: of a `MilvusIndex`, in capitals or not.
        min_recall: that an approximate one has to reach, in (0, 1].
        batch_size: rows per call, >= 1.
        progress: show a progress bar.

    Raises:
        ValueError: for another index, or a number out of range.
    """

    index: str = MilvusIndex.FLAT
    min_recall: float = MIN_RECALL
    batch_size: int = BATCH_ROWS
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"Expected `batch_size` to be >= 1, but got {self.batch_size}.")
        if not 0 < self.min_recall <= 1:
            raise ValueError(f"Expected `min_recall` to be in (0, 1], but got {self.min_recall}.")
        object.__setattr__(self, "index", index_of(self.index))


def space_of(collection: MilvusCollection, about: About) -> IndexSpace:
    """How the rows of a collection are compared."""
    nothing = RowParts([about.mean.new_zeros(0, about.dim)])
    compared = (about.mean.double().numpy(), about.metric, about.normalization)
    return IndexSpace(*compared, map_of(collection, about), nothing, about.largest)


def describe(store: Datastore, index: str = MilvusIndex.FLAT, vectors: str = FLOAT32) -> About:
    """The record about a collection that shall hold a datastore's rows.

    Args:
        store: the datastore.
        index: of a `MilvusIndex`.
        vectors: what Milvus keeps the vectors in, see `kinds.vector_dtype`.

    Raises:
        ValueError: for rows that Milvus cannot hold.
    """
    check_rows(store.paths, [store.source.get("split", "")], store.dim, store.dtype)
    total, largest, learned = 0, 0.0, store.learned_map
    compared = (store.mean.double().numpy(), store.metric, store.normalization, learned)
    for start in range(0, len(store), _BLOCK):
        rows = store.rows(slice(start, start + _BLOCK))
        total += sum_of(rows)
        space = IndexSpace(*compared, rows.features)
        largest = max(largest, space.largest)
    store.verify()  # afterwards: these are the rows that the server must have, read back
    return About(
        state=LOADING,
        count=len(store),
        total=total % 2**256,
        dim=store.dim,
        dtype=store.dtype,
        metric=store.metric,
        normalization=store.normalization,
        largest=_HEADROOM * (largest or 1.0),
        next_id=int(store.ids.max()) + 1 if len(store) else 0,
        has_paths=store.paths is not None,
        index=index,
        vectors=vectors,
        source=dict(store.source),
        learned_map="" if learned is None else learned.sha256,
        map_width=0 if learned is None else learned.width,
        mean=store.mean,
    )


def load_rows(store: Datastore, collection: MilvusCollection, plan: LoadPlan) -> About:
    """Brings the rows of a datastore into a collection, or finishes what was begun.

    The record says `loading` until every row was read back, so that half a collection is never
    opened. Rows are written by id: one that is written twice is there once.

    Args:
        store: the datastore.
        collection: where to.
        plan: how.

    Returns:
        The record, which now says `whole`.

    Raises:
        ValueError: for a collection that holds, or shall hold, other rows, or an index that the
            server does not have.
        DatastoreError: if what was read back is not what was written.
        DatastoreConnectionError: if the server does not answer; call again.
    """
    server = collection.server
    check_offered(plan.index, server.version, server.uri)
    vectors = vector_dtype(store.dtype, store.metric, server.version)
    wanted, known = describe(store, plan.index, vectors), collection.read_about()
    if known is not None and known.state == CHANGING:
        raise DatastoreError(f"Expected {collection} to be whole, but {INTERRUPTED[CHANGING]}.")
    if known is not None and known.fingerprint != wanted.fingerprint:
        raise ValueError(
            f"Expected {collection} to be free, but it {'' if known.state == WHOLE else 'shall '}"
            f"hold {known.count} rows, fingerprint {known.fingerprint[:12]}…, where these are "
            f"{wanted.count}, {wanted.fingerprint[:12]}…; take another name, or drop it."
        )
    if known is not None and known.index != plan.index:
        raise ValueError(
            f"Expected {collection} to be searched by {plan.index}, but it was made for "
            f"{known.index}; take another name, or drop it."
        )
    if known is not None and known.state == WHOLE and collection.has_rows():
        return known
    if known is not None:  # another version may have begun it, and its collection stands
        wanted = dataclasses.replace(wanted, vectors=known.vectors)
    if store.learned_map is not None:
        collection.create_about()
        write_map(collection, store.learned_map)
    space = space_of(collection, wanted)
    width = space.width + space.is_l2
    collection.create(wanted, width, build_parameters(wanted.index, wanted.count, width))
    present = _ids_in(collection)
    missing = np.flatnonzero(~np.isin(store.ids.numpy(), present))
    if len(store) - len(missing) != len(present):
        raise DatastoreError(
            f"Expected {collection} to hold rows of this datastore only, but of {len(present)} "
            f"rows {len(present) + len(missing) - len(store)} are others; drop it and load again."
        )
    if len(present):
        logger.info("%s holds %d of %d rows already.", collection, len(present), len(store))
    _write(store, collection, wanted, missing, plan)
    collection.flush()
    check_content(collection, wanted)
    if plan.index != MilvusIndex.FLAT and len(store) > 1:
        wanted = _with_recall(store, collection, wanted, plan.min_recall)
    whole = dataclasses.replace(wanted, state=WHOLE)
    collection.write_about(whole)
    return whole


def count_content(collection: MilvusCollection, about: About) -> tuple[int, int]:
    """Reads all rows: how many there are, and the sum of their hashes.

    Args:
        collection: the collection.
        about: the record about it.
    """
    count = total = 0
    for page in collection.pages(ROW_FIELDS, "", rows_per_call(about.dim, 4096)):
        total += sum_of(decode_rows(page, about))
        count += len(page)
    return count, total % 2**256


def check_content(collection: MilvusCollection, about: About) -> None:
    """Reads all rows and compares them with the record about them.

    Raises:
        DatastoreError: with both numbers.
    """
    count, total = count_content(collection, about)
    if (count, total) != (about.count, about.total):
        found = dataclasses.replace(about, count=count, total=total)
        raise DatastoreError(
            f"Expected {collection} to hold {about.count} rows, fingerprint "
            f"{about.fingerprint[:12]}…, but it holds {count}, {found.fingerprint[:12]}…; somebody "
            "else changed it: drop it and load again."
        )


def open_whole(place: MilvusCollection, recover: bool = False) -> About:
    """The record of a collection that is whole and ready to be read.

    Args:
        place: the collection.
        recover: count the rows anew after an interrupted change, and take what is there.

    Raises:
        DatastoreError: if there is no such datastore, or it is not whole, with the numbers.
        DatastoreConnectionError: if the server does not answer.
    """
    about = place.read_about()
    if about is None or not place.has_rows():
        raise DatastoreError(
            f"Expected {place} to be a datastore, but there is none; load one with "
            "MilvusDatastore.from_datastore."
        )
    if about.state == LOADING or (about.state == CHANGING and not recover):
        raise DatastoreError(f"Expected {place} to be whole, but {INTERRUPTED[about.state]}.")
    place.load()
    if recover:
        count, total = count_content(place, about)
        about = dataclasses.replace(about, state=WHOLE, count=count, total=total)
        place.write_about(about)
    found = place.count()
    if found != about.count:
        raise DatastoreError(
            f"Expected {place} to hold {about.count} rows, but it holds {found}; somebody else "
            "changed it: drop it and load again, or connect with recover=True."
        )
    return about


def open_named(place: MilvusCollection, reference: DatastoreReference) -> About:
    """The record of the collection that a checkpoint names, if it still holds those rows.

    Args:
        place: the collection.
        reference: what the checkpoint says.

    Raises:
        DatastoreError: for other rows, with both numbers; and as `open_whole` does.
        DatastoreConnectionError: if the server does not answer.
    """
    about = open_whole(place)
    if (about.count, about.fingerprint) != (reference.num_rows, reference.fingerprint):
        raise DatastoreError(
            f"Expected {place} to hold {reference.num_rows} rows, fingerprint "
            f"{reference.fingerprint[:12]}…, but it holds {about.count}, "
            f"{about.fingerprint[:12]}…; it was changed since the checkpoint was saved; "
            "if that is wanted, give the model MilvusDatastore.connect(…) and save it again."
        )
    return about


def bring_home(
    parts: list[StoredRows], about: About, learned: LearnedMap | None, index: str = FLAT
) -> Datastore:
    """An embedded datastore of rows that were read, with mean and map of their collection.

    Args:
        parts: rows, in the order wanted.
        about: the record about them.
        learned: the map that they go through, or None.
        index: see `Datastore.from_features`.
    """
    parts = parts or [decode_rows([], about)]
    ids, labels, features = (
        torch.from_numpy(np.concatenate([part[i] for part in parts])) for i in range(3)
    )
    return Datastore(
        features, labels, ids, about.mean, metric=about.metric, normalization=about.normalization,
        index=index, learned_map=learned,
        paths=[path for part in parts for path in part.paths] if about.has_paths else None,
    )  # fmt: skip


def _with_recall(
    store: Datastore, collection: MilvusCollection, about: About, min_recall: float
) -> About:
    """The record with an effort that reaches a recall, and what is reached on other queries."""
    space, labels = space_of(collection, about), store.labels.unique()

    def exact(queries: Queries, k: int) -> Ints:
        # by its labels a datastore is searched exactly, whatever its index
        return store.search(queries.features, k, queries.own, labels=labels).ids.numpy()

    test = RecallTest(store.features.numpy(), store.ids.numpy(), exact, exact)

    def find_with(effort: int) -> Find:
        tried = dataclasses.replace(about, effort=effort)

        def find(queries: Queries, k: int) -> Ints:
            wanted = space.normalize(queries.features)
            return search_collection(collection, tried, space, wanted, k, queries.own).ids

        return find

    def measure(effort: int) -> tuple[float, str]:
        return test.aimed(find_with(effort))

    effort = set_effort(about.index, len(store), measure, min_recall)
    recalls = test.recalls(find_with(effort))
    recall, measured_on = worst(recalls)
    return dataclasses.replace(
        about, effort=effort, recall=recall, measured_on=measured_on, recalls=recalls
    )


def _ids_in(collection: MilvusCollection) -> np.ndarray:
    pages = [[row["id"] for row in page] for page in collection.pages(["id"], "", _ID_PAGE)]
    return np.array([row_id for page in pages for row_id in page], np.int64)


def _write(
    store: Datastore,
    collection: MilvusCollection,
    about: About,
    missing: np.ndarray,
    plan: LoadPlan,
) -> None:
    step, space = rows_per_call(store.dim, plan.batch_size), space_of(collection, about)
    done = len(store) - len(missing)
    is_missing = np.zeros(len(store), bool)
    is_missing[missing] = True
    with tqdm(
        total=len(store), initial=done, unit=" rows", desc="into Milvus", disable=not plan.progress
    ) as bar:
        for start in range(0, len(store), step):
            part = slice(start, start + step)
            rows, wanted = store.rows(part), is_missing[part]
            if not wanted.any():
                continue
            vectors = space.first_pass_rows(rows.features).astype(about.vectors)
            encoded = encode_rows(rows, vectors)
            collection.upsert([row for row, new in zip(encoded, wanted, strict=True) if new])
            bar.update(int(wanted.sum()))
