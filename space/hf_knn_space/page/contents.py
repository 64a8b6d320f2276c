"""What the page shows, for all of its tabs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..explorer import Explorer
from ..pictures import Pictures
from ..service import Service
from .explore_views import detail_page
from .markup import FindPicture

_NEAR = 8


class Page(NamedTuple):
    """What is shown.

    Attributes:
        service: answers.
        pictures: of published rows.
        samples: pictures to begin with, as paths of files.
        explorer: looks through the published rows.
    """

    service: Service
    pictures: Pictures
    samples: list[str]
    explorer: Explorer

    @classmethod
    def of(cls, service: Service, pictures: Pictures, samples: list[str]) -> "Page":
        """The page of a model.

        Args:
            service: answers.
            pictures: of published rows.
            samples: see `Page`.
        """
        return cls(service, pictures, samples, Explorer(service.model))

    def near(self, row_id: int, token: str) -> str:
        """A stored picture, large, with what is next to it.

        Args:
            row_id: of a row that the visitor can see.
            token: of the visitor.

        Raises:
            SpaceError: for a row that there is not.
        """
        own, others = self.service.near(row_id, _NEAR, token)
        ids = [row_id, *(other.row_id for other in others)]
        return detail_page(own, others, self.picture_of(token, ids))

    def picture_of(self, token: str, ids: Sequence[int]) -> FindPicture:
        """How one visitor sees some rows; where their pictures lie is asked for at once.

        Args:
            token: of the visitor; empty for nobody's.
            ids: of the rows that will be shown; any other has no picture.
        """
        with self.service.visitors.hold(token) as overlay:
            taught = {} if overlay is None else overlay.examples
            own = {i: taught[i].thumbnail for i in ids if i in taught}
        kept = self.service.model.thumbnails
        at_hand = {i: own.get(i) or (None if kept is None else kept.get(i)) for i in ids}
        paths = self._paths_of([i for i, picture in at_hand.items() if picture is None])

        def find(row_id: int) -> bytes | None:
            known = at_hand.get(row_id)
            if known is not None or row_id not in paths:
                return known
            return self.pictures.find(row_id, paths[row_id])

        return find

    def _paths_of(self, ids: list[int]) -> dict[int, str]:
        """Where the pictures of published rows lie; ids of no such row are left out."""
        store = self.service.model.datastore
        if store is None or not ids:
            return {}
        known = store.ids[torch.isin(store.ids, torch.tensor(ids))].tolist()
        return dict(zip(known, store.paths_of(known), strict=True))
