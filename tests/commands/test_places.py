"""Names of folders, files and repositories that are something else: one sentence, at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import as_checkpoint, hf_knn

from hf_knn_cli import places


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint `model`, pictures `pics` and things that are neither."""
    as_checkpoint(tmp_path / "model")
    (tmp_path / "pics" / "cat").mkdir(parents=True)
    (tmp_path / "pics" / "cat" / "1.jpg").touch()
    (tmp_path / "cat.jpg").touch()
    (tmp_path / "notes.txt").write_text("path,label\n")
    as_checkpoint(tmp_path / "vit")
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "vit"}')
    as_checkpoint(tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").unlink()
    as_checkpoint(tmp_path / "torn")
    (tmp_path / "torn" / "config.json").write_text('{"model_type": ')
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "datastore.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


URL = "https://huggingface.co/org/name"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        # a checkpoint that is none
        ("predict modell cat.jpg", "modell to be a checkpoint folder .*did you mean model"),
        ("predict ./modell cat.jpg", r"\./modell to be .* nothing there.*did you mean model"),
        ("predict org/no-such cat.jpg", "org/no-such to be .*cache of the Hub does not hold"),
        ("predict ~/no-such cat.jpg", "/no-such to be a checkpoint"),
        (f"predict {URL} cat.jpg", "by its id: org/name"),
        (f"predict {URL}/tree/main cat.jpg", "by its id: org/name"),
        ("predict https://example.org/m.zip cat.jpg", "m.zip .*download it"),
        ("predict file:///tmp/m cat.jpg", "name the path alone"),
        ("predict cat.jpg model", "cat.jpg .*is a picture; name the checkpoint first"),
        ("predict pics cat.jpg", "pics to be a checkpoint, but it has no config.json"),
        ("predict notes.txt cat.jpg", "notes.txt .*is a file"),
        ("predict vit cat.jpg", "'vit'; `hf-knn train PICTURES --backbone vit`"),
        ("predict half cat.jpg", "half .*no model.safetensors"),
        ("predict torn cat.jpg", "torn .*config.json cannot be read"),
        ("predict rows cat.jpg", "hf-knn merge CHECKPOINT rows"),
        ("evaluate pics model", "pics to be a checkpoint.*before the pictures"),
        ("export modell --onnx out", "did you mean model"),
        ("diff model modell", "did you mean model"),
        ("inspect ./nothing", "nothing to be a checkpoint"),
        ("demo ./nothing", "nothing to be a checkpoint"),
        ("merge model ./nothing", "nothing to be a checkpoint"),
        ("code a/b/c", "a/b/c to be a checkpoint"),
        # one that will be changed is a folder
        ("teach org/name pics", "org/name to be a checkpoint folder"),
        ("undo modell", "did you mean model"),
        ("forget cat.jpg --label x", "is a picture"),
        ("tune modell pics", "did you mean model"),
        ("push modell org/x", "did you mean model"),
        ("push org/x model", "org/x to be a checkpoint folder"),
        ("push model pics", "pics to be a repository .*is a folder here"),
        (f"push model {URL}", "by its id: org/name"),
        # pictures that are none
        ("train ./nothing", "nothing to be a folder of pictures"),
        ("train pisc", "pisc .*did you mean pics"),
        ("train nothing.csv", "nothing.csv .*nothing there"),
        ("train 'pics/*/*.jpg'", "nothing there"),
        ("train https://example.org/pics.zip", "download it"),
        ("train cat.jpg", "is one picture"),
        ("train model", "model .*is a checkpoint; name the checkpoint first"),
        ("doctor ./nothing", "nothing to be a folder of pictures"),
        ("evaluate model ./nothing", "nothing to be a folder of pictures"),
        ("teach model ./foxes --label fox", "foxes to be a picture, a folder"),
        ("teach model foxes", "foxes to be a picture, a folder"),
        ("teach model model", "is a checkpoint"),
        ("predict model 'pics/*/*.png'", "nothing fits it"),
        ("predict model ./nothing", "nothing to be a picture to classify, or what names some"),
        ("predict model file:///etc/cat.jpg", "name the path alone"),
        ("predict model ftp://example.org/cat.jpg", "download it"),
        (f"predict model {URL}", "by its id: org/name"),
        ("predict model org/no-such", "org/no-such .*cache of the Hub does not hold"),
        ("predict model cat.jpg cta.jpg", "cta.jpg .*did you mean cat.jpg"),
        ("predict model model", "one checkpoint, and it first"),
        ("predict model cat.jpg --html x.html --pictures nowhere", "folder of the stored pictures"),
        ("inspect model --pictures cat.jpg", "cat.jpg to be the folder .*is a file"),
        ("predict '' cat.jpg", "'' .*names nothing"),
        # what is written
        ("train pics --backbone model -o cat.jpg", "cat.jpg to be a folder .*is a file"),
        ("train pics --backbone model -o cat.jpg/x", "place that can be written"),
        ("train pics --backbone model -o out\udcff", "out.udcff .*name is not UTF-8"),
        ("doctor pics --backbone model -o cat.jpg", "cat.jpg to be a folder"),
        ("tune model pics --plot pics", "pics to be a file to write, but it is a folder"),
        ("predict model cat.jpg --html cat.jpg/x.html", "place that can be written"),
        ("predict model cat.jpg -o pics", "pics to be a file to write, but it is a folder"),
        ("predict model cat.jpg -o answers.xlsx", r"ends in \.xlsx; end it in \.csv, \.jsonl"),
        ("predict model cat.jpg -o answers", "it ends in nothing"),
        ("predict model cat.jpg -o cat.jpg/x.csv", "place that can be written"),
        ("forget model --ids 1 --backup pics", "pics not to exist yet"),
        # backbones
        ("train pics --backbone pics", "pics to be a backbone.*no config.json"),
        ("train pics --backbone cat.jpg", "cat.jpg to be a backbone.*is a file"),
        ("train pics --backbone ./no", "no to be a backbone"),
        (f"train pics --backbone {URL}", "by its id: org/name"),
        ("train pics --backbone org/no-such", "org/no-such .*cache of the Hub does not hold"),
    ],
)
def test_a_place_that_is_something_else(typed: str, said: str, here: Path) -> None:
    import re
    import shlex

    done = hf_knn(*shlex.split(typed))
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("Error: Expected ")
    assert re.search(said, done.stderr), done.stderr


def test_places_that_are_right_pass(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert places.checkpoint("~/model") == f"{here}/model"
    assert places.checkpoint(None) is None
    assert places.checkpoint_folder(Path("model")) == Path("model")
    assert places.rows_or_checkpoint("rows") == "rows"
    assert places.rows_or_checkpoint("model") == "model"
    assert places.pictures("pics") == "pics"
    assert places.pictures("notes.txt") == "notes.txt"
    assert places.local_pictures(Path("~/cat.jpg")) == here / "cat.jpg"
    web = "https://huggingface.co/datasets/org/name/resolve/main/cat.jpg?download=true"
    sources = ["~/cat.jpg", "pics", "pics/*/*.jpg", "-", "notes.txt", web, "http://10.0.0.1/x"]
    assert places.picture_sources(sources) == [f"{here}/cat.jpg", *sources[1:]]
    assert places.answer_file(Path("new/answers.CSV")) == Path("new/answers.CSV")
    assert places.answer_file(None) is None
    assert places.backbone("vit") == "vit"
    assert places.backbone("efficientnet-lite0") == "efficientnet-lite0"
    assert places.code_of("org/name") == "org/name"
    assert places.repo_id("org/name") == "org/name"
    assert places.new_folder(Path("~/new/deep")) == here / "new" / "deep"
    assert not (here / "new").exists()  # looked at, not made
    assert places.new_file(Path("pics/page.html")) == Path("pics/page.html")
    (here / "sharded").mkdir()
    (here / "sharded" / "config.json").write_text(json.dumps({"model_type": "hf_knn"}))
    (here / "sharded" / "model.safetensors.index.json").touch()
    assert places.checkpoint("sharded") == "sharded"


def test_it_is_said_before_anything_heavy_is_imported(here: Path) -> None:
    """Seconds cannot be asserted, but modules can."""
    code = (
        "import sys\nfrom hf_knn_cli import app\nsys.argv = ['hf-knn', *sys.argv[1:]]\n"
        "try:\n    app()\nexcept SystemExit as left:\n    print(left.code, *sys.modules)"
    )
    for words in (["predict", "no-such", "cat.jpg"], ["train", "no-such"], ["teach", "model", "x"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        status, *modules = done.stdout.split()
        assert status == "1", done.stderr
        assert not {"torch", "transformers", "datasets", "hf_knn"} & set(modules)
        assert "Error: Expected" in done.stderr
