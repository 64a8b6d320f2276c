"""The decoder: every format and mode against pixels written by hand, and everything it refuses."""

import io
import random
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFile, PngImagePlugin
from support.pictures import WRITTEN_FORMATS, encoded

from hf_knn.data.decode import (
    ALLOWED_FORMATS,
    MAX_PIXELS,
    BadImageError,
    decode_image,
    read_picture,
)

Pixels = NDArray[np.int64]
Rows = Sequence[Sequence[tuple[int, ...]]]
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255,) * 3, (0,) * 3


def pixels_of(image: Image.Image) -> Pixels:
    assert image.mode == "RGB"
    return np.asarray(image).astype(np.int64)


def blocks(rows: Rows, mode: str = "RGB", side: int = 1) -> Image.Image:
    """A picture of one colour per block."""
    values = np.array(rows, np.uint8)
    if mode == "L":
        values = values[:, :, 0]
    return Image.fromarray(values.repeat(side, 0).repeat(side, 1), mode)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(
    size: tuple[int, int], depth: int, colour_type: int, rows: bytes, extra: bytes = b""
) -> bytes:
    """A PNG by hand: `rows` are the scan lines, each with its filter byte."""
    header = struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, 0)
    parts = chunk(b"IHDR", header), extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# formats and modes


def check(data: bytes, wanted: Rows, tolerance: int = 0) -> None:
    found = pixels_of(decode_image(data))
    assert found.shape == (len(wanted), len(wanted[0]), 3)
    assert np.abs(found - np.array(wanted)).max() <= tolerance, found.tolist()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP"])
def test_lossless_formats_keep_every_pixel(kind: str) -> None:
    rows = [[RED, GREEN, BLUE], [WHITE, BLACK, (17, 99, 200)]]
    options = {"lossless": True} if kind == "WEBP" else {}
    check(encoded(blocks(rows), kind, **options), rows)


def test_jpeg_colours_and_grey() -> None:
    rows = [[RED, GREEN], [BLUE, (40, 40, 40)]]
    data = encoded(blocks(rows, side=16), "JPEG", quality=95, subsampling=0)
    found = pixels_of(decode_image(data))[8::16, 8::16]
    assert np.abs(found - np.array(rows)).max() <= 4
    data = encoded(blocks([[(200,) * 3]], "L", side=8), "JPEG")
    assert np.abs(pixels_of(decode_image(data)) - 200).max() <= 2


def test_cmyk_jpeg() -> None:
    inks = {(255, 0, 0, 0): (0, 255, 255), (0, 255, 0, 0): (255, 0, 255), (0, 0, 0, 255): BLACK}
    inks |= {(0, 0, 0, 0): WHITE, (0, 0, 255, 128): (127, 127, 0)}
    for ink, colour in inks.items():
        found = pixels_of(decode_image(encoded(Image.new("CMYK", (8, 8), ink), "JPEG", quality=98)))
        assert np.abs(found - np.array(colour)).max() <= 3, (ink, found[0, 0])


def test_one_bit() -> None:
    image = Image.new("1", (3, 1))
    image.putpixel((1, 0), 1)
    for kind in ("PNG", "BMP", "GIF"):
        check(encoded(image, kind), [[BLACK, WHITE, BLACK]])


def test_grey_and_16_bit_grey_keep_the_high_byte() -> None:
    check(encoded(Image.fromarray(np.array([[0, 7, 255]], np.uint8))), [[BLACK, (7,) * 3, WHITE]])
    lines = b"\0" + struct.pack(">4H", 0, 0x80FF, 0x0100, 0xFFFF)
    check(png_file((4, 1), 16, 0, lines), [[BLACK, (128,) * 3, (1,) * 3, WHITE]])


def test_16_bit_colour_and_alpha() -> None:
    lines = b"\0" + struct.pack(">3H", 0x8000, 0x40FF, 0x0100)
    check(png_file((1, 1), 16, 2, lines), [[(128, 64, 1)]])
    lines = b"\0" + struct.pack(">4H", 0xFFFF, 0, 0, 0x8000)
    check(png_file((1, 1), 16, 6, lines), [[(255, 127, 127)]], tolerance=1)


def test_palette_with_and_without_transparency() -> None:
    palette = chunk(b"PLTE", bytes([*RED, *BLUE, 10, 20, 30]))
    lines = b"\0\x00\x01\x02"
    check(png_file((3, 1), 8, 3, lines, palette), [[RED, BLUE, (10, 20, 30)]])
    alpha = palette + chunk(b"tRNS", bytes([255, 0, 128]))
    wanted = [[RED, WHITE, (132, 137, 142)]]  # 10 * 128/255 + 255 * 127/255 and so on
    check(png_file((3, 1), 8, 3, lines, alpha), wanted, tolerance=1)


def test_alpha_is_laid_over_white() -> None:
    rgba = [[(255, 0, 0, 255), (255, 0, 0, 128), (0, 0, 0, 0), (0, 0, 0, 51)]]
    wanted = [[RED, (255, 127, 127), WHITE, (204,) * 3]]
    check(encoded(blocks(rgba, "RGBA")), wanted, tolerance=1)
    check(encoded(blocks(rgba, "RGBA"), "WEBP", lossless=True, exact=True), wanted, tolerance=1)
    grey = Image.fromarray(np.array([[[0, 255], [0, 128], [90, 0]]], np.uint8), "LA")
    check(encoded(grey), [[BLACK, (127,) * 3, WHITE]], tolerance=1)


def test_colour_key_transparency_of_rgb_and_grey() -> None:
    key = chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))
    check(png_file((2, 1), 8, 2, b"\0\x01\x02\x03\xff\x00\x00", key), [[WHITE, RED]])
    key = chunk(b"tRNS", struct.pack(">H", 0x12))
    check(png_file((3, 1), 8, 0, b"\0\x00\x80\x12", key), [[BLACK, (128,) * 3, WHITE]])


def test_colour_key_transparency_of_16_bit_grey() -> None:
    lines = b"\0" + struct.pack(">4H", 0, 0x80FF, 0xFFFF, 0x1234)
    key = chunk(b"tRNS", struct.pack(">H", 0x1234))
    check(png_file((4, 1), 16, 0, lines, key), [[BLACK, (128,) * 3, WHITE, WHITE]])


def test_first_frame_of_an_animation() -> None:
    first, second = blocks([[RED, GREEN]]), blocks([[BLUE, BLUE]])
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(first, kind, save_all=True, append_images=[second], duration=50, **options)
        with Image.open(io.BytesIO(data)) as image:
            assert getattr(image, "n_frames", 1) == 2
        check(data, [[RED, GREEN]])


def test_transparent_gif() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    check(encoded(image, "GIF", transparency=1), [[RED, WHITE]])


ORIENTED = {
    1: [[1, 2, 3], [4, 5, 6]],  # first row at the top, first column at the left
    2: [[3, 2, 1], [6, 5, 4]],  # top, right
    3: [[6, 5, 4], [3, 2, 1]],  # bottom, right
    4: [[4, 5, 6], [1, 2, 3]],  # bottom, left
    5: [[1, 4], [2, 5], [3, 6]],  # left, top
    6: [[4, 1], [5, 2], [6, 3]],  # right, top
    7: [[6, 3], [5, 2], [4, 1]],  # right, bottom
    8: [[3, 6], [2, 5], [1, 4]],  # left, bottom
}
"""Where the EXIF standard puts the stored rows 123 / 456."""


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", ORIENTED)
def test_exif_orientation(kind: str, orientation: int) -> None:
    stored = np.array(ORIENTED[1], np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    large = Image.fromarray((40 * stored).repeat(16, 0).repeat(16, 1))
    options = {"lossless": True} if kind == "WEBP" else {}
    found = pixels_of(decode_image(encoded(large, kind, exif=exif, **options)))
    assert ((found[8::16, 8::16, 0] + 20) // 40).tolist() == ORIENTED[orientation]
    opened = decode_image(Image.open(io.BytesIO(encoded(large, kind, exif=exif, **options))))
    assert np.array_equal(pixels_of(opened), found)


def test_metadata_is_dropped() -> None:
    secret = b"taken at home"
    exif = Image.Exif()
    exif[0x010E] = secret.decode()
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", secret.decode())
    image = blocks([[RED, BLUE]])
    files = [
        encoded(image, "JPEG", exif=exif, comment=secret, icc_profile=secret),
        encoded(image, "PNG", exif=exif, pnginfo=info, icc_profile=secret),
        encoded(image, "WEBP", exif=exif, xmp=secret, icc_profile=secret),
        encoded(image, "GIF", comment=secret),
    ]
    for data in files:
        assert secret in data or b"iCCP" in data
        for result in (decode_image(data), decode_image(Image.open(io.BytesIO(data)))):
            assert result.info == {}
            assert not result.getexif()
            for kind in ("JPEG", "PNG", "WEBP"):
                again = encoded(result, kind)
                assert secret not in again
                assert not any(name in again for name in (b"Exif", b"iCCP", b"eXIf", b"ICC"))


# sources


def test_bytes_path_text_and_opened_picture_agree(tmp_path: Path) -> None:
    data = encoded(blocks([[RED, BLUE], [GREEN, WHITE]]))
    path = tmp_path / "without a suffix"
    path.write_bytes(data)
    wanted = pixels_of(decode_image(data))
    sources = (path, str(path), Image.open(path), Image.open(path).convert("RGB"))
    for source in sources:
        assert np.array_equal(pixels_of(decode_image(source)), wanted)


def test_an_opened_picture_is_not_changed() -> None:
    image = blocks([[RED, BLUE]])
    image.info["comment"] = b"kept"
    result = decode_image(image)
    result.putpixel((0, 0), GREEN)
    assert image.getpixel((0, 0)) == RED
    assert image.info == {"comment": b"kept"}


def test_a_missing_file_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        decode_image(tmp_path / "nothing.png")


def test_one_of_several_is_named_by_its_path_or_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(blocks([[RED, BLUE]])))
    wanted = pixels_of(decode_image(path))
    array = wanted.astype(np.uint8)
    picture: Any
    for picture in (path, str(path), path.read_bytes(), Image.open(path), array):
        assert np.array_equal(pixels_of(read_picture(picture, 0)), wanted)
    for picture in (b"nothing", b"", None, 5, np.zeros((2, 2, 2, 2))):
        with pytest.raises(BadImageError, match="Expected picture 7 to be readable, but "):
            read_picture(picture, 7)
    for name in ("nothing.png", "."):
        with pytest.raises(BadImageError, match=f"Expected {tmp_path / name} to be readable"):
            read_picture(tmp_path / name, 7)


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(BadImageError):
        decode_image(tmp_path)


# refused


def eps_file() -> bytes:
    return encoded(blocks([[RED]]), "EPS")


def psd_file() -> bytes:
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 1, 1, 8, 3)
    return header + struct.pack(">III", 0, 0, 0) + b"\0\0" + b"\xff\0\0"


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><rect width="8"/></svg>'
HTML = b"<!DOCTYPE html><html><script>alert(1)</script></html>"
REFUSED: dict[str, Callable[[], bytes]] = {
    "eps": eps_file,
    "psd": psd_file,
    "svg": lambda: SVG,
    "ico": lambda: encoded(blocks([[RED]], side=16), "ICO"),
    "ppm": lambda: encoded(blocks([[RED]]), "PPM"),
    "pdf": lambda: encoded(blocks([[RED]]), "PDF"),
    "text": lambda: b"just some text\n",
    "html": lambda: HTML,
    "zeros": lambda: bytes(4096),
    "empty": lambda: b"",
    "one byte": lambda: b"\xff",
}


def refusal(source: bytes | Path, **options: Any) -> str:
    """The message of the refusal, which has to be one clear sentence."""
    with pytest.raises(BadImageError) as caught:
        decode_image(source, **options)
    message = str(caught.value)
    assert 10 < len(message) < 250
    assert "\n" not in message
    assert "BytesIO" not in message
    assert "0x" not in message  # no address of an object
    return message


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    data = REFUSED[name]()
    message = refusal(data)
    disguised = tmp_path / "harmless.png"
    disguised.write_bytes(data)
    assert refusal(disguised) == message
    if name == "empty":
        assert "empty" in message
    else:
        assert "JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF, HEIF" in message


def test_the_allow_list_is_what_is_said() -> None:
    assert ALLOWED_FORMATS == ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
    with pytest.raises(BadImageError, match=r"one of the formats PNG"):
        decode_image(encoded(blocks([[RED]]), "BMP"), formats=("PNG",))


@pytest.mark.parametrize("name", ["eps", "ppm"])
def test_an_opened_picture_of_another_format_is_refused(name: str) -> None:
    with pytest.raises(BadImageError):
        decode_image(Image.open(io.BytesIO(REFUSED[name]())))


def test_an_opened_picture_that_is_truncated_is_refused() -> None:
    data = encoded(Image.effect_noise((64, 64), 60), "JPEG")
    with pytest.raises(BadImageError):
        decode_image(Image.open(io.BytesIO(data[: len(data) // 2])))


@pytest.mark.parametrize("kind", WRITTEN_FORMATS)
def test_truncated(kind: str, tmp_path: Path) -> None:
    data = encoded(Image.effect_noise((40, 40), 60).convert("RGB"), kind)
    assert decode_image(data).size == (40, 40)
    for share in (0.05, 0.3, 0.5, 0.8):
        path = tmp_path / f"{share}"
        path.write_bytes(data[: int(len(data) * share)])
        refusal(path)


def zip_file() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("payload.html", HTML)
    return buffer.getvalue()


def gif_with(comment: bytes) -> bytes:
    image, buffer = blocks([[RED, BLUE]]), io.BytesIO()
    image.save(buffer, "GIF", comment=comment)
    return buffer.getvalue()


POLYGLOTS: dict[str, Callable[[], bytes]] = {
    "also an archive": lambda: encoded(blocks([[RED]]), "PNG") + zip_file(),
    "also a PDF": lambda: encoded(blocks([[RED]]), "JPEG") + encoded(blocks([[RED]]), "PDF"),
    "also a web page": lambda: gif_with(HTML),
    "also a program": lambda: encoded(Image.effect_noise((512, 512), 90), "PNG") + b"<?PHP x();",
}


@pytest.mark.parametrize("kind", POLYGLOTS)
def test_a_picture_that_is_something_else_too_is_refused(kind: str) -> None:
    data = POLYGLOTS[kind]()
    Image.open(io.BytesIO(data)).load()  # a picture it is
    assert kind in refusal(data)


def test_bytes_behind_a_picture_are_none_of_it() -> None:
    video = struct.pack(">I", 24) + b"ftypmp42" + bytes(4000)  # as phones append them
    result = decode_image(encoded(blocks([[RED, BLUE]])) + video)
    assert pixels_of(result).tolist() == [[list(RED), list(BLUE)]]
    assert b"ftyp" not in encoded(result)


# limits


def bombs(width: int, height: int) -> dict[str, bytes]:
    """Files of a few bytes that declare a huge picture."""
    start = b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", height, width)
    jpeg = b"\xff\xd8" + start + b"\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01"
    files = {
        "PNG": png_file((width, height), 8, 0, bytes(100)),
        "JPEG": jpeg + b"\xff\xda\x00\x0c\x03\x01\x00\x02\x11\x03\x11\x00\x3f\x00\xff\xd9",
        "GIF": b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0)
        + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x08\x01\x00\x00;",
        "BMP": b"BM" + struct.pack("<IIIIiiHHIIiiII", 154, 0, 54, 40, width, height, 1, 24, 0, 100,
                                   0, 0, 0, 0) + bytes(100),
    }  # fmt: skip
    if max(width, height) <= 1 << 14:
        bits = (width - 1) | (height - 1) << 14
        body = b"WEBPVP8L" + struct.pack("<I", 105) + b"\x2f" + bits.to_bytes(4, "little")
        files["WEBP"] = b"RIFF" + struct.pack("<I", 118) + body + bytes(101)
    return files


@pytest.mark.parametrize(("width", "height"), [(8001, 8000), (16384, 16384), (60000, 60000)])
def test_a_bomb_is_refused_from_its_header(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: loaded.append(image.format))
    files = bombs(width, height)
    assert len(files) == (5 if width <= 16384 else 4)
    if width * height <= 200e6:
        files.pop("JPEG")  # which may have three times as many
    for kind, data in files.items():
        assert len(data) < 1000
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # none of Pillow's own
            message = refusal(data)
        assert time.perf_counter() - started < 1
        assert "pixels" in message, (kind, message)
    assert loaded == []


def test_a_valid_bomb_of_81_megapixels_is_refused_quickly() -> None:
    data = png_file((9000, 9000), 1, 0, bytes(9000 * 1126))
    assert len(data) < 20_000
    started = time.perf_counter()
    assert "9000 x 9000" in refusal(data)
    assert time.perf_counter() - started < 0.3


def test_a_bomb_is_refused_when_warnings_are_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refusal(bombs(10000, 9500)["PNG"])


def test_limits_are_inclusive(tmp_path: Path) -> None:
    assert MAX_PIXELS == 64 * 10**6
    image = Image.new("RGB", (9, 8))
    data = encoded(image)
    assert decode_image(data, max_pixels=72, max_bytes=len(data)).size == (9, 8)
    assert "9 x 8" in refusal(data, max_pixels=71)
    assert str(len(data)) in refusal(data, max_bytes=len(data) - 1)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    assert decode_image(path, max_bytes=len(data)).size == (9, 8)
    assert "bytes" in refusal(path, max_bytes=len(data) - 1)
    with pytest.raises(BadImageError, match="9 x 8"):
        decode_image(image, max_pixels=71)


# mutations


def seeds_of(kind: str) -> list[bytes]:
    """Small files that reach many parts of a decoder."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    image = Image.effect_noise((24, 16), 80).convert("RGB")
    frames: dict[str, Any] = {"save_all": True, "append_images": [image.rotate(180)]}
    match kind:
        case "JPEG":
            cmyk = encoded(image.convert("CMYK"), kind)
            return [encoded(image, kind, exif=exif), encoded(image, kind, progressive=True), cmyk]
        case "PNG":
            palette = encoded(image.quantize(7), kind, transparency=1)
            rgba = encoded(image.convert("RGBA"), kind, exif=exif)
            return [rgba, palette, png_file((2, 1), 16, 0, b"\0\1\2\3\4"), encoded(image, **frames)]
        case "WEBP":
            alpha = encoded(image.convert("RGBA"), kind, lossless=True)
            return [encoded(image, kind, exif=exif), alpha, encoded(image, kind, **frames)]
        case "GIF":
            return [encoded(image, kind), encoded(image, kind, **frames)]
        case "TIFF":
            packed = [encoded(image, kind, compression=c) for c in ("tiff_lzw", "jpeg", "packbits")]
            modes = [encoded(image.convert(mode), kind) for mode in ("CMYK", "F", "1", "RGBA")]
            return [*packed, *modes, encoded(image, kind, **frames)]
        case "AVIF" | "HEIF":
            return [encoded(image, kind, exif=exif), encoded(image.convert("RGBA"), kind)]
        case _:
            return [encoded(image, kind), encoded(image.quantize(16), kind)]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One to six random edits, most of them near the header."""
    values = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        size = max(1, len(values))
        place = chance.randrange(min(size, chance.choice([40, 200, 10**6])))
        length = chance.randint(1, 12)
        match chance.randrange(6):
            case 0:
                values[place : place + 1] = bytes([chance.randrange(256)])
            case 1:
                values[place : place + length] = chance.randbytes(length)
            case 2:
                values[place : place + length] = b"\xff" * length
            case 3:
                del values[place : place + length]
            case 4:
                values[place:place] = values[: 4 * length]
            case _:
                values = values[: max(1, size - chance.randrange(size))]
    if data.startswith(b"\x89PNG") and chance.random() < 0.7:
        return with_checksums(bytes(values))
    return bytes(values)


def with_checksums(data: bytes) -> bytes:
    """Recomputes the checksums of PNG chunks, so that a damaged one is still looked into."""
    parts, place = [data[:8]], 8
    while place + 12 <= len(data):
        size = min(int.from_bytes(data[place : place + 4], "big"), len(data) - place - 12)
        parts.append(chunk(data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += 12 + size
    return b"".join(parts)


def survive(kind: str, count: int) -> None:
    chance = random.Random(f"{kind} {count}")
    seeds = seeds_of(kind)
    refused: list[str] = []
    for number in range(count):
        data = mutated(chance.choice(seeds), chance)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                image = decode_image(data, max_pixels=10**6)
            except BadImageError as error:
                refused.append(str(error).strip())
                continue
        assert image.mode == "RGB", number
        assert image.width * image.height <= 10**6, number
        assert image.info == {}, number
    assert all(refused)
    assert count * 0.1 < len(refused) < count  # both ways out were taken


@pytest.mark.parametrize("kind", WRITTEN_FORMATS)
def test_mutated_files_are_pictures_or_refused(kind: str) -> None:
    survive(kind, 500)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITTEN_FORMATS)
def test_many_mutated_files_are_pictures_or_refused(kind: str) -> None:
    survive(kind, 10_000)
