"""Who may ask a server: names, pages of other sites, tokens."""

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from hf_knn.serving.guard import Access, Guard

TOKEN = "a token that nobody guesses".replace(" ", "-")


def said(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"{request.url.path}?{request.url.query}")


def client(access: Access, host: str = "127.0.0.1:8000") -> TestClient:
    app = Starlette(routes=[Route("/{rest:path}", said, methods=["GET", "POST"])])
    guard = Guard(app, access, lambda method, path: path == "/teach")
    return TestClient(guard, f"http://{host}", follow_redirects=False)


LOCAL = Access.choose(token=TOKEN)
OPEN = Access.choose("0.0.0.0", TOKEN)
PROXIED = Access.choose(token=TOKEN, names=["knn.example.org"])
BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    ("access", "host", "is_let_in"),
    [
        (LOCAL, "127.0.0.1", True),
        (LOCAL, "127.0.0.1:8000", True),
        (LOCAL, "localhost:9999", True),  # a tunnel has another port
        (LOCAL, "LOCALHOST.", True),
        (LOCAL, "[::1]:8000", True),
        (LOCAL, "evil.example:8000", False),
        (LOCAL, "localhost.evil.example", False),
        (LOCAL, "127.0.0.1.evil.example", False),
        (LOCAL, "evil.example@localhost", False),
        (LOCAL, "localhost/evil.example", False),
        (LOCAL, "localhost:8000:9", False),
        (LOCAL, "0.0.0.0:8000", False),
        (LOCAL, "192.168.1.7", False),
        (LOCAL, "", False),
        (OPEN, "192.168.1.7:8000", True),
        (OPEN, "[fe80::1]", True),
        (OPEN, "evil.example", False),
        (PROXIED, "knn.example.org", True),
        (PROXIED, "evil.example", False),
        (PROXIED, "192.168.1.7", False),
        (Access.choose("knn.lan", TOKEN), "knn.lan:80", True),
        (Access.choose("::1", TOKEN), "[::1]:80", True),
    ],
)
def test_a_name_that_somebody_else_points_here_is_refused(
    access: Access, host: str, is_let_in: bool
) -> None:
    assert access.is_called(host) == is_let_in
    answer = client(access).get("/health", headers={"host": host, **BEARER})
    assert answer.status_code == (200 if is_let_in else 403)
    assert is_let_in or "Expected this server" in answer.json()["error"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # no browser
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"origin": "https://127.0.0.1:8000"}, 200),  # a proxy with a certificate
        ({"origin": "http://127.0.0.1:3000"}, 403),
        ({"origin": "http://localhost:8000"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"origin": "file://"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),  # an <img>
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}, 403),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_page_of_another_site_is_refused(
    method: str, headers: dict[str, str], status: int
) -> None:
    assert client(LOCAL).request(method, "/", headers=headers).status_code == status


def test_a_link_of_another_site_opens_a_page_but_posts_no_form() -> None:
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client(LOCAL).get("/docs", headers=headers).status_code == 200
    assert client(LOCAL).post("/predict", headers=headers).status_code == 403


def test_no_origin_is_that_of_a_host_without_one() -> None:
    headers = {"host": "::1", "origin": "null"}  # a host that is no part of an address
    assert client(LOCAL).get("/", headers=headers).status_code == 403


@pytest.mark.parametrize(
    ("access", "path", "headers", "status"),
    [
        (LOCAL, "/predict", {}, 200),
        (LOCAL, "/teach", {}, 401),
        (LOCAL, "/teach", BEARER, 200),
        (LOCAL, "/teach", {"authorization": f"bearer  {TOKEN} "}, 200),
        (LOCAL, "/teach", {"authorization": TOKEN}, 401),
        (LOCAL, "/teach", {"authorization": f"Basic {TOKEN}"}, 401),
        (LOCAL, "/teach", {"authorization": f"Bearer {TOKEN[:-1]}"}, 401),
        (LOCAL, "/teach", {"authorization": "Bearer "}, 401),
        (LOCAL, "/teach", {"authorization": b"Bearer \xff\xfe"}, 401),
        (LOCAL, f"/teach?token={TOKEN}", {}, 200),
        (OPEN, "/predict", {}, 401),
        (OPEN, "/health", {}, 401),
        (OPEN, "/docs", BEARER, 200),
        (PROXIED, "/predict", {}, 401),  # who is behind the proxy, nobody knows
    ],
)
def test_a_token_for_what_changes_and_for_all_that_others_can_reach(
    access: Access, path: str, headers: dict[str, str], status: int
) -> None:
    answer = client(access).post(path, headers=headers)
    assert answer.status_code == status
    if status == 401:
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"].startswith("Expected the token of this server, but got ")
    assert TOKEN not in answer.text


def test_an_address_with_the_token_makes_a_cookie_and_leaves_no_token_behind() -> None:
    browser = client(OPEN)
    opened = browser.get("/docs", params={"token": TOKEN, "a": "1"})
    assert (opened.status_code, opened.headers["location"]) == (303, "/docs?a=1")
    assert {"httponly", "samesite=strict"} <= {
        part.strip().lower() for part in opened.headers["set-cookie"].split(";")
    }
    assert browser.get("/docs").status_code == 200
    assert browser.post("/teach").text == "/teach?"
    assert client(OPEN).get("/docs", headers={"cookie": "hf_knn_8000=other; x"}).status_code == 401
    assert client(OPEN).get("/docs?token=wrong").status_code == 401
    away = client(OPEN).get(f"http://127.0.0.1:8000//evil.example/?token={TOKEN}")
    assert away.headers["location"] == "/evil.example/"


def test_answers_are_for_no_other_site() -> None:
    headers = client(LOCAL).get("/").headers
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["content-security-policy"] == "frame-ancestors 'none'"
    assert "access-control-allow-origin" not in headers


def test_a_socket_of_another_kind_is_closed() -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), client(LOCAL).websocket_connect("/"):
        raise AssertionError("unreachable: it was opened")


def test_what_is_not_said_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_KNN_TOKEN", raising=False)
    made = Access.choose()
    assert (made.host, made.is_local, made.is_given) == ("127.0.0.1", True, False)
    assert len(made.token) >= 32
    assert made.token != Access.choose().token
    assert made.token not in repr(made)
    monkeypatch.setenv("HF_KNN_TOKEN", TOKEN)
    assert Access.choose().token == TOKEN
    assert Access.choose(token="other").token == "other"
    assert Access.choose("localhost").is_local
    assert not Access.choose("knn.lan").is_local
    for bad in ("with space", "line\nbreak", "ü", ""):
        with pytest.raises(ValueError, match="Expected the token to be"):
            Access.choose(token=bad)
    with pytest.raises(ValueError, match="Expected the name of a host, but got 'a/b'"):
        Access.choose(names=["a/b"])
