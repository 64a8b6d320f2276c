"""Copies planted among pictures: how many `hf-knn doctor` finds, and how often it is wrong.

    python benchmark/claims/planted_duplicates.py [--seeds 3] [--copies 200] [--output DIR]

Copies as they come across splits are planted: made smaller (0.5 to 0.9) and recompressed (JPEG
quality 40 to 80), in the second arm also cropped by up to 4 % at each side. Found is a copy that is
paired with the picture it was made from, or one with the same pixels. A false alarm is a pair named
among the pictures as they are, beyond those with equal pixels. Openmoji has genuine near twins,
which are listed to be looked at; scans of digits, small and much alike, have none. Candidates come
from pixels alone here; the command adds those that a backbone finds alike.
"""

import argparse
import io
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))  # benchmark/, where the catalog lies

from catalog.offline_tasks import load_pictures
from hf_knn.checkup import find_pairs
from hf_knn.data import print_of
from study.provenance import write_findings
from study.results import mean_and_std

TASKS = ("openmoji-categories", "digits")
CROPS = {"resized and recompressed": 0.0, "also cropped": 0.04}


def spoil(image: Image.Image, generator: np.random.Generator, crop: float) -> bytes:
    """The bytes of a JPEG file with a copy that was cropped, made smaller and recompressed."""
    width, height = image.size
    left, top, right, bottom = generator.uniform(0, crop, 4)
    box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
    copy = image.crop(tuple(round(edge) for edge in box))
    share = generator.uniform(0.5, 0.9)
    kind = (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)[generator.integers(2)]
    copy = copy.resize((round(copy.width * share), round(copy.height * share)), kind)
    buffer = io.BytesIO()
    copy.save(buffer, "JPEG", quality=int(generator.integers(40, 81)))
    return buffer.getvalue()


class Originals(NamedTuple):
    """The pictures of a task, and what is kept of each."""

    names: list[str]
    images: list[Image.Image]
    prints: list[Any]


def load(task: str) -> Originals:
    dataset = load_pictures(task)
    images = [entry["image"].convert("RGB") for entry in dataset]
    return Originals(dataset["name"][:], images, [print_of(image) for image in images])


def measure(originals: Originals, seed: int, crop: float, copies: int) -> dict[str, Any]:
    """Recall and false alarms of one set of planted copies."""
    generator = np.random.default_rng([seed, round(1000 * crop)])
    count = len(originals.images)
    chosen = generator.choice(count, copies, replace=False)
    planted = []
    for row in chosen:
        with Image.open(io.BytesIO(spoil(originals.images[row], generator, crop))) as image:
            planted.append(print_of(image.convert("RGB")))
    prints = [*originals.prints, *planted]
    started = time.perf_counter()
    pairs = find_pairs(prints, None)
    seconds = time.perf_counter() - started
    found, wrong, twins = set(), 0, []
    for first, second in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
        sources = [row if row < count else int(chosen[row - count]) for row in (first, second)]
        same = originals.prints[sources[0]].digest == originals.prints[sources[1]].digest
        if second >= count and first < count and same:
            found.add(second)
        elif second >= count:
            wrong += not same
        elif not same:
            twins.append((originals.names[first], originals.names[second]))
    return {
        "recall": len(found) / copies,
        "copies_of_another": wrong,
        "named_per_1000": 1000 * len(twins) / count,
        "named": twins,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="sets of planted copies")
    parser.add_argument("--copies", type=int, default=200, help="planted in each set")
    parser.add_argument("--task", action="append", choices=TASKS, help="repeatable")
    parser.add_argument("--output", "-o", type=Path, default=Path("outputs/doctor"))
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for task in options.task or TASKS:
        originals = load(task)
        # scans of 8 x 8 pixels are not made smaller: nothing would be left of them
        crops = CROPS if task != "digits" else {"resized and recompressed": 0.0}
        for name, crop in crops.items():
            runs = [measure(originals, seed, crop, options.copies) for seed in range(options.seeds)]
            found[f"{task}, {name}"] = runs
            recall = "not measured"
            if task != "digits":
                mean, std = mean_and_std([run["recall"] for run in runs])
                recall = f"{mean:.3f} ± {std:.3f}"
            others = sum(run["copies_of_another"] for run in runs)
            alarms, _ = mean_and_std([run["named_per_1000"] for run in runs])
            print(
                f"{task}, {name}: recall {recall}; {alarms:.2f} per 1,000 named as near copies; "
                f"{others} copies paired with another picture"
            )
            for pair in sorted({tuple(sorted(pair)) for run in runs for pair in run["named"]}):
                print(f"   {pair[0]} | {pair[1]}")
    path = options.output / "planted_duplicates.json"
    write_findings(path, tasks=found)
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
