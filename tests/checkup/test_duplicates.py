"""Copies are found, look-alikes are not; the print is of size and pixels."""

import io

import numpy as np
import pytest
import torch
import xxhash
from PIL import Image, ImageDraw

from hf_knn.checkup.duplicates import clusters_of, differences, duplicate_findings, find_pairs
from hf_knn.checkup.findings import Kind, Pictures
from hf_knn.data.keys import SIDE, print_of


def scene(seed: int, size: tuple[int, int] = (320, 240), shift: int = 0) -> Image.Image:
    """Random blocks and discs; `shift` moves the last disc, and nothing else."""
    generator = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(generator.integers(120, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for number in range(9):
        x, y = generator.integers((0, 0), (size[0] - 60, size[1] - 60))
        if number == 8:
            x = x - shift if x > size[0] / 2 else x + shift
        box = (int(x), int(y), int(x) + int(generator.integers(30, 100)), int(y) + 60)
        colour = tuple(generator.integers(0, 200, 3).tolist())
        (draw.ellipse if number == 8 else draw.rectangle)(box, fill=colour)
    return image


def spoiled(image: Image.Image, seed: int, crop: float = 0.0) -> Image.Image:
    """A copy: cropped a little, made smaller, and recompressed."""
    generator = np.random.default_rng(seed)
    left, top, right, bottom = generator.uniform(0, crop, 4) if crop else (0, 0, 0, 0)
    width, height = image.size
    copy = image.crop(
        (round(left * width), round(top * height), round((1 - right) * width),
         round((1 - bottom) * height))
    )  # fmt: skip
    share = generator.uniform(0.5, 0.9)
    copy = copy.resize((round(copy.width * share), round(copy.height * share)))
    buffer = io.BytesIO()
    copy.save(buffer, "JPEG", quality=int(generator.integers(40, 81)))
    return Image.open(buffer).convert("RGB")


def pictures(splits: list[str], labels: list[int]) -> Pictures:
    rows = np.arange(len(splits))
    paths = [f"{split}-{row}.png" for row, split in enumerate(splits)]
    return Pictures(splits, rows, rows, paths, np.array(labels), ["ant", "bee"])


def pairs_in(found) -> set[tuple[int, int]]:
    ends = zip(found.first.tolist(), found.second.tolist(), strict=True)
    return {(min(pair), max(pair)) for pair in ends}


def test_the_digest_is_that_of_size_and_pixels():
    image = scene(0)
    wanted = xxhash.xxh3_128(b"320 240 " + np.asarray(image).tobytes()).hexdigest()
    assert print_of(image).digest == wanted
    turned = Image.frombytes("RGB", (240, 320), image.tobytes())  # the same bytes, another shape
    assert print_of(turned).digest != wanted


@pytest.mark.parametrize("crop", [0.0, 0.04])
def test_spoiled_copies_are_found_and_nothing_else(crop):
    originals = [scene(seed) for seed in range(40)]
    copies = [spoiled(image, seed, crop) for seed, image in enumerate(originals[:20])]
    found = find_pairs([print_of(image) for image in originals + copies], None)
    wanted = {(seed, 40 + seed) for seed in range(20)}
    assert pairs_in(found) <= wanted, "a false alarm"
    assert len(pairs_in(found)) >= 19
    assert not found.exact.any()


def test_a_part_that_moved_is_no_copy():
    moved = [print_of(scene(seed, shift=80)) for seed in range(30)]
    found = find_pairs([print_of(scene(seed)) for seed in range(30)] + moved, None)
    assert pairs_in(found) == set()


def test_equal_pixels_are_found_however_many_there_are():
    prints = [print_of(scene(1))] * 12 + [print_of(scene(2))]
    found = find_pairs(prints, None)
    assert clusters_of(found, 13).tolist() == [0] * 12 + [1]
    assert found.exact.all()


def test_features_propose_candidates_too_and_pixels_decide():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 8, generator=generator)
    features[1] = features[0]  # a backbone that cannot tell them apart is not believed
    found = find_pairs([print_of(scene(seed)) for seed in range(30)], features)
    assert pairs_in(found) == set()


def test_differences_are_0_for_equal_pictures_and_large_for_others():
    tiny = torch.from_numpy(np.stack([print_of(scene(seed)).tiny for seed in range(8)]))
    batch = tiny.permute(0, 3, 1, 2).float() / 255
    assert differences(batch, batch).max() == pytest.approx(0, abs=1e-5)
    assert differences(batch, batch.roll(1, 0)).min() > 0.5
    flat = torch.full((1, 3, SIDE, SIDE), 0.5)
    assert differences(flat, flat).tolist() == [0]
    with pytest.raises(ValueError, match="two batches"):
        differences(batch, batch[:3])


def test_of_a_group_the_test_picture_is_kept_and_conflicts_are_told():
    one, other = print_of(scene(1)), print_of(scene(2))
    prints = [one, other, one, one, print_of(spoiled(scene(2), 0))]
    table = pictures(["train", "train", "test", "test", "train"], [0, 0, 0, 1, 0])
    found = duplicate_findings(find_pairs(prints, None), table)
    told = {(finding.kind, finding.picture, finding.others) for finding in found}
    assert told == {
        (Kind.CROSS_SPLIT, 0, (2,)),
        (Kind.CONFLICT, 2, (0, 3)),  # 3 may be the one with the right label, so it is no copy
        (Kind.NEAR, 4, (1,)),
    }
    assert "ant, bee" in next(f.detail for f in found if f.kind is Kind.CONFLICT)
