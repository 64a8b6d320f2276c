"""What the page sends, checked before anything of it is believed."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .questions import Answer, Kept, Named, Skipped

Numbers = Annotated[list[int], Field(min_length=1)]
"""Of pictures; none at all would mean all of them."""

_PathOf = Callable[[int], Path]
_Kind = TypeVar("_Kind")


class Sent(BaseModel):
    """What is sent about a question: which one, since another tab may have answered it.

    Attributes:
        run: which start of the server has asked.
        number: of the question; None if there was none.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    run: str
    number: int | None


class SentNamed(Sent):
    """Pictures are of a class."""

    kind: Literal["named"]
    label: str
    pictures: Numbers

    def answer(self, path_of: _PathOf) -> Answer:
        """It, with pictures instead of their numbers."""
        return Named(self.label, tuple(map(path_of, self.pictures)))


class SentSkipped(Sent):
    """Pictures are skipped."""

    kind: Literal["skipped"]
    pictures: Numbers

    def answer(self, path_of: _PathOf) -> Answer:
        """It, with pictures instead of their numbers."""
        return Skipped(tuple(map(path_of, self.pictures)))


class SentKept(Sent):
    """One of several copies is kept."""

    kind: Literal["kept"]
    picture: int
    dropped: Numbers

    def answer(self, path_of: _PathOf) -> Answer:
        """It, with pictures instead of their numbers."""
        return Kept(path_of(self.picture), tuple(map(path_of, self.dropped)))


class SentFinish(Sent):
    """Everything is to be written: the list, and with it a folder of copies or links, or none."""

    kind: Literal["copies", "links", "list"]
    with_model: bool


SentAnswer = Annotated[SentNamed | SentSkipped | SentKept, Field(discriminator="kind")]
ANSWER: TypeAdapter[SentAnswer] = TypeAdapter(SentAnswer)
UNDO: TypeAdapter[Sent] = TypeAdapter(Sent)
FINISH: TypeAdapter[SentFinish] = TypeAdapter(SentFinish)


def read_sent(kind: TypeAdapter[_Kind], body: bytes) -> _Kind:
    """What a body of JSON says.

    Args:
        kind: what is expected.
        body: as it was sent.

    Raises:
        ValueError: naming what is wrong, for anything else.
    """
    try:
        return kind.validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise ValueError(
            f"Expected what the page sends, but {place}: {first['msg']}; load the page again."
        ) from error
