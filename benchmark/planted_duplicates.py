"""Copies planted across a split: how many `hf-knn doctor` finds, and how often it is wrong.

    python benchmark/planted_duplicates.py [--seeds 3] [--copies 200] [--output outputs/doctor]

Half of the pictures are `train`, half `test`. Copies of test pictures are planted in train: made
smaller (0.5 to 0.9) and recompressed (JPEG quality 40 to 80), in the second arm also cropped by up
to 4 % at each side. Found is a copy that is named, as a copy of a picture with the same pixels as
the one it was made from. A false alarm is a duplicate named among the pictures as they are, beyond
those with equal pixels. Openmoji has genuine near twins, which are listed to be looked at; scans of
digits, small and much alike, have none.
"""

import argparse
import csv
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from backbones import build_backbone
from PIL import Image
from results import mean_and_std, provenance
from tasks import load_task

TASKS = ("openmoji-categories", "digits")
CROPS = {"resized and recompressed": 0.0, "also cropped": 0.04}
KINDS = ("cross_split_duplicate", "near_duplicate", "exact_duplicate")


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


def measure(task: str, seed: int, crop: float, copies: int) -> dict[str, Any]:
    """Recall and false alarms of one set of planted copies."""
    generator = np.random.default_rng([seed, round(1000 * crop)])
    dataset = load_task(task)
    names = dataset.features["label"].names
    with tempfile.TemporaryDirectory() as scratch:
        folder, digests = Path(scratch) / "pictures", {}
        is_test = generator.random(len(dataset)) < 0.5
        chosen = set(generator.choice(np.flatnonzero(is_test), copies, replace=False).tolist())
        for row, entry in enumerate(dataset):
            image = entry["image"].convert("RGB")
            label = f"{entry['label']:02d} {names[entry['label']]}".replace("/", "-")
            place = folder / ("test" if is_test[row] else "train") / label / f"{row:05d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            image.save(place, compress_level=1)
            digests[row] = hashlib.sha256(image.tobytes()).hexdigest()
            if row in chosen:
                place = folder / "train" / label / f"{row:05d}-copy.jpg"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(spoil(image, generator, crop))
        started = time.perf_counter()
        lines = diagnose(folder, Path(scratch) / "out")
        seconds = time.perf_counter() - started
    found, near = set(), []
    for line in (line for line in lines if line["kind"] in KINDS):
        stem, other = Path(line["path"]).stem, Path(line["other"].split(" | ")[0]).stem
        source, kept = int(stem.split("-")[0]), int(other.split("-")[0])
        if stem.endswith("-copy") and digests[source] == digests[kept]:
            found.add(source)
        elif not stem.endswith("-copy") and digests[source] != digests[kept]:
            near.append((dataset[source]["name"], dataset[kept]["name"]))
    return {
        "recall": len(found & chosen) / copies,
        "named_per_1000": 1000 * len(near) / len(dataset),
        "named": near,
        "seconds": seconds,
    }


def diagnose(folder: Path, output: Path) -> list[dict[str, str]]:
    """What `hf-knn doctor` says about a folder."""
    backbone = build_backbone("tiny-vit-digits")  # copies are found by pixels, so the fastest one
    command = [sys.executable, "-m", "hf_knn_cli", "doctor", str(folder), "--json"]
    command += ["--backbone", str(backbone), "-o", str(output)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with (output / "findings.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="sets of planted copies")
    parser.add_argument("--copies", type=int, default=200, help="planted in each set")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--output", type=Path, default=Path("outputs/doctor"))
    options = parser.parse_args()
    document: dict[str, Any] = {"provenance": provenance(), "tasks": {}}
    for task in options.tasks:
        # scans of 8 x 8 pixels are not made smaller: nothing would be left of them
        crops = CROPS if task != "digits" else {"resized and recompressed": 0.0}
        for name, crop in crops.items():
            runs = [measure(task, seed, crop, options.copies) for seed in range(options.seeds)]
            document["tasks"][f"{task}, {name}"] = runs
            recall = "not measured"
            if task != "digits":
                mean, std = mean_and_std([run["recall"] for run in runs])
                recall = f"{mean:.3f} ± {std:.3f}"
            alarms, _ = mean_and_std([run["named_per_1000"] for run in runs])
            print(f"{task}, {name}: recall {recall}; {alarms:.2f} per 1,000 named as near copies")
            for pair in sorted({tuple(sorted(pair)) for run in runs for pair in run["named"]}):
                print(f"   {pair[0]} | {pair[1]}")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "planted_duplicates.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
