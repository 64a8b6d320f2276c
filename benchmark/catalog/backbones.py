"""The backbones of the study as data: the paper's 18, newer ones, and those made offline.

Ids with `verified=False`, and revisions, were written without a network, out of stored pages and of
what others publish; timm's ids, sizes and widths are those of the installed timm.
`benchmark/verify.py` checks them where there is a network.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from catalog.cache import unknown_name
from catalog.offline_backbones import LITES, OFFLINE_BACKBONES, build_backbone
from hf_knn_cli.backbones import known_backbones

SUPERVISED, SELF_SUPERVISED, RANDOM, SCRATCH = "supervised", "self-supervised", "random", "scratch"


@dataclass(frozen=True)
class Backbone:
    """One backbone.

    Attributes:
        name: what it is called on the command line.
        title: one line for reports.
        location: the Hub id, a folder, or the key of an offline one; None has no public equivalent.
        kind: how its weights came about: `supervised`, `self-supervised`, `random`, or `scratch`:
            trained on the training pictures of each split.
        offline: whether an installed package holds it.
        revision: commit on the Hub; None takes the newest and notes which.
        pooling: of the head's feature; None chooses by the kind of model.
        knn_pooling: of the neighbours' feature; None is that of the head.
        normalization: of the datastore.
        image_size: side of the square it sees, pixels.
        width: D of its feature; 0 is unknown before it was opened.
        megabytes: of the download, about.
        licence: of the weights.
        in_paper: whether it is one of the paper's 18.
        verified: whether the id was checked: against the Hub, or the installed timm.
        note: what to know about it.
    """

    name: str
    title: str
    location: str | None
    kind: str = SUPERVISED
    offline: bool = False
    revision: str | None = None
    pooling: str | None = None
    knn_pooling: str | None = None
    normalization: str = "l2_centered"
    image_size: int = 224
    width: int = 0
    megabytes: int = 0
    licence: str = "unknown"
    in_paper: bool = False
    verified: bool = False
    note: str = ""


def _paper(name: str, title: str, location: str | None, width: int, **facts: Any) -> Backbone:
    entry = Backbone(name, title, location, width=width, in_paper=True)
    return replace(entry, **facts)


def _absent(name: str, title: str, kind: str, where: str, width: int = 2048) -> Backbone:
    note = (
        "no public equivalent that transformers or timm can open is known; its authors' weights: "
        f"{where}"
    )
    return _paper(name, title, None, width, kind=kind, note=note)


_CNN = {"pooling": "mean", "knn_pooling": "max"}  # as published
_TOKENS = {"pooling": "cls"}
_SSL = {"kind": SELF_SUPERVISED}

_PAPER = (
    _paper("resnet50", "ResNet-50, ImageNet labels", "timm/resnet50.tv_in1k", 2048, **_CNN,
           megabytes=102, licence="BSD-3-Clause", verified=True),
    _absent("resnet50-inat2021", "ResNet-50, iNat2021 labels", SUPERVISED,
            "github.com/visipedia/newt"),
    _absent("resnet50-inat-mini", "ResNet-50, iNat2021-mini labels", SUPERVISED,
            "github.com/visipedia/newt"),
    _absent("resnet50-mocov2", "ResNet-50, MoCo-v2", SELF_SUPERVISED,
            "github.com/facebookresearch/moco"),
    _absent("resnet50-mocov3", "ResNet-50, MoCo-v3", SELF_SUPERVISED,
            "github.com/facebookresearch/moco-v3"),
    _absent("resnet50-swav", "ResNet-50, SwAV", SELF_SUPERVISED,
            "github.com/facebookresearch/swav"),
    _paper("resnet50-dino", "ResNet-50, DINO", "Ramos-Ramos/dino-resnet-50", 2048, **_CNN, **_SSL,
           megabytes=94, licence="Apache-2.0",
           revision="74c9d9a0c7237aee5768ac25f7a2b8454dc63d70"),
    _absent("resnet50-barlow-twins", "ResNet-50, Barlow Twins", SELF_SUPERVISED,
            "github.com/facebookresearch/barlowtwins"),
    _paper("vit-b16", "ViT-B/16, ImageNet-21k labels", "google/vit-base-patch16-224-in21k", 768,
           **_TOKENS, megabytes=346, licence="Apache-2.0",
           revision="b4569560a39a0f1af58e3ddaf17facf20ab919b0"),
    _paper("vit-l16", "ViT-L/16, ImageNet-21k labels", "google/vit-large-patch16-224-in21k", 1024,
           **_TOKENS, megabytes=1_220, licence="Apache-2.0"),
    _paper("vit-s16-dino", "ViT-S/16, DINO", "timm/vit_small_patch16_224.dino", 384, **_TOKENS,
           **_SSL, megabytes=87, licence="Apache-2.0", verified=True,
           revision="733b42a211ebe03aa7327050699cfcee7cd96123"),
    _paper("vit-b16-dino", "ViT-B/16, DINO", "timm/vit_base_patch16_224.dino", 768, **_TOKENS,
           **_SSL, megabytes=343, licence="Apache-2.0", verified=True,
           revision="3ca4284a1d2db6ac0fc1a7e24e71ee0643260ec2"),
    _absent("vit-s16-mocov3", "ViT-S/16, MoCo-v3", SELF_SUPERVISED,
            "github.com/facebookresearch/moco-v3", 384),
    _absent("vit-b16-mocov3", "ViT-B/16, MoCo-v3", SELF_SUPERVISED,
            "github.com/facebookresearch/moco-v3, also as the tensors of timm's "
            "vit_base_patch16_224 without a configuration in nyu-visionx/moco-v3-vit-b", 768),
    _paper("swin-t", "Swin-T, ImageNet labels", "timm/swin_tiny_patch4_window7_224.ms_in1k", 768,
           pooling="mean", megabytes=114, licence="MIT", verified=True),
    _paper("swin-s", "Swin-S, ImageNet labels", "timm/swin_small_patch4_window7_224.ms_in1k", 768,
           pooling="mean", megabytes=199, licence="MIT", verified=True),
    _paper("swin-b", "Swin-B, ImageNet-21k labels", "timm/swin_base_patch4_window7_224.ms_in22k",
           1024, pooling="mean", megabytes=437, licence="MIT", verified=True),
    _absent("swin-t-moby", "Swin-T, MoBY", SELF_SUPERVISED,
            "github.com/SwinTransformer/Transformer-SSL", 768),
)  # fmt: skip


def _modern(name: str, kind: str = SELF_SUPERVISED, **facts: Any) -> Backbone:
    """One of those that `hf-knn` knows by a short name."""
    known = known_backbones()[name]
    on_timm = known.place.startswith("timm/")
    entry = Backbone(
        name, known.title, known.place, kind, image_size=known.image_size, width=known.features,
        megabytes=known.megabytes, licence=known.licence, verified=on_timm, note=known.note,
    )  # fmt: skip
    return replace(entry, **facts)


_MODERN = (
    _modern("dinov2-s", **_TOKENS, revision="ed25f3a31f01632728cabb09d1542f84ab7b0056"),
    _modern("dinov2-b", **_TOKENS, revision="f9e44c814b77203eaa57a6bdbbd535f21ede1415"),
    _modern("dinov3-s", **_TOKENS),
    _modern("dinov3-b", **_TOKENS),
    _modern("siglip2-b", pooling="mean"),
    _modern("clip-b", **_TOKENS, revision="57c216476eefef5ab752ec549e440a49ae4ae5f3"),
    _modern("convnextv2-t", SUPERVISED, pooling="mean"),
    _modern("convnextv2-b", SUPERVISED, pooling="mean"),
)

_OFFLINE_FACTS: dict[str, dict[str, Any]] = {
    **{
        name: {"width": lite.features, "pooling": "mean", "image_size": lite.image_size}
        for name, lite in LITES.items()
    },
    "efficientnet-lite0-random": {"width": 1280, "pooling": "mean", "kind": RANDOM},
    "tiny-vit": {"width": 64, "pooling": "mean", "kind": SCRATCH, "image_size": 16},
    "tiny-vit-digits": {"width": 64, "pooling": "mean", "kind": SCRATCH, "image_size": 8},
}


def _offline(name: str) -> Backbone:
    known = OFFLINE_BACKBONES[name]
    entry = Backbone(name, known.title, name, offline=True, licence=known.licence, verified=True)
    return replace(entry, **_OFFLINE_FACTS[name])


BACKBONES: dict[str, Backbone] = {
    entry.name: entry for entry in (*_PAPER, *_MODERN, *map(_offline, OFFLINE_BACKBONES))
}
"""By name; beside them any Hub id (`org/name`), timm id (`timm/name`) or folder."""


def find_backbone(name: str) -> Backbone:
    """Looks a backbone up by what it is called on the command line.

    Args:
        name: a key of `BACKBONES`, a Hub id with a slash, or a folder that is there.

    Raises:
        ValueError: for an unknown name, with the nearest ones, or one that nobody offers publicly.
    """
    if name in BACKBONES:
        entry = BACKBONES[name]
        if entry.location is None:
            raise ValueError(
                f"Expected a backbone that can be had, but {name} cannot: {entry.note}; do convert "
                "it to a transformers folder and pass that."
            )
        return entry
    if "/" in name or Path(name).is_dir():
        return Backbone(name, name, name, kind="unknown")
    raise unknown_name("backbone", name, BACKBONES)


def place_of(entry: Backbone, cache_dir: Path | None) -> str | Path:
    """The folder or Hub id of a backbone; an offline one is made on first use."""
    assert entry.location is not None
    return build_backbone(entry.location, cache_dir) if entry.offline else entry.location
