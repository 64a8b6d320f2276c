"""A report as people read it: on a phone, by keyboard, in the dark."""

from pathlib import Path
from typing import Any

import pytest
from support.browsers import need_browser
from support.pictures import picture
from support.reports import known_model, report_of, rows_of, with_prints

need_browser()

HOSTILE = ["<script>window.evil = 1</script>", "ثعلب أحمر " * 9, "x" * 300, "bee"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 50 classes, four of them with names that go far, and pictures."""
    names = [*HOSTILE, *(f"class number {i}" for i in range(46))]
    labels = list(range(50)) * 2
    looks = [(label + 1) % 50 if row % 3 else label for row, label in enumerate(labels)]
    model = known_model(names, labels * 3)
    rows = rows_of(names, labels, looks=looks)
    report = report_of(
        model, rows, pictures={row: picture(row % 5, row, (90, 40)) for row in range(100)},
        stored_pictures=with_prints(model),
    )  # fmt: skip
    return report.save(tmp_path_factory.mktemp("report"))


@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_page_but_in_its_own_box(
    browser: Any,
    page: Path,
    width: int,
    scheme: str,
) -> None:
    size = {"width": width, "height": 800}
    context = browser.new_context(viewport=size, color_scheme=scheme)
    try:
        shown = context.new_page()
        trouble: list[str] = []
        shown.on("pageerror", lambda error: trouble.append(str(error)))
        shown.on("console", lambda message: trouble.append(message.text))
        shown.goto(page.as_uri())
        assert shown.evaluate("document.scrollingElement.scrollWidth") <= width
        wide = shown.evaluate("""() => [...document.querySelectorAll("body *")].filter(
            each => each.getBoundingClientRect().right > innerWidth + 1 && !each.closest(".table")
        ).map(each => each.outerHTML.slice(0, 80))""")
        assert wide == []
        assert shown.evaluate("window.evil") is None
        assert trouble == []
        paper = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
        broken = "[...document.images].filter(each => !each.naturalWidth).length"
        assert shown.evaluate(broken) == 0
        assert shown.evaluate("document.images.length") > 40
    finally:
        context.close()


def test_boxes_that_scroll_are_reached_and_moved_by_keyboard(
    browser: Any,
    page: Path,
) -> None:
    context = browser.new_context(viewport={"width": 320, "height": 800})
    try:
        shown = context.new_page()
        shown.goto(page.as_uri())
        box = shown.locator(".heat")
        assert box.evaluate("each => each.scrollWidth > each.clientWidth")
        reached = []
        for _ in range(30):
            shown.keyboard.press("Tab")
            reached.append(shown.evaluate("document.activeElement.className"))
        assert {"table", "table heat"} <= {*reached}
        box.focus()
        shown.keyboard.press("ArrowRight")
        moved = 0
        for _ in range(200):  # it glides; the page's policy lets no predicate be polled in it
            moved = moved or box.evaluate("each => each.scrollLeft")
            shown.wait_for_timeout(0 if moved else 50)
        assert moved > 0
    finally:
        context.close()
