"""What the speed scripts search: clusters, jittered real features, and a spectrum like theirs."""

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

sys.path.append(str(Path(__file__).parents[1]))  # benchmark/, where the catalog lies

from catalog.offline_backbones import build_backbone
from catalog.offline_tasks import load_pictures
from hf_knn import KnnForImageClassification, extract_features

DIM, CLUSTERS, SIGMA = 384, 1000, 1.2
IMAGENET_ROWS = 1_281_167
_JITTER = 0.5
_DECAY = 1.2  # of the variance by component, fitted to that of openmoji and glyphs
_BLOCK = 65_536

Rows = npt.NDArray[np.float32]


def clustered(rows: int, seed: int) -> Rows:
    """Unit vectors around 1,000 centres: [rows, 384] float32."""
    centres = np.random.default_rng(0).standard_normal((CLUSTERS, DIM), dtype=np.float32)
    generator = np.random.default_rng(seed)
    points = np.empty((rows, DIM), np.float32)
    for start in range(0, rows, _BLOCK):
        block = centres[generator.integers(CLUSTERS, size=min(_BLOCK, rows - start))]
        block += SIGMA * generator.standard_normal(block.shape, dtype=np.float32)
        points[start : start + _BLOCK] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return points


def jittered(rows: int, seed: int) -> Rows:
    """Features of openmoji and glyphs, each many times with noise: [rows, 384] float32.

    EfficientNet-Lite0 gives 1,280 values, a fixed random projection keeps 384. The noise of a row
    is half as long as the median distance from a picture to its nearest other picture.
    """
    return np.concatenate([np.empty((0, DIM), np.float32), *jittered_blocks(rows, seed)])


def jittered_blocks(rows: int, seed: int) -> Iterator[Rows]:
    """The same, block by block."""
    real = _real_features()
    distances = torch.cdist(torch.from_numpy(real), torch.from_numpy(real))
    distances.fill_diagonal_(torch.inf)
    length = _JITTER * float(distances.min(dim=1).values.median())
    generator = np.random.default_rng(seed)
    for start in range(0, rows, _BLOCK):
        block = real[generator.integers(len(real), size=min(_BLOCK, rows - start))]
        noise = generator.standard_normal(block.shape, dtype=np.float32)
        yield block + noise * np.float32(length / DIM**0.5)


def spectral(rows: int, seed: int) -> Rows:
    """Unit vectors without clusters, whose variance falls off by component: [rows, 384] float32."""
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((DIM, DIM)))
    spread = np.arange(1, DIM + 1) ** (-_DECAY / 2)
    mixing = (spread[:, None] * turn).astype(np.float32)
    generator = np.random.default_rng(seed)
    points = np.empty((rows, DIM), np.float32)
    for start in range(0, rows, _BLOCK):
        count = min(_BLOCK, rows - start)
        block = generator.standard_normal((count, DIM), dtype=np.float32) @ mixing
        points[start : start + _BLOCK] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return points


DATA: dict[str, Callable[[int, int], Rows]] = {
    "clusters": clustered,
    "jittered": jittered,
    "spectral": spectral,
}


@functools.cache
def _real_features(cache_dir: Path | None = None) -> Rows:
    parts = []
    for name in ("openmoji", "glyphs"):
        pictures = load_pictures(name, cache_dir)
        folder = build_backbone("efficientnet-lite0", cache_dir)
        model = KnnForImageClassification.from_backbone(folder, pictures.features["label"].names)
        parts.append(extract_features(model, pictures, model.image_processor).features)
    features = torch.cat(parts).numpy()
    projection = np.random.default_rng(0).standard_normal((features.shape[1], DIM))
    projected: Rows = (features @ projection / DIM**0.5).astype(np.float32)
    return projected
