"""What is wrong with a folder or a datastore, and the pages that say so."""

from typing import TYPE_CHECKING

from ..core.lazy import lazy_names

if TYPE_CHECKING:
    from ..fit.html import PAGE_STYLE as PAGE_STYLE
    from ..fit.html import thumbnail as thumbnail
    from .duplicates import find_pairs as find_pairs
    from .examine import inspect_datastore as inspect_datastore
    from .labels import score_labels as score_labels
    from .svg import map_svg as map_svg
    from .svg import place_features as place_features

_HOMES = {
    "PAGE_STYLE": ".fit.html",
    "find_pairs": "duplicates",
    "inspect_datastore": "examine",
    "map_svg": "svg",
    "place_features": "svg",
    "score_labels": "labels",
    "thumbnail": ".fit.html",
}
__all__ = [*_HOMES]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
