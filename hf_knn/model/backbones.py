"""A backbone from wherever, with its image processor: opened, copied, frozen, told apart."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
)
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file

from ..core.backbone import (
    build_backbone,
    count_prefix_tokens,
    hash_tensors,
    model_class,
    pool,
)
from ..core.config import Head, KnnConfig, Pooling
from .known import find_known, open_offline

AUTO_HEAD = "auto"
"""As `head`: the training chooses the best of several, unless one is named."""

# the classes of processors are taken from `transformers` when one is made: they import slowly
_PROBES = 2  # a model that packs all pictures into one row is found by the second one
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


def load_backbone(name: str, **hub_options: Any) -> PreTrainedModel:
    """Loads a pretrained vision model.

    Args:
        name: a Hub id, a local folder, or the name of a timm model (loaded as `timm/<name>`).
        hub_options: `revision`, `token`, `cache_dir`, `local_files_only`, `trust_remote_code`, ….

    Raises:
        ValueError: for a model without a vision tower.
        OSError: if it cannot be found.
    """
    hub_options.setdefault("use_safetensors", True)  # a pickle is not opened unless asked for
    lookup = {key: value for key, value in hub_options.items() if key != "use_safetensors"}
    config = AutoConfig.from_pretrained(name, **lookup)
    vision_config = getattr(config, "vision_config", None)
    if vision_config is None:
        return AutoModel.from_pretrained(name, config=config, **hub_options)
    if type(vision_config) not in MODEL_MAPPING:
        raise ValueError(
            f"Expected {name!r} to have a vision tower that loads alone, "
            f"but {type(vision_config).__name__} does not; choose another backbone."
        )
    return model_class(vision_config).from_pretrained(name, **hub_options)


def open_backbone(
    name: str, processor: Any = None, **hub_options: Any
) -> tuple[PreTrainedModel, Any, str | None]:
    """A pretrained vision model and what comes with it.

    Args:
        name: a local folder, a short name (`dinov2-s`, see `hf-knn backbones`), a Hub id, or the
            name of a timm model.
        processor: an image processor; None loads the one that comes with it.
        hub_options: `revision`, `token`, `cache_dir`, `trust_remote_code`, ….

    Returns:
        The model, an image processor (or None), and the model's id if it lies on the Hub.

    Raises:
        ImportError: for a short name whose weights lie in a package that is not installed.
    """
    is_here = Path(name).exists()
    known = None if is_here else find_known(name)
    if known is not None and known.is_offline:
        model, own = open_offline(known)
        return model, processor or own, None
    if known is not None:
        name = known.place
    elif "/" not in name and not is_here:
        name = f"timm/{name}"
    model = load_backbone(name, **hub_options)
    if processor is None:
        processor = load_processor(name, model.config, **hub_options)
    return model, processor, None if is_here else name


def copy_weights(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Copies the weights of a backbone, all but those of a pooler that the target does not have.

    Raises:
        ValueError: naming weights that are missing or too many.
    """
    report = target.load_state_dict(source.state_dict(), strict=False)
    unexpected = [key for key in report.unexpected_keys if "pooler" not in key]
    if report.missing_keys or unexpected:
        raise ValueError(
            f"Expected the backbone's weights to fit {type(target).__name__}, but "
            f"{report.missing_keys[:5]} are missing and {unexpected[:5]} are too many."
        )


def detached_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a backbone's configuration without the path or repo it came from.

    A masked autoencoder becomes the plain ViT it is without its mask: it would drop three quarters
    of the patches at random, in `eval()` mode too.

    Args:
        config: of a vision model.

    Raises:
        ValueError: for a model that is not a vision model alone.
    """
    if getattr(config, "vision_config", None) is not None:
        raise ValueError(
            f"Expected a vision backbone, but got {type(config).__name__}, which has other towers "
            "too; pass its vision tower (`model.vision_model`), or its id or folder."
        )
    if config.model_type == "vit_mae":
        known = set(ViTConfig().to_dict())
        values = {name: value for name, value in config.to_dict().items() if name in known}
        config = ViTConfig.from_dict(values | {"model_type": "vit"})
    config = copy.deepcopy(config)
    config.name_or_path = ""
    if hasattr(config, "auto_map"):
        del config.auto_map
    return config


def default_pooling(backbone: PreTrainedModel) -> str:
    """The pooling that suits a model: `cls` where there is a CLS token, else `mean`."""
    output, pixel_values = _probe(backbone)
    hidden = output.last_hidden_state
    if hidden.ndim == 3 and count_prefix_tokens(backbone, pixel_values, hidden.shape[1]):
        return str(Pooling.CLS)
    return str(Pooling.MEAN)


def measure_width(backbone: PreTrainedModel, pooling: str | None = None) -> int:
    """Width D of one pooled feature, by running the model once on an empty image.

    Args:
        backbone: the vision model.
        pooling: how its output is pooled; None as `default_pooling` says.
    """
    output, pixel_values = _probe(backbone)
    return pool(backbone, output, pixel_values, pooling or default_pooling(backbone)).shape[1]


def complete(config: KnnConfig) -> KnnConfig:
    """The configuration, with the widths that it leaves open filled in.

    Args:
        config: of a model, which is changed: a backbone without weights tells the widths.

    Raises:
        ValueError: for a backbone that cannot be one, or that tells no width without weights.
    """
    if config.feature_dim:
        return config
    with torch.device("meta"):
        backbone = build_backbone(config.backbone, (config.pooling, config.store_pooling))
    if config.store_pooling != config.pooling and config.knn_feature_dim is None:
        config.knn_feature_dim = measure_width(backbone, config.store_pooling)
    config.feature_dim = measure_width(backbone, config.pooling)
    config.fill_head()
    return config


def named_head(head: str | None, hidden_sizes: list[int] | None) -> str | None:
    """The head that somebody named, or None.

    Args:
        head: as given; `auto` names none.
        hidden_sizes: which only one head has.
    """
    if head not in (None, AUTO_HEAD):
        return str(head)
    return str(Head.MLP) if hidden_sizes else None


def config_for(backbone: PreTrainedModel, pooling: str | None, **values: Any) -> KnnConfig:
    """The configuration of a new model on a backbone.

    Args:
        backbone: what will make features.
        pooling: how its output becomes one; None chooses.
        values: further `KnnConfig` values.

    Raises:
        ValueError: for a backbone that cannot be one, or a bad value.
    """
    config = detached_config(backbone.config)  # refuses some, before they are tried
    if config.model_type != backbone.config.model_type:  # what it is without its mask
        with torch.device("meta"):
            backbone = build_backbone(config, list(Pooling))
    pooling = pooling or default_pooling(backbone)
    other = values.get("knn_pooling")
    return KnnConfig(
        backbone_config=config,
        feature_dim=measure_width(backbone, pooling),
        knn_feature_dim=None if other is None else measure_width(backbone, other),
        pooling=pooling,
        **values,
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module has the mode it had."""
    with in_eval_mode(model), torch.inference_mode():
        yield


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, also for threads that are started; then each module has the mode it had."""
    in_training = [module for module in model.modules() if module.training]
    if in_training:  # else nothing is written: threads may share the model
        model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


@contextmanager
def keeping_trainable(module: nn.Module) -> Iterator[None]:
    """Afterwards each parameter is trained or frozen as it was before."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, was_trained in before:
            parameter.requires_grad_(was_trained)


def freeze_all_but_last(backbone: nn.Module, count: int) -> None:
    """Leaves the last blocks of a backbone, and what comes after them, to be trained.

    The blocks are the list of modules that holds the most weights: the layers of a transformer, the
    stages of a CNN. Embeddings, stem and earlier blocks are frozen.

    Args:
        backbone: a vision model.
        count: how many blocks stay trainable, >= 1.

    Raises:
        ValueError: for more blocks than there are, or a backbone without blocks.
    """
    lists = [
        module
        for module in backbone.modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
    ]
    blocks = max(lists, key=_count_weights, default=None)
    if blocks is None or not 1 <= count <= len(blocks):
        found = 0 if blocks is None else len(blocks)
        raise ValueError(f"Expected `trainable_blocks` to be in [1, {found}], but got {count}.")
    first = next(iter(blocks[len(blocks) - count].parameters()))
    is_frozen = True
    for parameter in backbone.parameters():  # in the order in which modules were made
        is_frozen = is_frozen and parameter is not first
        parameter.requires_grad_(not is_frozen)


def freeze_statistics(module: nn.Module) -> None:
    """Puts batch norms whose weights are frozen into evaluation mode: their statistics stay."""
    for part in module.modules():
        is_norm = isinstance(part, nn.modules.batchnorm._BatchNorm) and part.affine
        if is_norm and not part.weight.requires_grad:
            part.eval()


def _count_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def weight_marks(module: nn.Module) -> str:
    """Two fingerprints of a module's weights in memory, one of which outlives a cast.

    Rounding to bfloat16 gives the same for float32 weights and their cast to bfloat16, rounding to
    float16 the same for their cast to float16; training changes both.
    """
    state = sorted(module.state_dict().items())
    kept = [(name, value) for name, value in state if not name.endswith("num_batches_tracked")]
    marks = [
        hash_tensors((name, _rounded(value, dtype)) for name, value in kept)
        for dtype in (torch.bfloat16, torch.float16)
    ]
    return ":".join(marks)


def same_weights(first: str, second: str) -> bool:
    """Whether two `weight_marks` are of the same weights, up to a cast."""
    return any(a == b for a, b in zip(first.split(":"), second.split(":"), strict=True))


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _probe(backbone: PreTrainedModel) -> tuple[Any, Tensor]:
    """What a backbone makes of empty pictures; a ValueError says why it is none."""
    height, width = _image_size(backbone.config)
    channels = getattr(backbone.config, "num_channels", 3)
    parameter = next(backbone.parameters())
    shape = (_PROBES, channels, height, width)
    pixels = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
    if backbone.main_input_name != "pixel_values":
        raise _no_backbone(backbone, f"takes `{backbone.main_input_name}`")
    try:
        with evaluating(backbone):
            output = backbone(pixel_values=pixels, return_dict=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any model that anybody wrote
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise _no_backbone(backbone, f"cannot do with `pixel_values` alone ({reason})") from error
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.ndim not in (3, 4) or len(hidden) != _PROBES:
        found = type(hidden).__name__ if not isinstance(hidden, Tensor) else tuple(hidden.shape)
        raise _no_backbone(backbone, f"made `last_hidden_state` {found} of {_PROBES} pictures")
    return output, pixels


def _no_backbone(backbone: PreTrainedModel, what: str) -> ValueError:
    name = type(getattr(backbone, "timm_model", backbone)).__name__
    return ValueError(
        "Expected a backbone that makes tokens or a feature map of each picture in `pixel_values`, "
        f"but {name} {what}; choose another vision model."
    )


def _image_size(config: PreTrainedConfig) -> tuple[int, int]:
    size = getattr(config, "image_size", None)
    if size is None:  # timm keeps it in its own settings
        arguments = getattr(config, "model_args", None) or {}
        size = arguments.get("img_size")
    if size is None:
        size = (getattr(config, "pretrained_cfg", None) or {}).get("input_size", [3, 224, 224])[1:]
    return (size[0], size[1]) if isinstance(size, (list, tuple)) else (size, size)
