"""Writes folders as `benchmark/run.py` does, with made-up answers; it documents their layout."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

POOL, TEST = 400, 120
KS, TEMPERATURES = [1, 5, 20, 50], [0.01, 0.07, 0.14, 0.5, 1.0]
HEAD_STRENGTHS = {
    "linear": 2.2, "ridge": 2.3, "kernel": 2.4, "lda": 2.1, "knn": 1.8, "blend:linear+knn": 2.4,
    "trials": 2.2, "blend:trials+knn": 2.4, "blend:ridge+knn": 2.5, "blend:kernel+knn": 2.55,
    "blend:lda+knn": 2.3, "auto": 2.6,
}  # fmt: skip
STRENGTHS: dict[str, dict[str, float]] = {
    "knn": {"head": 2.2, "knn": 1.8, "blend": 2.4, "fixed": 2.3, "dino": 1.7},
    "linear": {
        "plain": 2.2, "reweighted": 2.25, "focal": 2.1, "shuffled": 2.2, "constant": 2.22,
        "knn": 1.8, "blend": 2.4,
    },
    "lowdata": {"head": 1.0, "ridge": 1.1, "knn": 0.9, "blend": 1.3, "fixed": 1.2},
    "heads": HEAD_STRENGTHS,
    "lowdata_heads": {arm: strength - 1 for arm, strength in HEAD_STRENGTHS.items()},
    "complementarity": {"head": 2.2, "knn": 1.8, "blend": 2.4},
    "robustness": {"head": 1.6, "knn": 1.3, "blend": 1.7},
    "peers": {
        "head": 2.2, "knn": 1.8, "logistic": 2.2, "lda": 2.3, "ncm": 1.5,
        "blend:head+knn": 2.4, "blend:head+lda": 2.35, "blend:head+ncm": 2.2,
        "blend:lda+knn": 2.45, "blend:ncm+knn": 1.9, "blend:logistic+knn": 2.4,
        "blend:head+logistic": 2.25,
    },
}  # fmt: skip
"""How well each arm of a protocol tells the true class, in made-up logits."""


@dataclass(frozen=True)
class Plan:
    """What a made-up run holds; the protocols are those of `STRENGTHS`."""

    tasks: Sequence[str] = ("openmoji", "digits")
    backbones: Sequence[str] = ("lite0", "tiny-vit")
    protocols: Sequence[str] = tuple(STRENGTHS)
    seeds: Sequence[int] = (0, 1, 2)
    shots: Sequence[int] = (1, 4, 16)
    classes: int = 5
    label_names: Sequence[str] = ("cat", "dog", "fox", "hen", "owl")
    extra_strength: Mapping[str, float] = field(default_factory=dict)
    groups: bool = False
    near: float = 0.1
    revision: str = "1"
    commit: str = "abc123"
    salt: str = ""


def write_run(folder: Path, plan: Plan | None = None) -> Path:
    """Writes `run.json` and every cell of a plan."""
    plan = plan or Plan()
    (folder / "cells").mkdir(parents=True)
    revisions = dict.fromkeys(plan.tasks, plan.revision)
    run = {"format": 1, "suite": "made-up", "revisions": revisions, "options": {}}
    (folder / "run.json").write_text(json.dumps(run))
    for about in cells_of(plan):
        write_cell(folder, plan, about)
    return folder


def cells_of(plan: Plan) -> Iterable[dict[str, Any]]:
    """What tells cells apart."""
    for task in plan.tasks:
        for backbone in plan.backbones:
            for protocol in plan.protocols:
                variants: list[dict[str, Any]] = [{"shots": None}]
                if protocol.startswith("lowdata"):
                    variants = [{"shots": shots} for shots in plan.shots]
                if protocol == "robustness":
                    variants = [{"shots": None, "shift": shift} for shift in ("blur", "noise")]
                for variant in variants:
                    for seed in plan.seeds:
                        base = {"task": task, "backbone": backbone, "protocol": protocol}
                        yield base | {"seed": seed} | variant


def cell_name(about: Mapping[str, Any]) -> str:
    """The base name of a cell's files."""
    parts = [about["task"], about["backbone"], about["protocol"]]
    parts += [f"{about['shots']}shot"] if about["shots"] is not None else []
    parts += [about["shift"]] if about.get("shift") else []
    return "--".join([*parts, f"seed{about['seed']}"])


def write_cell(folder: Path, plan: Plan, about: Mapping[str, Any]) -> Path:
    """Writes CELL.json and CELL.npz; returns the path of the JSON."""
    name = cell_name(about)
    items = _items(plan, about)
    arrays: dict[str, NDArray[Any]] = dict(items)
    arms, said = {}, {}
    for arm, strength in STRENGTHS[about["protocol"]].items():
        strength += plan.extra_strength.get(arm, 0.0) + 0.4 * np.log2((about["shots"] or 1) + 1)
        said[arm] = probabilities = _answers(plan, about, arm, items["labels"], strength)
        predicted = probabilities.argmax(1)
        arrays[f"predicted/{arm}"] = predicted.astype(np.int32)
        arrays[f"confidence/{arm}"] = probabilities.max(1).astype(np.float32)
        true = probabilities[np.arange(len(predicted)), items["labels"]]
        arrays[f"true/{arm}"] = true.astype(np.float32)
        clean = ~items["near_duplicate"]
        test = metrics(probabilities, items["labels"])
        arms[arm] = {
            "chosen": _chosen(arm, about["seed"]),
            "validation": test,
            "test": test,
            "test_clean": metrics(probabilities[clean], items["labels"][clean]),
            "per_class": None,
            "terms": None,
        }
    for arm, (first, second) in _blends(arms).items():
        arms[arm]["terms"] = terms(said[first], said[second], 0.4, items["labels"])
    stored = folder / "cells" / f"{name}.npz"
    np.savez(stored, allow_pickle=False, **arrays)
    document = _document(plan, about, arms, items)
    document["arrays_sha256"] = hashlib.sha256(stored.read_bytes()).hexdigest()
    path = folder / "cells" / f"{name}.json"
    path.write_text(json.dumps(document))
    return path


def metrics(probabilities: NDArray[np.float64], labels: NDArray[Any]) -> dict[str, float]:
    """What a runner would have measured; the ECE is that of a single bin."""
    right = probabilities.argmax(1) == labels
    true = probabilities[np.arange(len(labels)), labels]
    return {
        "top1": float(right.mean()),
        "top5": 1.0,
        "mean_class": float(np.mean([right[labels == c].mean() for c in np.unique(labels)])),
        "nll": float(-np.log(true).mean()),
        "ece": abs(float(probabilities.max(1).mean() - right.mean())),
    }


def _blends(arms: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The blends among some arms, with their voices."""
    named = {arm: arm.removeprefix("blend:").split("+") for arm in arms if ":" in arm}
    found = {arm: (voices[0], voices[1]) for arm, voices in named.items()}
    return found | {arm: ("head", "knn") for arm in ("blend", "fixed") if {arm, "head"} <= {*arms}}


def terms(
    first: NDArray[np.float64], second: NDArray[np.float64], weight: float, labels: NDArray[Any]
) -> dict[str, float]:
    """What a runner says of a blend of [n, C] probabilities, the second with a weight."""
    truth = np.eye(first.shape[1])[labels]
    blend = (1 - weight) * first + weight * second
    own = np.arange(len(labels)), labels
    gain = float(np.mean(np.log(blend[own]) - np.log(first[own])))
    distance = float(((second - first) ** 2).sum(1).mean())
    return {
        "weight": weight, "disagreement": distance,
        "ambiguity": weight * (1 - weight) * distance,
        "error_first": float(((first - truth) ** 2).sum(1).mean()),
        "error_second": float(((second - truth) ** 2).sum(1).mean()),
        "error": float(((blend - truth) ** 2).sum(1).mean()),
        "top1_first": float((first.argmax(1) == labels).mean()),
        "top1_second": float((second.argmax(1) == labels).mean()),
        "log_gain": gain, "log_gain_measured": gain,
    }  # fmt: skip


def _chosen(arm: str, seed: int) -> dict[str, Any]:
    if arm == "auto":
        return {"head": ("kernel", "ridge")[seed % 2], "k": 20, "knn_weight": 0.5 * (seed > 0)}
    return {"k": 20, "temperature": 0.1 + 0.01 * seed} if "n" in arm else {}


def _rng(plan: Plan, *parts: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr((plan.salt, *parts)).encode()))


def _items(plan: Plan, about: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The test items of a split: the same for every backbone and protocol of a task."""
    labels = np.random.default_rng(1).integers(0, plan.classes, POOL)
    rng = np.random.default_rng(about["seed"])
    ids = np.sort(rng.choice(POOL, TEST, replace=False)).astype(np.int64)
    near = np.random.default_rng(2).random(POOL) < plan.near
    return {
        "ids": ids,
        "labels": labels[ids].astype(np.int32),
        "groups": ids // 4 if plan.groups else ids,
        "near_duplicate": near[ids],
    }


def _answers(
    plan: Plan, about: Mapping[str, Any], arm: str, labels: NDArray[Any], strength: float
) -> NDArray[np.float64]:
    """Softmax of noise, most of it shared by the arms, and of the true class."""
    size = (len(labels), plan.classes)
    shared = _rng(plan, about["task"], about["backbone"], about["seed"]).normal(size=size)
    own = np.random.default_rng(zlib.crc32(repr((arm, sorted(about.items(), key=str))).encode()))
    logits = 1.3 * shared + 0.5 * own.normal(size=size)
    logits[np.arange(len(labels)), labels] += strength
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def _document(
    plan: Plan, about: Mapping[str, Any], arms: dict[str, Any], items: dict[str, NDArray[Any]]
) -> dict[str, Any]:
    versions = {"torch": "2.14.1", "hf-knn": "0.1.0"}
    heat = np.add.outer(np.linspace(0.5, 0.7, len(KS)), np.linspace(0.1, 0, len(TEMPERATURES)))
    document = {
        "format": 1,
        "cell": dict(about),
        "task": {
            "title": about["task"].title(), "classes": plan.classes, "metric": "top1",
            "licence": "CC-BY-SA-4.0", "revision": plan.revision,
            "label_names": list(plan.label_names),
        },
        "model": {"title": about["backbone"], "revision": "w1"},
        "provenance": {
            "versions": versions, "python": "3.12", "machine": "Linux x86_64", "device": "cpu",
            "threads": 1, "commit": plan.commit, "precision": "float32", "world_size": 1,
            "finished": f"2026-11-24T12:00:{about['seed']:02d}+00:00",
        },
        "seconds": {"features": 1.5, "head": 0.5, "tuning": 0.25},
        "images": 300, "images_per_second": 200.0, "peak_memory_bytes": 3 * 2**28,
        "data": {
            "train": 200, "validation": 80, "test": TEST,
            "near_duplicates_in_train": int(items["near_duplicate"].sum()),
        },
        "arms": arms,
        "heat": {"k": KS, "temperature": TEMPERATURES, "top1": heat.tolist()},
    }  # fmt: skip
    if about["protocol"] == "complementarity":
        document["extra"] = {
            "both_right": 0.6, "only_head": 0.15, "only_knn": 0.1, "neither": 0.15, "oracle": 0.85,
        }  # fmt: skip
    if about["protocol"] == "peers":
        document["pairs"] = {
            f"{a}+{b}": (arms[a]["test"]["top1"] + arms[b]["test"]["top1"]) / 2 + 0.05
            for a, b in combinations(("logistic", "lda", "ncm"), 2)
        }
    return document
