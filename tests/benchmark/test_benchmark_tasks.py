"""The offline tasks and backbones: counts, subsets, splits, and folders that survive a kill."""

import io
import re
import shutil
import socket
import string
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from transformers import AutoImageProcessor, AutoModel

from catalog import cache, openclipart, openmoji
from catalog.backbones import find_backbone
from catalog.cache import build_once, cache_root, versioned
from catalog.glyphs import render_glyph
from catalog.loading import load_task
from catalog.offline_backbones import LITES, build_backbone
from catalog.offline_tasks import OFFLINE_TASKS, load_pictures, select_rows
from catalog.openmoji import match_emoji, read_emoji
from catalog.splits import split_indices
from hf_knn.model.known import Known, efficientnet_lite, find_known, rename_in_order
from study.suites import SUITES

GLYPHS = string.ascii_letters + string.digits


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


# openmoji


def test_match_emoji_by_eye():
    labels = {"category": "Symbols", "subcategory": "heart"}
    entries = [
        {"unified": "2665-FE0F", "name": "HEART", **labels},
        {"unified": "0023-FE0F-20E3", "name": "HASH KEY", **labels},
        {"unified": "1F3FB", "name": "TONE", **labels, "category": "Component"},
        {"unified": "1FFFF", "name": "UNDRAWN", **labels},
    ]
    matched = match_emoji(entries, {"2665", "0023-FE0F-20E3", "0023-20E3", "1F3FB"})
    assert [(emoji.hexcode, emoji.annotation) for emoji in matched] == [
        ("2665", "heart"),
        ("0023-FE0F-20E3", "hash key"),
    ]


@pytest.mark.parametrize(
    ("column", "classes", "rows"), [("subcategory", 70, 1748), ("category", 9, 1898)]
)
def test_openmoji_counts(column, classes, rows):
    emoji = read_emoji()
    assert len(emoji) == len({e.hexcode for e in emoji}) == 1898
    kept, names = select_rows([getattr(e, column) for e in emoji])
    assert (len(names), len(kept)) == (classes, rows)


def test_openmoji_tasks_share_one_drawing(tmp_path, monkeypatch):
    emoji = [e for e in read_emoji() if e.subcategory in ("cat-face", "heart", "hotel")]
    drawn = []
    render = openmoji.render_openmoji

    def counted(hexcode):
        drawn.append(hexcode)
        return render(hexcode)

    monkeypatch.setattr(openmoji, "read_emoji", lambda: emoji)
    monkeypatch.setattr(openmoji, "render_openmoji", counted)
    fine, coarse = (
        load_pictures("openmoji", tmp_path),
        load_pictures("openmoji-categories", tmp_path),
    )
    assert sorted(drawn) == sorted(e.hexcode for e in emoji)
    assert fine.features["label"].names == ["cat-face", "heart"]  # two hotels are no class
    assert coarse.features["label"].names == ["Smileys & Emotion"]
    expected = {f"{e.hexcode} {e.annotation}": e.subcategory for e in emoji}
    for row in fine:
        assert fine.features["label"].int2str(row["label"]) == expected[row["name"]]
    name, picture = fine[0]["name"], fine[0]["image"]
    assert (picture.mode, picture.size, picture.format) == ("RGB", (256, 256), "PNG")
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    with Image.open(io.BytesIO(render(name.split()[0]))) as again:
        assert again.tobytes() == picture.tobytes()


# glyphs


def test_glyphs_are_every_character_in_every_face(shared_cache, no_network):
    dataset = load_pictures("glyphs", shared_cache)
    assert len(dataset) == 19 * 62
    assert dataset.features["label"].names == sorted("".join(GLYPHS))
    assert set(Counter(dataset["label"][:]).values()) == {19}
    assert len(set(dataset["name"][:])) == len(dataset)


def test_a_glyph_lies_whole_in_the_middle():
    for face in ("DejaVuSans-BoldOblique", "STIXGeneral", "cmtt10"):
        for character in "WjQ0":
            picture = Image.open(io.BytesIO(render_glyph(face, character))).convert("L")
            rows, columns = np.nonzero(np.asarray(picture) < 128)
            for places in (rows, columns):
                assert places.min() > 20
                assert places.max() < 203
                # across by the width of its type, from which ink may lean out
                assert abs(places.min() + places.max() - 223) <= 20


def test_glyphs_of_two_faces_differ():
    faces = {render_glyph(face, "a") for face in ("DejaVuSans", "DejaVuSerif", "cmr10", "cmss10")}
    assert len(faces) == 4


# openclipart


@pytest.fixture
def clips(tmp_path, monkeypatch) -> Path:
    """A made-up folder: 9 birds in two folders, two of them the same, 8 tools, 2 of no class."""
    root = tmp_path / "png"
    for folder in ("animals/birds", "animals", "tools", "logos"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    places = [root / "animals" / "birds" / f"{n}.png" for n in range(6)]
    places += [root / "animals" / f"{n}.png" for n in range(3)]
    places += [root / "tools" / f"{n}.png" for n in range(8)]
    places += [root / "logos" / f"{n}.png" for n in range(2)]
    for seed, place in enumerate(places):
        noise = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((560, 400), Image.Resampling.NEAREST).save(place)
    shutil.copy(root / "animals" / "0.png", root / "animals" / "birds" / "0.png")
    (root / "tools" / "link.png").symlink_to("0.png")
    (root / "tools" / "broken.png").write_bytes(b"no picture")
    clear = Image.new("RGBA", (30, 20), (0, 0, 0, 0))
    clear.paste((200, 0, 0, 255), (10, 5, 20, 15))
    clear.save(root / "tools" / "0.png")
    monkeypatch.setattr(openclipart, "OPENCLIPART", root)
    return root


def test_openclipart_is_drawn_on_white_and_labelled_by_the_top_folder(clips, tmp_path, caplog):
    found = load_pictures("openclipart", tmp_path)
    assert "1 of 20 were left out. tools/broken.png: " in caplog.text
    assert found.features["label"].names == ["animals", "tools"]
    assert Counter(found["label"][:]) == {0: 9, 1: 8}
    by_name = {row["name"]: row for row in found}
    tool = by_name["tools/0.png"]["image"]
    assert (tool.mode, tool.size) == ("RGB", (30, 20))
    assert (tool.getpixel((0, 0)), tool.getpixel((15, 10))) == ((255, 255, 255), (200, 0, 0))
    assert by_name["tools/1.png"]["image"].size == (256, 183)  # of 560 x 400
    groups = {name: row["group"] for name, row in by_name.items()}
    assert groups["animals/birds/0.png"] == groups["animals/0.png"] == "animals/0.png"
    assert len(set(groups.values())) == 16


def test_openclipart_is_drawn_anew_when_the_folder_changes(clips, tmp_path):
    load_pictures("openclipart", tmp_path)
    before = load_task("openclipart", cache_dir=tmp_path)
    assert before.groups is not None
    (clips / "tools" / "8.png").write_bytes((clips / "tools" / "1.png").read_bytes())
    after = load_task("openclipart", cache_dir=tmp_path)
    assert (len(before.rows), len(after.rows)) == (17, 18)
    assert before.revision != after.revision


def test_without_the_package_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(openclipart, "OPENCLIPART", tmp_path / "nothing")
    with pytest.raises(
        FileNotFoundError, match=r"`apt-get install openclipart-png`, or pass --task"
    ):
        load_pictures("openclipart", tmp_path)
    assert "openclipart" not in SUITES["offline"]["tasks"]


# digits


def test_digits_are_those_of_sklearn(shared_cache, no_network):
    dataset, digits = load_pictures("digits", shared_cache), load_digits()
    assert dataset["label"][:] == digits.target.tolist()
    assert dataset.features["label"].names == [str(digit) for digit in range(10)]
    assert (dataset["name"][0], dataset["name"][1796]) == ("digit-0000", "digit-1796")
    pixels = np.stack([np.asarray(picture) for picture in dataset["image"]])
    assert pixels.shape == (1797, 8, 8, 3)
    assert (pixels.min(), pixels.max()) == (0, 255)
    np.testing.assert_array_equal(np.round(pixels[..., 1] * (16 / 255)), digits.images)


@pytest.mark.parametrize(
    ("limit", "counts"), [(100, [10] * 10), (43, [9, 9, 9, 8, 8]), (8, [8]), (5000, None)]
)
def test_limit_takes_the_same_balanced_subset(shared_cache, limit, counts):
    subset = load_pictures("digits", shared_cache, limit)
    whole = load_pictures("digits", shared_cache)
    if counts is None:
        assert len(subset) == len(whole)
        return
    label = subset.features["label"]
    sizes = Counter(subset["label"][:])
    assert sorted(sizes) == list(range(label.num_classes))
    assert sorted(sizes.values(), reverse=True) == counts
    assert subset["name"][:] == load_pictures("digits", shared_cache, limit)["name"][:]
    names = dict(zip(whole["name"][:], whole["label"][:], strict=True))
    assert [label.int2str(row["label"]) for row in subset] == [
        str(names[n]) for n in subset["name"]
    ]


def test_loading_leaves_the_drawn_folder_as_it_is(shared_cache):
    load_pictures("digits", shared_cache)
    before = sorted(shared_cache.rglob("*"))
    load_pictures("digits", shared_cache, limit=80)
    assert sorted(shared_cache.rglob("*")) == before


# subsets and splits


@settings(deadline=None)  # a busy machine is no defect
@given(st.lists(st.sampled_from("abcdefg"), max_size=120), st.integers(8, 130))
def test_select_rows_properties(values, limit):
    rows, names = select_rows(values, limit)
    counts = Counter(values[row] for row in rows)
    assert rows == sorted(set(rows))
    assert sorted(counts) == names
    assert len(rows) <= limit
    assert all(count >= 8 for count in counts.values())
    total = Counter(values)
    for name, count in counts.items():  # a class that got less than another is used up
        assert count == total[name] or count >= max(counts.values()) - 1


@settings(deadline=None)  # a busy machine is no defect
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=150),
    st.integers(0, 5),
    st.sampled_from([(0.5, 0.2, 0.3), (0.05, 0.05, 0.9), (0.1, 0.6, 0.3)]),
)
def test_split_properties(labels, seed, fractions):
    parts = split_indices(labels, seed, fractions)
    assert [part.dtype for part in parts] == [np.int64] * 3
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    for label, count in Counter(labels).items():
        sizes = [sum(labels[row] == label for row in part) for part in parts]
        assert sizes[0] >= 1
        assert count < 3 or min(sizes) >= 1
        slack = 1 if count * min(fractions) >= 1 else 3
        assert np.abs(np.array(sizes) - count * np.array(fractions)).max() < slack
    again = split_indices(np.array(labels), seed, fractions)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@pytest.mark.parametrize(
    ("count", "sizes"), [(8, [4, 2, 2]), (10, [5, 2, 3]), (3, [1, 1, 1]), (1, [1, 0, 0])]
)
def test_split_sizes_by_eye(count, sizes):
    assert [len(part) for part in split_indices([7] * count, seed=0)] == sizes


def test_split_depends_on_the_seed():
    labels = [0] * 20 + [1] * 20
    assert not np.array_equal(split_indices(labels, 0)[0], split_indices(labels, 1)[0])


@pytest.mark.parametrize(
    ("labels", "fractions", "message"),
    [
        (["cat"], (0.5, 0.2, 0.3), "Expected labels"),
        ([[0, 1]], (0.5, 0.2, 0.3), "Expected labels"),
        ([0], (0.5, 0.5, 0.0), "Expected fractions"),
        ([0], (0.5, 0.2, 0.2), "Expected fractions"),
    ],
)
def test_split_refuses(labels, fractions, message):
    with pytest.raises(ValueError, match=message):
        split_indices(labels, 0, fractions)


# names and cache


def test_unknown_names_are_answered_with_near_ones(tmp_path):
    with pytest.raises(ValueError, match=r"'openmojis'; do you mean openmoji or openmoji-categ"):
        load_pictures("openmojis", tmp_path)
    with pytest.raises(
        ValueError, match=r"digits or glyphs or openclipart or openmoji or openmoji-cat"
    ):
        load_pictures("zzz", tmp_path)
    with pytest.raises(ValueError, match=r"do you mean efficientnet-lite0 or "):
        build_backbone("efficientnet_lite0", tmp_path)
    with pytest.raises(ValueError, match=r"Expected limit .* but got 7"):
        load_pictures("digits", tmp_path, limit=7)


def test_tasks_are_named_by_their_key():
    assert [task.name for task in OFFLINE_TASKS.values()] == list(OFFLINE_TASKS)


def test_versioned_changes_with_the_builder_and_names_what_is_missing():
    assert re.fullmatch(r"digits_scikit-learn-[\d.]+_r1", versioned("digits", ["scikit-learn"], 1))
    with pytest.raises(ModuleNotFoundError, match="do `pip install no-such-package`"):
        versioned("digits", ["no-such-package"], 1)


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_KNN_CACHE", str(tmp_path / "env"))
    assert cache_root() == tmp_path / "env"
    assert cache_root(tmp_path) == tmp_path
    monkeypatch.setenv("HF_KNN_CACHE", "")
    assert cache_root() == Path.home() / ".cache" / "hf_knn"


def write_whole(folder: Path) -> None:
    assert not list(folder.iterdir())
    (folder / "first").write_text("1")
    (folder / "second").write_text("2")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_builder_that_raises_leaves_nothing_to_reuse(tmp_path):
    def fail_midway(folder: Path) -> None:
        (folder / "first").write_text("half")
        raise OSError("disk full")

    wanted = tmp_path / "made"
    with pytest.raises(OSError, match="disk full"):
        build_once(wanted, fail_midway)
    assert not wanted.exists()
    assert contents(build_once(wanted, write_whole)) == {"first": "1", "second": "2"}


def test_a_killed_builder_leaves_nothing_to_reuse(tmp_path):
    wanted = tmp_path / "made"
    program = f"""
import sys, time
from pathlib import Path
from catalog.cache import build_once

def build(folder):
    (folder / "first").write_text("half")
    print("half", flush=True)
    time.sleep(60)

build_once(Path({str(wanted)!r}), build)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(cache.__file__).parents[1],  # benchmark/
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.kill()
    assert not wanted.exists()
    assert any(tmp_path.rglob("first"))  # the kill did come in the middle
    assert contents(build_once(wanted, write_whole)) == {"first": "1", "second": "2"}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["made"]


def test_concurrent_builders_build_once(tmp_path):
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        write_whole(folder)

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: contents(build_once(tmp_path / "made", build)), range(16)))
    assert made == [{"first": "1", "second": "2"}] * 16
    assert len(built) == 1


# backbones


def _known(name: str) -> Known:
    found = find_known(name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", LITES)
def test_efficientnet_opens_offline_and_equals_timm(name, shared_cache, no_network):
    state = torch.get_rng_state()
    folder = build_backbone(name, shared_cache)
    assert torch.equal(torch.get_rng_state(), state)
    model = AutoModel.from_pretrained(folder).eval()
    full = efficientnet_lite(_known(name))
    side = LITES[name].image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model(pixels).pooler_output
        logits = full.get_submodule("classifier")(features)
        torch.testing.assert_close(logits, full(pixels))
    assert features.shape == (2, find_backbone(name).width)
    assert build_backbone(name, shared_cache) == folder


@pytest.mark.parametrize(
    ("name", "photograph", "imagenet"),
    [("efficientnet-lite0", "flower.jpg", 985), *((name, "china.jpg", 698) for name in LITES)],
)
def test_efficientnet_knows_a_daisy_and_a_palace(name, photograph, imagenet, shared_cache):
    """ImageNet has no dahlia, which the flower is: the larger two take it for honeycomb."""
    processor = AutoImageProcessor.from_pretrained(build_backbone(name, shared_cache))
    assert "Timm" not in type(processor).__name__
    picture = Image.fromarray(load_sample_image(photograph))
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    side = find_backbone(name).image_size
    assert pixels.shape == (1, 3, side, side)
    with torch.no_grad():
        assert efficientnet_lite(_known(name))(pixels).argmax(-1).item() == imagenet


@pytest.mark.parametrize("name", LITES)
def test_efficientnet_processor_agrees_with_timm(name, shared_cache):
    lite = LITES[name]
    known = timm.get_pretrained_cfg(lite.architecture)
    assert known is not None
    assert known.input_size == (3, lite.image_size, lite.image_size)
    assert known.crop_mode == "center"
    processor = AutoImageProcessor.from_pretrained(build_backbone(name, shared_cache))
    assert int(lite.image_size / known.crop_pct) == processor.size["shortest_edge"]
    picture = Image.fromarray(load_sample_image("flower.jpg")[:, :427])  # one-sided crops round
    config = timm.data.resolve_data_config({}, model=efficientnet_lite(_known(name)))
    expected = timm.data.create_transform(**config)(picture)
    pixels = processor(picture, return_tensors="pt")["pixel_values"][0]
    assert (pixels - expected).abs().mean() < 0.01  # PIL and torchvision round differently


def test_rename_in_order_refuses_what_does_not_fit():
    model = torch.nn.Linear(3, 2)
    weight, bias = torch.zeros(2, 3), torch.zeros(2)
    assert list(rename_in_order({"fc.weight": weight, "fc.bias": bias}, model)) == [
        "weight",
        "bias",
    ]
    with pytest.raises(ValueError, match="Expected 2 tensors in the weights, but got 1"):
        rename_in_order({"fc.weight": weight}, model)
    with pytest.raises(ValueError, match=r"for weight \[2, 3\], but got fc.weight \[3, 2\]"):
        rename_in_order({"fc.weight": weight.T, "fc.bias": bias}, model)
    with pytest.raises(ValueError, match=r"for bias \[2\], but got fc.mean \[2\]"):
        rename_in_order({"fc.weight": weight, "fc.mean": bias}, model)


def test_tiny_vit_is_the_same_wherever_it_is_built(tmp_path, shared_cache, no_network):
    folders = []
    for seed, root in enumerate((tmp_path, shared_cache)):
        torch.manual_seed(seed)
        folders.append(build_backbone("tiny-vit-digits", root))
    first, second = (AutoModel.from_pretrained(folder).state_dict() for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)
    processor = AutoImageProcessor.from_pretrained(folders[0])
    scan = Image.fromarray(np.full((8, 8), 255, np.uint8)).convert("RGB")
    pixels = processor(scan, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 8, 8)
    assert (pixels == 1).all()
