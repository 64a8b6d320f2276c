"""Features of pictures as they come, one or a few at a time, by any backend: for servers."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .backbone import extract
from .backend_choice import Work, check_backend, choose_backend, open_encoder
from .encoders import COMPILE, TORCH, Encoder
from .features import mark_of, settings_of

_ANSWERS = 100_000
"""Pictures that a server is expected to answer: worth the export of a graph."""


class PictureEncoder:
    """Makes features of decoded pictures; several threads may call it at the same time.

    Args:
        model: a `KnnForImageClassification` with an image processor; it is put into `eval()` mode
            and must stay in it.
        backend: `torch`, the model itself; `onnx` or `openvino`, whose features are checked against
            it first and may differ by 1e-2 at most; or `auto`, the fastest of those installed,
            measured once per model and machine.

    Attributes:
        backend: the one that was chosen.

    Raises:
        ValueError: without an image processor, or for a backend that cannot run this model;
            `compile` is refused, since threads share the model.
        ImportError: for a backend that is not installed.
    """

    def __init__(self, model: Any, backend: str = TORCH) -> None:
        if model.image_processor is None:
            raise ValueError("Expected a model with an `image_processor`, but it has none.")
        if check_backend(backend) == COMPILE:
            raise ValueError(
                "Expected `backend` to be torch, onnx, openvino or auto for a server, but got "
                "'compile'; choose onnx or openvino."
            )
        self._model = model.eval()
        sample = self._pixels(_patterns())
        self._shape = sample.shape[1:]
        work = Work(
            model.backbone, model.config, mark_of(model.backbone), "fp32", 1,
            settings_of(model.image_processor), lambda _: _ANSWERS, True, lambda _: sample,
        )  # fmt: skip
        self.backend = choose_backend(check_backend(backend), work)
        self._graph: Encoder | None = None
        if self.backend != TORCH:
            self._graph = open_encoder(self.backend, work)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Runs the processor and the backbone.

        Args:
            images: B >= 1 RGB pictures, as `decode_image` returns them.

        Returns:
            [B, D] float32 on the CPU, as in `pooler_output`.
        """
        pixels = self._pixels(images)
        if self._graph is not None and pixels.shape[1:] == self._shape:
            size = self._graph.batch_size
            return torch.cat([self._graph.encode(part)() for part in pixels.split(size)])
        model = self._model
        with torch.inference_mode():  # also what is no graph: pictures of another size
            moved = pixels.to(model.device, model.dtype)
            features = extract(model.backbone, moved, model.config)[0].float().cpu()
        return features.clone()

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        pixels: Tensor = self._model.image_processor(images=list(images), return_tensors="pt")[
            "pixel_values"
        ]
        return pixels


def _patterns() -> list[Image.Image]:
    """Pictures that a graph is compared on before there are any: smooth ones and noise."""
    made = [Image.effect_noise((256, 256), spread) for spread in (5, 30, 90)]
    made += [Image.linear_gradient("L"), Image.radial_gradient("L")]
    return [image.convert("RGB") for image in made]
