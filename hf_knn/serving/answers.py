"""What a server does with pictures: read in many threads, looked at and answered in batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.batches import CONTENT_BYTES, content_of
from ..data.decode import BadImageError
from ..data.uploads import UploadError, uploaded
from ..features.answering import Answer, Answerer, document_of
from ..features.encoders import Encoded
from ..model.pictures import Thumbnails, small_webp
from ..model.receipts import Receipt
from ..model.stored import StoredOtherwiseError
from ..store.backend import as_row_store
from .batches import Job
from .live import Change, LiveCheckpoint, ReplacedError, Version


class MissingError(ValueError):
    """Rows that are not there."""


class ConflictError(ValueError):
    """Something that the checkpoint as it is now speaks against."""


class Picture(NamedTuple):
    """A picture as it was sent, read.

    Attributes:
        name: what whoever sent it calls it.
        pixels: [3, H, W] float32; None if it cannot be read.
        content: its print, see `content_of`.
        thumbnail: a small WEBP, if the model keeps some.
        error: why it cannot be read.
    """

    name: str
    pixels: Tensor | None = None
    content: bytes = bytes(CONTENT_BYTES)
    thumbnail: bytes = b""
    error: str = ""


class Wish(NamedTuple):
    """What an answer is to say.

    Attributes:
        explain: also why.
        max_error: error rate at which it abstains; None always answers.
        top: classes, >= 1.
        neighbors: stored rows next to it, >= 0.
    """

    explain: bool
    max_error: float | None
    top: int
    neighbors: int


@dataclass
class Look(Job):
    """Pictures to be looked at.

    The result is a JSON document for each picture, or, without a wish, [M, D] features of all.

    Attributes:
        pictures: M >= 1 of them; without a wish, all can be read.
        maker: of the version that made pixels of them.
        wish: what is asked.
    """

    pictures: Sequence[Picture]
    maker: str
    wish: Wish | None = None
    readable: list[Picture] = field(init=False)

    def __post_init__(self) -> None:
        self.readable = [picture for picture in self.pictures if picture.pixels is not None]

    @property
    def size(self) -> int:
        """Pictures that go through the backbone."""
        return len(self.readable)


def read_pictures(version: Version, files: Sequence[tuple[str, bytes]]) -> list[Picture]:
    """Decodes what was sent, one picture at a time.

    Args:
        version: whose image processor makes pixels.
        files: name and content of each.
    """
    return [_read(version, name, content) for name, content in files]


def _read(version: Version, name: str, content: bytes) -> Picture:
    try:
        with uploaded(content) as image:
            small = b"" if version.model.thumbnails is None else small_webp(image)
            pixels = version.encoder.read([image])[0]
            return Picture(name, pixels, content_of(image), small)
    except BadImageError as error:
        return Picture(name, error=str(error))


def answer(live: LiveCheckpoint, looks: Sequence[Look], seen: Callable[[int], None]) -> None:
    """Gives some looks their results, all by the same version of the checkpoint.

    Args:
        live: what answers.
        looks: to be answered.
        seen: is told how many pictures went through the backbone together.
    """
    with live.answering() as version:
        for look in looks:
            if look.maker != version.maker:
                look.future.set_exception(ReplacedError())
        kept = [look for look in looks if not look.future.done()]
        pictures = [picture for look in kept for picture in look.readable]
        seen(len(pictures))
        features = _features(version, pictures)
        ends = np.cumsum([0, *(look.size for look in kept)]).tolist()
        parts = [features[a:b] for a, b in pairwise(ends)]
        by_kind: dict[tuple[bool, float | None], list[int]] = {}
        for place, look in enumerate(kept):
            if look.wish is None:
                look.future.set_result(parts[place])
            else:
                by_kind.setdefault(look.wish[:2], []).append(place)
        for (explain, max_error), places in by_kind.items():
            chosen = [kept[place] for place in places]
            try:
                answerer = Answerer(version.model, max_error, explain=explain, judge=True)
            except ValueError as error:  # an error rate that nobody has found a threshold for
                for look in chosen:
                    look.future.set_exception(UploadError(str(error)))
                continue
            _tell(version, answerer, chosen, torch.cat([parts[place] for place in places]))


def _features(version: Version, pictures: Sequence[Picture]) -> Tensor:
    """[B, D] of pictures that can be read; those of one size go through the backbone together."""
    by_shape: dict[torch.Size, list[int]] = {}
    for place, picture in enumerate(pictures):
        assert picture.pixels is not None
        by_shape.setdefault(picture.pixels.shape, []).append(place)
    config = version.model.config
    features = torch.empty(len(pictures), config.feature_dim + config.extra_dim)
    for places in by_shape.values():
        pixels = [pictures[place].pixels for place in places]
        features[places] = version.encoder.encode(torch.stack([p for p in pixels if p is not None]))
    return features


def _tell(version: Version, answerer: Answerer, looks: Sequence[Look], features: Tensor) -> None:
    """Documents of pictures whose features stand one after the other."""
    prints = np.empty((len(features), CONTENT_BYTES), np.uint8)
    whole = Encoded(features if len(features) else None, [*range(len(features))], [], prints)
    answers = iter(answerer(whole))
    for look in looks:
        wish, documents = look.wish, []
        assert wish is not None
        for picture in look.pictures:
            found = Answer(0, picture.error) if picture.error else next(answers)
            document = document_of(version.model, picture.name, found, wish.top, wish.neighbors)
            if not picture.error:
                best = float(found.blend.max())
                document |= {"p_value": found.typicality, "abstained": best < answerer.threshold}
            documents.append(document)
        look.future.set_result(documents)


def lesson(
    pictures: Sequence[Picture],
    features: Tensor,
    maker: str,
    label: str,
    again: bool,
    relabel: bool,
) -> Change:
    """What teaches pictures under one label.

    Args:
        pictures: M of them, all read.
        features: [M, D].
        maker: of the version that made the features.
        label: a class, or a new one.
        again: add pictures that are stored with their label once more.
        relabel: give those that are stored with another label this one.
    """
    prints = np.frombuffer(b"".join(one.content for one in pictures), np.uint8).copy()
    contents = torch.from_numpy(prints.reshape(len(pictures), CONTENT_BYTES))

    def change(version: Version) -> Receipt:
        if version.maker != maker:
            raise ReplacedError
        model = version.model
        if model.datastore is None:
            raise ConflictError("Expected a checkpoint with a datastore, but this one has none.")
        try:
            receipt = model.teach(
                features=features, contents=contents, labels=[label] * len(pictures),
                again=again, relabel=relabel,
            )  # fmt: skip
        except StoredOtherwiseError as error:
            raise ConflictError(
                f"{error.problem} Nothing was changed; send relabel=true to give them this label."
            ) from error
        if model.thumbnails is not None:
            skipped = set(receipt.skipped)
            taken = [one for place, one in enumerate(pictures) if place not in skipped]
            ids = receipt.ids[len(receipt.old_labels) :]
            small = {i: one.thumbnail for i, one in zip(ids, taken, strict=True) if one.thumbnail}
            joined = model.thumbnails.joined(Thumbnails(small))
            model.memory = replace(model.memory, thumbnails=joined)
        return receipt

    return change


def forgetting(ids: Sequence[int]) -> Change:
    """What forgets rows.

    Args:
        ids: of the rows, >= 1 of them.
    """
    wanted = torch.tensor(sorted(set(ids)), dtype=torch.int64)

    def change(version: Version) -> Receipt:
        store = version.model.datastore
        if store is None:
            raise ConflictError("Expected a checkpoint with a datastore, but this one has none.")
        try:
            as_row_store(store).rows_of(wanted)
        except ValueError as error:
            raise MissingError(str(error)) from error
        return version.model.forget(wanted)

    return change
