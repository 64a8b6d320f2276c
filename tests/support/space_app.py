"""The Space around a tiny model, running in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from hf_knn import Datastore, KnnForImageClassification
from hf_knn_space.page.app import launch, make_app
from hf_knn_space.page.contents import Page
from hf_knn_space.pictures import FolderPictures
from hf_knn_space.service import Service
from hf_knn_space.visitors import Visitors
from support.pictures import NAMES, SIDE, encoded, picture, small_model

KNOWN = NAMES[:3]
"""Classes of the published model."""

PER_CLASS = 8


class Running(NamedTuple):
    """A page that can be visited.

    Attributes:
        url: of the page.
        page: what answers.
    """

    url: str
    page: Page


def published(folder: Path, head: str = "linear") -> KnnForImageClassification:
    """A model whose rows are pictures of `folder`, which is filled."""
    model = small_model(KNOWN, head=head, k=5)
    paths, labels = [], []
    for label, name in enumerate(KNOWN):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for seed in range(PER_CLASS):
            path = folder / name / f"{seed}.png"
            path.write_bytes(encoded(picture(label, seed)))
            paths.append(path)
            labels.append(label)
    explained = features_of(model, paths)
    model.datastore = Datastore.from_features(
        explained, labels, paths=[str(path.relative_to(folder)) for path in paths]
    )
    return model


def features_of(model: KnnForImageClassification, paths: list[Path]) -> torch.Tensor:
    """[M, D] by the plain model, one picture after the other."""
    from PIL import Image

    rows = []
    for path in paths:
        pixels = model.image_processor(images=[Image.open(path)], return_tensors="pt")
        with torch.no_grad():
            rows.append(model(pixel_values=pixels["pixel_values"]).pooler_output)
    return torch.cat(rows)


def write_picture(path: Path, label: int, seed: int = 500, size: int = SIDE) -> Path:
    """A picture that the model has not seen."""
    path.write_bytes(encoded(picture(label, seed, (size, size))))
    return path


@contextmanager
def running(folder: Path, data: Path | None = None) -> Iterator[Running]:
    """The page on a port of its own, closed at the end."""
    model = published(folder)
    page = Page.of(Service(model, Visitors(model, data)), FolderPictures(folder), [])
    app = make_app(page)
    try:
        _, url, _ = launch(app, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
        yield Running(url, page)
    finally:
        app.close(verbose=False)
