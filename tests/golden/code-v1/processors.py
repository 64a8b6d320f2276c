"""Image processors: found beside a model, and always of a kind that a checkpoint can hold."""

import math
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file

# the classes of processors are taken from `transformers` when one is made: they import slowly
_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def load_processor(name: str, config: PreTrainedConfig | None = None, **options: Any) -> Any:
    """The image processor that comes with a model, or None if there is none.

    Args:
        name: a folder or a Hub id.
        config: of the model; a timm model keeps its settings there.
        options: `revision`, `token`, `cache_dir`, ….
    """
    lookup = {key: value for key, value in options.items() if key != "trust_remote_code"}
    found = cached_file(
        name, IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False, **lookup
    )
    if found is not None:
        return transformers.AutoImageProcessor.from_pretrained(name, **options)
    settings = getattr(config, "pretrained_cfg", None)
    return _from_timm(settings) if settings else None


def portable(processor: Any) -> Any:
    """A processor that can be saved: timm's own cannot, so its settings move to one that can.

    Args:
        processor: an image processor or None.
    """
    settings = getattr(processor, "data_config", None)
    return processor if settings is None else _from_timm(settings)


def _from_timm(settings: Mapping[str, Any]) -> Any:
    """Timm's evaluation transform: resize to size / crop_pct, centre crop, normalise."""
    _, height, width = settings.get("input_size", (3, 224, 224))
    crop_share = settings.get("crop_pct") or 0.875
    resized = [math.floor(side / crop_share) for side in (height, width)]
    size = {"shortest_edge": min(resized)}
    if settings.get("crop_mode") == "squash" or height != width:
        size = {"height": resized[0], "width": resized[1]}
    return transformers.BitImageProcessor(
        size=size,
        crop_size={"height": height, "width": width},
        resample=_RESAMPLING.get(settings.get("interpolation", "bicubic"), 3),
        image_mean=list(settings.get("mean", (0.485, 0.456, 0.406))),
        image_std=list(settings.get("std", (0.229, 0.224, 0.225))),
    )
