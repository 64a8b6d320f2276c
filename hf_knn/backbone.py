"""Any vision model of transformers, or of timm through transformers, as a source of features.

One feature is one vector per image, by an explicit pooling of the last hidden state; when the
datastore pools differently from the head, it is ``[head part | datastore part]``, split here and
nowhere else.
"""

import copy
import hashlib
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
)
from transformers.modeling_outputs import BaseModelOutput

from .configuration_knn import KnnConfig, Pooling

# arguments of timm.create_model that only shape the network; others can name files, URLs or repos
_TIMM_SHAPE_ARGUMENTS = frozenset(
    {"act_layer", "class_token", "depth", "dim", "drop_path_rate", "drop_rate", "dynamic_img_size"}
    | {"embed_dim", "global_pool", "img_size", "in_chans", "init_values", "mlp_ratio"}
    | {"norm_layer", "num_heads", "output_stride", "patch_size", "pos_embed", "reg_tokens"}
    | {"window_size"}
)


def build_backbone(config: PreTrainedConfig, poolings: Iterable[str]) -> PreTrainedModel:
    """Builds the architecture with random weights, without network and without foreign code.

    Args:
        config: the vision model's configuration.
        poolings: the poolings that will be used; a pooler nobody needs is not built.

    Raises:
        ValueError: for a timm configuration that names files or repos, or for a configuration
            without a vision model.
    """
    if config.model_type == "timm_wrapper":
        _check_timm(config)
    if type(config) not in MODEL_MAPPING:
        raise ValueError(
            f"Expected `backbone_config` of a vision model, but got {type(config).__name__}."
        )
    options = {}
    takes_pooler = "add_pooling_layer" in inspect.signature(_model_class(config)).parameters
    if takes_pooler and Pooling.POOLER not in list(poolings):
        options["add_pooling_layer"] = False
    return AutoModel.from_config(config, trust_remote_code=False, **options)


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
    return _model_class(vision_config).from_pretrained(name, **hub_options)


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


def extract(
    backbone: PreTrainedModel, pixel_values: Tensor, config: KnnConfig, **outputs: Any
) -> tuple[Tensor, BaseModelOutput]:
    """Runs the backbone and pools.

    Args:
        backbone: the vision model.
        pixel_values: [B, 3, H, W].
        config: names the poolings.
        outputs: `output_hidden_states` and `output_attentions`, if wanted.

    Returns:
        Features [B, D], or [B, 2 D] as [head part | datastore part] when the poolings differ, and
        the backbone's own output.
    """
    # convolutions on CPUs are 1.5 times faster in this layout
    pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
    output = backbone(pixel_values=pixel_values, return_dict=True, **outputs)
    head_part = pool(backbone, output, pixel_values, config.pooling)
    if config.store_pooling == config.pooling:
        return head_part, output
    store_part = pool(backbone, output, pixel_values, config.store_pooling)
    return torch.cat([head_part, store_part], dim=1), output


def split_features(features: Tensor, config: KnnConfig) -> tuple[Tensor, Tensor]:
    """Splits features into what the head and what the datastore sees.

    Args:
        features: [B, D_head] or [B, D_head + D_store], see `extract`.
        config: names the poolings and the widths.

    Returns:
        [B, D_head] and [B, D_store].

    Raises:
        ValueError: for another width.
    """
    wanted = config.feature_dim + config.extra_dim
    if features.ndim != 2 or features.shape[1] != wanted:
        raise ValueError(
            f"Expected `features` to be [B, {wanted}], but got {tuple(features.shape)}."
        )
    if config.store_pooling == config.pooling:
        return features, features
    return features[:, : config.feature_dim], features[:, config.feature_dim :]


def pool(backbone: PreTrainedModel, output: Any, pixel_values: Tensor, pooling: str) -> Tensor:
    """Pools the last hidden state into one vector per image.

    Args:
        backbone: the vision model, for the number of its prefix tokens.
        output: its output: `last_hidden_state` [B, T, D] or [B, D, H, W], maybe `pooler_output`.
        pixel_values: [B, 3, H, W], for the number of patches.
        pooling: see `Pooling`; `mean` and `max` are over patch tokens or spatial positions.

    Returns:
        [B, D], or [B, 2 D] for `cls_mean`.

    Raises:
        ValueError: if the model has no such token or output.
    """
    if pooling == Pooling.POOLER:
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            raise ValueError(
                "Expected a backbone with a pooler for pooling='pooler', but it has none; "
                "use 'cls' or 'mean'."
            )
        return pooled.flatten(1)  # [B, D] also from [B, D, 1, 1]
    hidden = output.last_hidden_state
    if hidden.ndim == 4:
        tokens, prefix = _spatial_tokens(backbone, hidden), 0  # [B, H*W, D]
    else:
        tokens, prefix = hidden, _count_prefix_tokens(backbone, pixel_values, hidden.shape[1])
    if pooling in (Pooling.CLS, Pooling.CLS_MEAN) and prefix == 0:
        raise ValueError(
            f"Expected a backbone with a CLS token for pooling={pooling!r}, but "
            f"{type(backbone).__name__} has none; use 'mean'."
        )
    match Pooling(pooling):
        case Pooling.CLS:
            return tokens[:, 0]
        case Pooling.MEAN:
            return tokens[:, prefix:].mean(dim=1)
        case Pooling.MAX:
            return tokens[:, prefix:].amax(dim=1)
        case _:
            return torch.cat([tokens[:, 0], tokens[:, prefix:].mean(dim=1)], dim=1)


def default_pooling(backbone: PreTrainedModel) -> str:
    """The pooling that suits a model: `cls` where there is a CLS token, else `mean`."""
    output, pixel_values = _probe(backbone)
    hidden = output.last_hidden_state
    if hidden.ndim == 3 and _count_prefix_tokens(backbone, pixel_values, hidden.shape[1]):
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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


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


def _count_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def freeze_statistics(module: nn.Module) -> None:
    """Puts batch norms whose weights are frozen into evaluation mode: their statistics stay."""
    for part in module.modules():
        is_norm = isinstance(part, nn.modules.batchnorm._BatchNorm) and part.affine
        if is_norm and not part.weight.requires_grad:
            part.eval()


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


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """The hex sha256 over names, dtypes, shapes and bytes, in the order given."""
    total = hashlib.sha256()
    for name, tensor in named:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def _model_class(config: PreTrainedConfig) -> Any:
    return MODEL_MAPPING[type(config)]


def _probe(backbone: PreTrainedModel) -> tuple[Any, Tensor]:
    height, width = _image_size(backbone.config)
    channels = getattr(backbone.config, "num_channels", 3)
    parameter = next(backbone.parameters())
    pixels = torch.zeros(1, channels, height, width, dtype=parameter.dtype, device=parameter.device)
    with evaluating(backbone):
        return backbone(pixel_values=pixels, return_dict=True), pixels


def _image_size(config: PreTrainedConfig) -> tuple[int, int]:
    size = getattr(config, "image_size", None)
    if size is None:  # timm keeps it in its own settings
        arguments = getattr(config, "model_args", None) or {}
        size = arguments.get("img_size")
    if size is None:
        size = (getattr(config, "pretrained_cfg", None) or {}).get("input_size", [3, 224, 224])[1:]
    return (size[0], size[1]) if isinstance(size, (list, tuple)) else (size, size)


def _spatial_tokens(backbone: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[B, D, H, W], or [B, H, W, D] as timm's Swin has it, to [B, H*W, D]."""
    width = getattr(getattr(backbone, "timm_model", None), "num_features", hidden.shape[1])
    if hidden.shape[1] != width and hidden.shape[-1] == width:
        return hidden.flatten(1, 2)
    return hidden.flatten(2).transpose(1, 2)


def _count_prefix_tokens(backbone: PreTrainedModel, pixel_values: Tensor, tokens: int) -> int:
    """How many tokens (CLS, registers, distillation) come before the patches."""
    timm_count = getattr(getattr(backbone, "timm_model", None), "num_prefix_tokens", None)
    if timm_count is not None:
        return timm_count
    patch = getattr(backbone.config, "patch_size", None)
    if patch is None:
        return 0
    down, across = patch if isinstance(patch, (list, tuple)) else (patch, patch)
    patches = (pixel_values.shape[-2] // down) * (pixel_values.shape[-1] // across)
    return max(0, tokens - patches)  # hierarchical models end with fewer tokens than patches


def _check_timm(config: PreTrainedConfig) -> None:
    if ":" in config.architecture or "/" in config.architecture:
        raise ValueError(
            f"Expected `architecture` to be the plain name of a timm model, "
            f"but got {config.architecture!r}, which names a place to load from; refused."
        )
    foreign = sorted(set(config.model_args or {}) - _TIMM_SHAPE_ARGUMENTS)
    if foreign:
        raise ValueError(
            f"Expected `model_args` of a timm backbone to shape the network only, "
            f"but got {foreign}; refused."
        )
