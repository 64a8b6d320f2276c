"""Models of a few thousand weights, built from configurations alone, for every test that wants one.

Weights are perturbed and batch-norm statistics are not the defaults, so that a tensor that is lost
or mixed up changes the answer.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    BeitConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    SwinConfig,
    TimmWrapperConfig,
    ViTConfig,
    ViTImageProcessor,
)

from hf_knn import Datastore, KnnForImageClassification
from hf_knn.model.checkpoint import made_by
from hf_knn.store.backend import RowStore

SIZE = 32
LABELS = ["ant", "bee", "cat", "dog"]

_TRANSFORMER: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 8,
}
_MLP: dict[str, Any] = {"intermediate_size": 32}
_TIMM_VIT = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
_TIMM_SWIN = {"img_size": 64, "embed_dim": 4, "window_size": 4}


def timm_config(architecture: str, size: int, **model_args: Any) -> TimmWrapperConfig:
    """A timm model as its Hub repo describes it: the image size lies in `pretrained_cfg`."""
    values: dict[str, Any] = {"pretrained_cfg": {"input_size": [3, size, size]}}
    return TimmWrapperConfig(architecture=architecture, model_args=model_args, **values)


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "vit": lambda: ViTConfig(**_TRANSFORMER, **_MLP),
    "deit": lambda: DeiTConfig(**_TRANSFORMER, **_MLP),
    "beit": lambda: BeitConfig(**_TRANSFORMER, **_MLP),
    "clip": lambda: CLIPVisionConfig(**_TRANSFORMER, **_MLP),
    "dinov2": lambda: Dinov2Config(**_TRANSFORMER, mlp_ratio=2),
    "dinov2_registers": lambda: Dinov2WithRegistersConfig(
        **_TRANSFORMER, mlp_ratio=2, num_register_tokens=3
    ),
    "swin": lambda: SwinConfig(
        image_size=SIZE, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
    "convnext": lambda: ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=SIZE
    ),
    "resnet": lambda: ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    ),
    "timm_resnet": lambda: TimmWrapperConfig(architecture="test_resnet"),
    "timm_vit": lambda: timm_config("vit_tiny_patch16_224", SIZE, **_TIMM_VIT),
    "timm_swin": lambda: timm_config("swin_tiny_patch4_window7_224", 64, **_TIMM_SWIN),
}
"""Configurations of tiny vision models, one per family."""

PREFIX_TOKENS = {"vit": 1, "deit": 2, "beit": 1, "clip": 1, "dinov2": 1}
PREFIX_TOKENS |= {"dinov2_registers": 4, "timm_vit": 1}
"""How many tokens come before the patches, written down by hand; no entry without a CLS token."""


def image_size(family: str) -> int:
    """Side of the images a family takes."""
    return 64 if family == "timm_swin" else SIZE


def pixels(count: int, seed: int = 0, size: int = SIZE) -> Tensor:
    """[count, 3, size, size] random images, as a processor would hand them over."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def perturb(module: torch.nn.Module, seed: int) -> None:
    """Moves every weight and statistic away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(module.state_dict().items()):
            if not value.is_floating_point():
                continue
            noise = torch.rand(value.shape, generator=generator).to(value.dtype)
            value += noise * 0.1 if name.endswith("running_var") else (noise - 0.5) * 0.2


def tiny_backbone(family: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A random vision model in eval mode."""
    torch.manual_seed(seed)
    backbone = AutoModel.from_config(FAMILIES[family](), **options)
    perturb(backbone, seed)
    return backbone.eval()


def processor() -> ViTImageProcessor:
    """An image processor that fits every family of size 32."""
    return ViTImageProcessor(size={"height": SIZE, "width": SIZE})


def tiny_model(
    family: str = "vit",
    labels: Any = LABELS,
    *,
    seed: int = 0,
    rows: int = 40,
    **config_values: Any,
) -> KnnForImageClassification:
    """A whole classifier: random backbone and head, and a datastore that belongs to them.

    Args:
        family: see `FAMILIES`.
        labels: class names or how many.
        seed: of every weight and row.
        rows: of the datastore; 0 gives none at all.
        config_values: of `KnnConfig`.
    """
    model = KnnForImageClassification.from_backbone(
        tiny_backbone(family, seed), labels, image_processor=processor(), **config_values
    )
    perturb(model.head, seed + 1)
    model.head.scale.fill_(1.5 + seed)  # by name, so that it is seen also when it is not stored
    if rows:
        model.datastore = tiny_store(model, rows, seed)
    return model


def tiny_store(model: KnnForImageClassification, rows: int = 40, seed: int = 0) -> Datastore:
    """A datastore of the model's own features, with ids that are not row numbers and with paths."""
    with torch.no_grad():
        features = model(pixel_values=pixels(rows, seed + 100)).pooler_output
    width = features.shape[1] // 2 if model.config.knn_pooling else 0
    generator = torch.Generator().manual_seed(seed)
    store = Datastore.from_features(
        features[:, width:],
        torch.randint(model.config.classes, (rows,), generator=generator),
        ids=torch.randperm(1000, generator=generator)[:rows],
        paths=[f"train/{seed}/{row}.png" for row in range(rows)],
    )
    store.digest = made_by(model)
    return store


def tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a model, saved or not."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: value.detach() for name, value in named.items()}


def assert_same_tensors(found: torch.nn.Module, wanted: torch.nn.Module) -> None:
    """Every tensor equal bit for bit, with the same names, dtypes and shapes."""
    left, right = tensors(found), tensors(wanted)
    assert left.keys() == right.keys()
    assert left, "nothing was compared"
    for name, value in right.items():
        assert left[name].dtype == value.dtype, name
        assert torch.equal(left[name], value), name


def assert_same_rows(found: RowStore | None, wanted: RowStore | None) -> None:
    """Two datastores equal in rows, mean, labels, ids, paths and options."""
    assert found is not None
    assert wanted is not None
    for name in ("features", "labels", "ids", "mean"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
        assert getattr(found, name).dtype == getattr(wanted, name).dtype, name
    options = ("paths", "metric", "normalization", "index")
    assert [getattr(found, o) for o in options] == [getattr(wanted, o) for o in options]


def all_files(folder: Path) -> Iterator[str]:
    """The names of all files below a folder, relative to it."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder))
