"""What the Space does, without a page: the same for the buttons and for the API."""

import copy
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from hf_knn import (
    BadImageError,
    Datastore,
    Explanation,
    KnnForImageClassification,
    PictureEncoder,
)
from hf_knn.data import check_count, check_label, content_of

from .overlay import Overlay, request_digest
from .settings import Settings, checked
from .uploads import (
    SpaceError,
    Upload,
    reading,
    shrink,
    thumbnail,
)
from .visitors import Visitors, check_token, new_token

MAX_KEY = 200
_KEPT_FEATURES = 1024


class Look:
    """A picture that has been through the backbone.

    Args:
        upload: the picture.
        features: of it.

    Attributes:
        name: of the file.
        digest: of the file.
        content: the print of the picture, see `content_of`.
        features: [1, D] float32.
    """

    def __init__(self, upload: Upload, features: Tensor) -> None:
        self.name, self.digest, self.features = upload.name, upload.digest, features
        self.content = content_of(upload.image)
        self._image: Image.Image | None = shrink(upload.image)
        self._thumbnail = b""

    @property
    def thumbnail(self) -> bytes:
        """A small WEBP, made when it is first shown or kept: an answer alone needs none."""
        if self._image is not None:
            self._thumbnail, self._image = thumbnail(self._image), None  # a page keeps many
        return self._thumbnail


class Near(NamedTuple):
    """A stored row beside another one.

    Attributes:
        row_id: of the row.
        label: its class.
        similarity: higher is closer; None where nothing is compared.
        share: of the vote, in [0, 1]; None where nothing is voted on.
    """

    row_id: int
    label: str
    similarity: float | None
    share: float | None


class Service:
    """Answers, and keeps visitors apart.

    Args:
        model: the published model, in eval mode; it is never changed.
        visitors: the overlays.
        backend: what makes features, see `PictureEncoder`.

    Raises:
        ValueError: for a model without image processor, or a backend that cannot run it.
        ImportError: for a backend that is not installed.
    """

    def __init__(
        self, model: KnnForImageClassification, visitors: Visitors, backend: str = "torch"
    ) -> None:
        self.model = model.eval()
        self.visitors = visitors
        self._encoder = PictureEncoder(model, backend)
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def look(self, path: str | None) -> Look:
        """Reads a picture and runs the backbone, once per content.

        Raises:
            SpaceError: if nothing was sent.
            BadImageError: if it is not a picture that is accepted.
        """
        with reading(path) as upload:
            features = self._known(upload.digest)
            if features is None:
                features = self._encoder([upload.image])
                self._keep(upload.digest, features)
            return Look(upload, features)

    def _known(self, digest: str) -> Tensor | None:
        with self._lock:
            features = self._features.get(digest)
            if features is not None:
                self._features.move_to_end(digest)
            return features

    def _keep(self, digest: str, features: Tensor) -> None:
        with self._lock:
            self._features[digest] = features
            if len(self._features) > _KEPT_FEATURES:
                self._features.popitem(last=False)

    def look_at_all(self, paths: Sequence[str]) -> list[Look]:
        """Several pictures, all or none.

        Raises:
            SpaceError: saying which one cannot be read, and why.
        """
        looks = []
        for number, path in enumerate(paths, start=1):
            try:
                looks.append(self.look(path))
            except BadImageError as error:
                raise SpaceError(f"Picture {number} of {len(paths)}: {error}.") from error
        return looks

    def explain(self, look: Look, settings: Settings, token: str) -> Explanation:
        """The answer for one visitor, from features alone."""
        with self._voter(token, settings) as model:
            found = model.explain(features=look.features)
        assert isinstance(found, list)
        return found[0]

    def near(self, row_id: int, count: int, token: str) -> tuple[Near, list[Near]]:
        """A stored row and the rows next to it.

        Raises:
            SpaceError: for a row that there is not.
        """
        with self._voter(token, Settings()) as model:
            store = model.datastore
            if not isinstance(store, Datastore) or not bool((store.ids == row_id).any()):
                raise SpaceError("Expected the id of a stored picture; this one is gone.")
            row, names = store.subset([row_id]), model.config.class_names
            hits = store.search(row.features, count, row.ids)
            own = Near(row_id, names[int(row.labels[0])], 1.0, None)
            columns = (hits.ids[0].tolist(), hits.labels[0].tolist(), hits.similarities[0].tolist())
            return own, [Near(i, names[n], s, None) for i, n, s in zip(*columns, strict=True)]

    def teach(
        self, paths: list[str] | None, label: str | None, token: str, key: str
    ) -> dict[str, Any]:
        """Adds pictures to what one visitor's model remembers; with the same key only once.

        Args:
            paths: of the files.
            label: a class, or a new one.
            token: of the visitor; empty makes one.
            key: any text of the client's own; empty makes the request one of its own.

        Returns:
            `visitor`, `ids`, `label`, `examples` (how many the visitor has), `repeated`, and
            `skipped`: places of the pictures that are known with this label already.

        Raises:
            SpaceError: beyond the limits, for a key of another request, or a picture that cannot be
                read; nothing was taught.
        """
        name = check_label(label)
        token = check_token(token) if token else new_token()
        key = check_key(key) or new_token()
        looks = self.look_at_all(check_count(paths))
        digest = request_digest(name, [look.digest for look in looks])
        with self.visitors.hold(token, create=True) as overlay:
            assert overlay is not None
            known = overlay.find(key, digest)
            taught = known or overlay.teach(
                torch.cat([look.features for look in looks]),
                name,
                [look.thumbnail for look in looks],
                key,
                digest,
                [look.content for look in looks],
            )
            return {
                "visitor": token, "ids": taught.ids, "label": taught.label,
                "examples": len(overlay.examples), "repeated": known is not None,
                "skipped": taught.skipped,
            }  # fmt: skip

    def forget(self, ids: Sequence[int], token: str) -> dict[str, Any]:
        """Removes pictures that a visitor taught.

        Returns:
            `ids`, and `examples`: how many are left.
        """
        with self.changing(token) as overlay:
            return {"ids": overlay.forget(ids), "examples": len(overlay.examples)}

    @contextmanager
    def changing(self, token: str) -> Iterator[Overlay]:
        """The overlay of a visitor who has taught something.

        Raises:
            SpaceError: if there is none.
        """
        with self.visitors.hold(token) as overlay:
            if overlay is None:
                raise SpaceError("Expected a visitor who has taught something; teach first.")
            yield overlay

    @contextmanager
    def _voter(self, token: str, settings: Settings) -> Iterator[KnnForImageClassification]:
        """The visitor's model with settings of its own; weights and rows are shared."""
        with self.visitors.hold(token) as overlay:
            model = self.model if overlay is None else overlay.model
            view = copy.copy(model)
            view.config = copy.copy(model.config)
            for name, value in checked(settings, self.model.config).items():
                setattr(view.config, name, value)
            yield view
            model.calibration = view.calibration  # counted once per version of the rows


def check_key(key: str) -> str:
    """Refuses keys that are too long to keep.

    Raises:
        SpaceError: with both lengths.
    """
    if len(key) > MAX_KEY:
        raise SpaceError(f"Expected a key of at most {MAX_KEY} characters, but got {len(key)}.")
    return key
