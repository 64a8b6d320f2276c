"""A small dataset of pictures on the local Hub."""

import io
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image

from support.hub_server import Hub

REPO = "org/shapes"


def picture(label: int, number: int) -> dict[str, Any]:
    pixels = np.random.default_rng(100 * label + number).integers(0, 90, (24, 24, 3), np.uint8)
    pixels[:, :, label] += 120
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def parquet(count: int, start: int, label: str = "label") -> bytes:
    names = ["disc", "ring"]
    features = Features(
        {"image": ImageColumn(), label: ClassLabel(names=names), "x": Value("int64")}
    )
    rows = [
        {"image": picture(row % 2, start + row), label: row % 2, "x": row} for row in range(count)
    ]
    stream = io.BytesIO()
    Dataset.from_list(rows, features=features).to_parquet(stream)
    return stream.getvalue()


def publish(hub: Hub, train: int = 24, label: str = "label", private: bool = False) -> str:
    """One more commit of the dataset; returns it."""
    repo = hub.repos.get(("dataset", REPO)) or hub.create(REPO, "dataset", private)
    files = {
        "train.parquet": parquet(train, 0, label),
        "test.parquet": parquet(16, 500, label),
    }
    return repo.commit("main", files, f"{train} pictures")
