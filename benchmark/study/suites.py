"""The suites: what is measured on what, as small dicts; and the cells that they come to."""

from typing import Any

from catalog.backbones import BACKBONES, find_backbone
from catalog.cache import unknown_name
from catalog.tasks import find_task
from study.cells import Cell
from study.protocols import FEW_PICTURES, PROTOCOLS
from study.shifts import SHIFTS

OFFLINE_BACKBONES = [
    "efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2", "tiny-vit",
    "efficientnet-lite0-random",
]  # fmt: skip
OFFLINE_TASKS = ["openmoji", "openmoji-categories", "digits", "glyphs"]
PAPER = [entry.name for entry in BACKBONES.values() if entry.in_paper and entry.location]
MODERN = ["dinov2-s", "dinov2-b", "dinov3-b", "siglip2-b", "clip-b", "convnextv2-t", "convnextv2-b"]
FEW = [1, 2, 4, 8, 16]
FROZEN = ["knn", "linear", "complementarity", "peers", "heads"]
FEW_PROTOCOLS = ["lowdata", "lowdata_heads"]

SUITES: dict[str, dict[str, Any]] = {
    "offline": {
        "tasks": OFFLINE_TASKS,
        "backbones": OFFLINE_BACKBONES,
        "protocols": [*FROZEN, *FEW_PROTOCOLS],
        "seeds": 5,
        "shots": FEW,
    },
    "fgvc": {
        "tasks": ["cub-200-2011", "flowers-102", "stanford-dogs", "stanford-cars"],
        "backbones": PAPER,
        "protocols": ["knn", "linear", "complementarity"],
        "seeds": 5,
    },
    "newt": {
        "tasks": [],  # `--task imagefolder:PATH`, once for each of the 164
        "backbones": PAPER,
        "protocols": ["knn", "linear"],
        "seeds": 5,
    },
    "imagenet": {
        "tasks": ["imagenet-1k", "imagenet-v2", "imagenet-r"],
        "backbones": PAPER,
        "protocols": ["knn", "linear", "complementarity"],
        "seeds": 1,
    },
    "lowdata": {
        "tasks": ["cub-200-2011", "flowers-102", "stanford-dogs", "stanford-cars"],
        "backbones": PAPER,
        "protocols": ["lowdata"],
        "seeds": 5,
        "shots": FEW,
    },
    "modern": {
        "tasks": ["flowers-102", "cub-200-2011", "dtd", "oxford-pets", "eurosat", "cifar100"],
        "backbones": MODERN,
        "protocols": [*FROZEN, *FEW_PROTOCOLS, "robustness"],
        "seeds": 5,
        "shots": FEW,
    },
}
"""`quick`, the default, is the quickstart: see `quickstart.py`."""

QUICK = "quick"


def make_cells(
    suite: str,
    *,
    tasks: list[str] | None = None,
    backbones: list[str] | None = None,
    protocols: list[str] | None = None,
    shots: list[int] | None = None,
    seeds: int | None = None,
) -> list[Cell]:
    """The cells of a suite; what is given takes the place of what the suite says.

    Args:
        suite: a key of `SUITES`.
        tasks: names, see `catalog.tasks.find_task`.
        backbones: names, see `catalog.backbones.find_backbone`.
        protocols: keys of `study.protocols.PROTOCOLS`.
        shots: pictures per class of `lowdata`.
        seeds: how many, from 0.

    Raises:
        ValueError: for an unknown name, with the nearest ones, or nothing to measure.
    """
    if suite not in SUITES:
        raise unknown_name("suite", suite, [QUICK, *SUITES])
    chosen = SUITES[suite]
    task_names = tasks or chosen["tasks"]
    backbone_names = backbones or chosen["backbones"]
    protocol_names = protocols or chosen["protocols"]
    for name in task_names:
        find_task(name)
    for name in backbone_names:
        find_backbone(name)
    for name in protocol_names:
        if name not in PROTOCOLS:
            raise unknown_name("protocol", name, PROTOCOLS)
    if not task_names:
        raise ValueError(
            f"Expected a task for the suite {suite}, whose pictures the Hub does not hold; do pass "
            "--task imagefolder:PATH."
        )
    numbers = range(chosen["seeds"] if seeds is None else seeds)
    few = shots or chosen.get("shots", FEW)
    return [
        cell
        for task in task_names
        for backbone in backbone_names
        for seed in numbers
        for protocol in protocol_names
        for cell in _variants(task, backbone, protocol, seed, few)
    ]


def _variants(task: str, backbone: str, protocol: str, seed: int, shots: list[int]) -> list[Cell]:
    if protocol in FEW_PICTURES:
        return [Cell(task, backbone, protocol, seed, shots=count) for count in shots]
    if protocol == "robustness":
        return [Cell(task, backbone, protocol, seed, shift=shift) for shift in SHIFTS]
    return [Cell(task, backbone, protocol, seed)]
