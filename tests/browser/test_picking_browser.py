"""Check boxes of the pages, used as people do: by keyboard, and what is written is what works."""

import csv
import io
import shlex
from pathlib import Path
from typing import Any

import pytest
from support.browsers import need_browser
from support.commands import hf_knn, save_backbone, wide_terminal  # noqa: F401
from support.pictures import encoded, picture

from hf_knn.fit.html import Section, Tile, write_page
from hf_knn.fit.picking import Pick, Picking

need_browser()


@pytest.fixture
def shown(browser: Any) -> Any:
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page = context.new_page()
    trouble: list[str] = []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("console", lambda message: trouble.append(message.text))
    yield page
    assert trouble == []
    context.close()


def test_rows_become_commands_by_keyboard(shown: Any, tmp_path: Path) -> None:
    ids = [3, 17, 20, 21, 22, -5, 2**60, 2**60 + 1]
    tiles = [Tile("x", pick=Pick(f"row {i}", str(i), "it's" if i == 17 else "")) for i in ids]
    tiles.append(tiles[0])  # a row with two findings
    path = write_page(tmp_path / "p.html", "t", [Section("s", tiles=tiles)],
                      picking=Picking("forget F", "relabel F"))  # fmt: skip
    shown.goto(path.as_uri())
    assert not shown.locator("#picked").is_visible()
    for _ in range(len(tiles)):
        shown.keyboard.press("Tab")
        shown.keyboard.press("Space")
    large = f"{2**60},{2**60 + 1}"
    # two boxes: what is copied and pasted must not both forget and relabel
    forget = shown.get_by_label("Or to forget them", exact=False).first.input_value()
    assert forget == f"forget F --ids=-5,3,17,20-22,{large}"
    said = shown.locator("#picked-relabel").input_value().splitlines()
    assert said[0] == f"relabel F --ids=-5,3,20-22,{large} --label=CLASS"
    assert shlex.split(said[1]) == ["relabel", "F", "--ids=17", "--label=it's"]
    assert shown.locator("textarea").count() == 2
    assert shown.locator("#picked-count").inner_text() == "9 boxes chosen"
    shown.get_by_role("button", name="Choose none").press("Enter")
    assert not shown.locator("#picked").is_visible()
    assert shown.evaluate("document.activeElement.type") == "checkbox"
    assert shown.evaluate("document.scrollingElement.scrollWidth") <= 390


def test_files_become_a_csv_that_doctor_takes(shown: Any, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    for label, name in enumerate(("ant", "bee")):
        (root / name).mkdir(parents=True)
        for row in range(6):
            (root / name / f"{row}.png").write_bytes(encoded(picture(label, row)))
    (root / "bee" / 'a "copy", x.png').write_bytes((root / "bee" / "1.png").read_bytes())
    backbone = save_backbone(tmp_path / "backbone")
    done = hf_knn("doctor", root, "--backbone", backbone, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    shown.goto((tmp_path / "out" / "report.html").as_uri())
    shown.get_by_role("checkbox", name="exact duplicates").first.check()
    text = shown.locator("#picked-csv").input_value()
    (line,) = csv.DictReader(io.StringIO(text))
    assert line["path"] == 'bee/a "copy", x.png'
    command = shlex.split(shown.locator("#picked-move").input_value())
    (tmp_path / "chosen.csv").write_text(text, encoding="utf-8")
    places = {"chosen.csv": str(tmp_path / "chosen.csv"), "quarantine": str(tmp_path / "aside")}
    done = hf_knn(*(places.get(word, word) for word in command[1:]))
    assert done.exit_code == 0, done.output
    assert not (root / "bee" / 'a "copy", x.png').exists()
