"""A card quotes what others wrote as text; what its owner wrote stays as it is."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from support.tiny import tiny_model, tiny_store

from hf_knn import KnnForImageClassification
from hf_knn.fit.plots import _show
from hf_knn.model.card import make_card

AUTOLINK = re.compile(r"(?i)(?:https?://|www\.)\S|[-.\w+]+@[-\w]+(?:\.[-\w]+)+|(?<!\w)@[a-z]")
"""What GitHub and the Hub make links of in text, after entities and escapes are read."""

NASTY = [
    "[click](http://evil.com)", "![x](https://evil.com/x.png)", "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>", "http://evil.com/a?b=c", "see www.evil.com now", "a@evil.com",
    "@someone", "<http://evil.com>", "[x]: http://evil.com", "[x][y]", "`code`", "``` code", "~~~",
    "**bold** _em_ ~~gone~~", "a | b | c", "|---|---|", "&#60;img src=x&#62;", "&lt;b&gt;",
    "\\[x\\](http://evil.com)", "\\", "# heading", "- item", "1. item", "12) item", "> quote",
    "====", "----", "text\n\n# heading", "text\r\n---\r\nevil: yes", "a\u2028b\x85c",
    "\x1b]0;title\x07",
    "\u202eevil", "\ud800", "<!-- hf_knn: end -->", "$$x$$", "[^1]", "\x00", "*" * 400,
    "HTTPS://EVIL.COM", "ftp://evil.com", "![](//evil.com/x)", "<a href='//evil.com'>x</a>",
    "data\"; import os; os.system('x') #", "{{ x }}", "*[a]: b",
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> KnnForImageClassification:
    model = tiny_model()
    model.datastore = tiny_store(model)
    return model


def put(model: KnnForImageClassification, text: str) -> None:
    """Into every place of a checkpoint that a card quotes."""
    model.measured = {
        "metrics": {"eval_blend_top1": 0.5, "eval_blend_nll": 1.0}, "rows": 8, "reliability": [],
        "dataset": text, "split": text, "note": text,
    }  # fmt: skip
    assert model.datastore is not None
    model.datastore.source = {"dataset": text, text: text, "revision": text, "license": text}
    model.config.base_model = text


def tokens_of(text: str) -> list[Any]:
    found: list[Any] = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        found += [token, *(token.children or [])]
    return found


def seen(text: str) -> str:
    """What a reader sees of the texts, without what nobody sees."""
    shown = "".join(t.content for t in tokens_of(text) if t.type in ("text", "text_special"))
    return shown.replace("\u2060", "")


@pytest.mark.parametrize("text", NASTY, ids=ascii)
@pytest.mark.parametrize("name", ["org/name", None])
def test_what_others_wrote_never_acts(
    model: KnnForImageClassification, text: str, name: str | None
) -> None:
    put(model, text)
    card = make_card(model, name or text)
    card.encode()  # a file is UTF-8
    body = ModelCard(card).text
    tokens = tokens_of(body)
    put(model, "plain")
    plain = tokens_of(ModelCard(make_card(model, name or "plain")).text)
    assert [t.type for t in tokens] == [t.type for t in plain]  # nothing but text is another one
    shown = "".join(t.content for t in tokens if t.type in ("text", "text_special"))
    assert not AUTOLINK.search(shown)
    flat = "".join(each if each.isprintable() else "\ufffd" for each in " ".join(text.split()))
    assert seen(body).count(flat[:150].strip()) >= 4  # and is there to be read


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_what_others_wrote_says_nothing_in_the_front_matter(
    model: KnnForImageClassification, text: str
) -> None:
    put(model, text)
    card = make_card(model, "org/name")
    values = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert set(values) == {
        "library_name", "pipeline_tag", "tags", "metrics", "model-index"
    }  # fmt: skip
    (result,) = values["model-index"][0]["results"]
    assert set(result) == {"task", "dataset", "metrics"}
    assert "\n" not in result["dataset"]["name"]


@pytest.mark.parametrize("base", [7, None, ["a/b"], {"a": "b"}, "a/b/c", "/etc/passwd", "../x", ""])
def test_a_base_that_is_no_repository_is_not_named(
    model: KnnForImageClassification, base: Any
) -> None:
    put(model, "plain")
    model.config.base_model = base
    assert "base_model" not in make_card(model, "org/name")


def test_names_of_repositories_are_named(model: KnnForImageClassification) -> None:
    put(model, "org/bees_2.0-a")
    data = ModelCard(make_card(model, "org/name")).data.to_dict()
    assert data["base_model"] == "org/bees_2.0-a"
    assert data["datasets"] == ["org/bees_2.0-a"]
    body = ModelCard(make_card(model, "org/name")).text
    assert "On 8 pictures of org/bees_2.0-a, split org/bees_2.0-a." in seen(body)


def test_the_words_of_the_owner_stay(model: KnnForImageClassification) -> None:
    put(model, "[x](http://evil.com)")
    mine = "# Mine\n\n[link](http://mine.org) <b>bold</b> ![x](y.png)\n"
    card = make_card(model, "org/name", mine)
    assert mine.strip() in card
    again = make_card(model, "org/name", card)
    assert mine.strip() in again
    assert again.count("## Datastore") == 1


@pytest.mark.parametrize("name", ["$x$", r"$\frac$", "$" + "{" * 50 + "$", "a $ b", "_x^"])
def test_names_under_pictures_are_no_formulas(tmp_path: Path, name: str) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    from PIL import Image

    figure = figures.Figure()
    axes = figure.subplots()
    _show(axes, Image.new("RGB", (4, 4)), name, is_right=True)
    figure.savefig(tmp_path / "x.png")
    assert axes.title.get_text() == name
    assert not axes.title.get_parse_math()
