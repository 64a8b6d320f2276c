"""Pages: one file, every text a text, every picture encoded anew."""

import base64
import io
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from hf_knn.fit.html import (
    Drawing,
    Fact,
    Group,
    Heat,
    Section,
    Table,
    Tile,
    plain,
    png_uri,
    svg_uri,
    thumbnail,
    write_page,
)

HOSTILE = "<img src=x onerror=alert(1)>\"'&\x00\x1b[31m\u202e<script>alert(2)</script>"


class Seen(HTMLParser):
    """Tags, attributes and texts of a page as a browser would see them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def seen(path) -> Seen:
    found = Seen()
    found.feed(path.read_text(encoding="utf-8"))
    found.close()
    return found


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def photo(size=(300, 200)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def page(tmp_path):
    uri = thumbnail(photo())
    tile = Tile(HOSTILE, uri, [HOSTILE, "second"], "bad")
    section = Section(
        HOSTILE,
        [HOSTILE],
        [Fact(HOSTILE, HOSTILE, "good")],
        [Drawing(svg_uri("<svg xmlns='http://www.w3.org/2000/svg'/>"), HOSTILE)],
        [Heat([HOSTILE], [[3, 1]], HOSTILE, [HOSTILE])],
        [Table([HOSTILE, "n"], [[HOSTILE, "1"]], HOSTILE, numeric=[1])],
        [tile, Tile("no picture")],
        [Group([tile], HOSTILE)],
    )
    return seen(write_page(tmp_path / "deep" / "page.html", HOSTILE, [section] * 3, [HOSTILE]))


def test_hostile_texts_are_texts(page):
    # 3 sections of 2 tiles with pictures and a drawing: no picture beyond those
    assert page.tags.count("img") == 9
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    shown = "<img src=x onerror=alert(1)>\"'&[31m<script>alert(2)</script>"
    assert page.texts.count(shown) >= 3 * 14
    alts = [value for name, value in page.attributes if name == "alt"]
    assert alts == [shown] * 9


def test_a_page_is_well_formed_and_needs_nothing_from_elsewhere(page):
    assert page.open == []
    sources = [value for name, value in page.attributes if name == "src"]
    assert all(value.startswith("data:image/") for value in sources)
    links = [value for name, value in page.attributes if name == "href"]
    assert links == ["#s0", "#s1", "#s2"]
    assert {value for name, value in page.attributes if name == "id"} >= {"s0", "s1", "s2"}
    assert not any("url(" in text or "@import" in text for text in page.texts)


def test_headings_go_down_one_level_at_a_time_and_the_language_is_said(page):
    assert page.tags.count("h1") == 1
    levels = [int(tag[1]) for tag in page.tags if tag in ("h1", "h2", "h3")]
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert ("lang", "en") in page.attributes


def test_a_thumbnail_is_small_and_forgets_what_the_file_said():
    secret = b"Exif\x00\x00taken at home"
    image = photo()
    image.info["exif"] = secret
    image.info["comment"] = b"taken at home"
    uri = thumbnail(image)
    small = decoded(uri)
    assert small.size == (112, 75)
    assert b"taken at home" not in base64.b64decode(uri.partition(",")[2])
    assert "exif" not in small.info


def test_a_tiny_picture_is_enlarged_in_whole_steps():
    tiny = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    large = np.asarray(decoded(thumbnail(tiny)))
    assert large.shape == (112, 112, 3)
    assert (large[::14, ::14] == np.asarray(tiny)).all()
    assert (large[13::14, 13::14] == np.asarray(tiny)).all()


def test_plain_keeps_what_people_write():
    assert plain("Füchse 🦊👨‍👩‍👧 日本\tx\ny") == "Füchse 🦊👨‍👩‍👧 日本 x y"
    assert plain("a\x00b\x7f\x85\ud800\u202ec\u2066") == "abc"


@pytest.mark.parametrize("uri", ["http://host/x.png", "x.png", "data:text/html,x", ""])
def test_a_picture_from_elsewhere_is_refused(uri, tmp_path):
    with pytest.raises(ValueError, match="data URI"):
        write_page(tmp_path / "page.html", "t", [Section("s", tiles=[Tile("x", uri)])])


def test_a_row_of_another_width_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rows of 2 cells, but got one of 1"):
        write_page(tmp_path / "p.html", "t", [Section("s", tables=[Table(["a", "b"], [["1"]])])])


def test_counts_of_another_width_are_refused(tmp_path):
    heat = Heat(["a", "b"], [[1, 0], [1]], "c")
    with pytest.raises(ValueError, match="rows of 2 counts, but got 1"):
        write_page(tmp_path / "p.html", "t", [Section("s", heats=[heat])])


def test_counts_are_coloured_by_their_share_of_the_row_and_nothing_is_empty(tmp_path):
    heat = Heat(["a", "b"], [[3, 1], [0, 7]], "c")
    path = write_page(tmp_path / "p.html", "t", [Section("s", heats=[heat])])
    styles = [value for name, value in seen(path).attributes if name == "style"]
    assert styles == [
        "background:rgb(26 127 55/0.44)", "background:rgb(200 50 35/0.21)",
        "background:rgb(26 127 55/0.55)",
    ]  # fmt: skip
    assert "<td></td><td style" in path.read_text(encoding="utf-8")


def test_an_unknown_tone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="great"):
        write_page(tmp_path / "p.html", "t", [Section("s", tiles=[Tile("x", tone="great")])])


def test_a_thumbnail_of_no_size_is_refused():
    with pytest.raises(ValueError, match="`size` to be >= 1"):
        thumbnail(photo(), 0)


def test_bytes_of_a_png_are_kept():
    buffer = io.BytesIO()
    photo((4, 4)).save(buffer, "PNG")
    assert base64.b64decode(png_uri(buffer.getvalue()).partition(",")[2]) == buffer.getvalue()
