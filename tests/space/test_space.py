"""The Space: overlays, journals, limits, and every endpoint against the library."""

import base64
import copy
import html
import io
import os
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from support.pictures import encoded, picture
from support.space_app import PER_CLASS, Running, features_of, published, running, write_picture

pytest.importorskip("gradio")
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

import hf_knn_space
from hf_knn import BadImageError, Datastore, KnnForImageClassification
from hf_knn.data import LARGE_PIXELS, MAX_FILES, check_label
from hf_knn_space.explanations import disagrees
from hf_knn_space.exports import as_csv, write_checkpoint, write_dataset
from hf_knn_space.guard import MAX_BODY, Shelf, shelf
from hf_knn_space.journal import Example, Journal, JournalError, Taught
from hf_knn_space.overlay import MAX_EXAMPLES, Overlay, fingerprint
from hf_knn_space.page.answer_views import answer_page, bars
from hf_knn_space.page.benchmark import find_report, report_frame
from hf_knn_space.page.classify import _controls
from hf_knn_space.page.contents import Page
from hf_knn_space.page.markup import text
from hf_knn_space.pictures import FolderPictures, NoPictures, ZipPictures
from hf_knn_space.service import Service
from hf_knn_space.settings import Settings
from hf_knn_space.uploads import MAX_BYTES, SpaceError, reading
from hf_knn_space.visitors import (
    MAX_IN_MEMORY,
    Visitors,
    check_token,
    new_token,
    room_for,
    token_of,
)

ROOT = Path(__file__).parents[2]
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("space")


@pytest.fixture(scope="module")
def model(place: Path) -> KnnForImageClassification:
    return published(place / "pictures")


@pytest.fixture
def service(model: KnnForImageClassification, tmp_path: Path) -> Service:
    return Service(model, Visitors(model, tmp_path / "data"))


@pytest.fixture
def lessons(tmp_path: Path) -> list[str]:
    """Five pictures of a class that nobody knows."""
    return [str(write_picture(tmp_path / f"lesson-{i}.png", 3, i)) for i in range(5)]


def rows_of(model: KnnForImageClassification) -> list[torch.Tensor]:
    store = model.datastore
    assert store is not None
    return [store.features.clone(), store.labels.clone(), store.ids.clone()]


# ---- what one visitor is told -------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(1, 0.02, 1.0, "uniform"),
        Settings(9, 0.5, 0.25, "rank"),
        Settings(20, 0.07, 0.0, "inverse_distance"),
    ],
)
def test_an_answer_is_what_the_library_computes(settings, service, model, tmp_path):
    path = write_picture(tmp_path / "asked.png", 1)
    found = service.explain(service.look(str(path)), settings, "")
    plain = copy.deepcopy(model)
    names = ("k", "knn_temperature", "knn_weight", "knn_weighting")
    for name, value in zip(names, settings, strict=True):
        if value is not None:
            setattr(plain.config, name, value)
    out = plain(features=features_of(model, [path]))
    wanted = dict(zip(model.config.class_names, out.logits[0].exp().tolist(), strict=True))
    assert found.probabilities == pytest.approx(wanted, abs=1e-6)
    assert service.model.config.k == 5, "settings of one request changed the model"


def test_settings_do_not_run_the_backbone_again(service, tmp_path, monkeypatch):
    path = str(write_picture(tmp_path / "asked.png", 1))
    look = service.look(path)
    monkeypatch.setattr(service.model.backbone, "forward", lambda *a, **k: pytest.fail("it ran"))
    assert service.look(path).features is look.features
    assert service.explain(look, Settings(k=3), "").neighbors


def test_an_answer_takes_one_search_and_no_thumbnail(service, tmp_path, monkeypatch):
    asked: list[int] = []
    search = Datastore.search

    def counted(self, queries, k, exclude_ids=None):
        asked.append(k)
        return search(self, queries, k, exclude_ids)

    look = service.look(str(write_picture(tmp_path / "asked.png", 1)))
    service.explain(look, Settings(), "")  # the rows are compared with one another once
    monkeypatch.setattr(Datastore, "search", counted)
    monkeypatch.setattr(
        "hf_knn_space.service.thumbnail", lambda image: pytest.fail("nobody looks at it")
    )
    look = service.look(str(write_picture(tmp_path / "other.png", 2)))
    assert service.explain(look, Settings(k=4), "").neighbors
    assert asked == [8], "those that vote, and as many that could come after"


@pytest.mark.parametrize("backend", ["onnx", "openvino", "auto"])
def test_a_backend_answers_alike(backend, model, service, tmp_path, knn_cache, monkeypatch):
    for name in {"onnx": ["onnx", "onnxruntime"], "openvino": ["onnx", "openvino"]}.get(
        backend, []
    ):
        pytest.importorskip(name)
    other = Service(model, Visitors(model, None), backend)
    paths = [str(write_picture(tmp_path / f"{i}.png", i % 3, i, 40)) for i in range(4)]
    for path in paths:
        wanted, found = service.look(path).features, other.look(path).features
        gap = (found - wanted).norm() / wanted.norm()
        assert gap < 1e-4, "well within what is checked"
        assert (found != wanted).any() or backend == "auto"
    done = other.teach(paths, "dog", "", "")
    assert service.model.config.classes == 3
    assert other.explain(other.look(paths[0]), Settings(), done["visitor"]).neighbors


def test_small_pictures_come_from_the_checkpoint_first(model, place, tmp_path):
    first, second = model.datastore.ids.tolist()[:2]
    own = copy.deepcopy(model)
    own.keep_thumbnails({first: str(write_picture(tmp_path / "other.png", 3))})
    page = Page.of(Service(own, Visitors(own, None)), FolderPictures(place / "pictures"), [])
    find = page.picture_of("", [first, second])
    none = Page.of(Service(model, Visitors(model, None)), NoPictures(), [])
    plain = none.picture_of("", [first])
    assert find(first) == own.thumbnails.get(first)
    assert find(second) == page.pictures.find(second, model.datastore.path_of(second)) is not None
    assert plain(first) is None


def test_a_backend_that_there_is_not_is_a_message(model, capsys, monkeypatch):
    with pytest.raises(ValueError, match="`backend` to be one of"):
        Service(model, Visitors(model, None), "gpu")
    monkeypatch.setattr(
        "hf_knn_space.opening.open_page",
        lambda *given: Service(model, Visitors(model, None), given[-2]),
    )
    monkeypatch.setenv("HF_KNN_BACKEND", "magic")
    assert hf_knn_space.main(["somewhere"]) == 1
    assert "Expected `backend`" in capsys.readouterr().err
    assert hf_knn_space.main(["somewhere", "--backend", "other"]) == 1
    assert "'other'" in capsys.readouterr().err


def test_the_command_passes_the_backend_on(monkeypatch, tmp_path, model):
    from typer.testing import CliRunner

    import hf_knn_cli

    ran: list[list[str]] = []

    def started(arguments: list[str]) -> int:
        ran.append(arguments)
        return 0

    monkeypatch.setattr("hf_knn_space.main", started)
    assert CliRunner().invoke(hf_knn_cli.app, ["demo", "--backend", "torch"]).exit_code == 0
    assert ran == [["--backend", "torch"]]
    model.save_pretrained(tmp_path)
    refused = CliRunner().invoke(
        hf_knn_cli.app, ["demo", str(tmp_path), "--backend", "torch", "--push", "org/x"]
    )
    assert refused.exit_code == 2


@pytest.mark.parametrize(("k", "temperature"), [(300, 1e-4), (5, 1e-3), (1, 10.0)])
def test_the_sliders_reach_what_the_model_was_tuned_to(k, temperature, model, tmp_path):
    tuned = copy.deepcopy(model)
    tuned.config.k, tuned.config.knn_temperature = k, temperature
    rows = tuned.datastore.features.repeat(20, 1) + torch.randn(20 * len(model.datastore), 1) / 50
    tuned.datastore = Datastore.from_features(rows, model.datastore.labels.repeat(20))
    service = Service(tuned, Visitors(tuned, None))
    controls = _controls(Page.of(service, NoPictures(), []))
    for slider in controls[:3]:
        assert slider.minimum <= slider.value <= slider.maximum
    look = service.look(str(write_picture(tmp_path / "asked.png", 1)))
    asked = service.explain(look, Settings(*[one.value for one in controls]), "")
    assert asked.probabilities == service.explain(look, Settings(), "").probabilities
    page = answer_page([look], 0, [asked], "", lambda row_id: None)
    assert page.count('class="knn-tile"') <= 100


def test_several_pictures_are_shown_with_their_answers(service, tmp_path):
    looks = [service.look(str(write_picture(tmp_path / f"{i}.png", i))) for i in range(3)]
    answers = [service.explain(look, Settings(), "") for look in looks]
    page = answer_page(looks, 1, answers, "", lambda row_id: None)
    strip = page.partition('knn-strip">')[2].partition("</div>")[0]
    for number, one in enumerate(answers):
        assert f'aria-label="Picture {number + 1}: {one.answer}"' in strip
    assert strip.count('aria-pressed="true"') == 1


@pytest.mark.parametrize(
    "settings",
    [
        Settings(k=0), Settings(k=101), Settings(k=2.5), Settings(temperature=0.0),  # type: ignore[arg-type]
        Settings(temperature=float("nan")), Settings(knn_weight=1.1), Settings(weighting="magic"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings, service, tmp_path):
    look = service.look(str(write_picture(tmp_path / "asked.png", 1)))
    with pytest.raises(SpaceError, match="Expected"):
        service.explain(look, settings, "")


def test_a_stored_picture_and_what_is_near_it(service, model):
    store = model.datastore
    own, others = service.near(3, 4, "")
    raw = store.features.double() - store.mean.double()
    unit = raw / raw.norm(dim=1, keepdim=True)
    similarity = (unit @ unit[3]).tolist()
    order = sorted((i for i in range(len(store)) if i != 3), key=lambda i: (-similarity[i], i))
    assert own.row_id == 3
    assert [near.row_id for near in others] == order[:4]
    assert [n.similarity for n in others] == pytest.approx([similarity[i] for i in order[:4]])
    with pytest.raises(SpaceError, match="gone"):
        service.near(10**6, 4, "")


# ---- teaching -----------------------------------------------------------------------------------


def test_what_one_visitor_teaches_is_known_to_nobody_else(service, model, lessons, tmp_path):
    before = rows_of(model)
    done = service.teach(lessons, "dog", "", "")
    look = service.look(str(write_picture(tmp_path / "asked.png", 3)))
    assert service.explain(look, Settings(), done["visitor"]).answer == "dog"
    for token in ("", new_token()):
        found = service.explain(look, Settings(), token)
        assert "dog" not in found.probabilities
        assert all(row.row_id < 3 * PER_CLASS for row in found.neighbors)
    assert model.config.class_names == ["ant", "bee", "cat"]
    assert all(torch.equal(a, b) for a, b in zip(before, rows_of(model), strict=True))
    with service.visitors.hold(done["visitor"]) as overlay:
        assert overlay.model.backbone is model.backbone


def test_the_same_key_teaches_once(service, lessons):
    first = service.teach(lessons[:2], "dog", "", "key-1")
    again = service.teach(lessons[:2], "dog", first["visitor"], "key-1")
    assert again == first | {"repeated": True}
    with pytest.raises(SpaceError, match="idempotency key"):
        service.teach(lessons[:2], "wolf", first["visitor"], "key-1")
    with pytest.raises(SpaceError, match="idempotency key"):
        service.teach(lessons[2:], "dog", first["visitor"], "key-1")


def test_relabel_forget_and_undo(service, lessons, tmp_path):
    done = service.teach(lessons, "dog", "", "")
    token, ids = done["visitor"], done["ids"]
    look = service.look(str(write_picture(tmp_path / "asked.png", 3)))

    def answer() -> str:
        return service.explain(look, Settings(), token).answer

    with service.changing(token) as overlay:
        overlay.relabel(ids, "wolf")
    assert answer() == "wolf"
    with service.changing(token) as overlay:
        assert overlay.undo() == "relabel"
    assert answer() == "dog"
    assert service.forget(ids[:1], token)["examples"] == 4
    with service.changing(token) as overlay:
        assert overlay.undo() == "forget"
        assert list(overlay.examples) == ids
    service.forget(ids, token)
    assert answer() != "dog"
    later = service.teach(lessons[:1], "dog", token, "")
    assert later["ids"][0] > max(ids), "an id was given twice"
    with service.changing(token) as overlay:
        assert overlay.undo() == "teach"
        assert overlay.examples == {}
        with pytest.raises(SpaceError, match="Nothing to undo"):
            overlay.undo()


def test_what_is_known_is_not_taught_twice(service, model, lessons, tmp_path):
    done = service.teach(lessons[:2], "dog", "", "")
    token = done["visitor"]
    assert done["skipped"] == []
    again = service.teach(lessons[1:4], "dog", token, "key-1")
    assert (len(again["ids"]), again["skipped"], again["examples"]) == (2, [0], 4)
    repeated = service.teach(lessons[1:4], "dog", token, "key-1")
    assert (repeated["repeated"], repeated["skipped"]) == (True, [0])
    nothing = service.teach(lessons[:2], "dog", token, "")
    assert (nothing["ids"], nothing["skipped"], nothing["examples"]) == ([], [0, 1], 4)
    with pytest.raises(SpaceError, match="stored under another one") as caught:
        service.teach(lessons[3:], "wolf", token, "")
    assert "Nothing was taught" in str(caught.value)
    assert "relabel" not in str(caught.value)
    published_one = tmp_path / "published.png"  # a row of the published model, by its features
    published_one.write_bytes(encoded(picture(0, 0)))
    with pytest.raises(SpaceError, match="as 'ant' in row 0"):
        service.teach([str(published_one)], "wolf", token, "")
    assert service.teach([str(published_one)], "ant", token, "")["skipped"] == [0]
    assert len(service.teach(lessons[4:], "dog", token, "")["ids"]) == 1


def test_a_restart_knows_again_what_was_taught(model, lessons, tmp_path):
    service = Service(model, Visitors(model, tmp_path))
    token = service.teach(lessons[:3], "dog", "", "key-1")["visitor"]
    again = Service(model, Visitors(model, tmp_path))
    assert again.teach(lessons, "dog", token, "")["skipped"] == [0, 1, 2]
    with pytest.raises(SpaceError, match="under another one"):
        again.teach(lessons[:1], "wolf", token, "")


def test_published_rows_cannot_be_forgotten(service, lessons):
    token = service.teach(lessons[:1], "dog", "", "")["visitor"]
    with pytest.raises(SpaceError, match="published"):
        service.forget([0], token)
    with pytest.raises(SpaceError, match="teach first"):
        service.forget([0], new_token())


@pytest.mark.parametrize("head", ["linear", "ridge"])
def test_a_restart_knows_what_was_acknowledged(head, lessons, tmp_path):
    model = published(tmp_path / "pictures", head)
    data, asked = tmp_path / "data", str(write_picture(tmp_path / "asked.png", 3))
    service = Service(model, Visitors(model, data))
    done = service.teach(lessons, "dog", "", "key-1")
    token = done["visitor"]
    service.forget(done["ids"][:1], token)
    with service.changing(token) as overlay:
        overlay.relabel(done["ids"][1:2], "ant")
    service.teach(lessons[:1], "eel", token, "key-2")
    before = service.explain(service.look(asked), Settings(), token)
    again = Service(model, Visitors(model, data))
    after = again.explain(again.look(asked), Settings(), token)
    assert after.probabilities == pytest.approx(before.probabilities, abs=1e-5)
    assert [row.row_id for row in after.neighbors] == [row.row_id for row in before.neighbors]
    assert again.teach(lessons, "dog", token, "key-1")["repeated"]
    with again.changing(token) as overlay:
        assert len(overlay.examples) == 5


def test_what_is_forgotten_leaves_no_byte(service, lessons, tmp_path):
    done = service.teach(lessons, "dog", "", "")
    with service.changing(done["visitor"]) as overlay:
        gone = overlay.examples[done["ids"][0]]
    (path,) = (tmp_path / "data").rglob("*.journal")
    assert Journal(path) is not None
    code = base64.b64encode(gone.features)
    assert code in path.read_bytes()
    service.forget(done["ids"][:1], done["visitor"])
    assert code not in path.read_bytes()
    assert done["visitor"].encode() not in path.read_bytes()
    assert done["visitor"] not in path.name


def test_a_full_disk_changes_nothing(service, lessons, monkeypatch):
    done = service.teach(lessons[:2], "dog", "", "")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_knn_space.journal.os.fsync", full)
    with pytest.raises(SpaceError, match="nothing was changed"):
        service.teach(lessons[2:], "dog", done["visitor"], "")
    with pytest.raises(SpaceError, match="nothing was changed"):
        service.forget(done["ids"], done["visitor"])
    monkeypatch.undo()
    with service.changing(done["visitor"]) as overlay:
        assert list(overlay.examples) == done["ids"]
        assert len(overlay.model.datastore) == 3 * PER_CLASS + 2


def test_a_folder_that_cannot_be_written_is_said(model, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="`HF_KNN_DATA` to be a folder that can be written"):
        Visitors(model, tmp_path / "file")


# ---- the journal --------------------------------------------------------------------------------


def entry(number: int) -> tuple[Taught, list[Example], int]:
    row = Example(number, "dog", b"\0\0\x80?", b"picture")
    return Taught(f"key-{number}", "digest", [number], "dog"), [row], number + 1


def test_a_line_cut_anywhere_was_never_acknowledged(tmp_path):
    path = tmp_path / "one.journal"
    Journal(path).append(*entry(1))
    whole = path.stat().st_size
    Journal(path).append(*entry(2))
    data = path.read_bytes()
    for end in range(whole, len(data), 7):
        path.write_bytes(data[:end])
        assert list(Journal(path).read()) == [entry(1)]
        Journal(path).append(*entry(3))
        assert list(Journal(path).read()) == [entry(1), entry(3)]


def test_a_changed_line_is_found(tmp_path):
    path = tmp_path / "one.journal"
    Journal(path).append(*entry(1))
    data = bytearray(path.read_bytes())
    for place in range(0, len(data) - 1, 11):
        changed = data.copy()
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(JournalError, match="line 1"):
            list(Journal(path).read())


def test_another_model_does_not_read_it(model, lessons, tmp_path):
    service = Service(model, Visitors(model, tmp_path / "data"))
    token = service.teach(lessons, "dog", "", "")["visitor"]
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.backbone.parameters()).add_(1)
    assert fingerprint(other) != fingerprint(model)
    with Visitors(other, tmp_path / "data").hold(token) as overlay:
        assert overlay is None


# ---- limits -------------------------------------------------------------------------------------


def test_visitors_are_bounded_and_none_is_lost(model, lessons, tmp_path):
    service = Service(model, Visitors(model, tmp_path / "data", max_in_memory=2))
    tokens = [service.teach(lessons[:1], "dog", "", "")["visitor"] for _ in range(5)]
    assert len(service.visitors._overlays) == 2
    for token in tokens:
        with service.changing(token) as overlay:
            assert len(overlay.examples) == 1


def test_large_models_leave_room_for_fewer_visitors(model, monkeypatch):
    assert room_for(model) == MAX_IN_MEMORY
    monkeypatch.setattr(
        "hf_knn_space.visitors.MAX_BYTES", 6 * len(model.datastore) * model.datastore.dim * 3
    )
    assert room_for(model) == 3
    monkeypatch.setattr("hf_knn_space.visitors.MAX_BYTES", 1)
    assert room_for(model) == 1


def test_the_rows_are_counted_once_for_all_visitors(model, lessons, monkeypatch):
    counted: list[int] = []
    count = Datastore.hash_sum

    def counting(store: Datastore) -> int:
        counted.append(len(store))
        return count(store)

    monkeypatch.setattr(Datastore, "hash_sum", counting)
    model.memory = replace(model.memory, tally=None)
    service = Service(model, Visitors(model, None))
    for _ in range(2):
        service.teach(lessons[:1], "dog", "", "")
    assert counted == [len(model.datastore)]


def test_old_journals_go_also_while_the_page_is_open(model, lessons, tmp_path, monkeypatch):
    service = Service(model, Visitors(model, tmp_path / "data", max_in_memory=1))
    first = service.teach(lessons[:1], "dog", "", "")["visitor"]
    service.teach(lessons[:1], "dog", "", "")  # the first one makes room
    monkeypatch.setattr("hf_knn_space.visitors.KEPT_ON_DISK", -1.0)
    service.explain(service.look(lessons[0]), Settings(), "")
    assert len(list((tmp_path / "data").rglob("*.journal"))) == 2
    later = time.monotonic() + 4000
    monkeypatch.setattr("hf_knn_space.visitors.time.monotonic", lambda: later)
    service.explain(service.look(lessons[0]), Settings(), "")
    assert len(list((tmp_path / "data").rglob("*.journal"))) == 1
    with service.visitors.hold(first) as overlay:
        assert overlay is None


def test_old_journals_go(model, lessons, tmp_path):
    import os

    service = Service(model, Visitors(model, tmp_path / "data"))
    service.teach(lessons[:1], "dog", "", "")
    (path,) = (tmp_path / "data").rglob("*.journal")
    assert Visitors(model, tmp_path / "data").expire() == 0
    os.utime(path, (time.time() - 31 * 86400,) * 2)
    Visitors(model, tmp_path / "data")
    assert not path.exists()


def test_a_visitor_teaches_so_many_and_no_more(model):
    overlay = Overlay(model, None)
    width = model.config.feature_dim
    features = torch.randn(MAX_EXAMPLES, width)
    overlay.teach(features, "dog", [b""] * MAX_EXAMPLES, "a", "a")
    with pytest.raises(SpaceError, match=f"at most {MAX_EXAMPLES}"):
        overlay.teach(features[:1], "dog", [b""], "b", "b")
    overlay = Overlay(model, None)
    for number in range(50):
        overlay.teach(features[:1], f"new {number}", [b""], f"{number}", "")
    with pytest.raises(SpaceError, match="new classes"):
        overlay.teach(features[:1], "one more", [b""], "c", "")


@pytest.mark.parametrize("token", ["short", "../../../etc/passwd", "x" * 65, "a b c d e f g h i j"])
def test_bad_tokens_are_refused(token, service, lessons):
    with pytest.raises(SpaceError, match="visitor token") as caught:
        service.teach(lessons[:1], "dog", token, "")
    assert token not in str(caught.value)


@pytest.mark.parametrize("label", ["", "   ", "a\nb", "a\0b", "x" * 61, "\u202eabc", None])
def test_bad_labels_are_refused(label):
    with pytest.raises(SpaceError, match="label"):
        check_label(label)


def read(path):
    with reading(path) as upload:
        return upload


def test_a_photo_of_a_phone_is_answered_as_the_library_answers(tmp_path, service, lessons):
    from PIL import Image

    path = tmp_path / "phone.jpg"
    with Image.open(lessons[0]) as image:
        image.convert("RGB").resize((5712, 4284)).save(path, "JPEG", quality=30)
    assert LARGE_PIXELS < 5712 * 4284  # so one at a time
    look = service.look(str(path))
    assert torch.equal(look.features, features_of(service.model, [path]))
    assert look._image.width < 1000


def test_large_pictures_are_looked_at_one_at_a_time(tmp_path, monkeypatch, service):
    from PIL import Image

    monkeypatch.setattr("hf_knn.data.uploads.LARGE_PIXELS", 99)
    inside, most, real = [], [], service._encoder

    def encode(images):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return real(images)

    monkeypatch.setattr(service, "_encoder", encode)
    paths = []
    for number in range(6):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (10, 10), (40 * number, 3, 7)).save(paths[-1])
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(service.look, paths))
    assert most == [1] * 6


def test_uploads_are_bounded(tmp_path, service, lessons):
    from PIL import Image

    path = tmp_path / "large.png"
    Image.new("1", (8001, 8000)).save(path)
    assert path.stat().st_size < 20_000
    with pytest.raises(BadImageError, match="8001 x 8000 pixels"):
        read(path)
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(BadImageError, match="bytes, more than"):
        read(path)
    with pytest.raises(SpaceError, match=f"at most {MAX_FILES}"):
        service.teach(lessons[:1] * (MAX_FILES + 1), "dog", "", "")
    path.write_bytes(b"nothing")
    with pytest.raises(SpaceError, match="Picture 2 of 2: not a picture"):
        service.teach([lessons[0], str(path)], "dog", "", "")


def test_pictures_outside_the_folder_are_not_shown(tmp_path):
    (tmp_path / "in").mkdir()
    write_picture(tmp_path / "in" / "a.png", 0)
    write_picture(tmp_path / "out.png", 0)
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"no")
    pictures = FolderPictures(tmp_path / "in")
    assert pictures.find(0, "a.png") is not None
    assert pictures.find(0, "link.png") is not None  # the owner of the folder put it there
    for path in ("../out.png", str(tmp_path / "out.png"), "bad.png", "", "none.png"):
        assert pictures.find(0, path) is None


def test_a_page_keeps_no_pixels(service, tmp_path):
    look = service.look(str(write_picture(tmp_path / "large.png", 1, size=900)))
    assert look.thumbnail
    assert look._image is None


def test_what_browsers_keep_is_a_token_or_nothing():
    token = new_token()
    assert token_of(token) == token
    for other in ("", None, "short", 7, {"a": 1}):
        assert token_of(other) != other
        assert check_token(token_of(other))


def test_a_damaged_journal_is_a_message(model, lessons, tmp_path, caplog):
    service = Service(model, Visitors(model, tmp_path / "data"))
    token = service.teach(lessons[:1], "dog", "", "")["visitor"]
    (path,) = (tmp_path / "data").rglob("*.journal")
    path.write_bytes(path.read_bytes().replace(b"dog", b"cow"))
    again = Service(model, Visitors(model, tmp_path / "data"))
    with pytest.raises(SpaceError, match="was damaged") as caught:
        again.explain(again.look(lessons[0]), Settings(), token)
    assert str(path) not in str(caught.value)
    assert str(path) in caplog.text


def test_what_lies_beside_the_shelf_is_never_swept(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    mine = tmp_path / "mine.txt"
    mine.write_text("years of work", encoding="utf-8")
    os.utime(mine, (0, 0))
    own = shelf.__wrapped__()
    assert own.folder.parent == tmp_path.resolve()
    assert os.environ["GRADIO_TEMP_DIR"] == str(own.folder)
    assert own.has_room(0)
    assert mine.exists()
    assert shelf.__wrapped__().folder == own.folder


def test_the_shelf_is_bounded_and_swept(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_knn_space.guard._LOOK_EVERY", 0.0)
    own = Shelf(tmp_path / "shelf", max_bytes=100_000)
    (own.folder / "a").mkdir()
    (own.folder / "a" / "old.png").write_bytes(b"\0" * 90_000)
    assert not own.has_room(20_000)
    assert own.has_room(1_000)
    hours_ago = time.time() - 3 * 3600
    for path in (own.folder / "a" / "old.png", own.folder / "a"):
        os.utime(path, (hours_ago, hours_ago))
    assert own.has_room(90_000)
    assert not (own.folder / "a" / "old.png").exists()
    monkeypatch.setattr("hf_knn_space.guard._LOOK_EVERY", 60.0)
    assert not own.has_room(20_000), "what was promised counts"


def test_nothing_is_written_without_room(service, lessons, monkeypatch, tmp_path):
    token = service.teach(lessons, "dog", "", "")["visitor"]
    monkeypatch.setattr(
        "hf_knn_space.exports.shelf", lambda: Shelf(tmp_path / "shelf", max_bytes=5_000)
    )
    with service.changing(token) as overlay, pytest.raises(SpaceError, match="no room"):
        write_checkpoint(overlay.model)
    assert list((tmp_path / "shelf").iterdir()) == []


# ---- what is shown ------------------------------------------------------------------------------


def test_small_pictures_that_were_pushed_are_found_by_path_alone(tmp_path):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as file:
        file.writestr("a/b.png.webp", b"small")
        file.writestr("secret", b"other")
    found = ZipPictures(tmp_path / "pictures.zip")
    assert found.find(0, "a/b.png") == b"small"
    assert [found.find(0, path) for path in ("", "secret", "../a/b.png", "a/c.png")] == [None] * 4


def test_labels_are_text():
    assert text(EVIL) == "&lt;img src=x onerror=alert(1)&gt;"
    assert "<img" not in bars({EVIL: 1.0}, "blend")
    assert not set("{}$`<>\"'") & set(text("{{x}} ${y} `z` <\"'>"))


def test_the_csv_names_each_picture_and_runs_no_formula(service, tmp_path):
    paths = [write_picture(tmp_path / name, i) for i, name in enumerate(["=1+1.png", "b.png"])]
    looks = [service.look(str(path)) for path in paths]
    found = [service.explain(look, Settings(), "") for look in looks]
    lines = as_csv(looks, found).splitlines()
    assert lines[1].startswith("'=1+1.png,")
    assert lines[2].split(",")[1] == found[1].answer
    assert float(lines[2].split(",")[2]) == found[1].probabilities[found[1].answer]


def test_the_dataset_is_one(service, lessons):
    token = service.teach(lessons, "dog", "", "")["visitor"]
    with (
        service.changing(token) as overlay,
        zipfile.ZipFile(write_dataset(overlay.examples.values())) as file,
    ):
        table = file.read("metadata.csv").decode().split()
        assert table[0] == "file_name,label"
        assert sorted(file.namelist()) == sorted(
            ["metadata.csv"] + [r.split(",")[0] for r in table[1:]]
        )
        assert all(line.endswith(",dog") for line in table[1:])
        from PIL import Image

        assert Image.open(io.BytesIO(file.read(table[1].split(",")[0]))).format == "WEBP"


def test_the_front_matter_is_what_the_hub_wants():
    from importlib.metadata import version

    from huggingface_hub import RepoCard, SpaceCardData

    _, front, _ = (ROOT / "space" / "README.md").read_text("utf-8").split("---\n", 2)
    card = RepoCard((ROOT / "space" / "README.md").read_text("utf-8"))
    assert card.data.to_dict() == yaml.safe_load(front), "keys or values that the Hub would drop"
    data = SpaceCardData(**card.data.to_dict())
    assert (data.sdk, data.app_file, data.python_version) == ("gradio", "app.py", "3.12")
    assert data.sdk_version == version("gradio")
    assert (ROOT / "space" / str(data.app_file)).is_file()


def test_a_report_is_shown_in_a_frame_without_scripts(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_KNN_RESULTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"benchmark/report\.py"):
        find_report()
    page = tmp_path / "report.html"
    page.write_text('<h1 class="a">92 % & more</h1><script>alert(1)</script>', "utf-8")
    assert find_report() == page
    frame = report_frame(page)
    assert frame.count("<") == 2
    assert 'sandbox=""' in frame
    assert html.unescape(frame.partition('srcdoc="')[2].partition('"')[0]) == page.read_text()


def test_the_report_of_a_clone_is_shown_with_its_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_KNN_RESULTS", str(tmp_path))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "a.png").write_bytes(b"picture")
    (tmp_path / "report.md").write_text(
        "# Results\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n![x](figures/a.png)\n![y](../b.png)",
        "utf-8",
    )
    page = html.unescape(report_frame(find_report()).partition('srcdoc="')[2])
    assert "<td>2</td>" in page
    assert f"data:image/png;base64,{base64.b64encode(b'picture').decode()}" in page
    assert "../b.png" in page, "no other file is read"


def test_requirements_allow_what_is_tested_here():
    from importlib.metadata import version

    from packaging.requirements import Requirement

    lines = (ROOT / "space" / "requirements.txt").read_text("utf-8").splitlines()
    found = {one.name: one.specifier for one in map(Requirement, lines)}
    for name, allowed in found.items():
        assert version(name) in allowed, name
    assert {"torch", "gradio", "transformers", "faiss-cpu"} <= set(found)


# ---- endpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def space(place: Path) -> Iterator[Running]:
    with running(place / "served", place / "served-data") as app:
        yield app


@pytest.fixture(scope="module")
def client(space: Running) -> Client:
    return Client(space.url, verbose=False)


def test_every_endpoint_gives_what_the_library_gives(space, client, lessons, tmp_path):
    path = write_picture(tmp_path / "asked.png", 1)
    asked, model = handle_file(str(path)), space.page.service.model
    found = client.predict(asked, api_name="/classify")
    features = features_of(model, [path])
    out = model(features=features, return_neighbors=True)
    wanted = dict(zip(model.config.class_names, out.logits[0].exp().tolist(), strict=True))
    assert found["probabilities"] == pytest.approx(wanted, abs=1e-6)
    assert [row["id"] for row in found["neighbors"]] == out.neighbors.ids[0].tolist()
    (plain,) = model.explain(features=features)
    assert found["flip"] == (None if plain.flip is None else plain.flip._asdict())
    assert found["disagree"] == disagrees(plain)

    near = client.predict(asked, k=3, api_name="/neighbors")
    hits = model.datastore.search(features, 3)
    assert [row["id"] for row in near] == hits.ids[0].tolist()
    assert [row["similarity"] for row in near] == pytest.approx(hits.similarities[0].tolist())

    files = [handle_file(lesson) for lesson in lessons]
    done = client.predict(files, "dog", idempotency_key="k", api_name="/teach")
    again = client.predict(files, "dog", done["visitor"], "k", api_name="/teach")
    assert (again["ids"], again["repeated"]) == (done["ids"], True)
    taught = copy.deepcopy(model)
    taught.teach(features=features_of(model, [Path(p) for p in lessons]), labels=["dog"] * 5)
    asked = handle_file(str(write_picture(path, 3)))
    found = client.predict(asked, visitor=done["visitor"], api_name="/classify")
    out = taught(features=features_of(model, [path]))
    wanted = dict(zip(taught.config.class_names, out.logits[0].exp().tolist(), strict=True))
    assert found["probabilities"] == pytest.approx(wanted, abs=1e-6)
    assert found["answer"] == "dog"
    gone = client.predict(done["ids"], done["visitor"], api_name="/forget")
    assert gone == {"ids": done["ids"], "examples": 0}
    found = client.predict(asked, visitor=done["visitor"], api_name="/classify")
    assert found["probabilities"].get("dog", 0) < 1e-9


@pytest.mark.parametrize(
    "content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"%!PS-Adobe", b"<svg/>"]
)
def test_a_broken_file_is_a_message(content, client, tmp_path, caplog, capfd):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(AppError, match=r"file is empty|not a picture|cannot be decoded"):
        client.predict(handle_file(str(path)), api_name="/classify")
    assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_bad_requests_are_messages(client, tmp_path):
    asked = handle_file(str(write_picture(tmp_path / "asked.png", 1)))
    for arguments, endpoint, message in [
        ((None,), "/classify", "got none"),
        ((asked, 0), "/classify", "whole number from 1"),
        (([asked], ""), "/teach", "label of 1 to"),
        ((["x"], "y" * 20), "/forget", "whole numbers"),
        (([1], "y" * 20), "/forget", "teach first"),
    ]:
        with pytest.raises(AppError, match=message):
            client.predict(*arguments, api_name=endpoint)


def test_curl_in_the_readme_works(space, tmp_path):
    import shutil
    import subprocess

    if shutil.which("curl") is None:
        pytest.skip("curl is not there")
    write_picture(tmp_path / "cat.jpg", 2)
    _, _, after = (ROOT / "space" / "README.md").read_text("utf-8").partition("```bash\nSPACE=")
    script = "SPACE=" + after.partition("```")[0]
    script = script.replace("http://127.0.0.1:7860", space.url.rstrip("/"))
    result = subprocess.run(
        ["bash", "-euc", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "event: complete" in result.stdout
    (line,) = (x for x in result.stdout.splitlines() if x.startswith("data: "))
    assert '"answer"' in line


@pytest.mark.parametrize("endpoint", ["call/classify", "call/forget", "queue/join"])
def test_no_address_is_fetched_for_a_visitor(endpoint, space, monkeypatch):
    """Gradio downloads, without a limit, whatever looks like a file with an address."""
    asked: list[str] = []
    monkeypatch.setattr(
        "gradio.processing_utils.async_ssrf_protected_download",
        lambda url, **where: asked.append(url),
    )
    file = {"path": "https://example.org/10GB.png", "meta": {"_type": "gradio.FileData"}}
    reply = httpx.post(f"{space.url}gradio_api/{endpoint}", json={"data": [[file], None]})
    assert reply.status_code == 400
    assert "uploaded" in reply.json()["detail"]
    assert asked == []


def test_requests_are_bounded(space, monkeypatch, tmp_path):
    place = f"{space.url}gradio_api/"
    reply = httpx.post(f"{place}call/forget", content=b" " * (MAX_BODY + 1))
    assert reply.status_code == 413
    sent = (part for part in [b"without", b"a length"])
    assert httpx.post(f"{place}upload", content=sent).status_code == 411
    monkeypatch.setattr("hf_knn_space.guard.MAX_UPLOAD", 1000)
    files = {"files": ("a.png", b"\0" * 2000)}
    assert httpx.post(f"{place}upload", files=files).status_code == 413
    monkeypatch.undo()
    monkeypatch.setattr("hf_knn_space.guard.Shelf.has_room", lambda self, size: False)
    assert httpx.post(f"{place}upload", files=files).status_code == 507
