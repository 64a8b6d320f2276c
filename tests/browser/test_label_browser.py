"""The page of `hf-knn label` as people use it: by keyboard, by mouse or thumb, at two widths."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browsers import need_browser
from support.label_pages import Served, served, written
from support.played_session import PlayedSession, page_of

from hf_knn.labelling.questions import Kept, Named, Skipped

need_browser()

EVIL = '<img src=x onerror="window.evil=1">'
WIDTHS = {1280: 800, 390: 844}
"""Of a desktop and of a phone held upright, with their heights."""


class Tab:
    """Somebody with the page open; errors of scripts are noted."""

    def __init__(self, browser: Any, url: str, width: int = 1280, **options: Any) -> None:
        size = {"width": width, "height": WIDTHS[width]}
        self.context = browser.new_context(viewport=size, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.trouble: list[str] = []
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("console", lambda message: self._hear(message.text))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.asked: list[str] = []
        self.page.goto(url)
        self.asks("")

    def _hear(self, text: str) -> None:
        if "Failed to load resource" not in text:  # a refusal, which is part of the game
            self.trouble.append(text)

    def asks(self, text: str) -> None:
        """Waits until the page asks this."""
        self.page.wait_for_function(
            """text => document.body.dataset.kind && !document.body.hasAttribute('aria-busy')
            && document.querySelector('#asked').textContent.includes(text)""", arg=text,
        )  # fmt: skip

    def says(self, text: str) -> None:
        """Waits until the line below the progress says this, and a question is there."""
        self.page.wait_for_function(
            """text => !document.body.hasAttribute('aria-busy')
            && document.querySelector('#said').textContent.includes(text)""", arg=text,
        )  # fmt: skip

    def counts(self, named: int) -> None:
        """Waits until so many pictures are named, and a question is there."""
        self.page.wait_for_function(
            """text => !document.body.hasAttribute('aria-busy')
            && document.querySelector('#counts').textContent.startsWith(text)""",
            arg=f"{named} of ",
        )

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def type(self, text: str) -> None:
        self.page.keyboard.type(text)

    def fits(self) -> bool:
        """Whether nothing is wider than the window, and no button leaves it."""
        fits: bool = self.page.evaluate(
            """() => document.scrollingElement.scrollWidth <= innerWidth
            && [...document.querySelectorAll('button')].every(b => {
                const box = b.getBoundingClientRect();
                const isIn = box.left >= 0 && box.right <= innerWidth + 1;
                return !box.width || (isIn && box.height <= 60);  // its words in one line
            })"""
        )
        return fits

    def close(self) -> None:
        self.context.close()
        assert self.trouble == []


@pytest.fixture
def session(tmp_path: Path) -> PlayedSession:
    folder = tmp_path / "pictures"
    paths = written(folder, [f"{name}.png" for name in "abcdefghijkl"] + [f"{EVIL[:4]}.png"])
    return PlayedSession(folder, [*paths[8:], *paths[6:8]], [paths[:4]], [paths[4:6]])


@pytest.fixture
def server(session: PlayedSession) -> Iterator[Served]:
    with served(page_of(session)) as running:
        yield running


@pytest.fixture
def opened(browser: Any, server: Served) -> Iterator[Callable[..., Tab]]:
    tabs = []

    def open_tab(*arguments: Any, **options: Any) -> Tab:
        tabs.append(Tab(browser, server.url, *arguments, **options))
        return tabs[-1]

    yield open_tab
    for tab in tabs:
        tab.close()


def test_copies_a_group_and_a_picture_with_keys_alone(
    opened: Callable[..., Tab], session: PlayedSession
) -> None:
    tab, (a, b, c, d) = opened(390), session.groups[0]
    tab.asks("copies")
    tab.press("2")
    tab.asks("Name this group of 4")
    tab.press("ArrowRight", "ArrowRight", "Space")  # the second one does not belong
    tab.press("n")
    tab.type("it's <b>")
    tab.press("Enter")
    tab.page.wait_for_selector("#trouble:not([hidden])")  # no folder has such a name
    assert "folder" in tab.page.inner_text("#trouble")
    tab.press("Backspace", "Backspace", "Backspace", "Enter")
    tab.asks("What is this?")
    tab.press("1")
    tab.says("1 picture named")
    tab.press("s")
    tab.says("1 picture skipped")
    tab.press("u")
    tab.says("taken back")
    keep, drop = session.copies[0][::-1]
    assert [answer for _, answer in session.answers] == [
        Kept(keep, (drop,)), Named("it's", (a, c, d)), Named("it's", (session.rest[0],))
    ]  # fmt: skip
    assert tab.fits()
    assert b not in session.named()


def everything_named(tab: Tab, session: PlayedSession) -> None:
    """Ends a session with keys alone, at any width."""
    tab.asks("copies")
    tab.press("s")
    tab.asks("group")
    tab.press("?")
    assert tab.page.locator("#keys").is_visible()
    tab.press("Escape")
    assert not tab.page.locator("#keys").is_visible()
    tab.press("a", "n")
    tab.type("ant")
    tab.press("Enter")
    tab.says("No picture is selected")
    tab.press("Escape", "a", "n")
    tab.type("ant")
    tab.press("Enter")
    tab.asks("What is this?")
    for label in [*(f"class {n}" for n in range(2, 10)), "kiwi"]:  # one more than digits
        tab.press("n")
        tab.type(label)
        tab.press("Shift+Enter")
        tab.says(f"1 picture named “{label}”")


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_whole_session_by_keyboard(
    width: int, scheme: str, opened: Callable[..., Tab], session: PlayedSession, server: Served
) -> None:
    session.rest = [*session.rest, *written(session.folder, [f"more{n}.png" for n in range(9)])]
    tab = opened(width, color_scheme=scheme)
    everything_named(tab, session)
    assert tab.fits()
    assert len(session.labels) == 10
    button = tab.page.locator(".class", has_text="kiwi")
    assert button.locator("kbd").inner_text() == "k"
    named = len(session.named())
    tab.press("k")
    tab.counts(named + 1)
    tab.press("n")
    tab.type("wi")
    assert tab.page.locator(".class:visible").count() == 1
    tab.press("Enter")
    tab.counts(named + 2)
    tab.press("Enter")  # yes: the guess
    tab.counts(named + 3)
    assert list(session.named().values()).count("kiwi") == 4
    assert all(url.startswith(server.url) for url in tab.asked)
    dark = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark == ("rgb(20, 24, 28)" if scheme == "dark" else "rgb(255, 255, 255)")


@pytest.mark.slow
def test_every_key_of_a_class_is_on_its_button_and_focus_is_seen(
    opened: Callable[..., Tab], session: PlayedSession
) -> None:
    session.copies = session.groups = ()
    session.names = tuple(f"class {n}" for n in range(40))
    tab = opened(1280)
    keys = tab.page.locator(".class kbd").all_inner_texts()
    given = [key for key in keys if key]
    assert len(given) == len(set(given)) == 9 + 26 - 5
    assert set(given).isdisjoint("uasnf")
    for _ in range(12):
        tab.press("Tab")
        outline = tab.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", tab.page.evaluate("document.activeElement.outerHTML")
    names = tab.page.evaluate(
        "[...document.querySelectorAll('button, input')].filter(e => e.checkVisibility())"
        ".map(e => e.ariaLabel || e.innerText || e.labels?.[0]?.innerText || '')"
    )
    assert all(name.strip() for name in names)


@pytest.mark.slow
def test_by_thumb(opened: Callable[..., Tab], session: PlayedSession) -> None:
    tab = opened(390, has_touch=True, is_mobile=True)
    tab.page.get_by_role("button", name="Keep this one").first.tap()
    tab.asks("group")
    tab.page.locator(".grid label").nth(1).tap()
    tab.page.get_by_label("Find a class").fill("ant")
    tab.page.get_by_label("Find a class").press("Enter")
    tab.asks("What is this?")
    tab.page.get_by_role("button", name="ant, key 1").tap()
    tab.says("1 picture named")
    tab.page.get_by_role("button", name="Undo").tap()
    tab.says("taken back")
    tab.page.get_by_role("button", name="Yes, it is").tap()
    tab.says("1 picture named")
    tab.page.get_by_role("button", name="Skip").tap()
    tab.says("skipped")
    a, _, c, d = session.groups[0]
    assert [answer for _, answer in session.answers][1:] == [
        Named("ant", (a, c, d)), Named("ant", (session.rest[0],)), Skipped((session.rest[1],))
    ]  # fmt: skip
    assert tab.fits()


@pytest.mark.slow
def test_two_tabs_lose_nothing(opened: Callable[..., Tab], session: PlayedSession) -> None:
    one, two = opened(), opened()
    one.press("1")
    one.asks("group")
    two.press("1")
    two.says("answered elsewhere")
    two.asks("group")
    assert len(session.answers) == 1
    two.press("n")
    two.type("ant")
    two.press("Enter")
    two.asks("What is this?")
    one.page.evaluate("window.dispatchEvent(new Event('focus'))")
    one.asks("What is this?")
    one.press("1")
    one.says("1 picture named")
    assert [type(answer) for _, answer in session.answers] == [Kept, Named, Named]


@pytest.mark.slow
def test_names_of_files_and_classes_are_text(
    opened: Callable[..., Tab], session: PlayedSession
) -> None:
    session.copies = session.groups = ()
    session.names = (EVIL, "a/../\"b\" 'c' &amp;")
    session.rest = written(session.folder, ["<script>window.evil=1<", "x' onerror='1.png"])
    tab = opened()
    assert EVIL in tab.page.inner_text("#classes")
    assert "&amp;" in tab.page.inner_text("#classes")
    tab.press("n")
    tab.type("<img src=y onerror=alert(1)>")
    tab.press("Enter")
    tab.page.wait_for_selector("#trouble:not([hidden])")
    assert tab.page.evaluate("window.evil") is None
    assert tab.page.locator("#stage img, #classes img").count() == 1


@pytest.mark.slow
def test_a_server_that_comes_back_goes_on(browser: Any, session: PlayedSession) -> None:
    page = page_of(session)
    first = Served(page)
    tab = Tab(browser, first.url)
    tab.press("1")
    tab.asks("group")
    first.stop()
    tab.press("n")
    tab.type("ant")
    tab.press("Enter")
    tab.page.wait_for_selector("#trouble:not([hidden])")
    assert "does not answer" in tab.page.inner_text("#trouble")
    again = Served(page_of(session), first.port)
    try:
        tab.says("back")
        tab.asks("group")
        assert len(session.answers) == 1
        assert tab.page.input_value("#name") == "ant"  # what was typed is still there
        tab.press("Enter")
        tab.asks("What is this?")
        assert len(session.answers) == 2
    finally:
        again.stop()
        tab.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_jumps_from_picture_to_picture(
    width: int, opened: Callable[..., Tab], session: PlayedSession
) -> None:
    session.copies = session.groups = ()
    session.names = ("ant", "bee")
    tab = opened(width)
    boxes = set()
    tab.press("1")
    tab.says("named")
    for key in "12s1":
        asked = tab.page.inner_text("figcaption >> nth=0")
        tab.press(key)
        tab.page.wait_for_function(
            "was => document.querySelector('figcaption').innerText !== was", arg=asked
        )
        boxes.add(tab.page.evaluate(
            "JSON.stringify(['#stage', '#yes', '#name', '.class:nth-child(2)', '#near'].map(s => {"
            " const b = document.querySelector(s).getBoundingClientRect();"
            " return [b.x, b.y, b.width, b.height].map(Math.round) }))"
        ))  # fmt: skip
    assert len(boxes) == 1
