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
    from .uploads import LARGE_PIXELS as LARGE_PIXELS
    from .uploads import MAX_FILES as MAX_FILES
    from .uploads import MAX_LABEL as MAX_LABEL
    from .uploads import MAX_UPLOAD as MAX_UPLOAD
    from .uploads import MAX_UPLOADED_FILE as MAX_UPLOADED_FILE
    from .uploads import UploadError as UploadError
    from .uploads import check_count as check_count
    from .uploads import check_label as check_label
    from .uploads import give_back_large_blocks as give_back_large_blocks
    from .uploads import uploaded as uploaded
    from .walk import StoredPictures as StoredPictures

_HOMES = {
    "BadImageError": "decode",
    "content_of": "batches",
    "Fold": "splits",
    "LARGE_PIXELS": "uploads",
    "MAX_FILES": "uploads",
    "MAX_LABEL": "uploads",
    "MAX_UPLOAD": "uploads",
    "MAX_UPLOADED_FILE": "uploads",
    "StoredPictures": "walk",
    "UploadError": "uploads",
    "check_count": "uploads",
    "check_label": "uploads",
    "datastore_as_dataset": "loading",
    "decode_image": "decode",
    "decoding": "decode",
    "few_rows": "splits",
    "few_shots": "splits",
    "give_back_large_blocks": "uploads",
    "load_splits": "loading",
    "print_of": "keys",
    "stratified_folds": "splits",
    "uploaded": "uploads",
}
__all__ = [*_HOMES]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
