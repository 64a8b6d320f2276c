"""Every vision model of transformers that can be built small: its features by hand, or a refusal.

The oracle is the model's own parameters: how many tokens of its own (class, registers, boxes) it
learns, which lie before or behind the patches.
"""

import contextlib
from typing import Any

import pytest
import torch
import transformers
from support.tiny import perturb
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    TimmWrapperConfig,
    ViTConfig,
    YolosConfig,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from hf_knn import KnnConfig, KnnForImageClassification
from hf_knn.model.backbones import complete

FIRST = (
    "cls_token", "class_token", "class_embedding", "register_tokens", "distillation_token",
    "cls_register_token",
)  # fmt: skip
LAST = ("detection_tokens",)
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 64, "patch_size": 16, "mlp_ratio": 2, "num_register_tokens": 3,
    "num_detection_tokens": 5, "embed_dim": 16, "window_size": 2,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "pvt": {"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4, "num_attention_heads": [1] * 4},
    "pvt_v2": {"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4, "num_attention_heads": [1] * 4},
    "dinov3_convnext": {"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4},
    "convnext": {"patch_size": 4, "hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4},
    "convnextv2": {"patch_size": 4, "hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4},
    "swin": {"depths": [1, 1], "num_heads": [2, 2], "patch_size": 4},
    "swinv2": {"depths": [1, 1], "num_heads": [2, 2], "patch_size": 4},
    "donut-swin": {"depths": [1, 1], "num_heads": [2, 2], "patch_size": 4},
    "focalnet": {"depths": [1, 1], "patch_size": 4},
    "yolos": {"image_size": [64, 64]},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8},
    "hiera": {"image_size": [64, 64]},
    "segformer": {"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4},
}
"""Where one value for all does not do."""

FAST = [
    "vit", "vit_mae", "radio", "deit", "yolos", "pvt", "dinov3_convnext", "dinov3_vit", "focalnet",
    "swin", "resnet",
]  # fmt: skip
VISION = sorted(
    name
    for name, classes in MODEL_MAPPING_NAMES.items()
    if name in CONFIG_MAPPING and isinstance(classes, str) and "audio" not in name
)


def small_config(name: str) -> PreTrainedConfig:
    """A configuration with what of `SMALL` and `OWN` it knows; as it is where that does not fit."""
    kind: Any = CONFIG_MAPPING[name]
    usual, values = kind().to_dict(), dict[str, Any]()
    for key, value in SMALL.items():
        if type(usual.get(key)) in (int, float):
            values[key] = type(usual[key])(value)
    config: PreTrainedConfig = kind(**values | OWN.get(name, {}))
    return config


def tokens_named(backbone: nn.Module, names: tuple[str, ...]) -> int:
    """How many tokens of its own a model learns under some names."""
    found = [
        value
        for name, value in backbone.named_parameters()
        if name.rpartition(".")[2] in names and not name.startswith("head.")  # of a pooler
    ]
    return sum(value.shape[-2] if value.ndim > 1 else 1 for value in found)


def wanted_of(name: str, backbone: PreTrainedModel, hidden: Tensor) -> dict[str, Tensor]:
    """Features by hand."""
    if hidden.ndim == 4:
        spatial = hidden.flatten(2)  # channels first: no channels-last model can be built small
        return {"mean": spatial.mean(2), "max": spatial.max(2).values}
    first, last = tokens_named(backbone, FIRST), tokens_named(backbone, LAST)
    if name == "dinov3_convnext":  # its first token is the mean of the patches, normalised
        first = 1
    patches = hidden[:, first : hidden.shape[1] - last]
    found = {"mean": patches.mean(1), "max": patches.max(1).values}
    return found | ({"cls": hidden[:, 0]} if first else {})


def check(name: str) -> str:
    """Compares a family with pooling by hand, or reads its refusal; what happened, in a word."""
    torch.manual_seed(0)
    try:
        config = small_config(name)
        size = getattr(config, "image_size", None)
        size = size if isinstance(size, int) else 64
        if sum(p.numel() for p in on_meta(config).parameters()) > 20_000_000:
            return "large"
        backbone = AutoModel.from_config(config)
    except Exception as error:
        return f"not built: {type(error).__name__}"
    perturb(backbone, 1)
    try:
        poolings = ["mean", "max"] + ["cls"] * (of_usual(backbone) == "cls")
        models = {
            p: KnnForImageClassification.from_backbone(backbone, 3, pooling=p).eval()
            for p in poolings
        }
    except ValueError as error:
        if not str(error).startswith("Expected"):
            raise
        return "refused"
    images = torch.randn(2, getattr(config, "num_channels", 3), size, size)
    with torch.inference_mode():
        # a masked autoencoder is taken without its mask
        plain = models["mean"].backbone if name == "vit_mae" else backbone.eval()
        try:
            hidden = plain(pixel_values=images).last_hidden_state
        except RuntimeError:
            return "takes another size"
        wanted = wanted_of(name, backbone, hidden)
        assert set(wanted) == set(models)
        for pooling, model in models.items():
            found = model(pixel_values=images).pooler_output
            atol = 1e-5 * float(found.abs().max())
            torch.testing.assert_close(found, wanted[pooling], rtol=1e-3, atol=atol)
    return "as by hand"


def of_usual(backbone: PreTrainedModel) -> str:
    """The pooling that is chosen where nobody says one."""
    return KnnForImageClassification.from_backbone(backbone, 3).config.pooling


def on_meta(config: PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return AutoModel.from_config(config)


@pytest.mark.parametrize("name", FAST)
def test_features_are_as_by_hand(name: str) -> None:
    assert check(name) == "as by hand"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_features_of_every_family_are_as_by_hand_or_refused() -> None:
    found: dict[str, str] = {}
    for name in VISION:
        kind = None
        with contextlib.suppress(Exception, SystemExit):  # one that misses what it needs
            kind = getattr(transformers, str(MODEL_MAPPING_NAMES[name]))
        if getattr(kind, "main_input_name", "") == "pixel_values":
            found[name] = check(name)
    print(found)
    assert sum(how == "as by hand" for how in found.values()) >= 25
    assert {name for name in FAST if found[name] != "as by hand"} == set()


def made(name: str, **values: Any) -> PreTrainedConfig:
    kind: Any = CONFIG_MAPPING[name]
    config: PreTrainedConfig = kind(**values)
    return config


REFUSED: dict[str, PreTrainedConfig] = {
    "text": BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    ),
    "siglip2": made(
        "siglip2_vision_model",
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        num_patches=16, patch_size=8,
    ),
    "video": made(
        "vivit",
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        image_size=32, num_frames=4,
    ),
    "pictures of videos": made(
        "videomae",
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        image_size=32, num_frames=4,
    ),
    "packed": made(
        "pixtral",
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8,
    ),
    "no hidden state": made("hgnet_v2"),
    "several": TimmWrapperConfig(architecture="crossvit_tiny_240"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_a_backbone_is_refused_by_its_name(name: str) -> None:
    backbone = AutoModel.from_config(REFUSED[name])
    kind = type(getattr(backbone, "timm_model", backbone)).__name__
    with pytest.raises(ValueError, match=rf"Expected a backbone .*, but {kind} .*; choose another"):
        KnnForImageClassification.from_backbone(backbone, 3)


@pytest.mark.parametrize("kind", ["dinat", "sam2_hiera_det_model", "edgetam_vision_model"])
def test_a_map_with_channels_last_is_pooled_over_places(kind: str) -> None:
    """As models make it that are large, or need a library that is not there."""
    from hf_knn.core.backbone import pool

    backbone = AutoModel.from_config(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    backbone.config.model_type = kind
    hidden = torch.randn(2, 6, 6, 6)  # whose shape does not say which are channels
    output = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=hidden)
    found = pool(backbone, output, torch.zeros(2, 3, 32, 32), "mean")
    torch.testing.assert_close(found, hidden.mean((1, 2)))


SMALL_VIT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
VIT = ViTConfig(**SMALL_VIT, image_size=64)
PLAIN: dict[str, tuple[PreTrainedConfig, dict[str, Any], int]] = {
    "vit": (VIT, {}, 32),
    "two poolings": (VIT, {"pooling": "cls", "knn_pooling": "cls_mean"}, 32),
    "mlp": (VIT, {"head": "mlp", "pooling": "cls_mean"}, 64),
    "resnet": (
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]), {"pooling": "mean"}, 16
    ),
    "yolos": (YolosConfig(**SMALL_VIT, image_size=[64, 64], num_detection_tokens=5), {}, 32),
}  # fmt: skip


def plain_config(name: str, **more: Any) -> KnnConfig:
    backbone, options, _ = PLAIN[name]
    values: dict[str, Any] = {"backbone_config": backbone, "num_labels": 5} | options | more
    return KnnConfig(**values)


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_a_configuration_alone_builds_a_model_that_trains(name: str, tmp_path: Any) -> None:
    config, width = plain_config(name), PLAIN[name][2]
    model = KnnForImageClassification(config)
    assert config.feature_dim == width
    assert not any(p.is_meta for p in model.parameters())
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 4])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        output = model(pixel_values=images, labels=labels)
        assert output.logits.shape == (4, 5)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss))
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = KnnForImageClassification.from_pretrained(tmp_path)
    assert again.config.feature_dim == width
    with torch.inference_mode():
        found = again(pixel_values=images).logits
        torch.testing.assert_close(found, model.eval()(pixel_values=images).logits)


def test_a_width_that_was_given_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    config = plain_config("vit", feature_dim=32)
    monkeypatch.setattr("hf_knn.model.backbones.measure_width", None)
    complete(config)
    assert config.feature_dim == 32


def test_a_configuration_whose_pooling_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"CLS token for pooling='cls'.*use 'mean'"):
        KnnForImageClassification(plain_config("resnet", pooling="cls"))
