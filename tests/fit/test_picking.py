"""Check boxes of pages: one script of ours, named by its hash, and data that is only data."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hf_knn.fit.html import Group, Section, Tile, write_page
from hf_knn.fit.picking import PICK_SCRIPT, Pick, Picking

HOSTILE = "\"><script>alert(1)</script><img src=x onerror='alert(2)'>&quot;"


class Seen(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [values for name, values in self.tags if name == tag]


def policy_of(page: Seen) -> dict[str, str]:
    (content,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert content is not None
    return dict(part.strip().split(" ", 1) for part in content.split(";"))


def page_with(path: Path, pick: Pick | None, picking: Picking | None) -> Seen:
    sections = [Section("s", groups=[Group([Tile("x", pick=pick), Tile("y")])])]
    return Seen(write_page(path, "t", sections, picking=picking).read_text("utf-8"))


def test_the_policy_names_the_one_script_by_its_hash(tmp_path: Path) -> None:
    pick = Pick(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    page = page_with(tmp_path / "p.html", pick, Picking(HOSTILE, HOSTILE, HOSTILE, HOSTILE))
    assert page.scripts == [PICK_SCRIPT]
    wanted = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    policy = policy_of(page)
    assert policy["script-src"] == f"'sha256-{wanted}'"
    assert policy["default-src"] == "'none'"  # also what a script could fetch, or send a form to
    assert len(page.all("script")) == 1
    assert page.all("img") == []
    assert page.all("script")[0] == {}
    assert not [n for _, values in page.tags for n in values if n.startswith("on")]


def test_what_a_box_knows_is_data(tmp_path: Path) -> None:
    pick = Pick("a picture", "-17", HOSTILE, "near_duplicate", 'a,"b\'c"')
    page = page_with(tmp_path / "p.html", pick, Picking("f", "r", header=HOSTILE))
    (box,) = [each for each in page.all("input") if each["type"] == "checkbox"]
    assert box["aria-label"] == "choose a picture"
    assert box["data-id"] == "-17"
    assert box["data-label"] == HOSTILE
    assert box["data-kind"] == "near_duplicate"
    assert box["data-line"] == 'a,"b\'c"'
    begins = {each["name"]: each["data-begins"] for each in page.all("textarea")}
    assert begins == {"csv": HOSTILE, "relabel": "r", "forget": "f"}
    known = {values["id"] for _, values in page.tags if "id" in values}
    assert {*re.findall(r'"(picked[\w-]*)"', PICK_SCRIPT)} <= known
    assert {each["for"] for each in page.all("label") if "for" in each} <= known
    assert all("readonly" in each for each in page.all("textarea"))


def test_nothing_that_a_terminal_obeys_gets_into_a_command(tmp_path: Path) -> None:
    evil = "fox\x03rm\n\u202e\udc80"
    page = page_with(tmp_path / "p.html", Pick(evil, "1", evil, line=evil), Picking(evil, evil))
    (box,) = [each for each in page.all("input") if each["type"] == "checkbox"]
    assert (box["data-label"], box["aria-label"]) == ("", "choose fox?rm???")
    assert [each["data-begins"] for each in page.all("textarea")] == ["fox?rm???"] * 2


def test_the_script_makes_no_markup_and_no_request() -> None:
    for word in ("innerHTML", "insertAdjacent", "document.write", "eval", "Function", "fetch",
                 "XMLHttp", "WebSocket", "import", "location", "</"):  # fmt: skip
        assert word not in PICK_SCRIPT


def test_a_page_without_boxes_has_no_script(tmp_path: Path) -> None:
    page = page_with(tmp_path / "p.html", None, Picking("f", "r"))
    assert page.all("script") == []
    assert "script-src" not in policy_of(page)


def test_boxes_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`picking` for tiles with check boxes"):
        page_with(tmp_path / "p.html", Pick("x", "1"), None)
