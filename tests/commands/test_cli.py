"""The commands as a user types them, on real files; importing torch anew for each takes too long.

One command runs in a process of its own, all others in this one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import hf_knn, save_backbone, wide_terminal  # noqa: F401

from hf_knn import KnnForImageClassification
from hf_knn.data import decode_image
from hf_knn.model.pictures import small_webp

ROOT = Path(__file__).parents[2]
BROKEN = "disc/007.jpg"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"), patch_size=4, layers=2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """300 files: discs, squares and stripes, one of them broken, and one lone cross."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:24, :24]
    shapes = {
        "disc": lambda x, y, r: (rows - y) ** 2 + (columns - x) ** 2 < r**2,
        "square": lambda x, y, r: (abs(rows - y) < r) & (abs(columns - x) < r),
        "stripes": lambda x, y, r: (rows + y) // r % 2 == 0,
        "cross": lambda x, y, r: (abs(rows - y) < 2) | (abs(columns - x) < 2),
    }
    for name, count in {"disc": 100, "square": 100, "stripes": 99, "cross": 1}.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            x, y, r = generator.integers((9, 9, 4), (15, 15, 8))
            mask = shapes[name](x, y, r)[:, :, None]
            pixels = np.where(mask, generator.integers(150, 256, 3), generator.integers(0, 80, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:03d}.jpg")
    broken = folder / BROKEN
    broken.write_bytes(broken.read_bytes()[:300])
    return folder


@pytest.fixture(scope="module")
def trained(backbone, pictures, tmp_path_factory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("out") / "knn-model"
    done = hf_knn("train", pictures, "--backbone", backbone, "-o", output, "--epochs", 20)
    assert done.exit_code == 0, done.stderr
    return output, done.stdout


def test_train_says_what_it_did_about_a_broken_picture_and_a_lone_class(trained):
    output, said = trained
    assert f"Skipped {BROKEN}" in said or f"{BROKEN}: the picture cannot be decoded" in said
    assert "Class cross has one picture" in said
    report = json.loads((output / "train-report.json").read_text())
    assert [Path(row["path"]).name for row in report["skipped"]] == ["007.jpg"]


def test_train_measures_all_three_voices_and_names_the_next_command(trained):
    output, said = trained
    for voice in ("head alone", "neighbours alone", "blend"):
        assert voice in said
    assert f"hf-knn predict {output}" in said
    metrics = json.loads((output / "train-report.json").read_text())["metrics"]
    # shapes are easy: a head or a store that learned nothing would be near a third
    assert metrics["eval_blend_top1"] > 0.6
    assert "accuracy" in (output / "README.md").read_text()


def test_every_usable_picture_is_used_once(trained):
    from hf_knn import Datastore

    output, _ = trained
    store = Datastore.load(output)
    held_out = 20 + 20 + 20  # a fifth of 99, 100 and 99 pictures, none of the lone class
    assert len(store) == 299 - held_out
    assert store.paths is not None
    assert "cross/000.jpg" in store.paths
    assert BROKEN not in store.paths


def test_small_copies_of_local_pictures_are_kept_and_this_is_said(trained):
    output, said = trained
    assert f"Small copies of the 239 pictures are kept in {output}" in said
    assert "A push leaves them behind" in said
    kept = KnnForImageClassification.from_pretrained(output).thumbnails
    assert len(kept) == 239


def test_predict_shows_both_voices_and_the_neighbours(trained, pictures):
    output, _ = trained
    done = hf_knn("predict", output, pictures / "square" / "003.jpg", "--json")
    assert done.exit_code == 0, done.stderr
    (answer,) = json.loads(done.stdout)
    total = sum(row["probability"] for row in answer["classes"])
    assert total == pytest.approx(1, abs=1e-5)
    assert len(answer["neighbors"]) == 5
    assert answer["neighbors"][0]["path"].split("/")[0] == answer["neighbors"][0]["label"]
    similarities = [row["similarity"] for row in answer["neighbors"]]
    assert similarities == sorted(similarities, reverse=True)
    table = hf_knn("predict", output, pictures / "square" / "003.jpg").stdout
    assert "nearest training pictures" in table
    assert answer["neighbors"][0]["path"] in table


def test_a_checkpoint_can_be_the_backbone_of_another(trained, pictures, tmp_path):
    output, _ = trained
    table = tmp_path / "some.csv"
    lines = [
        f"{pictures}/{name}/{i:03d}.jpg,{name}" for name in ("disc", "square") for i in range(6)
    ]
    table.write_text("\n".join(["path,label", *lines]) + "\n")
    done = hf_knn("train", table, "--backbone", output, "-o", tmp_path / "second", "--epochs", 2)
    assert done.exit_code == 0, done.stderr


def test_a_ridge_head_is_evaluated_and_tuned(trained, pictures, tmp_path):
    first, _ = trained
    output, plot = tmp_path / "ridge", tmp_path / "plots" / "tuning.png"
    done = hf_knn("train", pictures, "--backbone", first, "-o", output, "--head", "ridge")
    assert done.exit_code == 0, done.stderr
    assert "Ridge head: smoothing (regulariser)" in done.stdout
    assert json.loads((output / "config.json").read_text())["head"] == "ridge"
    done = hf_knn("evaluate", output, pictures, "--json")
    assert done.exit_code == 0, done.stderr
    metrics = json.loads(done.stdout[done.stdout.index("{") :])
    assert metrics["eval_knn_top1"] > 0.6
    assert metrics["eval_oracle"] >= metrics["eval_blend_top1"]
    done = hf_knn("tune", output, pictures, "--criterion", "accuracy", "--plot", plot)
    assert done.exit_code == 0, done.stderr
    assert "are stored in the model, and nothing is chosen on them" in " ".join(done.stdout.split())
    config = json.loads((output / "config.json").read_text())
    assert f"k = {config['k']}," in done.stdout
    assert min(Image.open(plot).size) > 300


def test_a_sweep_says_what_was_best(trained, pictures, tmp_path):
    first, _ = trained
    output = tmp_path / "swept"
    options = ("--head", "mlp", "--hidden", "8", "--sweep", "small", "--no-thumbnails")
    done = hf_knn("train", pictures, "--backbone", first, "-o", output, *options)
    assert done.exit_code == 0, done.stderr
    assert "Best of 24 heads: learning rate" in done.stdout
    assert "Small copies" not in done.stdout
    assert not (output / "thumbnails.safetensors").exists()
    assert json.loads((output / "config.json").read_text())["head_hidden_sizes"] == [8]


def rows_of(output: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((output / "train-report.json").read_text())["rows"]
    return found


def test_fine_tuning_from_a_config_file(backbone, pictures, tmp_path):
    output, config = tmp_path / "tuned", tmp_path / "options.yaml"
    config.write_text(
        f"backbone: {backbone}\nfine-tune: true\nepochs: 5\nalpha: 0.1\nlearning_rate: 1e-3\n"
        "shots: 8\naugmentation: flip\nrefresh: 2\n"
    )
    done = hf_knn("train", pictures, "-o", output, "--config", config, "--epochs", "2")
    assert done.exit_code == 0, done.stderr
    assert "Epoch 2 of 2: loss" in done.stdout  # what is typed wins
    assert "Epoch 3" not in done.stdout
    assert "Too few labels to choose by (6 on a validation set" in done.stdout
    # a quarter of the 25 is what is chosen on: 8 of each class, and a lone cross
    assert rows_of(output) == {"train": 19, "validation": 6, "test": 60}
    assert not output.with_name("tuned.training").exists()
    assert json.loads((output / "training_args.json").read_text())["knn_refresh"] == "2"


def test_an_interrupted_run_is_resumed(backbone, pictures, tmp_path, monkeypatch):
    from hf_knn.commands import train as training_command

    output = tmp_path / "tuned"
    command = ["train", pictures, "-o", output, "--backbone", backbone, "--fine-tune"]
    command += ["--epochs", 3, "--batch-size", 64, "--patience", 2]

    class Interrupted(training_command.EpochReport):
        def on_save(self, args, state, control, **_):
            raise OSError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(training_command, "EpochReport", Interrupted)
        done = hf_knn(*command)
    assert done.exit_code == 1
    assert "the power went" in done.stderr
    assert (tmp_path / "tuned.training").is_dir()
    assert not output.exists()
    done = hf_knn(*command, "--resume")
    assert done.exit_code == 0, done.stderr
    assert "Epoch 1 of 3" not in done.stdout
    assert "Epoch 2 of 3" in done.stdout


def test_a_csv_with_groups_few_shots_and_calibration(backbone, pictures, tmp_path):
    table, output = tmp_path / "some.csv", tmp_path / "out"
    rows = [
        f"{pictures}/{name}/{i:03d}.jpg,{name},camera{i // 6}"
        for name in ("disc", "square")
        for i in range(60)
        if f"{name}/{i:03d}.jpg" != BROKEN
    ]
    table.write_text("\n".join(["path,label,camera", *rows]) + "\n")
    options = ["--group-by", "camera", "--head", "ridge", "--calibrate", "--shots", 12]
    options += ["--show-neighbors", "--thumbnails"]
    done = hf_knn("train", table, "-o", output, "--backbone", backbone, *options)
    assert done.exit_code == 0, done.stderr
    assert "24 of them are labelled pictures" in done.stdout
    words = " ".join(done.stdout.split())
    # one half is chosen by, in the other the error at each confidence is counted
    assert "Too few labels to choose by (14 on cross-validation; 16 a class are wanted)" in words
    assert "so only what neighbours count is chosen: 20 neighbours vote (k = 20, temp" in words
    assert "Asking heads and neighbours: 100%" in done.stderr
    assert "Choosing k, temperature and λ: 100%" in done.stderr
    assert rows_of(output)["test"] in (23, 24)  # two cameras, one with a broken picture
    config = json.loads((output / "config.json").read_text())
    assert config["blend_temperature"] != 1
    assert min(Image.open(output / "neighbors.png").size) > 300
    card = (output / "README.md").read_text()
    assert "(neighbors.png)" in card
    assert "small copies of training pictures" in card
    found = KnnForImageClassification.from_pretrained(output)
    assert len(found.thumbnails) == len(found.datastore) == 24
    assert "(reliability.png)" in card
    more = tmp_path / "more.csv"
    more.write_text(f"path,label\n{pictures}/disc/080.jpg,disc\n{pictures}/square/081.jpg,box\n")
    done = hf_knn("teach", output, more)
    assert done.exit_code == 0, done.stderr
    taught = KnnForImageClassification.from_pretrained(output)
    (_, box) = taught.changes[-1].ids
    assert taught.thumbnails.get(box) == small_webp(decode_image(pictures / "square/081.jpg"))
    assert len(taught.thumbnails) == 26
    other = ("-o", tmp_path / "other", "--backbone", backbone)
    done = hf_knn("train", table, *other, "--group-by", "lens")
    assert done.exit_code == 1
    assert "'lens'" in done.stderr
    assert "camera" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--blocks", 1], "Expected --fine-tune with --blocks"),
        (["--resume", "--bf16"], "--resume, --bf16"),
        (["--fine-tune", "--sweep", "small"], "no --sweep"),
        (["--fine-tune", "--queries", "live"], "--alpha above 0"),
        (["--head", "ridge", "--epochs", 5], "with --epochs, but got --head ridge"),
        (["--sweep", "small", "--learning-rate", 0.1], "no --sweep, which tries"),
        (["--shots", 2, "--fraction", 0.5], "one of --shots and --fraction"),
        (["--fine-tune", "--shots", 1], "leave out --fine-tune"),
        (["--config", "{folder}/bad.yaml"], "colour"),
        (["--config", "{folder}/list.yaml"], "options by name"),
        (["--config", "{folder}/value.yaml"], "'--epochs'"),
    ],
)
def test_options_that_do_not_go_together(backbone, pictures, tmp_path, options, message):
    (tmp_path / "bad.yaml").write_text("colour: red\n")
    (tmp_path / "list.yaml").write_text("- epochs\n")
    (tmp_path / "value.yaml").write_text("epochs: many\n")
    given = [str(option).format(folder=tmp_path) for option in options]
    done = hf_knn("train", pictures, "-o", tmp_path / "out", "--backbone", backbone, *given)
    assert isinstance(done.exception, SystemExit)
    assert done.exit_code in (1, 2)
    # the box around a message breaks its lines
    said = " ".join(done.stderr.replace("│", " ").split())
    assert message in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "no-such-folder/"), "no-such-folder/ to be a folder of pictures"),
        (("predict", "no-such-checkpoint/", "x.jpg"), "no-such-checkpoint"),
        (("train", ".", "--alpha", "-1"), "--alpha"),
        (("train", ".", "--precision", "fp8"), "fp8"),
        (("evaluate", "no-such-checkpoint/", "."), "no-such-checkpoint"),
        (("tune", "no-such-checkpoint/", "."), "to be a checkpoint folder"),
    ],
)
def test_bad_input_is_one_message(arguments, message):
    done = hf_knn(*arguments)
    assert done.exit_code in (1, 2)  # an exception would be 1 too, and is seen below
    assert isinstance(done.exception, SystemExit)
    assert message in done.stderr


@pytest.mark.slow
def test_an_error_in_a_process_of_its_own_is_one_message_without_traceback(tmp_path):
    environment = os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "hf_knn_cli", "predict", "no-such-checkpoint/", "x.jpg"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    assert "no-such-checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


def test_predict_on_something_that_is_no_picture(trained, tmp_path):
    output, _ = trained
    (tmp_path / "notes.jpg").write_text("not a picture")
    done = hf_knn("predict", output, tmp_path / "notes.jpg")
    assert done.exit_code == 1
    assert "notes.jpg" in done.stderr
    assert "not a picture in one of the formats" in done.stderr


def test_help_version_and_usage_import_nothing_that_takes_long():
    """One after the other in one process, which is quicker than a process for each."""
    code = (
        "import sys, hf_knn_cli\n"
        "for line in sys.argv[1:]:\n"
        "    sys.argv = ['hf-knn', *line.split()]\n"
        "    try: hf_knn_cli.main()\n"
        "    except SystemExit as end: print('\\nended', end.code)\n"
        "print(*sys.modules)"
    )
    lines = ["--help", "train --help", "--version", "predict -v --version", "backbones", "trian"]
    lines += ["train --nonsense", "predict -q -v a b", "log"]
    command = [sys.executable, "-c", code, *lines]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "--help" in done.stdout
    assert "dinov2-s" in done.stdout
    said = done.stdout.splitlines()
    codes = [line.split()[1] for line in said if line.startswith("ended ")]
    assert codes == [*"00000", *"2222"]
    loaded = said[-1].split()
    late = {"torch", "transformers", "datasets", "hf_knn", "faiss", "numpy", "yaml"}
    assert set(loaded) & late == set()


def test_the_package_can_be_run_as_a_module():
    command = [sys.executable, "-m", "hf_knn_cli", "train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "--fine-tune" in done.stdout
