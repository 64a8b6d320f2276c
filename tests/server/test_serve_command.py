"""`hf-knn serve` as a user types it: what it prints, where it listens, how it ends."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from support.commands import hf_knn
from support.commands import wide_terminal as wide_terminal
from support.pictures import encoded, picture
from support.tiny import tiny_model

from hf_knn.commands import serve
from hf_knn.serving import listening
from hf_knn.serving.guard import Access
from hf_knn.serving.listening import address_of, listen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("serve") / "my model"
    tiny_model("vit", k=5).save_pretrained(place)
    return place


def test_it_says_how_to_ask_and_what_was_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_KNN_TOKEN", raising=False)
    rounds: list[Any] = []

    def served(app: Any, bound: socket.socket, ready: Callable[[], None]) -> None:
        ready()
        with TestClient(app, "http://127.0.0.1") as client:
            files = [("files", ("a.png", encoded(picture(1, 5))))]
            token = rounds[0]
            taught = client.post(
                "/teach", files=files, data={"label": "elk"}, headers={"authorization": token}
            )
            rounds.append(taught.status_code)

    monkeypatch.setattr(listening, "serve", served)
    rounds.append("Bearer secret-of-mine-12345")
    done = hf_knn("serve", folder, "--token", "secret-of-mine-12345", "--port", 0)
    assert done.exit_code == 2  # there is no such port
    done = hf_knn("serve", folder, "--token", "secret-of-mine-12345")
    assert rounds[1:] == [200]
    assert done.exit_code == 0, done.output
    assert "40 stored pictures, 4 classes, features by torch" in done.output
    assert "/docs" in done.output
    assert "/predict" in done.output
    assert "secret-of-mine" not in done.output
    assert "1 x teach" in done.output
    assert "undo" in done.output
    rounds[:] = ["Bearer other"]
    done = hf_knn("serve", folder, "--host", "localhost")
    assert rounds[1:] == [401]
    assert "Token, needed to teach and to forget: " in done.output
    assert "nothing was changed" in done.output


@pytest.mark.slow
def test_a_host_of_the_network_needs_the_token_for_everything(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def served(app: Any, bound: socket.socket, ready: Callable[[], None]) -> None:
        ready()
        with TestClient(app, "http://192.168.1.7") as client:
            seen.extend(client.get(path).status_code for path in ("/health", "/docs", "/metrics"))
            seen.append(
                client.get("/health", headers={"authorization": "Bearer short"}).status_code
            )

    monkeypatch.setattr(listening, "serve", served)
    monkeypatch.setenv("HF_KNN_TOKEN", "short")
    done = hf_knn("serve", folder, "--host", "0.0.0.0")
    assert done.exit_code == 0, done.output
    assert seen == [401, 401, 401, 200]
    assert "needed for everything" in done.output
    assert "nothing is encrypted" in done.output
    assert "fewer than 16 characters" in done.output


def test_what_cannot_be_served_is_said_before_anything_is_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, said in (
        (["--token", "with space"], "Expected the token to be"),
        (["--allow-host", "a/b"], "Expected the name of a host"),
        (["--host", "no.such.host.invalid"], "Expected --host to be an address or a name"),
    ):
        done = hf_knn("serve", folder, *options)
        assert (done.exit_code, said in done.output) == (1, True), done.output
    with listen("127.0.0.1") as bound:
        done = hf_knn("serve", folder, "--port", bound.getsockname()[1])
        assert (done.exit_code, "to be free" in done.output) == (1, True), done.output
    monkeypatch.setattr(serve, "_NEEDED", {"no_such_module": "no-such-package"})
    done = hf_knn("serve", folder)
    assert "hf-knn serve needs no-such-package; run `" in done.output
    assert "[serve]" in done.output


def test_the_first_free_port_is_taken() -> None:
    with listen("127.0.0.1", first=18_000) as one, listen("127.0.0.1", first=18_000) as two:
        ports = [each.getsockname()[1] for each in (one, two)]
        assert 18_000 <= ports[0] < ports[1] < 18_100
        assert address_of(one, Access.choose()) == f"http://127.0.0.1:{ports[0]}"
        assert address_of(one, Access.choose("0.0.0.0")) == f"http://localhost:{ports[0]}"
        assert address_of(one, Access.choose("::1")) == f"http://[::1]:{ports[0]}"
