"""How often a page asks the datastore where pictures lie: once, however many it shows."""

from pathlib import Path
from typing import Any

import pytest
from support.space_app import PER_CLASS, published, write_picture

pytest.importorskip("gradio")
import gradio as gr

from hf_knn import Datastore
from hf_knn_space.page import classify, explore
from hf_knn_space.page.contents import Page
from hf_knn_space.page.explore_views import rows_of
from hf_knn_space.pictures import FolderPictures, NoPictures
from hf_knn_space.service import Service
from hf_knn_space.visitors import Visitors


@pytest.fixture
def page(tmp_path: Path) -> Page:
    model = published(tmp_path / "pictures")
    service = Service(model, Visitors(model, None))
    return Page.of(service, FolderPictures(tmp_path / "pictures"), [])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids of every question, in order."""
    questions: list[list[int]] = []
    paths_of = Datastore.paths_of

    def noted(store: Datastore, ids: Any) -> list[str]:
        questions.append([int(i) for i in ids])
        return paths_of(store, ids)

    monkeypatch.setattr(Datastore, "paths_of", noted)
    return questions


def click(row_id: int) -> gr.EventData:
    return gr.EventData(None, {"row": str(row_id)})


def pictures_in(html: str) -> int:
    return html.count("data:image/webp")


def test_an_answer_asks_once_for_all_its_tiles(page, asked, tmp_path):
    handlers = classify._Handlers(page)
    look = page.service.look(str(write_picture(tmp_path / "asked.png", 1)))
    shown = classify.Shown((look,))
    html, _ = handlers._answer(shown, "", (12, 0.1, 0.5, "softmax"))
    assert pictures_in(html) > 12, "its own picture, and those that voted"
    by_explaining, by_showing = asked
    assert len(by_explaining) == 12
    assert set(by_explaining) <= set(by_showing)


def test_a_stored_picture_asks_once_with_what_is_near_it(page, asked):
    html = explore._Handlers(page).near(click(3), "")
    assert pictures_in(html) == 9
    assert len(asked) == 1


def test_a_class_and_the_findings_ask_once_each(page, asked):
    handlers = explore._Handlers(page)
    assert pictures_in(handlers.browse(f"bee ({PER_CLASS})")) == PER_CLASS
    assert len(asked) == 1
    found = page.explorer.look()
    asked.clear()
    _, html = handlers.look()
    assert pictures_in(html) == len(rows_of(found))
    assert len(asked) <= 1


def test_small_pictures_at_hand_ask_nothing(page, asked, tmp_path):
    model = page.service.model
    picture = str(write_picture(tmp_path / "other.png", 3))
    model.keep_thumbnails(dict.fromkeys(model.datastore.ids.tolist(), picture))
    lesson = str(write_picture(tmp_path / "lesson.png", 3, 7))
    done = page.service.teach([lesson], "dog", "", "")
    ids = [3, *done["ids"]]
    asked.clear()
    find = page.picture_of(done["visitor"], ids)
    assert all(map(find, ids))
    assert asked == []
    theirs = page.picture_of("", ids)
    assert theirs(3)
    assert theirs(done["ids"][0]) is None, "nobody else's to see"


def test_a_row_that_is_gone_or_was_not_named_has_no_picture(page):
    find = page.picture_of("", [3, 10**6])
    assert find(3)
    assert find(10**6) is None
    assert find(4) is None
    empty = Page.of(page.service, NoPictures(), [])
    assert empty.picture_of("", [3])(3) is None
