"""Pictures and labels, before any model."""

from typing import TYPE_CHECKING

from ..core.lazy import lazy_names

if TYPE_CHECKING:
    from .batches import content_of as content_of
    from .decode import BadImageError as BadImageError
    from .decode import decode_image as decode_image
    from .decode import decoding as decoding
    from .keys import print_of as print_of
    from .loading import datastore_as_dataset as datastore_as_dataset
    from .loading import load_splits as load_splits
    from .splits import Fold as Fold
    from .splits import few_rows as few_rows
    from .splits import few_shots as few_shots
    from .splits import stratified_folds as stratified_folds
    from .walk import StoredPictures as StoredPictures

_HOMES = {
    "BadImageError": "decode",
    "content_of": "batches",
    "Fold": "splits",
    "StoredPictures": "walk",
    "datastore_as_dataset": "loading",
    "decode_image": "decode",
    "decoding": "decode",
    "few_rows": "splits",
    "few_shots": "splits",
    "load_splits": "loading",
    "print_of": "keys",
    "stratified_folds": "splits",
}
__all__ = [*_HOMES]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
