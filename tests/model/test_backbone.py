"""Features of every family against pooling by hand, and what a hostile configuration does."""

import builtins
import io
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from PIL import Image
from support.tiny import (
    FAMILIES,
    PREFIX_TOKENS,
    assert_same_tensors,
    image_size,
    perturb,
    pixels,
    processor,
    tensors,
    tiny_backbone,
    tiny_model,
)
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
)

from hf_knn import KnnConfig, KnnForImageClassification
from hf_knn.core.backbone import build_backbone, extract, split_features
from hf_knn.core.config import Pooling
from hf_knn.model.backbones import default_pooling, load_backbone, measure_width

POOLINGS = [str(pooling) for pooling in Pooling]
HAS_CLS = sorted(PREFIX_TOKENS)
NO_CLS = sorted(FAMILIES.keys() - PREFIX_TOKENS.keys())
WIDTHS = {"timm_vit": 24, "timm_swin": 32, "timm_resnet": 96}
CHANNELS_LAST = "timm_swin"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fails on any attempt to reach the network; collects the attempts, since callers swallow."""
    attempts: list[str] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        attempts.append(repr(args))
        raise AssertionError(f"the network was asked for {args}")  # an OSError would be retried

    # in offline mode the Hub libraries would stop before the socket, and hide that they asked
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


@pytest.fixture(scope="module")
def backbones() -> dict[str, PreTrainedModel]:
    return {family: tiny_backbone(family) for family in FAMILIES}


def config_for(
    backbone: PreTrainedModel, pooling: str, knn_pooling: str | None = None
) -> KnnConfig:
    return KnnConfig(
        backbone_config=backbone.config,
        feature_dim=measure_width(backbone, pooling),
        knn_feature_dim=None if knn_pooling is None else measure_width(backbone, knn_pooling),
        pooling=pooling,
        knn_pooling=knn_pooling,
    )


def pooled_by_hand(family: str, output: Any, pooling: str) -> Tensor:
    """The definition in method.md, one image at a time, with the prefix known by name."""
    if pooling == "pooler":
        return torch.stack([row.reshape(-1) for row in output.pooler_output])
    rows = []
    for hidden in output.last_hidden_state:
        if hidden.ndim == 3:
            height_first = family == CHANNELS_LAST
            width = hidden.shape[-1] if height_first else hidden.shape[0]
            tokens = hidden.reshape(-1, width) if height_first else hidden.reshape(width, -1).T
        else:
            tokens = hidden
        patches = tokens[PREFIX_TOKENS.get(family, 0) :]
        parts = {
            "cls": lambda tokens=tokens: tokens[0],
            "mean": lambda patches=patches: patches.sum(0) / len(patches),
            "max": lambda patches=patches: patches.max(0).values,
        }
        names = ["cls", "mean"] if pooling == "cls_mean" else [pooling]
        rows.append(torch.cat([parts[name]() for name in names]))
    return torch.stack(rows)


CASES = [
    (family, pooling)
    for family in sorted(FAMILIES)
    for pooling in POOLINGS
    if family in HAS_CLS or "cls" not in pooling
]
"""Every family with every pooling it has; for the others see test_no_cls_token_is_refused."""


@pytest.mark.parametrize(("family", "pooling"), CASES)
def test_pooling_equals_pooling_by_hand(family, pooling, backbones):
    backbone = backbones[family]
    images = pixels(3, seed=1, size=image_size(family))
    with torch.no_grad():
        features, _ = extract(backbone, images, config_for(backbone, pooling))
        wanted = pooled_by_hand(family, backbone(pixel_values=images), pooling)
    assert features.shape == wanted.shape
    torch.testing.assert_close(features, wanted, rtol=1e-5, atol=1e-6)
    assert (features[0] - features[1]).abs().max() > 1e-4, "features do not depend on the image"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_prefix_tokens_written_down_are_right(family, backbones):
    """The table the other tests trust: tokens = prefix + patches, counted from the patch grid."""
    hidden = backbones[family](pixel_values=pixels(1, size=image_size(family))).last_hidden_state
    if family in PREFIX_TOKENS:
        assert hidden.shape[1] == PREFIX_TOKENS[family] + (32 // 8) ** 2
    else:
        assert hidden.ndim == 4 or hidden.shape[1] == (32 // (4 * 2)) ** 2


def test_channels_last_has_several_positions(backbones):
    """Else a swap of channels and positions could not be seen."""
    hidden = backbones[CHANNELS_LAST](pixel_values=pixels(1, size=64)).last_hidden_state
    assert hidden.shape == (1, 2, 2, 32)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_default_pooling_and_width(family, backbones):
    assert default_pooling(backbones[family]) == ("cls" if family in HAS_CLS else "mean")
    assert measure_width(backbones[family]) == WIDTHS.get(family, 16)


@pytest.mark.parametrize("pooling", ["cls", "cls_mean"])
@pytest.mark.parametrize("family", NO_CLS)
def test_no_cls_token_is_refused(family, pooling, backbones):
    backbone = backbones[family]
    images = pixels(1, size=image_size(family))
    message = (
        rf"CLS token for pooling='{pooling}', but {type(backbone).__name__} has none; use 'mean'"
    )
    with pytest.raises(ValueError, match=message):
        extract(backbone, images, config_for(backbone, pooling))


def test_a_missing_pooler_is_refused():
    config = config_for(tiny_backbone("vit"), "cls")
    backbone = build_backbone(config.backbone, ["cls"])
    with pytest.raises(ValueError, match="pooler for pooling='pooler'"):
        extract(backbone, pixels(1), config_for(backbone, "pooler"))


@pytest.mark.parametrize("family", ["vit", "beit", "clip"])
def test_a_pooler_that_nobody_needs_is_not_built(family):
    with_pooler = build_backbone(FAMILIES[family](), ["mean", "pooler"])
    without = build_backbone(FAMILIES[family](), ["mean", "cls"])
    has_option = family != "clip"
    assert (len(tensors(without)) < len(tensors(with_pooler))) == has_option


@pytest.mark.parametrize("size", [16, 48])
def test_other_image_sizes_count_their_own_patches(size):
    """DINOv2 resizes its positions, so the number of patches comes from the image."""
    backbone = tiny_backbone("dinov2_registers")
    images = pixels(2, size=size)
    output: Any
    with torch.no_grad():
        features, output = extract(backbone, images, config_for(backbone, "mean"))
    assert output.last_hidden_state.shape[1] == 4 + (size // 8) ** 2
    torch.testing.assert_close(features, output.last_hidden_state[:, 4:].mean(1))


@pytest.mark.parametrize(
    ("family", "pooling", "knn_pooling"),
    [
        ("resnet", "mean", "max"),
        ("vit", "cls", "mean"),
        ("vit", "cls_mean", "max"),
        ("vit", "max", "cls_mean"),
        ("convnext", "pooler", "max"),
    ],
)
def test_two_poolings_are_head_then_store(family, pooling, knn_pooling, backbones):
    backbone = backbones[family]
    config = config_for(backbone, pooling, knn_pooling)
    images = pixels(3, seed=2)
    with torch.no_grad():
        features, _ = extract(backbone, images, config)
        head_part, _ = extract(backbone, images, config_for(backbone, pooling))
        store_part, _ = extract(backbone, images, config_for(backbone, knn_pooling))
    assert torch.equal(features, torch.cat([head_part, store_part], dim=1))
    found_head, found_store = split_features(features, config)
    assert torch.equal(found_head, head_part)
    assert torch.equal(found_store, store_part)
    assert not torch.equal(head_part[:, :4], store_part[:, :4])


def test_one_pooling_is_not_doubled(backbones):
    for knn_pooling in (None, "cls"):
        config = config_for(backbones["vit"], "cls", knn_pooling)
        features, _ = extract(backbones["vit"], pixels(2), config)
        assert features.shape == (2, 16)
        head_part, store_part = split_features(features, config)
        assert torch.equal(head_part, features)
        assert torch.equal(store_part, features)


@pytest.mark.parametrize("shape", [(2, 15), (2, 17), (2, 32), (16,), (2, 2, 16)])
def test_features_of_another_shape_are_refused(shape, backbones):
    config = config_for(backbones["vit"], "cls")
    with pytest.raises(ValueError, match=r"\[B, 16\], but got \(") as caught:
        split_features(torch.zeros(shape), config)
    assert str(tuple(shape)) in str(caught.value)


@pytest.mark.parametrize("family", ["resnet", "timm_resnet"])
@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_statistics_and_mode_alone(family, training):
    backbone = tiny_backbone(family).train(training)
    before = {name: value.clone() for name, value in tensors(backbone).items()}
    measure_width(backbone)
    default_pooling(backbone)
    assert all(module.training == training for module in backbone.modules())
    after = tensors(backbone)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert any("running_mean" in name for name in before)


def test_measuring_leaves_the_mode_of_each_part_alone():
    backbone = tiny_backbone("resnet").train()
    frozen = [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for module in frozen:
        module.eval()
    measure_width(backbone)
    assert frozen
    assert not any(module.training for module in frozen)


def test_timm_image_size_is_found_in_model_args():
    config = FAMILIES["timm_vit"]()
    backbone = AutoModel.from_config(
        TimmWrapperConfig(architecture=config.architecture, model_args=config.model_args)
    )
    assert measure_width(backbone) == 24


def test_a_pooler_wider_than_the_hidden_state_works():
    backbone = AutoModel.from_config(TimmWrapperConfig(architecture="mobilenetv3_small_050")).eval()
    model = KnnForImageClassification.from_backbone(backbone, 2, pooling="pooler")
    with torch.no_grad():
        output = model(pixel_values=pixels(2))
        wanted = backbone(pixel_values=pixels(2)).pooler_output
    assert output.pooler_output.shape == wanted.shape
    torch.testing.assert_close(output.pooler_output, wanted, rtol=1e-4, atol=1e-20)


# ---- hostile configurations ---------------------------------------------------------------------


def timm_values(**values: Any) -> dict[str, Any]:
    return {"model_type": "timm_wrapper", "architecture": "test_resnet", "num_classes": 2} | values


def build_from_json(values: dict[str, Any]) -> PreTrainedModel:
    """What opening a checkpoint with this `backbone_config` does."""
    config = KnnConfig(backbone_config=values, feature_dim=4, pooling="mean")
    return build_backbone(config.backbone, [config.pooling])


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all files that are opened or listed through the standard library or torch."""
    names: list[str] = []

    def spy(module: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(module, name)

        def record(*args: Any, **kwargs: Any) -> Any:
            names.append(str(args[0] if args else kwargs.get("file")))
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, record)

    for module, name in ((builtins, "open"), (io, "open"), (os, "open"), (os, "scandir")):
        spy(module, name)
    spy(torch, "load")
    return names


def test_a_plain_timm_configuration_is_built(offline):
    """The counterpart of the refusals below: they refuse because of what they plant."""
    backbone = build_from_json(timm_values(model_args={"in_chans": 3}))
    assert type(backbone).__name__ == "TimmWrapperModel"
    assert offline == []


@pytest.mark.parametrize(
    "architecture",
    ["hf-hub:evil/x", "hf_hub:evil/x", "local-dir:{trap}", "{trap}", "timm/resnet18", "evil/x"],
)
def test_timm_architecture_that_names_a_place_is_refused(architecture, tmp_path, opened, offline):
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / "config.json").write_text('{"architecture": "test_resnet"}')
    opened.clear()
    with pytest.raises(ValueError, match=r"`architecture`.*refused"):
        build_from_json(timm_values(architecture=architecture.format(trap=trap)))
    assert not [name for name in opened if "trap" in name]
    assert offline == []


@pytest.mark.parametrize(
    "argument",
    ["cache_dir", "checkpoint_path", "features_only", "pretrained", "pretrained_cfg", "url"],
)
def test_timm_arguments_that_load_are_refused(argument, tmp_path, opened, offline):
    trap = tmp_path / "trap.pth"
    trap.write_bytes(b"not weights")
    opened.clear()
    with pytest.raises(ValueError, match=rf"`model_args`.*\['{argument}'\]; refused"):
        build_from_json(timm_values(model_args={argument: str(trap), "img_size": 32}))
    assert not [name for name in opened if "trap" in name]
    assert offline == []


def test_timm_pretrained_cfg_names_no_weights(tmp_path, opened, offline):
    """`pretrained_cfg` beside the architecture is data about the input, never a place to load."""
    trap = tmp_path / "trap.pth"
    trap.write_bytes(b"not weights")
    opened.clear()
    pretrained = {"file": str(trap), "url": "http://evil/x", "hf_hub_id": "evil/x"}
    build_from_json(timm_values(pretrained_cfg=pretrained | {"input_size": [3, 32, 32]}))
    assert not [name for name in opened if "trap" in name]
    assert offline == []


def test_code_named_by_a_backbone_configuration_is_dropped(offline):
    values = FAMILIES["vit"]().to_dict() | {
        "auto_map": {"AutoConfig": "evil/x--code.Config", "AutoModel": "evil/x--code.Model"},
        "_name_or_path": "evil/x",
        "attn_implementation": "evil/kernel",
        "_attn_implementation": "evil/kernel",
        "trust_remote_code": True,
    }
    backbone = build_from_json(values)
    assert type(backbone).__name__ == "ViTModel"
    assert not hasattr(backbone.config, "auto_map")
    assert backbone.config.name_or_path == ""
    assert offline == []


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "timm_backbone", "backbone": "hf-hub:evil/x"},
        {"model_type": "detr", "backbone": "evil/x", "use_timm_backbone": False},
        {"model_type": "dpt", "backbone": "evil/x"},
    ],
    ids=lambda values: values["model_type"],
)
def test_a_backbone_of_a_backbone_is_refused_without_network(values, offline):
    with pytest.raises(ValueError, match=r"backbone"):
        build_from_json(values)
    assert offline == []


@pytest.mark.parametrize("model_type", ["detr", "rt_detr", "perception_lm", "llava"])
def test_a_model_inside_a_model_is_refused_without_network(model_type, offline):
    backbone = {"model_type": "timm_backbone", "backbone": "hf-hub:evil/x", "out_indices": [1]}
    values = {"backbone_config": backbone, "vision_config": timm_values(architecture="hf-hub:x/y")}
    with pytest.raises(ValueError, match=r"refused|vision model"):
        build_from_json({"model_type": model_type} | values)
    assert offline == []


def test_timm_backbone_does_not_read_a_folder(tmp_path, opened):
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / "config.json").write_text('{"architecture": "test_resnet"}')
    opened.clear()
    with pytest.raises(ValueError, match="refused"):
        build_from_json({"model_type": "timm_backbone", "backbone": f"local-dir:{trap}"})
    assert not [name for name in opened if "trap" in name]


@pytest.mark.parametrize("model_type", ["evil", None, 3, ["vit"]])
def test_an_unknown_model_type_is_refused(model_type):
    with pytest.raises(ValueError, match=r"model type of transformers, but got"):
        KnnConfig(backbone_config={"model_type": model_type})


def test_a_configuration_without_a_model_is_refused():
    with pytest.raises(ValueError, match="vision model, but got PreTrainedConfig"):
        build_backbone(PreTrainedConfig(), ["cls"])


# ---- from_backbone ------------------------------------------------------------------------------


def test_from_a_model_object():
    source = tiny_backbone("vit", add_pooling_layer=False)
    model = KnnForImageClassification.from_backbone(source, ["cat", "dog"])
    assert model.backbone is not source
    assert_same_tensors(model.backbone, source)
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert model.config.label2id == {"cat": 0, "dog": 1}
    assert (model.config.num_head_labels, model.config.pooling) == (2, "cls")
    assert (model.datastore, model.image_processor, model.training) == (None, None, False)


def test_the_source_is_not_changed_by_training_the_model():
    source = tiny_backbone("vit", add_pooling_layer=False)
    before = {name: value.clone() for name, value in tensors(source).items()}
    model = KnnForImageClassification.from_backbone(source, 2)
    perturb(model, 5)
    assert all(torch.equal(value, before[name]) for name, value in tensors(source).items())
    assert model.config.backbone is not source.config


def test_an_unused_pooler_of_the_source_is_left_out():
    source = tiny_backbone("vit")
    model = KnnForImageClassification.from_backbone(source, 2)
    names = {name for name in tensors(source) if "pooler" not in name}
    assert tensors(model.backbone).keys() == names


def test_a_wanted_pooler_is_copied():
    source = tiny_backbone("vit")
    model = KnnForImageClassification.from_backbone(source, 2, pooling="pooler")
    assert_same_tensors(model.backbone, source)


def test_a_pooler_that_the_source_lacks_is_not_invented():
    source = tiny_backbone("vit", add_pooling_layer=False)
    with pytest.raises(ValueError, match=r"with a pooler.*has none"):
        KnnForImageClassification.from_backbone(source, 2, pooling="pooler")


@pytest.mark.parametrize("family", ["vit", "resnet", "timm_vit"])
def test_from_a_local_folder(family, tmp_path, offline):
    source = tiny_backbone(family)
    source.save_pretrained(tmp_path / "backbone")
    processor().save_pretrained(tmp_path / "backbone")
    model = KnnForImageClassification.from_backbone(tmp_path / "backbone", ["cat", "dog"])
    names = {name: v for name, v in tensors(source).items() if "pooler" not in name}
    found = tensors(model.backbone)
    assert all(torch.equal(found[name], value) for name, value in names.items())
    assert model.image_processor is not None
    assert str(tmp_path) not in str(model.config.to_dict())
    assert offline == []


def test_from_the_folder_of_a_fine_tuned_classifier(tmp_path):
    """The usual ViT on the Hub has its head on; the encoder must come through the renaming."""
    torch.manual_seed(0)
    config: Any = FAMILIES["vit"]()
    source = ViTForImageClassification(config)
    perturb(source, 0)
    source.save_pretrained(tmp_path / "classifier")
    model = KnnForImageClassification.from_backbone(tmp_path / "classifier", 2)
    assert_same_tensors(model.backbone, source.vit)


def clip_folder(folder: Path) -> CLIPModel:
    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    whole = CLIPModel(
        CLIPConfig(
            text_config=text.to_dict(), vision_config=FAMILIES["clip"]().to_dict(), projection_dim=4
        )
    )
    perturb(whole, 0)
    whole.save_pretrained(folder)
    return whole


def test_the_vision_tower_of_a_clip_folder(tmp_path, offline):
    whole = clip_folder(tmp_path / "clip").eval()
    model = KnnForImageClassification.from_backbone(tmp_path / "clip", 2)
    tower = whole.vision_model
    images = pixels(2)
    with torch.no_grad():
        wanted = tower(pixel_values=images).last_hidden_state[:, 0]
        assert torch.equal(model(pixel_values=images).pooler_output, wanted)
    values = sorted(tensors(tower).items(), key=lambda item: item[0].rpartition("vision_model.")[2])
    ours = sorted(
        tensors(model.backbone).items(), key=lambda i: i[0].rpartition("vision_model.")[2]
    )
    assert len(values) == len(ours) > 20
    for (name, value), (our_name, our_value) in zip(values, ours, strict=True):
        assert name.rpartition("vision_model.")[2] == our_name.rpartition("vision_model.")[2]
        assert torch.equal(value, our_value), name
    assert offline == []


def test_a_whole_clip_model_object_is_refused_with_words(tmp_path):
    """Text and vision in one object: either its tower is taken, or the message names it."""
    with pytest.raises(ValueError, match=r"backbone.*(vision_model|vision tower)"):
        KnnForImageClassification.from_backbone(clip_folder(tmp_path / "clip"), 2)


def test_features_of_a_masked_autoencoder_do_not_change_from_call_to_call():
    torch.manual_seed(0)
    config = ViTMAEConfig(**FAMILIES["vit"]().to_diff_dict() | {"model_type": "vit_mae"})
    model = KnnForImageClassification.from_backbone(ViTMAEModel(config).eval(), 2)
    with torch.no_grad():
        first, second = (model(pixel_values=pixels(2)).pooler_output for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("as_folder", [True, False])
def test_the_backbone_of_a_knn_checkpoint(as_folder, tmp_path):
    source = tiny_model("vit", ["a", "b", "c"], k=3)
    source.save_pretrained(tmp_path / "saved")
    place = tmp_path / "saved" if as_folder else source
    model = KnnForImageClassification.from_backbone(place, ["cat", "dog"])
    assert_same_tensors(model.backbone, source.backbone)
    assert (model.datastore, model.config.k, model.config.classes) == (None, 20, 2)
    assert model.config.backbone.model_type == "vit"


TIMM_SETTINGS = {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}


def timm_folder(folder: Path) -> Path:
    """A timm model as on the Hub: no preprocessor_config.json, its settings are in config.json."""
    source = tiny_backbone("timm_resnet")
    source.config.pretrained_cfg = {**TIMM_SETTINGS, "interpolation": "bicubic", "crop_pct": 1.0}
    source.save_pretrained(folder)
    assert not (folder / "preprocessor_config.json").exists()
    return folder


def test_the_processor_of_a_timm_model_is_found(tmp_path):
    model = KnnForImageClassification.from_backbone(timm_folder(tmp_path / "timm"), 2)
    assert model.image_processor is not None


def test_the_processor_of_a_timm_model_survives_saving(tmp_path):
    folder = timm_folder(tmp_path / "timm")
    timm_processor = AutoImageProcessor.from_pretrained(folder)
    model = KnnForImageClassification.from_backbone(folder, 2, image_processor=timm_processor)
    model.save_pretrained(tmp_path / "saved")
    found = KnnForImageClassification.from_pretrained(tmp_path / "saved")
    assert found.image_processor is not None
    picture = Image.frombytes("RGB", (32, 32), random.Random(0).randbytes(32 * 32 * 3))
    wanted = timm_processor(picture)["pixel_values"]
    pixel_values = found.image_processor(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values, wanted, rtol=0, atol=0.02)


def test_a_bfloat16_source_stays_bfloat16():
    source = tiny_backbone("vit", add_pooling_layer=False).bfloat16()
    model = KnnForImageClassification.from_backbone(source, 2)
    assert {value.dtype for value in tensors(model).values()} == {torch.bfloat16}
    assert_same_tensors(model.backbone, source)


def test_a_name_that_does_not_exist_is_an_oserror(tmp_path, offline):
    with pytest.raises(OSError, match="nowhere"):
        KnnForImageClassification.from_backbone(tmp_path / "nowhere", 2)


def test_a_folder_without_weights_is_an_oserror(tmp_path):
    source = tmp_path / "backbone"
    tiny_backbone("vit").save_pretrained(source)
    (source / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_backbone(str(source))


def test_a_backbone_is_not_read_from_a_pickle(tmp_path):
    backbone = tiny_backbone("vit")
    backbone.save_pretrained(tmp_path / "backbone")
    (tmp_path / "backbone" / "model.safetensors").unlink()
    torch.save(backbone.state_dict(), tmp_path / "backbone" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        KnnForImageClassification.from_backbone(tmp_path / "backbone", 2)


def test_code_in_a_backbone_folder_does_not_run(tmp_path):
    """`auto_map` in a local folder: refused or ignored unless the user passes trust_remote_code."""
    source = tmp_path / "backbone"
    tiny_backbone("vit").save_pretrained(source)
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = AutoConfig.from_pretrained(source)
    config.auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    config.save_pretrained(source)
    shutil.copy(source / "evil.py", source / "modeling.py")
    model = KnnForImageClassification.from_backbone(source, 2)
    assert type(model.backbone).__name__ == "ViTModel"
    assert not (tmp_path / "ran").exists()
    assert not hasattr(model.config.backbone, "auto_map")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "dog", "cat"], r"unique, but got some twice: \['cat'\]"),
        ([], "at least one class"),
        (0, "at least one class"),
        (["cat", ""], "empty one or a number"),
        (["cat", " \t"], "empty one or a number"),
        (["cat", 3], "empty one or a number"),
        (["cat", None], "empty one or a number"),
    ],
)
def test_bad_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_model("vit", labels, rows=0)


def test_a_string_is_no_list_of_labels():
    with pytest.raises(ValueError, match="labels"):
        tiny_model("vit", "cat", rows=0)


def test_doubled_labels_of_mixed_types_are_a_value_error():
    with pytest.raises(ValueError, match="labels"):
        tiny_model("vit", [1, 1, "cat", "cat"], rows=0)


def test_a_number_of_labels():
    model = tiny_model("vit", 3, rows=0)
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert model(pixel_values=pixels(2)).head_logits.shape == (2, 3)
