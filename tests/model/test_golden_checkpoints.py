"""Checkpoints that version 0.1.0 saved open for ever, with the package and without it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.golden import (
    GOLDEN,
    KINDS,
    LEGACY_CODE,
    assert_as_expected,
    expected,
    lay_out,
)
from support.stranger import make_site, run
from torch import Tensor

from hf_knn import KnnForImageClassification
from hf_knn.model.code import compare_code, reader_of

ANSWER = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

torch.set_num_threads(1)
golden, folder = Path(sys.argv[1]), Path(sys.argv[2])
report = {}
for kind in sys.argv[3:]:
    images = load_file(golden / "checkpoints-v1" / kind / "expected.safetensors")["pixel_values"]
    model = AutoModel.from_pretrained(folder / kind, trust_remote_code=True)
    with torch.no_grad():
        out = model(pixel_values=images, return_neighbors=True)
    found = {"pixel_values": images, "logits": out.logits, "head_logits": out.head_logits}
    if out.neighbors is not None:
        found |= out.neighbors._asdict()
    save_file({name: value.contiguous() for name, value in found.items()}, folder / f"{kind}.st")
    report[kind] = type(model).__module__
print(json.dumps(report))
"""

STRANGER = """
from transformers import AutoConfig, AutoModelForImageClassification, pipeline
from PIL import Image

vit = folder / "vit_cosine"
model = AutoModelForImageClassification.from_pretrained(vit, trust_remote_code=True)
report["sentences"] = []

def said_by(task):
    import io, logging
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    logging.getLogger().addHandler(handler)
    task()
    logging.getLogger().removeHandler(handler)
    return heard.getvalue()

def opening(place):
    try:
        AutoModel.from_pretrained(place, trust_remote_code=True)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
for name in ("teach", "forget", "explain", "undo"):
    try:
        getattr(model, name)
    except AttributeError as error:
        report["sentences"].append(str(error))
try:
    type(model).from_backbone("any", ["cat"])
except AttributeError as error:
    report["sentences"].append(str(error))
try:
    type(model).from_pretrained(folder / "vit_cosine", datastore_uri="http://localhost")
except ValueError as error:
    report["sentences"].append(str(error))
report["path"] = model.datastore.path_of(int(model.datastore.ids[0]))
try:
    model.datastore.path_of(10**6)
except ValueError as error:
    report["no such id"] = str(error)
model.save_pretrained(folder / "again")
again = AutoModel.from_pretrained(folder / "again", trust_remote_code=True)
report["again"] = torch.equal(again.datastore.features.joined(), model.datastore.features.joined())
plain = AutoModel.from_pretrained(vit, trust_remote_code=True, load_datastore=False)
report["plain"] = plain.datastore is None
plain.save_pretrained(folder / "plain")
report["files"] = sorted(path.name for path in (folder / "plain").iterdir())
report["all files"] = sorted(path.name for path in (folder / "again").iterdir())
report["none left"] = AutoModel.from_pretrained(
    folder / "plain", trust_remote_code=True).datastore is None
report["over others"] = []
for mine, other in ((plain, folder / "again"), (model, folder / "ridge_taught")):
    before = {path.name: path.stat().st_mtime_ns for path in other.iterdir()}
    try:
        mine.save_pretrained(other)
    except ValueError as error:
        unchanged = before == {path.name: path.stat().st_mtime_ns for path in other.iterdir()}
        report["over others"].append(f"{error} {unchanged}")
model.save_pretrained(folder / "again")  # over itself
report["over itself"] = sorted(path.name for path in (folder / "again").iterdir())
report["dtype"] = said_by(lambda: AutoModel.from_pretrained(
    folder / "again", trust_remote_code=True, dtype=torch.float16))
with torch.no_grad():
    next(again.backbone.parameters()).add_(1)
report["changed"] = said_by(lambda: again.save_pretrained(folder / "changed"))
report["changed refused"] = opening(folder / "changed")
forced = AutoModel.from_pretrained(folder / "changed", trust_remote_code=True, allow_stale=True)
forced.save_pretrained(folder / "forced")
report["forced refused"] = opening(folder / "forced")

def refusal(damage):
    import shutil
    broken = folder / "broken"
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(folder / "vit_cosine", broken)
    damage(broken)
    return opening(broken)

def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))

def other_weights(broken):
    state = load_file(broken / "model.safetensors")
    name = next(name for name in sorted(state) if name.startswith("backbone."))
    save_file(state | {name: state[name] + 1}, broken / "model.safetensors", {"format": "pt"})

def reference(broken):
    manifest = json.loads((broken / "datastore.json").read_text())
    manifest["format"] = "hf_knn.datastore-reference"
    (broken / "datastore.json").write_text(json.dumps(manifest))

def later(broken):
    manifest = json.loads((broken / "datastore.json").read_text())
    manifest["format_version"] = 2
    (broken / "datastore.json").write_text(json.dumps(manifest))

report["refusals"] = {
    "rows": refusal(lambda broken: flip(next(broken.glob("datastore-*.safetensors")))),
    "manifest": refusal(lambda broken: flip(broken / "datastore.json")),
    "weights": refusal(other_weights),
    "missing": refusal(lambda broken: (broken / "datastore.json").unlink()),
    "reference": refusal(reference),
    "later": refusal(later),
}
classify = pipeline("image-classification", model=str(vit), trust_remote_code=True)
report["pipeline"] = classify(Image.new("RGB", (40, 40), "red"), top_k=None)
print(json.dumps(report))
"""


def answer(model: KnnForImageClassification, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        out = model(pixel_values=images, return_neighbors=True)
    found = {"pixel_values": images, "logits": out.logits, "head_logits": out.head_logits}
    return found | ({} if out.neighbors is None else out.neighbors._asdict())


def opened_here(folder: Path, kind: str) -> dict[str, Tensor]:
    model = KnnForImageClassification.from_pretrained(folder)
    return answer(model, expected(kind)["pixel_values"])


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a stranger answered: with the 51 files that came along, and with the two of today."""
    root = tmp_path_factory.mktemp("stranger")
    folder, new, home = root / "checkpoints", root / "saved anew", root / "home"
    home.mkdir()
    for kind in KINDS:
        lay_out(kind, folder / kind)
        lay_out(kind, new / kind)
        KnnForImageClassification.from_pretrained(new / kind).save_pretrained(new / kind)
    site = make_site(root / "site")
    modules = run(ANSWER, GOLDEN, folder, *KINDS, site=site, home=home)
    report = run(ANSWER + STRANGER, GOLDEN, new, *KINDS, site=site, home=home)
    found = {kind: (modules[kind], load_file(folder / f"{kind}.st")) for kind in KINDS}
    found |= {f"{kind} anew": (report[kind], load_file(new / f"{kind}.st")) for kind in KINDS}
    return found | {"report": report, "folder": new}


def test_five_kinds_are_kept() -> None:
    assert KINDS == ["l2_ivf", "ridge_taught", "trainer_checkpoint", "two_poolings", "vit_cosine"]
    assert len(LEGACY_CODE) == 51


@pytest.mark.parametrize("with_code", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_package_opens_them(kind: str, with_code: bool, tmp_path: Path) -> None:
    folder = lay_out(kind, tmp_path / kind, with_code=with_code)
    assert_as_expected(kind, opened_here(folder, kind))


@pytest.mark.parametrize("when", ["", " anew"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stranger_opens_them_with_the_code_beside_them(
    kind: str, when: str, opened: dict[str, Any]
) -> None:
    module, found = opened[kind + when]
    assert module.startswith("transformers_modules.")
    assert_as_expected(kind, found)


@pytest.mark.parametrize("when", ["", " anew"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_give_the_same_bits(
    kind: str, when: str, opened: dict[str, Any], tmp_path: Path
) -> None:
    found = opened_here(lay_out(kind, tmp_path / kind), kind)
    theirs = opened[kind + when][1]
    different = [name for name, value in found.items() if not torch.equal(value, theirs[name])]
    assert different == []


def test_what_was_taught_is_still_known(tmp_path: Path) -> None:
    model = KnnForImageClassification.from_pretrained(lay_out("ridge_taught", tmp_path / "model"))
    assert [receipt.action for receipt in model.changes] == ["teach", "forget"]
    assert model.thumbnails is not None
    kept = [row for row in range(40) if model.thumbnails.get(row) is not None]
    assert kept == [0, 1, 3, 4, 5, 36, 37, 38, 39]
    assert model.fingerprint_rows() == model.changes[-1].hash_after
    model.relabel([36], ["cat"])
    model.undo()
    images = expected("ridge_taught")["pixel_values"]
    assert_as_expected("ridge_taught", answer(model, images))


# ---- what a stranger can do, and what is said where the package is needed ------------------------


def test_a_sentence_names_the_package(opened: dict[str, Any]) -> None:
    sentences = opened["report"]["sentences"]
    assert len(sentences) == 6
    names = ("teach", "forget", "explain", "undo", "from_backbone", "datastore_uri")
    for name, sentence in zip(names, sentences, strict=True):
        assert sentence.startswith(f"`{name}` needs the package")
        assert "pip install hf-knn" in sentence


def test_a_stranger_sees_where_pictures_are(opened: dict[str, Any]) -> None:
    assert opened["report"]["path"].startswith("train/0/")
    assert "1000000" in opened["report"]["no such id"]


def test_a_stranger_saves_again(opened: dict[str, Any]) -> None:
    report = opened["report"]
    assert report["again"]
    assert report["plain"]
    assert report["none left"]
    code = ["configuration_hf_knn.py", "modeling_hf_knn.py"]
    plain = {"config.json", "model.safetensors", "preprocessor_config.json", *code}
    assert set(report["files"]) == plain
    rows = {path.name for path in (opened["folder"] / "vit_cosine").glob("datastore-*")}
    assert set(report["all files"]) == plain | rows | {"datastore.json"}
    assert report["over itself"] == report["all files"]


def test_a_stranger_saves_over_no_other_rows(opened: dict[str, Any]) -> None:
    refused = opened["report"]["over others"]
    assert len(refused) == 2
    for said in refused:
        assert "to hold no other datastore; choose another folder, or `pip install" in said
        assert said.endswith("True")  # nothing was touched


def test_rows_of_other_weights_stay_stale_in_a_stranger_s_hands(opened: dict[str, Any]) -> None:
    report = opened["report"]
    assert "saved as stale" in report["changed"]
    assert report["changed refused"].startswith("StaleDatastoreError: ")
    assert report["forced refused"].startswith("StaleDatastoreError: ")
    assert "loaded as float16, but float32 made" in report["dtype"]


def test_damage_and_other_weights_are_refused_without_the_package(opened: dict[str, Any]) -> None:
    refusals = opened["report"]["refusals"]
    assert refusals["rows"].startswith("DatastoreError: Expected datastore-")
    assert "datastore.json" in refusals["manifest"]
    assert refusals["weights"].startswith("StaleDatastoreError: Expected a datastore made by")
    assert "is missing; pass load_datastore=False" in refusals["missing"]
    assert "pip install 'hf-knn[milvus]'" in refusals["reference"]
    assert "format version 1, but got version 2" in refusals["later"]


def test_the_stock_pipeline_answers(opened: dict[str, Any]) -> None:
    scores = [entry["score"] for entry in opened["report"]["pipeline"]]
    assert sum(scores) == pytest.approx(1, abs=1e-5)


# ---- saved over ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_saved_over_two_files_of_code_are_left(kind: str, opened: dict[str, Any]) -> None:
    names = {path.name for path in (opened["folder"] / kind).glob("*.py")}
    assert names == {"configuration_hf_knn.py", "modeling_hf_knn.py"}


def test_code_of_the_user_stays(tmp_path: Path) -> None:
    """Only what the old `auto_map` reaches goes, and only if version 0.1 wrote it."""
    folder = lay_out("vit_cosine", tmp_path / "model")
    (folder / "mine.py").write_text("from .search import Searcher\n")
    (folder / "__init__.py").write_text("")
    model = KnnForImageClassification.from_pretrained(folder)
    model.save_pretrained(folder)
    (folder / "search.py").write_text("# of the user: its name is that of an old file\n")
    model.save_pretrained(folder)
    kept = {path.name for path in folder.glob("*.py")}
    ours = {"configuration_hf_knn.py", "modeling_hf_knn.py"}
    assert kept == ours | {"mine.py", "__init__.py", "search.py"}
    (folder / "config.json").write_text("[" * 100_000)
    model.save_pretrained(folder)
    assert (folder / "search.py").is_file()


def test_whether_the_code_is_that_of_the_package(tmp_path: Path) -> None:
    folder = lay_out("vit_cosine", tmp_path / "model")
    old = compare_code(reader_of(folder))
    assert len(old) == 3
    assert "runs other code: configuration_knn, modeling_knn" in old[-1]
    KnnForImageClassification.from_pretrained(folder).save_pretrained(folder)
    assert compare_code(reader_of(folder)) == []
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/other"}')
    assert "another model is opened" in compare_code(reader_of(folder))[0]
    (folder / "adapter_config.json").unlink()
    with (folder / "modeling_hf_knn.py").open("a") as file:
        file.write("# one line more\n")
    (folder / "configuration_hf_knn.py").unlink()
    assert compare_code(reader_of(folder)) == [
        "configuration_hf_knn.py is missing.",
        "modeling_hf_knn.py is not that of the installed package.",
    ]
