"""`hf-knn label` with its page: what it says, how it ends, and what a kill loses."""

import csv
import random
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
from support.commands import hf_knn, save_backbone
from support.commands import wide_terminal as wide_terminal
from support.label_process import labelling
from support.pictures import NAMES, encoded, picture

from hf_knn.commands import label_page


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With pictures of three classes, whose names begin with it, and a backbone."""
    place = tmp_path_factory.mktemp("label")
    (place / "pictures").mkdir()
    for number in range(12):
        name = f"{NAMES[number % 3]}-{number}.png"
        (place / "pictures" / name).write_bytes(encoded(picture(number % 3, number, (16, 16))))
    save_backbone(place / "backbone")
    return place


def labels_of(output: Path) -> dict[str, str]:
    """By the names of the files."""
    with (output / "labels.csv").open(newline="", encoding="utf-8") as file:
        return {Path(row["path"]).name: row["label"] for row in csv.DictReader(file)}


def test_it_says_where_the_page_is_what_was_kept_and_what_is_next(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    does_stop = True

    def served(
        app: Any, bound: socket.socket, ready: Callable[[], None], is_over: Callable[[], bool]
    ) -> None:
        with bound:
            ready()
        http = TestClient(app, "http://127.0.0.1")
        http.get("/?token=a-token-of-some-length")  # a cookie from then on, if one is needed
        asked = http.get("/api/question").json()
        body = {"run": asked["run"], "number": asked["number"], "label": "ant"}
        numbers = [each["number"] for each in asked["pictures"]]
        reply = http.post("/api/answer", json=body | {"kind": "named", "pictures": numbers[:1]})
        assert reply.status_code == 200, reply.text
        if does_stop:
            return  # as at Ctrl-C
        body = {"run": asked["run"], "number": reply.json()["number"], "with_model": False}
        assert http.post("/api/finish", json=body | {"kind": "copies"}).status_code == 200
        assert is_over()

    monkeypatch.setattr(label_page, "serve", served)
    command = [
        "label", str(place / "pictures"), "-o", str(tmp_path / "out"), "--no-browser",
        "--backbone", str(place / "backbone"), "--groups", "0",
    ]  # fmt: skip
    done = hf_knn(*command)
    assert done.exit_code == 130
    assert "http://127.0.0.1:" in done.output
    assert "1 labelled, 11 left" in done.output
    assert "the same command goes on" in done.output
    does_stop = False
    done = hf_knn(*command, "--host", "0.0.0.0", "--token", "a-token-of-some-length")
    assert done.exit_code == 0, done.output
    assert "?token=YOUR-TOKEN" in done.output
    assert "a-token-of-some-length" not in done.output
    assert set(labels_of(tmp_path / "out").values()) == {"ant"}
    assert len(list((tmp_path / "out" / "pictures" / "ant").iterdir())) == 2
    assert f"train {tmp_path / 'out' / 'labels.csv'}" in done.output


@pytest.mark.parametrize("option", [("--port", "7999"), ("--host", "0.0.0.0"), ("--no-browser",)])
def test_a_terminal_has_no_page(place: Path, tmp_path: Path, option: tuple[str, ...]) -> None:
    done = hf_knn("label", place / "pictures", "-o", tmp_path / "o", "--terminal", *option)
    assert done.exit_code == 2
    assert "--terminal" in done.output


def test_a_port_that_is_taken_is_said_before_pictures_are_read(place: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = hf_knn("label", place / "pictures", "-o", tmp_path / "o", "--port", port)
    assert done.exit_code == 1
    assert f"port {port}" in done.output
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_a_session_is_stopped_goes_on_and_ends_with_what_was_asked_for(
    place: Path, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", ("--backbone", place / "backbone", "--groups", 1)
    with labelling(place / "pictures", out, *options) as page:
        assert page.http.get("/").status_code == 200
        question = page.question()
        for _ in range(3):
            question = page.name_truly(question)
        status, said = page.end()
        assert status == 130
        kept = question["progress"]["labelled"]
        assert f"{kept} labelled" in said
    with labelling(place / "pictures", out, *options) as page:
        question = page.question()
        assert question["progress"]["labelled"] == kept
        while question["kind"] != "done":
            question = page.name_truly(question)
        ending = page.send("finish", question, kind="links", with_model=True)
        said = "".join(page.process.communicate(timeout=120))
        assert page.process.returncode == 0, said
        assert all(line in said for line in ending["said"])
    named = labels_of(out)
    assert len(named) == 12
    assert all(name.startswith(label) for name, label in named.items())
    assert all(path.is_symlink() for path in (out / "pictures" / "ant").iterdir())
    assert (out / "model" / "config.json").is_file()
    assert len(list((place / "pictures").iterdir())) == 12


@pytest.mark.faults
def test_a_kill_loses_at_most_the_answer_in_flight(place: Path, tmp_path: Path) -> None:
    out, chance, taken = tmp_path / "out", random.Random(0), 0
    for _ in range(6):
        options = ("--backbone", place / "backbone", "--groups", 0)
        with labelling(place / "pictures", out, *options) as page:
            lines = (out / "answers.jsonl").read_bytes().splitlines()
            assert taken <= len(lines) - 1 <= taken + 1  # the first one is a heading
            taken = len(lines) - 1
            question = page.question()
            killer = threading.Timer(chance.uniform(0, 1), page.process.kill)
            killer.start()
            with suppress(httpx.HTTPError):  # in flight: it may be kept or not
                while True:
                    if question["kind"] == "done":
                        question = page.send("undo", question)["question"]
                    else:
                        question = page.name_truly(question)
                    taken += 1
            killer.join()
    assert taken > 0
