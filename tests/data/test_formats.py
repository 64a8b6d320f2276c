"""Formats and sizes: what is read as PNG is, what is merely not read, and what memory it takes."""

import io
import logging
import os
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageColumn
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin
from support.pictures import encoded, pillow_heif

from hf_knn.data import decode, formats, pixels
from hf_knn.data.batches import picture_of
from hf_knn.data.decode import (
    MAX_JPEG_PIXELS,
    PICTURE_SUFFIXES,
    BadImageError,
    decode_image,
    decoding,
)
from hf_knn.data.loading import prepare
from hf_knn.data.pixels import FULL_PIXELS

needs_heif = pytest.mark.skipif(pillow_heif is None, reason="needs pillow-heif")


def scene(width: int = 48, height: int = 32) -> Image.Image:
    """A picture like a photo: smooth, with an edge."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    rgb = np.stack([x, y, np.where(x > y, 220, 30)], -1).astype(np.uint8)
    return Image.fromarray(rgb)


def pixels_of(image: Image.Image) -> NDArray[np.int64]:
    assert image.mode == "RGB"
    assert image.info == {}
    return np.asarray(image).astype(np.int64)


def gap(data: bytes, wanted: Image.Image) -> int:
    found = decode_image(data)
    assert found.size == wanted.size
    return int(np.abs(pixels_of(found) - np.asarray(wanted.convert("RGB"))).max())


def refusal(source: bytes | Path | Image.Image, **options: Any) -> BadImageError:
    with pytest.raises(BadImageError) as caught:
        decode_image(source, **options)
    assert "\n" not in str(caught.value)
    return caught.value


# ---- TIFF, AVIF, HEIC ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compression", "most"),
    [(None, 0), ("tiff_lzw", 0), ("tiff_adobe_deflate", 0), ("packbits", 0), ("jpeg", 12)],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P"])
def test_tiff(compression: str | None, most: int, mode: str) -> None:
    if compression == "jpeg" and mode in "P":
        pytest.skip("JPEG has no palette")
    image = scene().quantize(32) if mode == "P" else scene().convert(mode)
    options = {"quality": 95} if compression == "jpeg" else {}
    for is_big in (False, True):
        data = encoded(image, "TIFF", compression=compression, big_tiff=is_big, **options)
        assert gap(data, image) <= most


@pytest.mark.parametrize("mode", ["1", "LAB", "YCbCr", "RGBA", "LA"])
def test_tiff_of_other_modes(mode: str) -> None:
    image = scene().convert(mode) if mode != "LAB" else lab_of(scene())
    options = {"compression": "jpeg", "quality": 98} if mode == "YCbCr" else {}
    wanted = scene().convert(mode).convert("RGB") if mode in ("1", "LA") else scene()
    found = pixels_of(decode_image(encoded(image, "TIFF", **options)))
    most = 3 if mode in ("LAB", "YCbCr") else 0  # rounded on the way
    assert np.abs(found - np.asarray(wanted)).mean() <= most


def lab_of(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    change = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    found = ImageCms.applyTransform(image, change)
    assert found is not None
    return found


def tiff_file(
    values: NDArray[Any], tags: dict[int, int], bits: int, samples: int, sample_format: int = 1
) -> bytes:
    """An uncompressed TIFF by hand, of values that Pillow cannot write."""
    rows, columns = values.shape[:2]
    data = values.tobytes()
    fields = {256: columns, 257: rows, 258: bits, 259: 1, 262: 2 if samples > 1 else 1, 273: 8}
    fields |= {277: samples, 278: rows, 279: len(data), 339: sample_format} | tags
    extra = b""
    start = 8 + len(data)
    entries = b""
    for tag, value in sorted(fields.items()):
        if tag in (258, 339) and samples > 2:
            place = start + 2 + 12 * len(fields) + 4 + len(extra)
            entries += struct.pack("<HHII", tag, 3, samples, place)
            extra += struct.pack(f"<{samples}H", *[value] * samples)
        else:
            entries += struct.pack("<HHII", tag, 4, 1, value)
    directory = struct.pack("<H", len(fields)) + entries + bytes(4) + extra
    return b"II*\0" + struct.pack("<I", start) + data + directory


def test_tiff_of_16_bits_keeps_the_high_byte() -> None:
    wide = np.asarray(scene()).astype(np.uint16) * 256 + 77
    assert gap(tiff_file(wide, {}, 16, 3), scene()) == 0
    grey = wide[:, :, 0]
    assert (
        gap(encoded(Image.fromarray(grey), "TIFF"), Image.fromarray((grey >> 8).astype(np.uint8)))
        == 0
    )


def test_tiff_of_several_pages_is_its_first() -> None:
    pages = {"save_all": True, "append_images": [Image.new("RGB", (9, 9), "red")]}
    assert gap(encoded(scene(), "TIFF", **pages), scene()) == 0


def test_a_tiff_lies_as_its_orientation_says() -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(scene(), "TIFF", exif=exif)
        wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(scene(), "PNG", exif=exif))))
        assert gap(data, wanted) == 0, orientation


@pytest.mark.parametrize("kind", ["AVIF", pytest.param("HEIF", marks=needs_heif)])
def test_avif_and_heic(kind: str) -> None:
    data = encoded(scene(), kind, quality=95)
    assert np.abs(pixels_of(decode_image(data)) - np.asarray(scene())).mean() < 5
    glass = scene().convert("RGBA")
    glass.putalpha(0)
    assert pixels_of(decode_image(encoded(glass, kind, quality=95))).min() > 250  # over white
    moving = encoded(
        scene(), kind, quality=95, save_all=True, append_images=[Image.new("RGB", (48, 32))]
    )
    assert np.abs(pixels_of(decode_image(moving)) - np.asarray(scene())).mean() < 5


def test_an_avif_lies_as_its_orientation_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_image(encoded(scene(), "AVIF", quality=95, exif=exif))
    assert turned.size == (32, 48)
    upright = pixels_of(turned) - np.asarray(scene().transpose(Image.Transpose.ROTATE_270))
    assert np.abs(upright).mean() < 5


def heic_start(brand: bytes = b"heic") -> bytes:
    return struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"mif1" + brand + bytes(64)


def test_heic_without_the_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    formats._reads_heic.cache_clear()
    for data in (heic_start(), heic_start(b"heix"), heic_start(b"mif1")[:20] + b"heic" + bytes(9)):
        error = refusal(data)
        assert "pip install 'hf-knn[heic]'" in str(error)
        assert error.is_unread
    formats._reads_heic.cache_clear()


@needs_heif
def test_a_damaged_heic_is_broken_and_not_unread() -> None:
    assert not refusal(heic_start()).is_unread
    assert not refusal(encoded(scene(), "HEIF")[:300]).is_unread


def test_suffixes_are_lower_case_and_hold_every_format() -> None:
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in PICTURE_SUFFIXES)
    assert {".heic", ".heif", ".hif"} <= {*PICTURE_SUFFIXES}  # the extra is named when it is read
    known = Image.registered_extensions()
    readable = {suffix for suffix, kind in known.items() if kind in decode.ALLOWED_FORMATS}
    assert readable - {".mpo", ".heics", ".heifs"} <= set(PICTURE_SUFFIXES)


# ---- pictures made in memory --------------------------------------------------------------------


def made_in_memory() -> dict[str, Any]:
    grey = np.linspace(0, 255, 32 * 48).reshape(32, 48)
    return {
        "palette": scene().quantize(16),
        "cmyk": scene().convert("CMYK"),
        "one bit": scene().convert("1"),
        "16 bits": Image.fromarray((grey * 257).astype(np.uint16)),
        "32 bits": Image.fromarray((grey * 257).astype(np.int32)),
        "32 bits of 8": Image.fromarray(grey.astype(np.int32)),
        "float": Image.fromarray(grey.astype(np.float32)),
        "float of 1": Image.fromarray((grey / 255).astype(np.float32)),
        "float of 16 bits": Image.fromarray((grey * 257).astype(np.float32)),
        "array of 64-bit floats": grey / 255,
        "array of 16 bits": (grey * 257).astype(np.uint16),
    }


@pytest.mark.parametrize("name", made_in_memory())
@pytest.mark.filterwarnings("ignore:Downcasting array")
def test_what_datasets_stores_is_what_it_gives(name: str) -> None:
    kinds = Features({"image": ImageColumn(), "label": ClassLabel(names=["a"])})
    rows = Dataset.from_dict({"image": [made_in_memory()[name]], "label": [0]}, features=kinds)
    found = pixels_of(picture_of(prepare(rows), 0))
    given = rows[0]["image"]
    assert np.array_equal(found, pixels_of(decode_image(given)))
    if name in ("palette", "cmyk", "one bit"):
        assert np.array_equal(found, np.asarray(given.convert("RGB")))
    else:
        wanted = np.linspace(0, 255, 32 * 48).reshape(32, 48, 1)
        assert np.abs(found - wanted).max() <= 1  # the upper 8 bits, or rounded


def test_values_of_no_picture_are_named() -> None:
    heights = np.full((4, 4), 8848.0, np.float32) * 100
    error = refusal(Image.fromarray(heights))
    assert "its values reach 884800" in str(error)
    assert error.is_unread
    holes = np.array([[0, 0.5, 1, np.nan, np.inf, -np.inf, -2]], np.float32)
    assert pixels_of(decode_image(Image.fromarray(holes)))[0, :, 0].tolist() == [
        0,
        128,
        255,
        0,
        0,
        0,
        0,
    ]
    over = np.array([[0, 100, 255, 261]], np.float32)  # what a filter leaves above 255
    assert pixels_of(decode_image(Image.fromarray(over)))[0, :, 0].tolist() == [0, 100, 255, 255]
    eighth = Image.fromarray(np.arange(256, dtype=np.float32)[None] / 255)
    assert pixels_of(decode_image(eighth))[0, :, 0].tolist() == list(range(256))


# ---- what is not read, and what is broken -------------------------------------------------------

DARK = np.zeros((4, 4), np.uint8)
FLOATS = tiff_file(np.zeros((4, 4, 3), np.float32), {}, 32, 3, 3)
UNREAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "jxl": (lambda: b"\xff\x0a" + bytes(60), "JPEG XL"),
    "jxl in a box": (lambda: b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(60), "JPEG XL"),
    "jp2": (lambda: encoded(scene(), "JPEG2000"), "JPEG 2000"),
    "ico": (lambda: encoded(scene(), "ICO"), "an icon"),
    "ppm": (lambda: encoded(scene(), "PPM"), "PNM"),
    "pdf": (lambda: encoded(scene(), "PDF"), "a PDF"),
    "eps": (lambda: encoded(scene(), "EPS"), "PostScript"),
    "svg": (lambda: b'<?xml version="1.0"?>\n<!-- a --><svg width="8"></svg>', "SVG"),
    "dds": (lambda: encoded(scene(), "DDS"), "DDS"),
    "dicom": (lambda: bytes(128) + b"DICM" + bytes(60), "DICOM"),
    "cr2": (lambda: b"II*\0\x10\0\0\0CR\2\0" + bytes(60), "a raw photo"),
    "cr3": (lambda: struct.pack(">I", 24) + b"ftypcrx " + bytes(60), "a raw photo"),
    "raf": (lambda: b"FUJIFILMCCD-RAW 0201" + bytes(60), "a raw photo"),
    "mp4": (lambda: struct.pack(">I", 24) + b"ftypmp42" + bytes(60), "a video"),
    "float colours": (lambda: FLOATS, "a TIFF of an unusual kind"),
    "a preview": (lambda: tiff_file(DARK, {254: 1}, 8, 1), "only the preview"),
    "dng": (lambda: tiff_file(DARK, {50706: 1}, 8, 1), "only the preview"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_a_format_that_is_not_read_is_named(name: str) -> None:
    make, words = UNREAD[name]
    error = refusal(make())
    assert words in str(error)
    assert error.is_unread


BROKEN: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"P1 is our best product, said the <html> page",
    "zeros": lambda: bytes(4096),
    "half a jpeg": lambda: encoded(Image.effect_noise((64, 64), 90), "JPEG")[:900],
    "a tiff without its directory": lambda: encoded(scene(), "TIFF")[:-200][:3000],
    "half an avif": lambda: encoded(scene(), "AVIF")[:200],
    "polyglot": lambda: encoded(scene(), "TIFF") + b"<script>alert(1)</script>",
    "tiles": lambda: tiff_file(DARK, {322: 60000, 323: 60000}, 8, 1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_not_called_unread(name: str) -> None:
    assert not refusal(BROKEN[name]()).is_unread


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert "no plain file" in str(refusal(tmp_path / "a.png"))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_what_is_said_about_a_picture_may_be_damaged() -> None:
    for block in (
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0nonsense",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
    ):
        assert gap(encoded(scene(), "JPEG", quality=98, subsampling=0, exif=block), scene()) < 20


# ---- sizes --------------------------------------------------------------------------------------


def grey_jpeg(width: int, height: int, **options: Any) -> bytes:
    """A JPEG that is made in little time: a gradient of a few columns, repeated."""
    tile = Image.linear_gradient("L").resize((width, 64))
    image = Image.new("L", (width, height))
    for top in range(0, height, 64):
        image.paste(tile, (0, top))
    return encoded(image, "JPEG", **options)


def test_a_jpeg_above_64_megapixels_is_read_at_half_its_size(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_reduced", iter(range(9)))
    data = grey_jpeg(8192, 7936)  # 65 megapixels, of whole blocks
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode_image(data)
        again = decode_image(data)
    assert found.size == (4096, 3968)
    assert found.tobytes() == again.tobytes()
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once
    assert "8192 x 7936 pixels is read at 1/2" in caplog.text
    # halves of pixels side by side, as the average of four says
    with Image.open(io.BytesIO(data)) as whole:
        mean = np.asarray(whole.reduce(2)).astype(int)
    assert np.abs(np.asarray(found)[..., 0] - mean).max() <= 2


def test_below_that_every_pixel_is_read() -> None:
    assert decode_image(grey_jpeg(8000, 8000)).size == (8000, 8000)
    assert FULL_PIXELS == 8000 * 8000


def test_limits_of_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = encoded(Image.new("L", (300, 200)), "PNG")
    monkeypatch.setenv("HF_KNN_MAX_PIXELS", "59999")
    error = refusal(data)
    assert "300 x 200 pixels, more than 59999" in str(error)
    assert error.is_unread
    assert decode_image(data, max_pixels=60000).size == (300, 200)
    monkeypatch.setenv("HF_KNN_MAX_PIXELS", "60000")
    assert decode_image(data).size == (300, 200)
    monkeypatch.setenv("HF_KNN_MAX_BYTES", "100")
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        error = refusal(source)
        assert f"{len(data)} bytes, more than 100" in str(error)
        assert error.is_unread
    for value in ("0", "-5", "1e9", "many"):
        monkeypatch.setenv("HF_KNN_MAX_BYTES", value)
        with pytest.raises(ValueError, match=r"\$HF_KNN_MAX_BYTES to be a whole number") as caught:
            decode_image(data)
        assert not isinstance(caught.value, BadImageError)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF"])
def test_our_limits_decide_and_not_pillows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # twice as many are an error to Pillow
    data = encoded(Image.new("L", (300, 200), 9), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(data).size == (300, 200)
    assert Image.MAX_IMAGE_PIXELS == 1000
    refusal(b"nothing")
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_a_frame_larger_than_its_gif_is_refused() -> None:
    data = bytearray(encoded(Image.new("L", (20, 20)), "GIF"))
    place = data.index(b",\0\0\0\0\x14\0\x14\0")
    data[place + 5 : place + 9] = struct.pack("<HH", 10_000, 10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "10000 x 10000 pixels" in str(refusal(bytes(data)))


def test_large_pictures_are_decoded_one_at_a_time() -> None:
    data = encoded(Image.new("L", (400, 300)), "PNG")
    inside, most, lock = 0, 0, threading.Lock()
    waiting = threading.Barrier(4)

    def use() -> None:
        nonlocal inside, most
        waiting.wait()
        with decoding(data, alone_above=100_000):
            with lock:
                inside += 1
                most = max(most, inside)
            threading.Event().wait(0.02)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    with decoding(data, alone_above=120_000), decoding(data):  # small ones do not wait
        pass


PEAK = """
import resource, sys
from hf_knn.data.decode import decode_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(decode_image(sys.argv[1]).size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts kilobytes")
@pytest.mark.slow
def test_a_jpeg_of_200_megapixels_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(grey_jpeg(16320, 12240, quality=30))
    assert MAX_JPEG_PIXELS >= 16320 * 12240
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], check=True, capture_output=True, text=True
    )
    size, kilobytes = done.stdout.rsplit(maxsplit=1)
    assert size == "(8160, 6120)"
    assert int(kilobytes) < 600_000  # 800 MB would be the whole alone
    assert "16320 x 12240" in done.stderr


def test_a_picture_of_strips_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [scene().convert(mode) for mode in ("RGBA", "LA", "CMYK", "P", "1", "F", "I")]
    pictures += [Image.fromarray(np.arange(1536, dtype=np.uint16).reshape(32, 48) * 40)]
    clear = scene().quantize(8)
    clear.info["transparency"] = 2
    for picture in [*pictures, clear]:
        whole = decode_image(picture).tobytes()
        with monkeypatch.context() as patch:
            patch.setattr(pixels, "_STRIP", 5 * 48)
            assert decode_image(picture).tobytes() == whole


def test_an_opened_picture_is_left_as_it_is() -> None:
    with Image.open(io.BytesIO(grey_jpeg(8192, 7936))) as image:
        assert decode_image(image).size == image.size == (8192, 7936)
    assert isinstance(TiffImagePlugin.COMPRESSION_INFO, dict)
