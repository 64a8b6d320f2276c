"""A live checkpoint behind HTTP: answers, changes, limits, and what others do meanwhile."""

import base64
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from support.pictures import encoded, picture
from support.tiny import LABELS, tiny_model

from hf_knn import KnnForImageClassification
from hf_knn.commands.answering import PredictOptions
from hf_knn.commands.console import json_text
from hf_knn.features.answering import Answerer, document_of
from hf_knn.features.encoders import Encoded
from hf_knn.model.pictures import look_at
from hf_knn.serving import answers, app, intake, live
from hf_knn.serving.app import Server, Settings
from hf_knn.serving.guard import Access
from hf_knn.serving.live import LiveCheckpoint
from hf_knn.store.folders import exclusive_lock

TOKEN = "a-token-that-nobody-guesses"
BEARER = {"authorization": f"Bearer {TOKEN}"}
PICTURES = [encoded(picture(label, 7)) for label in range(4)]
SHARED = Settings(batch_size=8, wait=0.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "model"
    model = tiny_model("vit", k=5)
    model.config.answer_thresholds = {"0.05": 0.9}
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


@contextmanager
def serving(folder: Path, settings: Settings = SHARED) -> Iterator[tuple[TestClient, Server]]:
    server = Server(LiveCheckpoint(str(folder)), Access.choose(token=TOKEN), settings)
    with TestClient(server, "http://127.0.0.1", raise_server_exceptions=True) as client:
        yield client, server


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    with serving(folder) as (found, _):
        yield found


@pytest.fixture(scope="module")
def shared(made: Path) -> Iterator[TestClient]:
    """Of tests that change nothing."""
    with serving(made) as (found, _):
        yield found


def files(*contents: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (f"{n}.png", content)) for n, content in enumerate(contents)]


def as_text(*contents: bytes) -> list[str]:
    return [base64.b64encode(content).decode() for content in contents]


def teach(client: TestClient, label: str, *contents: bytes, **fields: str) -> Any:
    return client.post(
        "/teach", headers=BEARER, files=files(*contents), data={"label": label, **fields}
    )


def opened(folder: Path) -> KnnForImageClassification:
    return KnnForImageClassification.from_pretrained(folder)


def own_answers(folder: Path, contents: list[bytes]) -> Any:
    """What the library says, one by one, as `hf-knn predict --json` does."""
    model, options, found = opened(folder), PredictOptions(), []
    for number, content in enumerate(contents):
        features, prints = look_at(model, [content])
        assert prints is not None
        answerer = Answerer(model, None, explain=False, judge=True)
        (answer,) = answerer(Encoded(features, [0], [], prints.numpy()))
        document = document_of(
            model, f"{number}.png", answer, options.shown_classes, options.shown_neighbors
        )
        found.append(document | {"p_value": answer.typicality, "abstained": False})
    return json.loads(json_text(found))


def alike(found: Any, wanted: Any) -> bool:
    """Equal but for the last digits of numbers, which depend on the batch."""
    if isinstance(wanted, float):
        return found == pytest.approx(wanted, abs=1e-5)
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(alike(found[k], wanted[k]) for k in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(alike, found, wanted))
    return bool(found == wanted)


# ---- answers ------------------------------------------------------------------------------------


def test_answers_are_those_of_predict(shared: TestClient, made: Path) -> None:
    found = shared.post("/predict", files=files(*PICTURES))
    assert found.status_code == 200, found.text
    assert alike(found.json(), own_answers(made, PICTURES))
    in_json = shared.post("/predict", json={"images": as_text(*PICTURES)}).json()
    names = [document.pop("image") for document in in_json]
    assert names == ["picture 1", "picture 2", "picture 3", "picture 4"]
    assert in_json == [
        {name: value for name, value in document.items() if name != "image"}
        for document in found.json()
    ]
    address = f"data:image/png;base64,{as_text(PICTURES[0])[0]}"
    assert shared.post("/predict", json={"images": [address]}).json()[0]["answer"] is not None


def test_options_are_obeyed(shared: TestClient) -> None:
    fields = {"top": "2", "neighbors": "1", "max_error": "0.05"}
    (found,) = shared.post("/predict", files=files(PICTURES[0]), data=fields).json()
    assert (len(found["classes"]), len(found["neighbors"])) == (2, 1)
    assert found["abstained"] == (found["classes"][0]["probability"] < 0.9)
    in_json = {"images": as_text(PICTURES[0]), "top": 2, "neighbors": 1, "max_error": 0.05}
    assert shared.post("/predict", json=in_json).json()[0] | {"image": "0.png"} == found
    refused = shared.post("/predict", files=files(PICTURES[0]), data={"max_error": "0.03"})
    assert refused.status_code == 422
    assert "Expected `max_error` to be one of [0.05]" in refused.json()["error"]


def test_reasons_are_those_of_explain(shared: TestClient, made: Path) -> None:
    (found,) = shared.post("/explain", files=files(PICTURES[1])).json()
    wanted = opened(made).explain(PICTURES[1])
    assert not isinstance(wanted, list)
    assert found["answer"] == wanted.answer
    assert found["margin"] == pytest.approx(wanted.margin, abs=1e-5)
    assert found["p_value"] == found["typicality"] == wanted.typicality
    assert [row["share"] for row in found["neighbors"]] == pytest.approx(
        [voter.share for voter in wanted.neighbors], abs=1e-5
    )
    assert (found["flip"] is None) == (wanted.flip is None)


def test_a_broken_picture_is_an_answer_with_its_reason(shared: TestClient) -> None:
    found = shared.post("/predict", files=files(PICTURES[0], b"no picture", PICTURES[1])).json()
    assert [document["error"] is None for document in found] == [True, False, True]
    assert found[1]["answer"] is None
    refused = shared.post("/predict", files=files(b"", b"no picture"))
    assert refused.status_code == 422
    assert "none of 2 can; 0.png: the file is empty" in refused.json()["error"]


def test_pictures_of_many_requests_go_through_together(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    plain = answers.answer
    monkeypatch.setattr(app, "answer", lambda found, looks, _: plain(found, looks, sizes.append))
    with serving(made, Settings(batch_size=4, wait=0.0)) as (client, server):
        alone = [client.post("/predict", files=files(each)).json()[0] for each in PICTURES]
        assert sizes == [1] * 4
        sizes.clear()
        with ThreadPoolExecutor(9) as pool:
            with server.live.answering():  # the thread that answers waits here
                first = pool.submit(client.post, "/predict", files=files(PICTURES[0]))
                _until(lambda: server._intake.requests == 1 and not len(server._looks))
                rest = [
                    pool.submit(client.post, "/predict", files=files(PICTURES[n % 4]))
                    for n in range(8)
                ]
                _until(lambda: len(server._looks) == 8)
            found = [future.result().json()[0] for future in (first, *rest)]
    assert sizes == [1, 4, 4]
    assert alike(found, [alone[0], *alone, *alone])


def _until(holds: Callable[[], bool]) -> None:
    tick = threading.Event()
    for _ in range(3000):
        if holds():
            return
        tick.wait(0.005)
    raise AssertionError("it never came to that")


@pytest.mark.slow
def test_one_request_too_many_is_told_to_come_back(made: Path) -> None:
    with serving(made, Settings(waiting=1)) as (client, server), ThreadPoolExecutor(1) as pool:
        with server.live.answering():
            first = pool.submit(client.post, "/predict", files=files(PICTURES[0]))
            _until(lambda: server._intake.requests == 1)
            refused = client.post("/predict", files=files(PICTURES[0]))
            assert client.get("/health").status_code == 200
        assert first.result().status_code == 200
        assert client.post("/predict", files=files(PICTURES[0])).status_code == 200
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0


@pytest.mark.slow
def test_an_answer_that_takes_too_long_is_given_up(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "ANSWER_SECONDS", 0.05)
    with serving(made) as (client, server), ThreadPoolExecutor(1) as pool:
        with server.live.answering():
            begun = pool.submit(client.post, "/predict", files=files(PICTURES[0]))
            _until(lambda: server._intake.requests == 1 and not len(server._looks))
            waiting = client.post("/predict", files=files(PICTURES[1]))
        assert waiting.status_code == 503
        assert "nothing was done" in waiting.json()["error"]
        assert begun.result().status_code in (200, 503)


# ---- changes ------------------------------------------------------------------------------------


def test_what_is_taught_is_saved_and_known_to_the_next_answer(
    client: TestClient, folder: Path
) -> None:
    receipt = teach(client, "elk", *PICTURES[:2])
    assert receipt.status_code == 200, receipt.text
    said = receipt.json()
    assert (said["action"], said["rows_after"], said["new_classes"]) == ("teach", 42, ["elk"])
    model = opened(folder)
    assert model.datastore is not None
    assert len(model.datastore) == 42
    assert said["hash_after"] == model.fingerprint_rows()
    (found,) = client.post("/predict", files=files(PICTURES[0])).json()
    assert found["neighbors"][0]["id"] == said["ids"][0]
    assert found["neighbors"][0]["label"] == "elk"
    assert client.get("/health").json()["classes"] == [*LABELS, "elk"]


@pytest.mark.slow
def test_stored_pictures_are_left_out_or_relabelled_if_that_is_asked(client: TestClient) -> None:
    ids = teach(client, "elk", *PICTURES[:2]).json()["ids"]
    again = teach(client, "elk", PICTURES[0]).json()
    assert (again["scope"], again["skipped"], again["ids"]) == ("nothing", [0], [])
    refused = teach(client, "fox", PICTURES[0])
    assert refused.status_code == 409
    assert "send relabel=true" in refused.json()["error"]
    assert client.get("/health").json()["rows"] == 42
    moved = teach(client, "fox", PICTURES[0], relabel="true").json()
    assert (moved["ids"], moved["old_labels"]) == ([ids[0]], ["elk"])
    more = teach(client, "fox", PICTURES[0], again="true").json()
    assert more["rows_after"] == 43
    in_json = {"images": as_text(PICTURES[2]), "label": " elk "}
    assert client.post("/teach", headers=BEARER, json=in_json).json()["labels"] == ["elk"]


def test_a_broken_picture_teaches_nothing(shared: TestClient) -> None:
    refused = teach(shared, "elk", PICTURES[0], b"no picture")
    assert refused.status_code == 422
    assert "1.png cannot" in refused.json()["error"]
    assert shared.get("/health").json()["rows"] == 40


def test_rows_are_forgotten_by_id(folder: Path) -> None:
    with serving(folder) as (client, server):
        _forget(client, server, folder)


def _forget(client: TestClient, server: Server, folder: Path) -> None:
    store = server.live.latest.model.datastore
    assert store is not None
    gone = store.ids[:3].tolist()
    said = client.post("/forget", headers=BEARER, json={"ids": [*gone, gone[0]]})
    assert said.status_code == 200, said.text
    assert sorted(said.json()["ids"]) == sorted(gone)
    left = opened(folder).datastore
    assert left is not None
    assert not set(left.ids.tolist()) & set(gone)
    missing = client.post("/forget", headers=BEARER, json={"ids": [gone[0], int(left.ids[0])]})
    assert missing.status_code == 404
    assert str(gone[0]) in missing.json()["error"]
    assert client.get("/health").json()["rows"] == 37
    assert server.live.latest.model.memory.gone == ()  # no byte of them stays in the process
    assert server.changes == ["forget"]


@pytest.mark.parametrize("path", ["/teach", "/forget", "/teach/", "/forget?x=1"])
def test_nothing_changes_without_the_token(shared: TestClient, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer other"}):
        refused = shared.post(path, headers=headers, files=files(PICTURES[0]), data={"label": "x"})
        assert refused.status_code == 401
    assert shared.get("/health").json()["rows"] == 40


def test_changes_that_come_together_are_saved_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves: list[int] = []
    plain = KnnForImageClassification.save_pretrained

    def counted(model: KnnForImageClassification, *args: Any, **kwargs: Any) -> None:
        saves.append(len(model.changes))
        plain(model, *args, **kwargs)

    checkpoint = LiveCheckpoint(str(folder))
    version = checkpoint.latest
    taught = []
    for number, content in enumerate(PICTURES):
        (read,) = answers.read_pictures(version, [(f"{number}.png", content)])
        assert read.pixels is not None
        features = version.encoder.encode(read.pixels[None])
        taught.append(answers.lesson([read], features, version.maker, "fox", False, False))
    monkeypatch.setattr(KnnForImageClassification, "save_pretrained", counted)
    found = checkpoint.change([*taught[:2], answers.forgetting([123456]), *taught[2:], taught[0]])
    assert [type(one).__name__ for one in found] == [
        "Receipt", "Receipt", "MissingError", "Receipt", "Receipt", "Receipt",
    ]  # fmt: skip
    assert saves == [4]
    assert [getattr(one, "rows_after", 0) for one in found] == [41, 42, 0, 43, 44, 44]
    store = opened(folder).datastore
    assert store is not None
    assert len(store) == 44
    old = answers.lesson([read], features, "another maker", "fox", False, False)
    (refused,) = checkpoint.change([old])
    assert isinstance(refused, live.ReplacedError)
    assert saves == [4]


def test_a_change_that_cannot_be_saved_did_not_happen(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device", str(folder))

    with monkeypatch.context() as patched:
        patched.setattr(KnnForImageClassification, "save_pretrained", full)
        refused = teach(client, "elk", PICTURES[0])
    assert refused.status_code == 503
    assert str(folder) not in refused.text
    (found,) = client.post("/predict", files=files(PICTURES[0])).json()
    assert "elk" not in {each["label"] for each in found["classes"]}
    assert teach(client, "elk", PICTURES[0]).json()["rows_after"] == 41


@pytest.mark.slow
def test_small_pictures_are_kept_where_the_checkpoint_keeps_some(folder: Path) -> None:
    model = opened(folder)
    assert model.datastore is not None
    model.keep_thumbnails({int(model.datastore.ids[0]): PICTURES[0]})
    model.save_pretrained(folder)
    with serving(folder) as (client, _):
        (row,) = teach(client, "elk", PICTURES[1]).json()["ids"]
    small = opened(folder).thumbnails
    assert small is not None
    assert len(small) == 2
    assert small.get(row) is not None


# ---- other processes ----------------------------------------------------------------------------


def test_what_another_process_changes_is_seen_and_never_overwritten(
    client: TestClient, folder: Path
) -> None:
    other = opened(folder)
    other.teach([PICTURES[0]], ["owl"])
    other.save_pretrained(folder)
    (found,) = client.post("/predict", files=files(PICTURES[0])).json()
    assert found["neighbors"][0]["label"] == "owl"
    other.teach([PICTURES[1]], ["owl"])
    other.save_pretrained(folder)
    assert teach(client, "elk", PICTURES[2]).json()["rows_after"] == 43  # not 41
    assert opened(folder).config.class_names == [*LABELS, "owl", "elk"]
    assert "hf_knn_opened_again 2.0" in client.get("/metrics").text


@pytest.mark.slow
def test_another_backbone_is_seen_too(client: TestClient, folder: Path) -> None:
    client.post("/predict", files=files(PICTURES[0]))
    tiny_model("vit", ["x", "y"], seed=3).save_pretrained(folder)
    taught = teach(client, "x", PICTURES[0])  # its pixels were made for the one before
    assert taught.status_code == 200, taught.text
    model = opened(folder)
    assert model.datastore is not None
    features = look_at(model, [PICTURES[0]])[0]
    stored = model.datastore.rows_of(taught.json()["ids"]).features
    assert stored[0] == pytest.approx(features[0].numpy(), abs=1e-2)


@pytest.mark.slow
def test_another_process_that_takes_long_keeps_changes_but_not_answers(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "WAIT_SECONDS", 0.05)
    with exclusive_lock(folder):
        refused = teach(client, "elk", PICTURES[0])
        assert client.post("/predict", files=files(PICTURES[0])).status_code == 200
    assert refused.status_code == 503
    assert "Another program is changing the checkpoint" in refused.json()["error"]
    assert teach(client, "elk", PICTURES[0]).status_code == 200


@pytest.mark.slow
def test_a_damaged_checkpoint_is_said_and_healed(client: TestClient, folder: Path) -> None:
    config = folder / "config.json"
    whole = config.read_text()
    config.write_text(whole[:100])
    for answer in (client.post("/predict", files=files(PICTURES[0])), client.get("/health")):
        assert answer.status_code == 503
        assert str(folder) not in answer.text
    assert teach(client, "elk", PICTURES[0]).status_code == 503
    config.write_text(whole)
    assert client.post("/predict", files=files(PICTURES[0])).status_code == 200
    assert client.get("/health").json()["status"] == "ok"


@pytest.mark.slow
def test_a_checkpoint_of_the_hub_is_not_changed(made: Path) -> None:
    checkpoint = LiveCheckpoint(str(made))
    checkpoint.folder = None  # as for a name of the Hub
    server = Server(checkpoint, Access.choose(token=TOKEN))
    with TestClient(server, "http://127.0.0.1") as client:
        assert client.post("/predict", files=files(PICTURES[0])).status_code == 200
        assert teach(client, "elk", PICTURES[0]).status_code == 409
        forgotten = client.post("/forget", headers=BEARER, json={"ids": [1]})
        assert forgotten.status_code == 409
        assert client.get("/health").json()["can_be_changed"] is False


# ---- what is sent -------------------------------------------------------------------------------

PNG = files(PICTURES[0])
MULTIPART = {"content-type": "multipart/form-data; boundary=x"}
NO_BOUNDARY = {"content-type": "multipart/form-data"}
JSON = {"content-type": "application/json"}
SURROGATE = json.dumps({"images": as_text(PICTURES[0]), "label": "\ud800"}).encode()


@pytest.mark.parametrize(
    ("path", "sent", "status", "said"),
    [
        ("/predict", {}, 415, "multipart/form-data or application/json"),
        ("/predict", {"content": b"x", "headers": {"content-type": "text/x\x7f"}}, 415, "text/x?"),
        ("/predict", {"data": {"top": "1"}}, 415, "urlencoded"),
        ("/predict", {"json": {}}, 422, "`images`"),
        ("/predict", {"json": []}, 422, "`the request`"),
        ("/predict", {"json": {"images": []}}, 422, "got none"),
        ("/predict", {"json": {"images": ["?"]}}, 422, "base64"),
        ("/predict", {"json": {"images": ["é"]}}, 422, "base64"),
        ("/predict", {"json": {"images": ["http://127.0.0.1/x.png"]}}, 422, "not followed"),
        ("/predict", {"json": {"images": ["/etc/passwd"]}}, 422, "picture 1"),
        ("/predict", {"json": {"images": [None]}}, 422, "`images.0`"),
        ("/predict", {"json": {"images": as_text(PICTURES[0]), "k": 3}}, 422, "`k`"),
        ("/predict", {"json": {"images": as_text(PICTURES[0]), "top": 0}}, 422, "`top`"),
        ("/predict", {"json": {"images": as_text(PICTURES[0]), "top": 10**30}}, 422, "`top`"),
        ("/predict", {"json": {"images": as_text(PICTURES[0]), "top": 1.5}}, 422, "`top`"),
        ("/predict", {"content": b"{", "headers": JSON}, 400, "JSON"),
        ("/predict", {"content": b"\xff", "headers": JSON}, 400, "JSON"),
        ("/predict", {"content": b"[" * 100_000, "headers": JSON}, 400, "JSON"),
        ("/predict", {"content": b"x", "headers": MULTIPART}, 400, "multipart"),
        ("/predict", {"content": b"", "headers": MULTIPART}, 422, "got none"),
        ("/predict", {"content": b"x", "headers": NO_BOUNDARY}, 400, "multipart"),
        ("/predict", {"files": [("files", (None, b"text"))]}, 422, "`files`"),
        ("/predict", {"files": PNG, "data": {"top": "many"}}, 422, "`top`"),
        ("/predict", {"files": PNG, "data": {"top": ["1", "2"]}}, 422, "'top' comes twice"),
        ("/predict", {"files": PNG, "data": {"max_error": "nan"}}, 422, "`max_error`"),
        ("/predict", {"files": PNG, "data": {"max_error": "inf"}}, 422, "`max_error`"),
        ("/predict", {"files": PNG * 17}, 413, "at most 16 pictures at once, but got 17"),
        ("/predict", {"json": {"images": ["AAAA"] * 17}}, 413, "but got 17"),
        ("/predict?top=3", {"files": PNG}, 422, "`top`"),
        ("/teach", {"files": PNG}, 422, "`label`"),
        ("/teach", {"files": PNG, "data": {"label": " "}}, 422, "a label of 1 to 60"),
        ("/teach", {"files": PNG, "data": {"label": "a\nb"}}, 422, "cannot be shown"),
        ("/teach", {"files": PNG, "data": {"label": "x" * 61}}, 422, "61 characters"),
        ("/teach", {"content": SURROGATE, "headers": JSON}, 400, "JSON"),
        ("/teach", {"json": {"images": as_text(PICTURES[0]), "label": ["a"]}}, 422, "`label`"),
        ("/forget", {"files": PNG}, 415, "application/json"),
        ("/forget", {"json": {"ids": []}}, 422, "`ids`"),
        ("/forget", {"json": {"ids": [-1]}}, 422, "`ids.0`"),
        ("/forget", {"json": {"ids": [2**63]}}, 422, "`ids.0`"),
        ("/forget", {"json": {"ids": [True]}}, 422, "`ids.0`"),
        ("/forget", {"json": {"ids": ["1"]}}, 422, "`ids.0`"),
        ("/nothing", {"files": PNG}, 404, "/predict"),
        ("/health", {"files": PNG}, 405, "POST"),
    ],
)  # fmt: skip
def test_what_cannot_be_understood_is_answered_with_a_sentence(
    shared: TestClient, path: str, sent: dict[str, Any], status: int, said: str
) -> None:
    answer = shared.post(path, **{**sent, "headers": BEARER | sent.get("headers", {})})
    assert (answer.status_code, list(answer.json())) == (status, ["error"]), answer.text
    assert answer.json()["error"].startswith("Expected ")
    assert said in answer.json()["error"]


@pytest.mark.parametrize(
    "name", ['"><script>', "../../etc/passwd", "\ud800", "a\x00b\r\nc", "x" * 5000]
)
def test_names_of_files_are_only_told(shared: TestClient, name: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="f"; filename="'
    body += name.encode("utf-8", "surrogatepass") + b'"\r\n\r\n' + PICTURES[0] + b"\r\n--x--\r\n"
    answer = shared.post("/predict", content=body, headers=MULTIPART)
    assert answer.status_code in (200, 400, 422)
    if answer.status_code == 200:
        (document,) = answer.json()
        assert document["image"].isprintable()
        assert len(document["image"]) <= 200


def test_a_picture_beyond_a_limit_is_refused(
    shared: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_KNN_MAX_BYTES", "20")  # --max-bytes
    refused = shared.post("/predict", files=files(PICTURES[0]))
    assert (refused.status_code, "at most 20 bytes" in refused.json()["error"]) == (413, True)
    monkeypatch.undo()
    monkeypatch.setenv("HF_KNN_MAX_PIXELS", "60")
    refused = shared.post("/predict", files=files(PICTURES[0]))
    assert (refused.status_code, "more than 60" in refused.json()["error"]) == (422, True)


@pytest.mark.parametrize("length", [True, False])
def test_a_request_beyond_a_limit_is_refused_while_it_comes(
    shared: TestClient, length: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "MAX_BODY", 100)
    sent = b"x" * 101
    parts = sent if length else iter([sent[:50], sent[50:]])
    refused = shared.post("/predict", content=parts, headers=MULTIPART)
    assert (refused.status_code, "at most 100 bytes" in refused.json()["error"]) == (413, True)
    monkeypatch.undo()
    monkeypatch.setattr(intake, "MAX_HELD", 100)
    refused = shared.post("/predict", content=sent, headers=MULTIPART)
    assert refused.status_code == 503
    monkeypatch.undo()
    assert shared.post("/predict", files=files(PICTURES[0])).status_code == 200


def test_an_error_of_our_own_is_a_sentence_without_its_place(
    shared: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("/secret/place")

    monkeypatch.setattr(app, "read_pictures", broken)
    answer = shared.post("/predict", files=files(PICTURES[0]))
    assert answer.status_code == 503
    assert "secret" not in answer.text
    assert "secret" in caplog.text


# ---- pages --------------------------------------------------------------------------------------


def test_the_page_says_what_there_is_and_asks_nobody_else(shared: TestClient) -> None:
    page = shared.get("/docs")
    assert page.status_code == 200
    assert re.findall(r"(?:src|href)=\"(?:https?:)?//", page.text) == []
    for place in re.findall(r"(?:src|href)=\"(/[^\"]+)\"", page.text):
        assert shared.get(place).status_code == 200
    api = shared.get("/openapi.json").json()
    assert {"/predict", "/explain", "/teach", "/forget", "/health", "/metrics"} == set(api["paths"])
    for path in ("/predict", "/explain", "/teach"):
        kinds = api["paths"][path]["post"]["requestBody"]["content"]
        assert list(kinds) == ["multipart/form-data", "application/json"]
    assert api["paths"]["/teach"]["post"]["security"]
    assert "security" not in api["paths"]["/predict"]["post"]
    assert shared.get("/", follow_redirects=False).headers["location"] == "/docs"


def test_numbers_are_told_as_prometheus_reads_them(client: TestClient) -> None:
    client.post("/predict", files=files(*PICTURES[:3]))
    teach(client, "elk", PICTURES[0])
    client.get("/made/up")
    text = client.get("/metrics").text
    for line in (
        'hf_knn_requests_total{method="POST",path="/predict",status="200"} 1.0',
        'hf_knn_requests_total{method="GET",path="other",status="404"} 1.0',
        "hf_knn_pictures_total 4.0", "hf_knn_rows 41.0", 'hf_knn_changes_total{action="teach"} 1.0',
        'hf_knn_batch_pictures_bucket{le="2.0"} 1.0', "hf_knn_requests_waiting 0.0",
    ):  # fmt: skip
        assert line in text, text


@pytest.mark.slow
def test_closing_answers_what_was_asked(folder: Path) -> None:
    with serving(folder) as (client, server), ThreadPoolExecutor(1) as pool:
        with server.live.answering():
            asked = pool.submit(teach, client, "elk", PICTURES[0])
            _until(lambda: server._intake.requests == 1)
        assert asked.result().status_code == 200
        server.close()
        store = opened(folder).datastore
        assert store is not None
        assert len(store) == 41
