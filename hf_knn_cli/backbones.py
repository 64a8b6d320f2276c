"""The backbones that have a short name: the table of `hf_knn`, read without importing it."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Backbone:
    """A pretrained vision model that is known by a short name: a line of backbones.json.

    Attributes:
        name: the short one.
        title: what it is, in one line.
        place: its id on the Hub; of an offline one the package that holds its weights.
        architecture: what timm calls it.
        features: D, the numbers that it makes of a picture.
        image_size: side of the square that it sees, in pixels.
        parameters: in millions, counted.
        megabytes: of the download, about.
        gflops: thousand million operations for one picture, counted; a multiply-add is two.
        milliseconds: of one processor thread for one picture, measured with PyTorch in float32 on
            a machine with AVX2 and without bfloat16; None was not measured.
        licence: of its weights.
        is_gated: whether one has to ask for access on its page first.
        is_offline: whether an installed package holds its weights, so that no network is needed.
        is_convolutional: whether it takes pictures of any size as it is.
        note: what else to know; empty if nothing.
    """

    name: str
    title: str
    place: str
    architecture: str
    features: int
    image_size: int
    parameters: float
    megabytes: int
    gflops: float
    milliseconds: int | None
    licence: str
    is_gated: bool
    is_offline: bool
    is_convolutional: bool
    note: str


@cache
def known_backbones() -> dict[str, Backbone]:
    """All of them, by their short names."""
    found = find_spec("hf_knn")
    assert found is not None
    assert found.origin is not None
    table = Path(found.origin).with_name("model") / "backbones.json"
    return {line["name"]: Backbone(**line) for line in json.loads(table.read_text("utf-8"))}
