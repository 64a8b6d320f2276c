"""handler.py for Inference Endpoints: what it answers, and whose files a push takes away."""

import base64
import io
import logging
import runpy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.pictures import encoded, picture
from support.tiny import tiny_model

from hf_knn import KnnForImageClassification
from hf_knn.data.uploads import MAX_FILES
from hf_knn.features.answering import Answerer, document_of
from hf_knn.features.encoders import Encoded
from hf_knn.model.endpoint import MARK, settle_endpoint, write_endpoint
from hf_knn.model.pictures import look_at

OURS, OTHERS = f"{MARK}\nclass EndpointHandler: ...", "class EndpointHandler: ..."
PICTURES = [encoded(picture(label, 3, (20, 30)), "JPEG") for label in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("endpoint") / "model"
    model = tiny_model("vit", k=5)
    model.config.answer_thresholds = {"0.05": 0.9}
    model.save_pretrained(place)
    write_endpoint(model, place)
    return place


@pytest.fixture(scope="module")
def handler(folder: Path) -> Any:
    return runpy.run_path(str(folder / "handler.py"))["EndpointHandler"](str(folder))


def test_it_answers_as_predict_does(folder: Path, handler: Any) -> None:
    found = handler({"inputs": PICTURES})
    model = KnnForImageClassification.from_pretrained(folder)
    features, prints = look_at(model, PICTURES)
    assert prints is not None
    answerer = Answerer(model, None, explain=False, judge=False)
    answers = answerer(Encoded(features, [0, 1, 2], [], prints.numpy()))
    for number, (document, answer) in enumerate(zip(found, answers, strict=True), 1):
        wanted = document_of(model, f"picture {number}", answer)
        assert document.pop("abstained") is False
        assert document.keys() == wanted.keys()
        assert document["answer"] == wanted["answer"]
        for mine, theirs in zip(document["classes"], wanted["classes"], strict=True):
            assert mine.pop("label") == theirs.pop("label")
            assert mine == pytest.approx(theirs, abs=1e-5)
        nearest = [(row["id"], row["label"], row["path"]) for row in document["neighbors"]]
        assert nearest == [(row["id"], row["label"], row["path"]) for row in wanted["neighbors"]]


def test_it_takes_pictures_as_they_come(handler: Any) -> None:
    text = base64.b64encode(PICTURES[0]).decode()
    ways: list[Any] = [PICTURES[0], text, f"data:image/jpeg;base64,{text}"]
    with Image.open(io.BytesIO(PICTURES[0])) as opened:
        found = handler({"inputs": [*ways, opened]})
    assert len({document["classes"][0]["probability"] for document in found}) == 1
    (alone,) = handler({"inputs": text, "parameters": {"top": 1, "neighbors": 0}})
    assert (len(alone["classes"]), alone["neighbors"]) == (1, [])
    (unsure,) = handler({"inputs": text, "parameters": {"max_error": 0.05}})
    assert unsure["abstained"] == (unsure["classes"][0]["probability"] < 0.9)


@pytest.mark.parametrize("sent", [b"no picture", "http://127.0.0.1/x.png", "é", "", None, 3, b""])
def test_what_is_no_picture_is_said_beside_the_others(handler: Any, sent: Any) -> None:
    broken, whole = handler({"inputs": [sent, PICTURES[0]]})
    assert broken["error"]
    assert broken["answer"] is None
    assert (whole["error"], whole["image"]) == (None, "picture 2")


@pytest.mark.parametrize(
    "request_",
    [
        {"inputs": []},
        {"inputs": PICTURES[:1] * (MAX_FILES + 1)},
        {"inputs": PICTURES[0], "parameters": {"top": 0}},
        {"inputs": PICTURES[0], "parameters": {"top": True}},
        {"inputs": PICTURES[0], "parameters": {"k": 3}},
        {"inputs": PICTURES[0], "parameters": {"max_error": "many"}},
        {"inputs": PICTURES[0], "parameters": {"max_error": 0.03}},
        {"inputs": PICTURES[0], "parameters": [1]},
    ],
)
def test_a_request_that_cannot_be_understood_is_a_sentence(
    handler: Any, request_: dict[str, Any]
) -> None:
    assert list(handler(request_)) == ["error"]


def test_a_backbone_of_timm_asks_for_timm(folder: Path, tmp_path: Path) -> None:
    assert "timm" not in (folder / "requirements.txt").read_text()
    write_endpoint(tiny_model("timm_vit"), tmp_path)
    assert "\ntimm>=" in (tmp_path / "requirements.txt").read_text()


@pytest.mark.parametrize(
    ("there", "is_wanted", "gone"),
    [
        ({}, False, []),
        ({}, True, []),
        ({"handler.py": OURS, "requirements.txt": f"{MARK}\n"}, True, []),
        ({"handler.py": OURS, "requirements.txt": f"{MARK}\n"}, False,
         ["handler.py", "requirements.txt"]),
        ({"handler.py": OURS, "requirements.txt": "torch"}, False, ["handler.py"]),
        ({"handler.py": OTHERS}, False, []),
        ({"handler.py": OTHERS}, True, None),
        ({"handler.py": OURS, "requirements.txt": "torch"}, True, None),
    ],
)  # fmt: skip
def test_a_push_takes_away_what_an_earlier_one_wrote_and_nothing_else(
    there: dict[str, str], is_wanted: bool, gone: list[str] | None,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with caplog.at_level(logging.WARNING, "hf_knn"):
        if gone is None:
            with pytest.raises(ValueError, match="that hf-knn did not write"):
                settle_endpoint(there.get, is_wanted)
        else:
            assert settle_endpoint(there.get, is_wanted) == gone
    assert bool(gone) == ("were removed from the repository" in caplog.text)
