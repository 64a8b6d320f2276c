"""The page's API: what is asked, what is taken, what is refused, and which files it shows."""

import io
import json
import os
import re
import shlex
import threading
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient
from support.label_pages import written
from support.pictures import encoded, picture
from support.played_session import PlayedSession, page_of

from hf_knn.labelling.page import MOST_SENT, LabelPage
from hf_knn.labelling.questions import Guess, Kept, Named, Neighbour, Picture, Skipped
from hf_knn.model.pictures import small_webp
from hf_knn.serving.guard import Access

HOSTILE = ["<script>alert(1)</script>.png", 'it\'s "quoted" & 100%.png', "a\nb.png", "‮gnp.exe.png"]


class Tab:
    """Somebody with the page open."""

    def __init__(self, page: LabelPage, **options: Any) -> None:
        self.http = TestClient(
            page.app(Access.choose(**options)), "http://127.0.0.1:7861",
            raise_server_exceptions=False,
        )  # fmt: skip
        self.shown = self.http.get("/api/question").json()

    def send(self, path: str, **body: Any) -> tuple[int, Any]:
        about = {"run": self.shown["run"], "number": self.shown["number"]}
        reply = self.http.post(f"/api/{path}", json=about | body)
        return reply.status_code, reply.json()

    def answer(self, **body: Any) -> Any:
        """Answers as the page does; the next question is shown then."""
        status, said = self.send("answer", **body)
        assert status == 200, said
        self.shown = said
        return said

    @property
    def numbers(self) -> list[int]:
        return [each["number"] for each in self.shown["pictures"]]


@pytest.fixture
def session(tmp_path: Path) -> PlayedSession:
    paths = written(tmp_path / "pictures", [f"{name}.png" for name in "abcdefgh"])
    return PlayedSession(tmp_path / "pictures", paths[5:], [paths[:3]], [paths[3:5]])


@pytest.fixture
def page(session: PlayedSession) -> LabelPage:
    return page_of(session)


def test_copies_groups_and_pictures_are_asked_and_answered(
    page: LabelPage, session: PlayedSession
) -> None:
    tab = Tab(page)
    a, b, c, d, e, f, g, h = (session.folder / f"{name}.png" for name in "abcdefgh")
    assert tab.shown["kind"] == "copies"
    assert [each["name"] for each in tab.shown["pictures"]] == ["d.png", "e.png"]
    assert all(re.fullmatch(r"\d+ (kB|bytes)", each["about"]) for each in tab.shown["pictures"])
    assert tab.shown["progress"] == {"labelled": 0, "skipped": 0, "dropped": 0, "left": 8}
    keeps, drops = tab.numbers
    tab.answer(kind="kept", picture=keeps, dropped=[drops])
    assert (tab.shown["kind"], tab.shown["guesses"]) == ("group", [])
    first, _, third = tab.numbers
    tab.answer(kind="named", label="ant", pictures=[first, third])
    assert tab.shown["kind"] == "picture"
    assert tab.shown["guesses"] == [{"label": "ant", "probability": 0.5}]
    assert [near["label"] for near in tab.shown["neighbours"]] == ["ant", "ant"]
    assert tab.shown["labels"] == [{"name": "ant", "key": "1", "count": 2}]
    tab.answer(kind="skipped", pictures=tab.numbers)
    assert [answer for _, answer in session.answers] == [
        Kept(d, (e,)), Named("ant", (a, c)), Skipped((f,))
    ]  # fmt: skip
    status, said = tab.send("undo")
    assert (status, said["said"]) == (200, "The last answer was taken back.")
    assert said["question"]["pictures"][0]["name"] == "f.png"
    assert len(session.answers) == 2
    assert tab.shown["progress"]["skipped"] == 1
    assert {b, g, h}.isdisjoint(session.named())


def test_what_comes_next_is_known_ahead_and_shown(page: LabelPage) -> None:
    tab = Tab(page)
    tab.answer(kind="skipped", pictures=tab.numbers)
    tab.answer(kind="skipped", pictures=tab.numbers)
    now, following, *_ = tab.http.get("/api/ahead").json()["pictures"]
    assert [now] == tab.numbers
    assert tab.http.get(f"/pictures/{following}?size=1600").status_code == 200
    tab.answer(kind="skipped", pictures=tab.numbers)
    assert tab.numbers == [following]


def test_finishing_writes_says_what_is_next_and_ends_the_server(session: PlayedSession) -> None:
    ended = []
    tab = Tab(page_of(session, lambda: ended.append("now")))
    status, said = tab.send("finish", kind="list", with_model=True)
    assert (status, ended) == (422, [])
    assert "label" in said["error"]
    tab.answer(kind="skipped", pictures=tab.numbers)
    tab.answer(kind="named", label="ant", pictures=tab.numbers)
    status, said = tab.send("finish", kind="copies", with_model=True)
    assert (status, ended) == (200, ["now"])
    assert "3 pictures" in said["said"][0]
    assert str(session.folder / "pictures") in " ".join(said["said"])
    command = shlex.split(said["commands"][0]["command"])
    assert command[1:] == ["predict", str(session.folder / "model"), str(session.folder)]
    status, said = tab.send("finish", kind="list", with_model=False)
    assert shlex.split(said["commands"][0]["command"])[1] == "train"
    assert tab.send("finish", kind="everything", with_model=True)[0] == 422


def test_the_end_is_said(session: PlayedSession, page: LabelPage) -> None:
    session.groups, session.copies, session.rest = (), (), session.rest[:1]
    tab = Tab(page)
    tab.answer(kind="named", label="bee", pictures=tab.numbers)
    assert (tab.shown["kind"], tab.shown["number"], tab.numbers) == ("done", None, [])
    assert tab.send("answer", kind="named", label="bee", pictures=[0])[0] == 422
    status, said = tab.send("undo")
    assert (status, said["question"]["kind"]) == (200, "picture")


def test_an_answer_to_an_old_question_changes_nothing(
    page: LabelPage, session: PlayedSession
) -> None:
    one, two = Tab(page), Tab(page)
    old = two.numbers
    one.answer(kind="skipped", pictures=one.numbers)
    for path, body in [("answer", {"kind": "skipped", "pictures": old}), ("undo", {})]:
        status, said = two.send(path, **body)
        assert status == 409
        assert said["question"] == one.shown
        assert "answered" in said["error"]
    two.shown = said["question"] | {"run": "of a server before"}
    assert two.send("answer", kind="skipped", pictures=two.numbers)[0] == 409
    assert len(session.answers) == 1


def test_of_two_answers_at_once_one_is_taken(page: LabelPage, session: PlayedSession) -> None:
    tabs = [Tab(page) for _ in range(4)]
    statuses = []

    def send(tab: Tab) -> None:
        statuses.append(tab.send("answer", kind="skipped", pictures=tab.numbers)[0])

    threads = [threading.Thread(target=send, args=(tab,)) for tab in tabs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200, 409, 409, 409]
    assert len(session.answers) == 1


@pytest.mark.parametrize(
    "body",
    [
        {"kind": "named", "label": "x", "pictures": []},  # not: all of them
        {"kind": "named", "label": "x", "pictures": [2**70]},
        {"kind": "named", "label": "x", "pictures": [-1]},
        {"kind": "named", "label": "x", "pictures": ["0"]},
        {"kind": "named", "label": "x", "pictures": [True]},
        {"kind": "named", "label": "x", "pictures": [0.5]},
        {"kind": "named", "label": "x", "pictures": ["../../etc/passwd"]},
        {"kind": "named", "label": "../../etc", "pictures": [0]},
        {"kind": "named", "label": "a/b", "pictures": [0]},
        {"kind": "named", "label": "\x00", "pictures": [0]},
        {"kind": "named", "label": "", "pictures": [0]},
        {"kind": "named", "label": "\ud800", "pictures": [0]},
        {"kind": "named", "label": ["x"], "pictures": [0]},
        {"kind": "named", "label": "x" * 5000, "pictures": [0]},
        {"kind": "named", "label": "x"},
        {"kind": "kept", "picture": 0, "dropped": []},
        {"kind": "kept", "picture": 99, "dropped": [0]},
        {"kind": "deleted", "pictures": [0]},
        {"kind": "skipped", "pictures": [0], "path": "/etc/passwd"},
        {},
    ],
)
def test_what_is_no_answer_is_refused_in_a_sentence(
    body: dict[str, Any], page: LabelPage, session: PlayedSession
) -> None:
    tab = Tab(page)
    about = {"run": tab.shown["run"], "number": tab.shown["number"]}
    reply = tab.http.post("/api/answer", content=json.dumps(about | body))
    assert reply.status_code == 422
    assert reply.json()["error"].startswith("Expected ")
    assert session.answers == []


@pytest.mark.parametrize(
    "body", [b"", b"\xff", b"[" * 50_000, b"null", b"[]", b'{"run": NaN}', b'{"number": 1e999}']
)
def test_what_is_no_json_is_refused(body: bytes, page: LabelPage) -> None:
    http = Tab(page).http
    for path in ("answer", "undo", "finish"):
        reply = http.post(f"/api/{path}", content=body)
        assert reply.status_code == 422
        assert reply.json()["error"].startswith("Expected ")


def test_too_much_is_not_read(page: LabelPage) -> None:
    assert Tab(page).http.post("/api/answer", content=b" " * (MOST_SENT + 1)).status_code == 413


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    paths = written(folder, HOSTILE)
    bytes_name = os.fsencode(folder) + b"/\xff.png"
    Path(os.fsdecode(bytes_name)).write_bytes(paths[0].read_bytes())
    paths.append(Path(os.fsdecode(bytes_name)))
    session = PlayedSession(folder, paths[1:], [paths[:1]])
    tab = Tab(page_of(session))
    session.names = ("<img src=x onerror=alert(1)>", "a/../\"b\" 'c'")  # of a checkpoint
    label = "it's & what"
    for _ in paths:
        (shown,) = tab.shown["pictures"]
        assert shown["name"].isprintable()
        assert tab.http.get(f"/pictures/{shown['number']}?size=360").status_code == 200
        tab.answer(kind="named", label=label, pictures=tab.numbers)
    said = [(each["name"], each["count"]) for each in tab.shown["labels"]]
    assert said == [*((name, 0) for name in session.names), (label, 5)]
    assert tab.http.get("/api/question").content.isascii()


# ---- pictures ----------------------------------------------------------------------------------


def fetched(tab: Tab, number: int, size: int = 1600) -> Image.Image:
    reply = tab.http.get(f"/pictures/{number}?size={size}&run=x")
    assert reply.status_code == 200, reply.text
    assert "immutable" in reply.headers["cache-control"]
    return Image.open(io.BytesIO(reply.content))


def test_pictures_are_upright_small_and_without_metadata(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    exif[0x010E] = "where I live"
    image = Image.new("RGB", (2400, 900), "red")
    image.paste("blue", (0, 0, 1200, 900))
    image.save(tmp_path / "turned.jpg", exif=exif)
    tiny = picture(1, 1)
    tiny.save(tmp_path / "tiny.png")
    session = PlayedSession(tmp_path, [], [[tmp_path / "turned.jpg", tmp_path / "tiny.png"]])
    tab = Tab(page_of(session))
    for size in (360, 1600):
        shown = fetched(tab, 0, size)
        assert shown.size == (size * 3 // 8, size)
        assert dict(shown.getexif()) == {}
        red, _, blue = shown.convert("RGB").getpixel((5, 5))  # type: ignore[misc]
        assert blue > 200 > red
    assert fetched(tab, 1).tobytes() == tiny.tobytes()


@pytest.mark.parametrize(
    "path",
    [
        "99", "-1", "x", "0.png", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%2f..%2fsecret.png",
        "secret.png", "", "99999999999999999999999999", "0/1", "//etc/passwd",
    ],
)  # fmt: skip
def test_only_numbers_of_the_session_are_shown(path: str, page: LabelPage, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encoded(picture(0, 0)))
    reply = Tab(page).http.get(f"/pictures/{path}?size=360")
    assert reply.status_code == 404
    assert not reply.headers["content-type"].startswith("image/")


def test_a_neighbour_that_only_a_checkpoint_knows_is_its_small_picture(
    page: LabelPage, session: PlayedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = [Neighbour(Path("../secret.png"), "ant", 0.9, small) for small in (b"", None)]
    near[0] = near[0]._replace(small=small_webp(picture(2, 2, (64, 64))))
    asked = Picture(0, session.rest[0], (Guess("ant", 1.0),), tuple(near))
    monkeypatch.setattr(session, "question", lambda: asked)
    (session.folder.parent / "secret.png").write_bytes(encoded(picture(0, 0)))
    tab = Tab(page)
    first, second = (each["picture"] for each in tab.shown["neighbours"])
    assert fetched(tab, first["number"], 360).size == (64, 64)
    assert second == {"number": None, "name": "secret.png"}
    status, said = tab.send("answer", kind="named", label="x", pictures=[first["number"]])
    assert (status, said["error"][:8]) == (422, "Expected")


def test_a_picture_that_is_gone_or_broken_is_no_server_error(
    page: LabelPage, session: PlayedSession
) -> None:
    tab = Tab(page)
    (session.folder / "d.png").unlink()
    (session.folder / "e.png").write_bytes(b"not a picture")
    for number in tab.numbers:
        reply = tab.http.get(f"/pictures/{number}?size=360")
        assert reply.status_code == 404
        assert str(session.folder) not in reply.json()["error"]
    assert "gone" in tab.http.get("/api/question").json()["pictures"][0]["about"]
    assert tab.http.get(f"/pictures/{tab.numbers[0]}?size=7").status_code == 422


# ---- who may ask, and what a browser is told ---------------------------------------------------


def test_the_page_needs_nothing_from_elsewhere(page: LabelPage) -> None:
    http = Tab(page).http
    texts = {}
    for path in ("/", "/page.js", "/page.css"):
        reply = http.get(path)
        assert reply.status_code == 200
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        texts[path] = reply.text
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", "".join(texts.values()))
    assert not re.search(r"<script(?! type=\"module\" src=)|\son\w+=|\sstyle=", texts["/"])
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(", texts["/page.js"])


def test_every_file_of_the_page_is_served(page: LabelPage) -> None:
    names = {each.name for each in (files("hf_knn.labelling") / "static").iterdir()}
    assert names == {"index.html", "page.js", "page.css"}


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/api/question", {"host": "evil.example"}, 403),
        ("/pictures/0?size=360", {"host": "evil.example"}, 403),
        ("/api/question", {"origin": "https://evil.example"}, 403),
        ("/", {"host": "localhost:7861"}, 200),
    ],
)
def test_other_names_and_pages_are_refused(
    path: str, headers: dict[str, str], status: int, page: LabelPage
) -> None:
    assert Tab(page).http.get(path, headers=headers).status_code == status


def test_an_answer_from_the_page_of_another_site_is_refused(
    page: LabelPage, session: PlayedSession
) -> None:
    tab = Tab(page)
    body = {"run": tab.shown["run"], "number": tab.shown["number"]}
    body |= {"kind": "skipped", "pictures": tab.numbers}
    for headers in ({"origin": "http://127.0.0.1:80"}, {"sec-fetch-site": "cross-site"}):
        assert tab.http.post("/api/answer", json=body, headers=headers).status_code == 403
    assert session.answers == []


def test_reached_from_other_machines_everything_needs_the_token(page: LabelPage) -> None:
    access = Access.choose("0.0.0.0", "a-token-of-some-length")
    http = TestClient(page.app(access), "http://192.168.1.7:7861", follow_redirects=True)
    for path in ("/", "/page.js", "/api/question", "/pictures/0?size=360"):
        assert http.get(path).status_code == 401
    assert http.get(f"/?token={access.token}").status_code == 200
    assert http.get("/api/question").json()["kind"] == "copies"  # a cookie by now


def test_what_goes_wrong_inside_is_said_without_details(
    page: LabelPage, session: PlayedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    tab = Tab(page)

    def fail(*_: object) -> None:
        raise RuntimeError("/home/somebody/secret")

    monkeypatch.setattr(session, "answer", fail)
    status, said = tab.send("answer", kind="skipped", pictures=tab.numbers)
    assert status == 500
    assert "secret" not in said["error"]
