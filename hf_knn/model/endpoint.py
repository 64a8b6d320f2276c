"""What Inference Endpoints needs beside a checkpoint: handler.py, and what it has to install.

Both say in their first line who wrote them, so that a push knows them again: it writes them anew
where that is asked for, takes away what an earlier push left, and leaves a user's own alone.
"""

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..data import pixels as pixels_of_a_picture
from ..data.uploads import MAX_FILES, MAX_UPLOADED_FILE

if TYPE_CHECKING:
    from .modeling import KnnForImageClassification

logger = logging.getLogger(__name__)

HANDLER_NAME, REQUIREMENTS_NAME = "handler.py", "requirements.txt"
MARK = "# Made by `hf-knn push --endpoint`."

_ALWAYS = ("transformers>=5.23,<6", "safetensors>=0.6,<1", "torchvision", "numpy>=2,<3",
           "pillow>=11.3,<14", "filelock")  # fmt: skip
_TIMM = "timm>=1.0.20,<2"


def write_endpoint(model: "KnnForImageClassification", folder: Path) -> None:
    """Writes both files into a checkpoint.

    Args:
        model: that it answers with.
        folder: of the checkpoint.
    """
    is_timm = model.backbone.config.model_type == "timm_wrapper"
    needed = [*_ALWAYS, _TIMM] if is_timm else _ALWAYS
    (folder / HANDLER_NAME).write_text(f"{MARK}\n{_HANDLER}", encoding="utf-8")
    (folder / REQUIREMENTS_NAME).write_text("\n".join([MARK, *needed, ""]), encoding="utf-8")


def settle_endpoint(read: Callable[[str], str | None], is_wanted: bool) -> list[str]:
    """What of a repository's own files a push takes away; that is logged.

    Args:
        read: reads a file of the repository by name; None if it is not there.
        is_wanted: the push brings new ones.

    Returns:
        Names of files that an earlier push wrote.

    Raises:
        ValueError: if the push would replace a file that somebody else wrote.
    """
    texts = {name: read(name) for name in (HANDLER_NAME, REQUIREMENTS_NAME)}
    there = {name: text for name, text in texts.items() if text is not None}
    ours = [name for name, text in there.items() if text.startswith(MARK)]
    others = [name for name in there if name not in ours]
    if not is_wanted:
        if ours:
            logger.warning(
                "%s of an earlier push --endpoint were removed from the repository, since this "
                "push brings none; push with --endpoint to keep them.", " and ".join(ours),
            )  # fmt: skip
        return ours
    if others:
        raise ValueError(
            f"Expected a repository without a {' and '.join(others)} of its own, but it has one "
            "that hf-knn did not write; remove or rename it there, or push without --endpoint."
        )
    return []


_HANDLER = '''"""Answers pictures on Inference Endpoints by head, neighbours and blend."""

import base64
import binascii
import io
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

# ---- how hf_knn reads a picture ----

#PIXELS#
# ---- what is asked, and what is answered ----

MOST_PICTURES, MOST_BYTES = #FILES#, #BYTES#
MOST_PIXELS, MOST_JPEG_PIXELS = 64 * 10**6, 200 * 10**6
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
Image.MAX_IMAGE_PIXELS = MOST_JPEG_PIXELS


class EndpointHandler:
    """Opens the checkpoint once, and answers requests.

    Args:
        path: the folder of the repository.
    """

    def __init__(self, path: str = "") -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor = AutoImageProcessor.from_pretrained(path)
        model = AutoModelForImageClassification.from_pretrained(path, trust_remote_code=True)
        self.model = model.eval().to(device)

    def __call__(self, data: dict[str, Any]) -> Any:
        """Answers a request.

        Args:
            data: `inputs` is a picture, or up to #FILES# in a list: opened, as the content of a
                file, or that as base64; no address, since nothing is fetched. `parameters` may
                have `top` (classes, 5), `neighbors` (stored pictures next to it, 5) and
                `max_error` (an error rate that was tuned: `abstained` says so below it).

        Returns:
            A document for each picture, as `hf-knn predict --json` has it, with `error` for one
            that cannot be read; `error` alone for a request that cannot be understood.
        """
        try:
            top, neighbors, threshold = self._parameters(data.get("parameters") or {})
            inputs = data.get("inputs")
            sent = inputs if isinstance(inputs, list) else [inputs]
            if not 1 <= len(sent) <= MOST_PICTURES:
                raise ValueError(f"Expected 1 to {MOST_PICTURES} pictures, but got {len(sent)}.")
        except (ValueError, TypeError, AttributeError) as error:
            return {"error": str(error)}
        pictures, problems = [], {}
        for number, one in enumerate(sent):
            try:
                pictures.append(_read(one))
            except DECODE_ERRORS as error:
                problems[number] = str(error) or type(error).__name__
        found = iter(self._answers(pictures, top, neighbors, threshold) if pictures else [])
        blank = {"answer": None, "classes": [], "neighbors": []}
        return [
            {"image": f"picture {n + 1}"}
            | (blank | {"error": problems[n]} if n in problems else next(found) | {"error": None})
            for n in range(len(sent))
        ]

    def _parameters(self, given: dict[str, Any]) -> tuple[int, int, float]:
        known = {"top": 5, "neighbors": 5, "max_error": None}
        odd = sorted(set(given) - set(known))
        if odd:
            raise ValueError(f"Expected parameters among {list(known)}, but got {odd}.")
        values = known | given
        for name, least in (("top", 1), ("neighbors", 0)):
            if type(values[name]) is not int or values[name] < least:
                raise ValueError(f"Expected `{name}` to be a whole number from {least} on.")
        rate, tuned = values["max_error"], self.model.config.answer_thresholds
        if rate is None:
            return values["top"], values["neighbors"], 0.0
        if f"{float(rate):g}" not in tuned:
            raise ValueError(f"Expected `max_error` to be one of {sorted(map(float, tuned))}.")
        return values["top"], values["neighbors"], tuned[f"{float(rate):g}"]

    @torch.inference_mode()
    def _answers(
        self, pictures: list[Any], top: int, neighbors: int, threshold: float
    ) -> list[dict[str, Any]]:
        pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        parameter = next(self.model.parameters())
        output = self.model(
            pixel_values=pixels.to(parameter.device, parameter.dtype), return_neighbors=True
        )
        names, store = self.model.config.class_names, self.model.datastore
        blend = output.logits.float().exp().cpu()
        head = output.head_logits.float().softmax(-1).cpu()
        knn = None if output.knn_log_probs is None else output.knn_log_probs.float().exp().cpu()
        near = output.neighbors
        documents = []
        for row, shares in enumerate(blend):
            order = shares.argsort(descending=True, stable=True).tolist()[:top]
            stored = []
            if near is not None and store is not None:
                columns = (near.labels[row], near.similarities[row], near.ids[row])
                stored = [
                    {"label": names[label], "similarity": how, "id": i, "path": store.path_of(i)}
                    for label, how, i in zip(*(part.tolist() for part in columns))
                ]
            documents.append({
                "answer": names[order[0]],
                "classes": [
                    {
                        "label": names[c],
                        "probability": float(shares[c]),
                        "head": float(head[row, c]) if c < head.shape[1] else None,
                        "knn": None if knn is None else float(knn[row, c]),
                    }
                    for c in order
                ],
                "neighbors": stored[:neighbors],
                "abstained": float(shares.max()) < threshold,
            })
        return documents


def _read(sent: Any) -> Any:
    """A picture as it was sent, in RGB, upright, over white."""
    if isinstance(sent, Image.Image):
        _check(sent)
        return to_rgb(sent)
    if isinstance(sent, str):
        text = sent.partition(",")[2] if sent.startswith("data:") else sent
        try:
            sent = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("it is no file as base64; an address is not followed") from None
    if not isinstance(sent, bytes | bytearray):
        raise ValueError("it is no picture; send the content of a file, or that as base64")
    if len(sent) > MOST_BYTES:
        raise ValueError(f"the file has {len(sent)} bytes, more than {MOST_BYTES}")
    with Image.open(io.BytesIO(sent), formats=FORMATS) as opened:
        _check(opened)
        reduce_jpeg(opened)
        return to_rgb(opened)


def _check(image: Any) -> None:
    most = MOST_JPEG_PIXELS if kind_of(image) == "JPEG" else MOST_PIXELS
    if image.width * image.height > most:
        raise ValueError(f"the picture has {image.width} x {image.height} pixels, more than {most}")
'''
_HANDLER = (
    _HANDLER.replace("#PIXELS#", inspect.getsource(pixels_of_a_picture))
    .replace("#FILES#", str(MAX_FILES))
    .replace("#BYTES#", str(MAX_UPLOADED_FILE))
)
