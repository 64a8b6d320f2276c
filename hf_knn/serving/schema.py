"""What the requests and answers of a server look like: the models of its OpenAPI page."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from ..data.uploads import MAX_FILES, MAX_LABEL
from ..features.answering import CLASSES, NEIGHBORS

MULTIPART, JSON = "multipart/form-data", "application/json"
FILES, IMAGES = "files", "images"
"""Where the pictures are, in multipart and in JSON."""

MOST_IDS = 10_000
LARGEST_ID = 2**63 - 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AnswerOptions(_Strict):
    """What an answer is to say."""

    top: Annotated[int, Field(ge=1, le=10_000, description="Classes.")] = CLASSES
    neighbors: Annotated[
        int, Field(ge=0, le=10_000, description="Stored pictures next to it, of those that vote.")
    ] = NEIGHBORS
    max_error: Annotated[
        float | None,
        Field(gt=0, lt=1, description="Error rate at which it abstains, one that was tuned."),
    ] = None


class TeachOptions(_Strict):
    """What is taught."""

    label: Annotated[
        str, Field(description=f"A class, or a new one; at most {MAX_LABEL} characters.")
    ]
    again: Annotated[
        bool, Field(description="Also add pictures that are stored with this label.")
    ] = False
    relabel: Annotated[
        bool, Field(description="Give pictures that are stored with another label this one.")
    ] = False


class _Images(_Strict):
    images: Annotated[
        list[str],
        Field(
            description=f"1 to {MAX_FILES} files as base64; no addresses: nothing is fetched.",
            json_schema_extra={"minItems": 1, "maxItems": MAX_FILES},
        ),
    ]


class AnswerRequest(AnswerOptions, _Images):
    """Pictures to be answered."""


class TeachRequest(TeachOptions, _Images):
    """Pictures to be taught."""


class ForgetRequest(_Strict):
    """Rows to be forgotten."""

    ids: Annotated[
        list[Annotated[StrictInt, Field(ge=0, le=LARGEST_ID)]],
        Field(min_length=1, max_length=MOST_IDS, description="As a receipt or an answer has them."),
    ]


class ClassShare(BaseModel):
    """A class, and what head and neighbours give it."""

    label: str
    probability: float
    head: float | None
    knn: float | None


class StoredPicture(BaseModel):
    """A stored picture that voted."""

    label: str
    similarity: float
    id: int
    path: str


class Document(BaseModel):
    """The answer to one picture, as by `hf-knn predict --json`; or why it cannot be read."""

    image: str
    answer: str | None
    classes: list[ClassShare]
    neighbors: list[StoredPicture]
    p_value: float | None = None
    abstained: bool | None = None
    error: str | None


class SharedPicture(StoredPicture):
    """A stored picture and its part in the vote."""

    share: float


class ReasonedDocument(Document):
    """The answer to one picture, and why."""

    neighbors: list[SharedPicture]  # type: ignore[assignment]
    answers: bool | None = None
    margin: float | None = None
    typicality: float | None = None
    is_typical: bool | None = None
    flip: dict[str, Any] | None = None
    notices: list[str] | None = None


class ReceiptDocument(BaseModel):
    """What a change did, as by `hf-knn teach --json`; it is saved."""

    action: str
    ids: list[int]
    labels: list[str]
    rows_before: int
    rows_after: int
    hash_before: str
    hash_after: str
    scope: str
    at: str
    old_labels: list[str]
    new_classes: list[str]
    notes: list[str]
    skipped: list[int]


class Health(BaseModel):
    """Whether it answers."""

    status: str
    rows: int
    classes: list[str]
    backend: str
    can_be_changed: bool
    version: str


class Problem(BaseModel):
    """Why there is no answer, in a sentence."""

    error: str


def body(request: type[BaseModel], options: type[BaseModel] | None) -> dict[str, Any]:
    """The body of a request, for OpenAPI.

    Args:
        request: in JSON.
        options: of multipart; None takes no files.
    """
    content = {JSON: {"schema": request.model_json_schema()}}
    if options is not None:
        form = options.model_json_schema()
        files = {"type": "string", "format": "binary", "contentMediaType": "image/*"}
        form["properties"] = {
            FILES: {"type": "array", "items": files, "minItems": 1, "maxItems": MAX_FILES},
            **form["properties"],
        }
        form["required"] = [FILES, *form.get("required", [])]
        content = {MULTIPART: {"schema": form}, **content}
    return {"requestBody": {"required": True, "content": content}}
