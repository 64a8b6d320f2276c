"""Any vision model of transformers, or of timm through transformers, as a source of features.

One feature is one vector per image, by an explicit pooling of the last hidden state; when the
datastore pools differently from the head, it is ``[head part | datastore part]``, split here and
nowhere else.
"""

import hashlib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers.initialization as init
from torch import Tensor, nn
from torch.nn import functional
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .config import CLOSED_FORM, Head, Kernel, KnnConfig, Normalization, Pooling

# arguments of timm.create_model that only shape the network; others can name files, URLs or repos
_TIMM_SHAPE_ARGUMENTS = frozenset(
    {"act_layer", "class_token", "depth", "dim", "drop_path_rate", "drop_rate", "dynamic_img_size"}
    | {"embed_dim", "global_pool", "img_size", "in_chans", "init_values", "mlp_ratio"}
    | {"norm_layer", "num_heads", "output_stride", "patch_size", "pos_embed", "reg_tokens"}
    | {"window_size"}
)


_CHANNELS_LAST = ("dinat", "edgetam_vision_model", "sam2_hiera_det_model", "sam2_vision_model")
_ONE_FIRST = ("dinov3_convnext", "pvt")
"""Model types without one patch size whose first token is no patch."""


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
    takes_pooler = "add_pooling_layer" in inspect.signature(model_class(config)).parameters
    if takes_pooler and Pooling.POOLER not in list(poolings):
        options["add_pooling_layer"] = False
    return AutoModel.from_config(config, trust_remote_code=False, **options)


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
        own = getattr(backbone.config, "num_detection_tokens", 0)  # YOLOS has them at the end
        tokens = hidden[:, : hidden.shape[1] - own]
        prefix = count_prefix_tokens(backbone, pixel_values, tokens.shape[1])
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


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """The hex sha256 over names, dtypes, shapes and bytes, in the order given."""
    total = hashlib.sha256()
    for name, tensor in named:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def model_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that a configuration belongs to."""
    return MODEL_MAPPING[type(config)]


def _spatial_tokens(backbone: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[B, D, H, W], or [B, H, W, D] as timm's Swin has it, to [B, H*W, D]."""
    width = getattr(getattr(backbone, "timm_model", None), "num_features", hidden.shape[1])
    is_last = backbone.config.model_type in _CHANNELS_LAST
    if is_last or (hidden.shape[1] != width and hidden.shape[-1] == width):
        return hidden.flatten(1, 2)
    return hidden.flatten(2).transpose(1, 2)


def count_prefix_tokens(backbone: PreTrainedModel, pixel_values: Tensor, tokens: int) -> int:
    """How many tokens (CLS, registers, distillation) come before the patches."""
    timm_count = getattr(getattr(backbone, "timm_model", None), "num_prefix_tokens", None)
    if timm_count is not None:
        return timm_count
    patch = getattr(backbone.config, "patch_size", None)
    if patch is None:
        return int(backbone.config.model_type in _ONE_FIRST)
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


_SMALLEST_LENGTH = 1e-30


class KnnHead(nn.Module):
    """A classifier on standardised features: linear, with hidden layers, or in closed form.

    Args:
        dim: D, width of a feature.
        num_labels: number of classes.
        hidden_sizes: widths of hidden layers, each followed by a ReLU.
        unit_length: scale each feature to length 1, as a datastore does (closed-form heads).
        kernel: what random features come to, see `Kernel`.
        expansion: how many principal components P and random features R of them stand before the
            features themselves.
    """

    def __init__(
        self,
        dim: int,
        num_labels: int,
        hidden_sizes: Sequence[int] = (),
        unit_length: bool = False,
        kernel: str = Kernel.RBF,
        expansion: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))
        self.unit_length, self.kernel = unit_length, Kernel(kernel)
        (components, self.random), axes, directions = expansion, None, None
        if self.random:
            rows = self.random if self.kernel is Kernel.RELU else self.random // 2
            axes, directions = torch.zeros(components, dim), torch.zeros(rows, components)
        self.register_buffer("axes", axes)  # [P, D]
        self.register_buffer("directions", directions)  # [R, P], of `rbf` [R / 2, P]
        widths = [dim + self.random, *hidden_sizes]
        pairs = zip(widths, hidden_sizes, strict=False)
        self.hidden = nn.ModuleList(nn.Linear(width, out) for width, out in pairs)
        self.classifier = nn.Linear(widths[-1], num_labels)

    mean: Tensor
    scale: Tensor
    axes: Tensor | None
    directions: Tensor | None

    @classmethod
    def from_config(cls, config: KnnConfig) -> "KnnHead":
        """The head that a configuration asks for, with new weights."""
        is_closed = config.head in CLOSED_FORM
        return cls(
            config.feature_dim,
            config.head_classes,
            config.head_hidden_sizes if config.head == Head.MLP else (),
            unit_length=is_closed and config.normalization != Normalization.NONE,
            kernel=config.head_kernel,
            expansion=(config.head_components, config.head_features),
        )

    def standardize(self, features: Tensor) -> None:
        """Fixes what is subtracted and divided, so that learning rates mean the same everywhere.

        Args:
            features: [N, D] training features.
        """
        mean = features.double().mean(dim=0)
        deviation = (features.double() - mean).pow(2).mean().sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(deviation if deviation > 0 else torch.ones(()))

    def prepared(self, features: Tensor) -> Tensor:
        """[B, D] features as the first layer sees them: [B, R + D]."""
        rows = (features - self.mean.to(features.dtype)) / self.scale.to(features.dtype)
        if self.unit_length:
            rows = functional.normalize(rows, dim=-1, eps=_SMALLEST_LENGTH)
        if self.axes is None or self.directions is None:
            return rows
        components = rows @ self.axes.to(rows.dtype).T  # [B, P]
        components = functional.normalize(components, dim=-1, eps=_SMALLEST_LENGTH)
        angles = components @ self.directions.to(rows.dtype).T
        random = (
            angles.relu() * self.random**-0.5
            if self.kernel is Kernel.RELU
            else torch.cat([angles.cos(), angles.sin()], dim=-1) * (self.random / 2) ** -0.5
        )
        return torch.cat([random, rows], dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C_head] logits."""
        rows = self.prepared(features)
        for layer in self.hidden:
            rows = functional.relu(layer(rows))
        return self.classifier(rows)

    def soften(self, temperature: float) -> None:
        """Divides the logits by a temperature, for good.

        Args:
            temperature: > 0.
        """
        with torch.no_grad():
            self.classifier.weight.div_(temperature)
            self.classifier.bias.div_(temperature)

    def reset(self) -> None:
        """New buffers; called by the model when it initialises weights."""
        init.zeros_(self.mean)
        init.ones_(self.scale)
        for part in (self.axes, self.directions):
            if part is not None:
                init.zeros_(part)
