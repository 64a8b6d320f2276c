"""The tasks of the study as data: where each lives, at which revision, and what its columns say.

An entry with `verified=False` was written without a network: ids, columns, sizes and the revisions
that are pinned are those of stored pages and of what others publish, not asked from the Hub.
`benchmark/verify.py` checks all entries where there is a network, and prints the revision to pin.
"""

import re
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from catalog.cache import unknown_name
from catalog.label_maps import LabelMap
from catalog.offline_tasks import OFFLINE_TASKS

HUB, FOLDER, NEWT = "hub:", "imagefolder:", "newt:"

_HUB_NAME = re.compile(
    r"hub:(?P<id>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?(?::(?P<config>[\w.-]+))?"
)


class Source(StrEnum):
    """Where the pictures of a task come from."""

    OFFLINE = "offline"
    FOLDER = "imagefolder"
    HUB = "hub"
    NOWHERE = "nowhere"


@dataclass(frozen=True)
class Task:
    """One classification task.

    Attributes:
        name: what it is called on the command line.
        title: one line for reports.
        source: where the pictures come from.
        location: the Hub id, the folder, or the key of an offline task.
        revision: the commit on the Hub that is read; None reads the newest and notes which.
        config: of the Hub dataset.
        image: column of the pictures.
        label: column of the labels.
        group: column of what must stay on one side of a split.
        splits: names of its training, validation and test splits; None where there is none.
        train_from: a task that has the training pictures, where this one has test pictures only.
        label_map: how its labels then name the classes of that task.
        classes: how many there are; 0 is unknown before it was read.
        pictures: how many there are, about; 0 is unknown.
        megabytes: of the download, about.
        metric: what the literature reports, `top1` or `mean_class`.
        licence: of the pictures, as their source says it.
        citation: whom to cite.
        gated: whether its terms must be accepted on the Hub first.
        streamed: too large for a small disk: pictures go through, features stay.
        verified: whether id, columns and revision were checked against the Hub.
        augmentation: that keeps the labels when a backbone is fine-tuned: `paper` (crops and
            mirroring), `flip` or `none`.
        note: what to know about it.
    """

    name: str
    title: str
    source: Source
    location: str
    revision: str | None = None
    config: str | None = None
    image: str = "image"
    label: str = "label"
    group: str | None = None
    splits: tuple[str, str | None, str | None] = ("train", None, "test")
    train_from: str | None = None
    label_map: LabelMap = LabelMap.NAMES
    classes: int = 0
    pictures: int = 0
    megabytes: int = 0
    metric: str = "top1"
    licence: str = "unknown"
    citation: str = ""
    gated: bool = False
    streamed: bool = False
    verified: bool = False
    augmentation: str = "paper"
    note: str = ""


def _hub(name: str, title: str, location: str, classes: int, pictures: int, **facts: Any) -> Task:
    entry = Task(name, title, Source.HUB, location, classes=classes, pictures=pictures)
    return replace(entry, **facts)


_HUB_TASKS = (
    _hub(
        "cub-200-2011", "Caltech-UCSD Birds 200-2011", "bentrevett/caltech-ucsd-birds-200-2011",
        200, 11_788, revision="1ef09e021b0b65b40337f6f285909656f407f6e0", megabytes=1_150,
        licence="research only", citation="Wah et al., CNS-TR-2011-001",
    ),
    _hub(
        "flowers-102", "Oxford Flowers-102", "dpdl-benchmark/oxford_flowers102", 102, 8_189,
        revision="544b55c9af69a05742ead7571cd7ae23cfcd758b",
        splits=("train", "validation", "test"), megabytes=3_360, metric="mean_class",
        citation="Nilsback and Zisserman, ICVGIP 2008",
    ),
    _hub(
        "stanford-dogs", "Stanford Dogs", "maurice-fp/stanford-dogs", 120, 20_580,
        megabytes=800, citation="Khosla et al., FGVC 2011",
    ),
    _hub(
        "stanford-cars", "Stanford Cars", "tanganke/stanford_cars", 196, 16_185,
        revision="9abf6cf7d6dfa7b95152a0d6e791ea9435b47a40",
        megabytes=5_970, licence="research only", citation="Krause et al., 3dRR 2013",
        note="the download has damaged copies of its test pictures too, which are left out",
    ),
    _hub(
        "imagenet-1k", "ImageNet-1k (ILSVRC 2012)", "ILSVRC/imagenet-1k", 1_000, 1_331_167,
        revision="49e2ee26f3810fb5a7536bbf732a7b07389a47b5",
        splits=("train", None, "validation"), megabytes=150_000, gated=True, streamed=True,
        licence="ImageNet terms of access", citation="Russakovsky et al., IJCV 2015",
        note="its test split has no labels; the validation split is the test set here",
    ),
    _hub(
        "imagenet-v2", "ImageNet-V2, matched frequency", "clip-benchmark/wds_imagenetv2",
        1_000, 10_000, image="webp", label="cls", splits=("", None, "test"),
        train_from="imagenet-1k", label_map=LabelMap.NUMBERS, megabytes=1_300, licence="MIT",
        citation="Recht et al., ICML 2019",
    ),
    _hub(
        "imagenet-r", "ImageNet-R (renditions)", "axiong/imagenet-r", 200, 30_000,
        revision="762a23f169e080bef0be7c9d96bf73a126cbb660",
        splits=("", None, "test"), train_from="imagenet-1k", label_map=LabelMap.WNIDS,
        megabytes=2_200, label="wnid",
        licence="MIT", citation="Hendrycks et al., ICCV 2021",
        note="its 200 classes are asked among all 1,000, which is harder than among themselves",
    ),
    _hub(
        "cifar10", "CIFAR-10", "uoft-cs/cifar10", 10, 60_000, image="img",
        revision="0b2714987fa478483af9968de7c934580d0bb9a2", megabytes=145,
        citation="Krizhevsky 2009",
    ),
    _hub(
        "cifar100", "CIFAR-100, fine labels", "uoft-cs/cifar100", 100, 60_000, image="img",
        label="fine_label", revision="aadb3af77e9048adbea6b47c21a81e47dd092ae5", megabytes=145,
        citation="Krizhevsky 2009",
    ),
    _hub(
        "food101", "Food-101", "ethz/food101", 101, 101_000, splits=("train", None, "validation"),
        revision="e06acf2a88084f04bce4d4a525165d68e0a36c38", megabytes=5_100,
        citation="Bossard et al., ECCV 2014",
        note="its test pictures are called validation",
    ),
    _hub(
        "dtd", "Describable Textures", "tanganke/dtd", 47, 5_640,
        revision="d2afa97d9f335b1a6b3b09c637aef667f98f966e", megabytes=630,
        licence="research only", citation="Cimpoi et al., CVPR 2014",
    ),
    _hub(
        "oxford-pets", "Oxford-IIIT Pets", "timm/oxford-iiit-pet", 37, 7_349,
        revision="10b688881011725fa2fa3d856a47536c9a7e6968", megabytes=800,
        metric="mean_class", licence="CC-BY-SA-4.0", citation="Parkhi et al., CVPR 2012",
    ),
    _hub(
        "eurosat", "EuroSAT, RGB", "timm/eurosat-rgb", 10, 27_000,
        revision="b4e28552cd5f3932b6abc37eb20d3e84901ad728",
        splits=("train", "validation", "test"), megabytes=95, licence="MIT",
        citation="Helber et al., JSTARS 2019",
    ),
)  # fmt: skip

_OFFLINE_FACTS: dict[str, dict[str, Any]] = {
    "openmoji": {"classes": 70, "pictures": 1_748, "citation": "OpenMoji project"},
    "openmoji-categories": {"classes": 9, "pictures": 1_898, "citation": "OpenMoji project"},
    "digits": {
        "classes": 10, "pictures": 1_797, "citation": "Alpaydin and Kaynak, UCI 1998",
        "augmentation": "none",  # of 8 x 8 pixels a crop loses strokes; a mirrored 2 is none
    },
    "glyphs": {
        "classes": 62, "pictures": 1_178, "group": "group", "citation": "matplotlib's typefaces",
        "augmentation": "none",  # a mirrored b is a d, and capitals differ by size
        "note": "no typeface family is on two sides of a split",
    },
    "openclipart": {
        "classes": 20, "pictures": 6_875, "group": "group", "metric": "mean_class",
        "citation": "Open Clip Art Library, release 0.18",
        "note": "not in a suite: needs Debian's package openclipart-png; near-duplicates are on "
        "one side of a split",
    },
}  # fmt: skip


def _offline(name: str) -> Task:
    known = OFFLINE_TASKS[name]
    entry = Task(name, known.title, Source.OFFLINE, name, licence=known.licence, verified=True)
    return replace(entry, splits=("train", None, None), **_OFFLINE_FACTS[name])


TASKS: dict[str, Task] = {
    entry.name: entry for entry in (*_HUB_TASKS, *map(_offline, OFFLINE_TASKS))
}
"""By name; beside them `newt:TASK`, `imagefolder:PATH` and `hub:ID[@REVISION][:CONFIG]`."""


def find_task(name: str) -> Task:
    """Looks a task up by what it is called on the command line.

    Args:
        name: a key of `TASKS`, `newt:` and the name of a NeWT task, `imagefolder:` and a folder
            with a sub-folder per label (or with `train`, `validation`, `test` inside), or `hub:`
            and a Hub id, with `@revision` and `:config` where wanted.

    Raises:
        ValueError: for an unknown name, with the nearest ones.
    """
    if name in TASKS:
        return TASKS[name]
    if name.startswith(FOLDER):
        return Task(name, name, Source.FOLDER, name.removeprefix(FOLDER), verified=True)
    if name.startswith(NEWT):
        return _newt(name.removeprefix(NEWT))
    found = _HUB_NAME.fullmatch(name)
    if found:
        entry = Task(name, name, Source.HUB, found["id"], found["revision"], found["config"])
        return replace(entry, splits=("train", "validation", "test"))
    raise unknown_name("task", name, [*TASKS, NEWT + "TASK", FOLDER + "PATH", HUB + "org/name"])


def _newt(task: str) -> Task:
    """One of the 164 binary tasks, as sub-folders of the pictures that its authors hand out."""
    return Task(
        NEWT + task, f"NeWT, {task}", Source.NOWHERE, task, classes=2, pictures=400,
        megabytes=4_000, licence="see github.com/visipedia/newt",
        citation="Van Horn et al., CVPR 2021",
        note="no copy on the Hub is known: download newt2021_images and newt2021_labels.csv from "
        "github.com/visipedia/newt, put the pictures of a task into train/LABEL and test/LABEL, "
        "and pass imagefolder:PATH",
    )  # fmt: skip
