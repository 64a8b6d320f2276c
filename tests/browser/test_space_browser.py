"""The Space as people use it: Debian's chromium against the running page."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browsers import need_browser
from support.space_app import PER_CLASS, Running, features_of, running, write_picture

from hf_knn_space.uploads import as_uri, reading, thumbnail

EVIL = "<img src=x onerror=alert(1)>"

need_browser()


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("browser")
    with running(place / "pictures", place / "data") as app:
        yield app


class Visit:
    """Somebody with the page open; errors of scripts and dialogs are noted."""

    def __init__(self, browser: Any, url: str, width: int = 1200) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900})
        self.context.set_default_timeout(15_000)
        self.page = self.context.new_page()
        self.trouble: list[str] = []
        self.page.on("dialog", self._refuse)
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.open(url)

    def _refuse(self, dialog: Any) -> None:
        self.trouble.append("dialog")
        dialog.dismiss()

    def open(self, url: str) -> None:
        self.page.goto(url)
        self.page.wait_for_selector("#knn-upload input[type=file]", state="attached")

    def upload(self, *paths: Path) -> None:
        self.page.locator("#knn-upload input[type=file]").set_input_files([str(p) for p in paths])

    def classify(self, path: Path) -> str:
        """The answer to a picture that is not shown yet, once the page shows it."""
        self.page.get_by_role("tab", name="Classify").click()
        self.upload(path)
        with reading(path) as upload:
            uri = as_uri(thumbnail(upload.image))
        self.page.wait_for_function(
            "uri => document.querySelector('#knn-page .knn-answer > img')?.src === uri", arg=uri
        )
        return self.page.locator("#knn-answer").inner_text()

    def teach(self, paths: list[Path], label: str) -> None:
        self.page.get_by_role("tab", name="Teach").click()
        self.page.locator("#knn-lessons input[type=file]").set_input_files([str(p) for p in paths])
        self.page.locator("#knn-lessons .file-preview").wait_for()
        self.page.locator("#knn-label textarea, #knn-label input").fill(label)
        self.page.locator("#knn-teach").click()
        self.page.get_by_text(f"Taught {len(paths)}").wait_for()

    def rows(self, selector: str) -> list[int]:
        """Ids of the tiles that are shown."""
        return [int(tile.get_attribute("data-row")) for tile in self.page.locator(selector).all()]

    def scores(self, kind: str = "blend") -> dict[str, float]:
        rows = self.page.locator(f".knn-{kind} li").all()
        return {
            row.get_attribute("data-label"): float(row.get_attribute("data-score")) for row in rows
        }


@pytest.fixture
def visit(browser: Any, space: Running) -> Iterator[Visit]:
    visitor = Visit(browser, space.url)
    yield visitor
    visitor.context.close()
    assert visitor.trouble == []


def wanted_scores(space: Running, path: Path, **settings: Any) -> dict[str, float]:
    """What the plain forward pass of the library says."""
    model = space.page.service.model
    old = {name: getattr(model.config, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(model.config, name, value)
        out = model(features=features_of(model, [path]))
    finally:
        for name, value in old.items():
            setattr(model.config, name, value)
    return dict(zip(model.config.class_names, out.logits[0].exp().tolist(), strict=True))


def test_sliders_give_what_the_library_computes(visit, space, tmp_path):
    path = write_picture(tmp_path / "asked.png", 1, 77)
    answer = visit.classify(path)
    wanted = wanted_scores(space, path)
    assert visit.scores() == pytest.approx(wanted, abs=2e-6)
    assert answer == max(wanted, key=wanted.__getitem__)
    spoken = f"{answer}, {wanted[answer]:.0%}"  # to a screen reader
    visit.page.locator(".knn-unseen[role=status]", has_text=spoken).wait_for(state="attached")
    visit.page.get_by_text("Advanced: how the neighbours vote").click()
    settings: dict[str, Any] = {}
    for label, name, value in [
        ("k: neighbours", "k", 17), ("Temperature", "knn_temperature", 0.6),
        ("λ:", "knn_weight", 0.85),
    ]:  # fmt: skip
        field = visit.page.get_by_label(re.compile(f"number input for {label}"))
        field.fill(str(value))
        field.press("Enter")
        settings[name] = value
        assert_scores(visit, wanted_scores(space, path, **settings))
    visit.page.get_by_label("Weight of a neighbour by").click()
    visit.page.get_by_role("option", name="rank").click()
    assert_scores(visit, wanted_scores(space, path, **settings, knn_weighting="rank"))


def assert_scores(visit: Visit, wanted: dict[str, float]) -> None:
    """The page shows these scores, at the latest in some seconds."""
    for _ in range(60):
        if visit.scores() == pytest.approx(wanted, abs=2e-6):
            return
        visit.page.wait_for_timeout(100)
    assert visit.scores() == pytest.approx(wanted, abs=2e-6)


def test_a_neighbour_is_opened_with_its_own_neighbours_by_keyboard(visit, space, tmp_path):
    visit.classify(write_picture(tmp_path / "asked.png", 0, 78))
    tile = visit.page.locator("#knn-voters .knn-tile").nth(1)
    row_id = int(tile.get_attribute("data-row"))
    tile.focus()
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector("#knn-detail")
    store = space.page.service.model.datastore
    row = store.subset([row_id])
    hits = store.search(row.features, 8, row.ids).ids[0].tolist()
    shown = [
        int(t.get_attribute("data-row")) for t in visit.page.locator("#knn-near .knn-tile").all()
    ]
    assert shown == hits
    assert f"Stored picture {row_id}" in visit.page.locator("#knn-near").inner_text()
    large = visit.page.locator("#knn-near .knn-answer img")
    assert large.evaluate("image => image.naturalWidth") > 0
    assert large.bounding_box()["width"] > 1.5 * tile.bounding_box()["width"]
    for _ in range(2):  # it closes, the focus is where it was, and it opens again
        visit.page.keyboard.press("Escape")
        visit.page.locator("#knn-detail").wait_for(state="detached")
        focused = visit.page.evaluate("document.activeElement.dataset.row")
        assert focused == str(row_id)
        visit.page.keyboard.press("Enter")
        visit.page.wait_for_selector("#knn-detail")


def test_a_class_taught_with_five_pictures_is_predicted_after_a_reload(visit, space, tmp_path):
    lessons = [write_picture(tmp_path / f"{i}.png", 3, i) for i in range(5)]
    asked = [write_picture(tmp_path / f"asked{i}.png", 3, 790 + i) for i in range(3)]
    assert visit.classify(asked[0]) != EVIL
    visit.teach(lessons, EVIL)
    assert visit.page.locator("#knn-taught .knn-tile").count() == 5
    assert visit.page.locator("#knn-taught b").first.inner_text() == EVIL
    assert visit.classify(asked[1]) == EVIL
    visit.open(space.url)
    visit.page.get_by_role("tab", name="Teach").click()
    visit.page.locator("#knn-taught .knn-tile").first.wait_for()
    assert visit.classify(asked[2]) == EVIL
    assert visit.page.locator("img[src=x]").count() == 0
    visit.page.get_by_role("tab", name="Teach").click()
    visit.page.locator("#knn-taught .knn-tile").first.click()
    visit.page.locator("#knn-taught .knn-tile[aria-pressed=true]").wait_for()
    visit.page.locator("#knn-remove").click()
    visit.page.get_by_text("Removed 1; 4 are left.").wait_for()
    visit.page.locator("#knn-undo").click()
    visit.page.get_by_text("Undone: forget.").wait_for()
    assert visit.page.locator("#knn-taught .knn-tile").count() == 5


def test_what_was_taught_changes_the_answer_that_is_shown(visit, tmp_path):
    asked = write_picture(tmp_path / "asked.png", 4, 84)
    assert visit.classify(asked) != "eel"
    visit.teach([write_picture(tmp_path / f"{i}.png", 4, i) for i in range(5)], "eel")
    visit.page.get_by_role("tab", name="Classify").click()
    visit.page.locator("#knn-answer", has_text="eel").wait_for()


def test_what_is_stored_is_mapped_and_browsed(visit, space):
    visit.page.get_by_role("tab", name="Explore").click()
    dots = visit.page.locator("#knn-map circle[data-row]")
    dots.first.wait_for()
    ids = {int(dot.get_attribute("data-row")) for dot in dots.all()}
    assert ids == set(space.page.service.model.datastore.ids.tolist())
    visit.page.get_by_role("combobox", name="Class").click()
    visit.page.get_by_role("option", name=f"bee ({PER_CLASS})").click()
    visit.page.locator("#knn-rows .knn-tile").first.wait_for()
    rows = visit.rows("#knn-rows .knn-tile")
    assert rows == list(range(PER_CLASS, 2 * PER_CLASS))
    visit.page.locator(f"#knn-map circle[data-row='{rows[0]}']").click()
    visit.page.locator("#knn-stored").get_by_text(f"Stored picture {rows[0]}").wait_for()


def test_two_visitors_do_not_see_each_other(visit, browser, space, tmp_path):
    lessons = [write_picture(tmp_path / f"{i}.png", 4, i) for i in range(3)]
    asked = write_picture(tmp_path / "asked.png", 4, 80)
    visit.teach(lessons, "mine alone")
    assert visit.classify(asked) == "mine alone"
    other = Visit(browser, space.url)
    assert other.classify(asked) != "mine alone"
    rows = [
        int(t.get_attribute("data-row")) for t in other.page.locator("#knn-voters button").all()
    ]
    assert max(rows) < 3 * PER_CLASS
    other.page.get_by_role("tab", name="Teach").click()
    assert other.page.locator("#knn-taught .knn-tile").count() == 0
    assert "mine alone" not in other.page.content()
    other.context.close()


def test_tabs_of_one_browser_share_what_is_taught(visit, space, tmp_path):
    """Also those that were opened before anything was taught."""
    second = visit.context.new_page()
    second.goto(space.url)
    second.wait_for_selector("#knn-upload input[type=file]", state="attached")
    second.wait_for_timeout(500)
    visit.teach([write_picture(tmp_path / "0.png", 4, 0)], "first tab")
    first, visit.page = visit.page, second
    visit.teach([write_picture(tmp_path / "1.png", 4, 1)], "second tab")
    labels = second.locator("#knn-taught b")
    assert labels.all_inner_texts() == ["first tab", "second tab"]
    visit.page = first
    visit.open(space.url)
    visit.page.get_by_role("tab", name="Teach").click()
    visit.page.locator("#knn-taught .knn-tile").nth(1).wait_for()


def test_a_pasted_picture_goes_to_the_tab_that_is_open(visit, tmp_path):
    visit.page.get_by_role("tab", name="Teach").click()
    visit.page.locator("#knn-teach").click()
    message = visit.page.locator("#knn-said [role=alert]")
    message.get_by_text("Expected pictures, but got none").wait_for()
    data = as_uri(write_picture(tmp_path / "pasted.png", 4, 85).read_bytes())
    visit.page.evaluate(
        """async (uri) => {
          const sent = new DataTransfer();
          const blob = await (await fetch(uri)).blob();
          sent.items.add(new File([blob], 'pasted.png', {type: 'image/png'}));
          document.body.dispatchEvent(
            new ClipboardEvent('paste', {clipboardData: sent, bubbles: true}));
        }""",
        data,
    )
    visit.page.locator("#knn-lessons .file-preview").wait_for()
    visit.page.locator("#knn-label input").fill("eel")
    visit.page.locator("#knn-label input").press("Enter")
    visit.page.get_by_text("Taught 1; you have 1 now.").wait_for()
    suggested = visit.page.locator("#knn-labels option")
    values = suggested.evaluate_all("all => all.map((one) => one.value)")
    assert values == ["ant", "bee", "cat", "eel"]


def test_a_broken_file_is_a_message_and_the_next_one_works(visit, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    visit.upload(broken)
    message = visit.page.locator("#knn-page [role=alert]")
    message.wait_for()
    assert "Picture 1 of 1: " in message.inner_text()
    assert "Traceback" not in visit.page.content()
    assert visit.classify(write_picture(tmp_path / "fine.png", 2, 81))


def test_several_pictures_give_a_csv(visit, tmp_path):
    paths = [write_picture(tmp_path / f"{i}.png", i, 82) for i in range(3)]
    visit.upload(*paths)
    button = visit.page.get_by_text("All answers as csv")
    button.wait_for()
    with visit.page.expect_download() as download:
        button.click()
    lines = Path(download.value.path()).read_text("utf-8").splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["0.png", "1.png", "2.png"]
    visit.page.locator("#knn-page [data-look='2']").click()
    visit.page.locator("#knn-page [data-look='2'][aria-pressed=true]").wait_for()
    assert visit.page.locator("#knn-answer").inner_text() == lines[3].split(",")[1]


@pytest.mark.slow
def test_nothing_is_wider_than_a_phone(browser, space, tmp_path):
    visit = Visit(browser, space.url, width=390)
    visit.classify(write_picture(tmp_path / "asked.png", 1, 83))
    visit.page.wait_for_function(  # the answer comes into view by itself
        "document.querySelector('#knn-answer').getBoundingClientRect().bottom < innerHeight / 2"
    )
    for name in ("Classify", "Teach", "Explore", "API"):
        if not visit.page.get_by_role("tab", name=name).is_visible():
            visit.page.locator(".overflow-menu > button").click()
        visit.page.get_by_role("tab", name=name).or_(
            visit.page.locator(".overflow-dropdown").get_by_text(name)
        ).first.click()
        visit.page.wait_for_timeout(300)
        width = visit.page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, name
    visit.context.close()
