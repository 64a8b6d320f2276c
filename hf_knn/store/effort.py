"""How hard an approximate index is searched: as hard as the recall that is wanted takes."""

import logging
from collections.abc import Callable
from dataclasses import replace

from ..core.manifest import IndexInfo
from ..core.search import Ints, TorchFirstPass
from .approximate import LEAST, FaissApproximate
from .choice import most_that_pays
from .recall import AIMED_AT, RECALL_K, Queries, RecallTest, worst
from .searcher import GrowingSearcher, nearest_in_blocks

logger = logging.getLogger(__name__)


def set_effort(
    searcher: GrowingSearcher, index: FaissApproximate, info: IndexInfo, min_recall: float
) -> IndexInfo:
    """Raises parameters until the recall on rows and perturbed rows is reached, and no further.

    Args:
        searcher: searches the index.
        index: whose parameters are set.
        info: which index it is.
        min_recall: that is wanted.

    Returns:
        The same with parameters, and with its recalls on all kinds of queries.
    """
    features, ids, space = searcher.features, searcher.ids, searcher.space

    def exact(queries: Queries, k: int) -> Ints:
        # each block of rows is compared once: another first pass takes longer to be made
        asked = (TorchFirstPass, queries.features, k, queries.own)
        return ids[nearest_in_blocks(features, ids, space, *asked)]

    def find(queries: Queries, k: int) -> Ints:
        return ids[searcher.search(queries.features, k, queries.own)[1]]

    test, largest = RecallTest(features, ids, exact, find), most_that_pays(info, index.tunable())

    def aimed(values: dict[str, int]) -> float:
        index.set_parameters(values)
        return test.aimed(find)[0]

    values = {name: index.parameters.get(name, LEAST[name]) for name in largest}
    least = dict(values)
    recall = aimed(values)
    while recall < min_recall and (more := wider(values, largest)):
        found = [(aimed(each), each) for each in more]
        recall, values = max(found, key=lambda pair: pair[0])
    if recall >= min_recall:
        values = narrowed(values, least, lambda tried: aimed(tried) >= min_recall)
    index.set_parameters(values)
    recalls = test.recalls(find)
    recall, measured_on = worst(recalls)
    info = replace(info, parameters=values, recall=recall, measured_on=measured_on, recalls=recalls)
    logger.info("index %s: %s", info.requested, info)
    recall, measured_on = worst({kind: recalls[kind] for kind in AIMED_AT})
    if recall < min_recall:
        logger.warning(
            "index %s reaches recall@%d %.4f, below %.4f, on %s; index='flat' is exact.",
            info.spec, RECALL_K, recall, min_recall, measured_on,
        )  # fmt: skip
    return info


def wider(values: dict[str, int], largest: dict[str, int]) -> list[dict[str, int]]:
    """The parameters with one of them doubled, for each that can be.

    Args:
        values: parameters by name.
        largest: of each.
    """
    return [
        values | {name: min(2 * value, largest[name])}
        for name, value in values.items()
        if value < largest[name]
    ]


def narrowed(
    values: dict[str, int], least: dict[str, int], is_enough: Callable[[dict[str, int]], bool]
) -> dict[str, int]:
    """The parameters, of which each that was doubled is as small as is enough, to an eighth.

    The last first: to compare more rows costs more than to look into more lists.

    Args:
        values: parameters by name, which are enough.
        least: from which on they were doubled.
        is_enough: measures parameters.
    """
    for name, high in reversed(values.items()):
        low = min(high, least[name]) - 1
        while high - low > max(1, high // 8):
            middle = (low + high) // 2
            if is_enough(values | {name: middle}):
                high = middle
            else:
                low = middle
        values = values | {name: high}
    return values
