"""What a page needs, from what whoever starts it names or lies beside app.py."""

import re
import tempfile
from pathlib import Path

import torch
from torch import nn

from hf_knn import KnnForImageClassification

from .builtin import open_builtin
from .hub_pictures import HubPictures
from .page.contents import Page
from .pictures import FolderPictures, NoPictures, Pictures, ZipPictures
from .service import Service
from .visitors import Visitors

_SAMPLES = 6


def open_page(
    beside: Path | None,
    checkpoint: str | None,
    pictures: str | None,
    data: str | None,
    backend: str = "torch",
    device: str = "cpu",
) -> Page:
    """Opens a model, or the embedded one.

    Args:
        beside: the folder of app.py, which may hold `model`, `model.txt`, `pictures.zip` and
            `examples`; None for none.
        checkpoint: a folder or a Hub id; None takes the `model` beside app.py or what its
            `model.txt` names, else the embedded one.
        pictures: the folder that the model was trained on, or `none`; None takes the `pictures.zip`
            beside app.py, else the dataset on the Hub that the rows came from.
        data: where to keep what visitors teach; None keeps it in memory.
        backend: what makes features, see `hf_knn.PictureEncoder`.
        device: where; `auto` is a GPU if there is one, else the processor.

    Raises:
        ValueError: for a damaged checkpoint, or a backend that cannot run it.
        ImportError: for a backend that is not installed.
        OSError: if something is not there.
    """
    checkpoint = checkpoint or _model_in(beside)
    if checkpoint is None:
        model, samples = _open_embedded()
    else:
        model = KnnForImageClassification.from_pretrained(checkpoint)
        examples = [] if beside is None else (beside / "examples").glob("*.*")
        samples = sorted(map(str, examples))[:_SAMPLES]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    nn.Module.to(model, torch.device(device))
    visitors = Visitors(model, None if data is None else Path(data))
    service = Service(model, visitors, backend)
    return Page.of(service, find_pictures(model, pictures, beside), samples)


def find_pictures(
    model: KnnForImageClassification, given: str | None, beside: Path | None = None
) -> Pictures:
    """Where pictures are that the checkpoint does not hold.

    Args:
        model: what remembers the rows.
        given: see `open_page`.
        beside: see `open_page`.
    """
    if given == "none":
        return NoPictures()
    if given is not None:
        return FolderPictures(Path(given))
    if beside is not None and (beside / "pictures.zip").is_file():
        return ZipPictures(beside / "pictures.zip")
    source = {} if model.datastore is None else model.datastore.source
    is_pinned = re.fullmatch("[0-9a-f]{40}", source.get("revision", ""))
    return HubPictures(source) if is_pinned and model.thumbnails is None else NoPictures()


def _model_in(beside: Path | None) -> str | None:
    """The checkpoint that was pushed with the page, or its name."""
    if beside is None:
        return None
    if (beside / "model").is_dir():
        return str(beside / "model")
    name = beside / "model.txt"
    return name.read_text(encoding="utf-8").strip() if name.is_file() else None


def _open_embedded() -> tuple[KnnForImageClassification, list[str]]:
    """The embedded model, and paths of pictures that it was not trained on."""
    embedded = open_builtin()
    folder = Path(tempfile.mkdtemp(prefix="hf-knn-samples-"))
    for number, image in enumerate(embedded.samples):
        image.save(folder / f"{number}.png")
    return embedded.model, sorted(map(str, folder.iterdir()))
