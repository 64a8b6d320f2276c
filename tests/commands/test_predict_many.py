"""`hf-knn predict` of many pictures, as a user types it."""

import csv
import io
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import hf_knn
from support.forks import as_nobody, die, outcome, stop_before
from support.pictures import dataset_of, encoded, picture, write_folder
from support.tiny import tiny_model
from typer.testing import CliRunner, Result

import hf_knn_cli
from hf_knn import KnnForImageClassification
from hf_knn.commands import answering, predict
from hf_knn.commands.answers import AnswerFile
from hf_knn.data import batches
from hf_knn.model.pictures import features_of

BROKEN = "in/elk/broken.png"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was taught three classes, and new pictures of them, one of them broken."""
    root = tmp_path_factory.mktemp("many")
    write_folder(root / "known", {"ant": 5, "elk": 5, "fox": 5})
    model = tiny_model("vit", k=4)
    files = sorted((root / "known").rglob("*.png"))
    paths = [str(file.relative_to(root / "known")) for file in files]
    model.teach(files, [file.parent.name for file in files], paths=paths)
    model.changes = []
    model.config.answer_thresholds = {"0.1": 0.5}
    model.save_pretrained(root / "model")
    write_folder(root / "in", {"ant": 4, "elk": 4, "fox": 3}, 100)
    (root / BROKEN).write_bytes(b"no picture")
    return root


@pytest.fixture(autouse=True)
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)


FILES = [f"in/{kind}/{i}.png" for kind, count in (("ant", 4), ("elk", 4), ("fox", 3))
         for i in range(count)]  # fmt: skip
ALL = sorted([*FILES, BROKEN])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def answered(tmp_path: Path, *words: object, given: bytes | None = None) -> list[dict[str, Any]]:
    path = tmp_path / "answers.jsonl"
    typed = [str(word) for word in ("predict", "model", *words, "-o", path, "--overwrite")]
    done = CliRunner(env={"COLUMNS": "200"}).invoke(hf_knn_cli.app, typed, input=given)
    assert done.exit_code == 0, done.output
    return rows_of(path)


# ---- answers ------------------------------------------------------------------------------------


def test_answers_are_those_of_the_model_one_by_one(made: Path, tmp_path: Path) -> None:
    rows = answered(tmp_path, "in", "--explain", "--max-error", 0.1, "--top", 3)
    assert [row["path"] for row in rows] == ALL
    model = KnnForImageClassification.from_pretrained(made / "model")
    names = model.config.class_names
    for row in rows:
        if row["path"] == BROKEN:
            assert "not a picture in one of the formats" in row["error"]
            assert {row[name] for name in row if name not in ("path", "error")} == {None}
            continue
        features = features_of(model, [made / row["path"]])
        with torch.inference_mode():
            alone = model(features=features, return_neighbors=True)
        wanted = model.explain(features=features, max_error=0.1)[0]
        blend, head = alone.logits[0].exp(), alone.head_logits[0].softmax(-1)
        knn = alone.knn_log_probs[0].exp()
        assert row["answer"] == wanted.answer
        assert row["probability"] == pytest.approx(float(blend.max()), abs=1e-5)
        assert row["head_answer"] == names[int(head.argmax())]
        assert row["head_probability"] == pytest.approx(float(head.max()), abs=1e-5)
        assert row["knn_answer"] == next(iter(wanted.knn))
        assert row["knn_probability"] == pytest.approx(float(knn.max()), abs=1e-5)
        assert row["nearest_ids"] == alone.neighbors.ids[0, :5].tolist()
        assert row["nearest_similarities"] == pytest.approx(
            alone.neighbors.similarities[0, :5].tolist(), abs=1e-5
        )
        assert row["p_value"] == pytest.approx(wanted.typicality)
        assert row["abstained"] == (not wanted.answers)
        assert row["classes"] == list(wanted.probabilities)[:3]
        assert row["class_probabilities"] == pytest.approx(
            list(wanted.probabilities.values())[:3], abs=1e-5
        )
        assert row["margin"] == pytest.approx(wanted.margin, abs=1e-5)
        flip = wanted.flip
        assert row["flip_ids"] == (None if flip is None else flip.row_ids)
        assert row["flip_answer"] == (None if flip is None else flip.answer)
        assert row["notices"] == predict.notices(wanted)
        assert row["error"] is None


def test_typicality_and_abstaining_are_the_same_without_reasons(tmp_path: Path) -> None:
    why = answered(tmp_path, "in", "--explain", "--max-error", 0.1)
    plain = answered(tmp_path, "in", "--max-error", 0.1)
    for row, other in zip(why, plain, strict=True):
        assert set(row) - set(other) == {"margin", "flip_ids", "flip_answer", "notices"}
        assert {name: row[name] for name in other} == other
    assert {row["abstained"] for row in plain} >= {None}
    assert {row["abstained"] for row in answered(tmp_path, "in")} == {False, None}


def test_an_approximate_index_is_asked_for_one_picture_at_a_time(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = KnnForImageClassification.from_pretrained(made / "model")
    sizes: list[int] = []
    forward = type(model).forward

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(options["features"]))
        return forward(self, *args, **options)

    monkeypatch.setattr(type(model), "forward", watched)
    features = features_of(model, [made / file for file in FILES[:3]])
    bad = [batches.BadRow(1, 1, "", "why")]
    part = answering.Encoded(features, [0, 2, 3], bad, np.empty((3, 16), np.uint8))
    for spec, wanted in (("flat", [3]), ("HNSW8,Flat", [1, 1, 1])):
        monkeypatch.setattr(answering, "FLAT", model.datastore.index.spec if spec == "flat" else "")
        sizes.clear()
        answers = answering.Answerer(model, None, explain=False, judge=False)(part)
        assert sizes == wanted
        assert [(one.number, one.error) for one in answers] == [
            (0, ""), (1, "why"), (2, ""), (3, ""),
        ]  # fmt: skip


# ---- sources ------------------------------------------------------------------------------------


def test_every_kind_of_source(made: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"{made / file}\n" for file in FILES[:2]))
    (tmp_path / "list.csv").write_text(f"path,label\n{made / FILES[2]},ant\n{made}/gone.png,ant\n")
    dataset_of([0, 1], broken=[1]).to_parquet(tmp_path / "some.parquet")
    rows = answered(
        tmp_path, FILES[5], "in/fox", "in/a*/3.png", tmp_path / "list.txt", tmp_path / "list.csv",
        tmp_path / "some.parquet", "-", given=f"{FILES[6]}\0{FILES[5]}\0".encode(),
    )  # fmt: skip
    parquet = f"{tmp_path}/some.parquet:train"
    assert [row["path"] for row in rows] == [
        FILES[5], *FILES[8:], FILES[3], *(f"{made}/{file}" for file in FILES[:3]),
        f"{made}/gone.png", f"{parquet}:0", f"{parquet}:1", FILES[6],
    ]  # fmt: skip
    errors = {row["path"]: row["error"] for row in rows if row["error"]}
    assert list(errors) == [f"{made}/gone.png", f"{parquet}:1"]
    assert "No such file" in errors[f"{made}/gone.png"]


def test_an_unreadable_file_is_a_row(made: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encoded(picture(0, 1)))
    (tmp_path / "in" / "b.png").write_bytes(encoded(picture(0, 2)))
    (tmp_path / "in" / "a.png").chmod(0)

    def look() -> None:
        batch = batches.read_batch(
            predict.SourceRows(predict.find_sources([f"{tmp_path}/in"], bytes).pictures),
            [0, 1], KnnForImageClassification.from_pretrained(made / "model").image_processor,
        )  # fmt: skip
        assert batch.rows == [1]
        assert batch.bad[0].reason == "the file cannot be read (Permission denied)"

    top = Path(tempfile.gettempdir())
    for place in (tmp_path, made / "model"):
        for folder in (place, *place.parents):
            if top in folder.parents:
                folder.chmod(0o755)
    assert as_nobody(look) == ""


def test_an_empty_folder_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "scan.pdf").touch()
    done = hf_knn("predict", "model", tmp_path)
    assert done.exit_code == 1
    assert re.search(r"but there are none.*1 \.pdf .* was left out", done.stderr)


def test_split_of_a_dataset(tmp_path: Path) -> None:
    dataset_of([0, 1]).to_parquet(tmp_path / "some.parquet")
    assert len(answered(tmp_path, tmp_path / "some.parquet", "--split", "train")) == 2
    done = hf_knn("predict", "model", tmp_path / "some.parquet", "--split", "test")
    assert done.exit_code == 1
    assert "['train'], but got 'test'" in done.stderr


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_other_kinds_of_files_hold_the_same(ending: str, tmp_path: Path) -> None:
    wanted = answered(tmp_path, "in")
    path = tmp_path / "new folder" / f"answers.{ending}"
    done = hf_knn("predict", "model", "in", "-o", path)
    assert done.exit_code == 0, done.output
    assert f"Written: {path}" in done.stdout
    if ending == "parquet":
        from pyarrow import parquet

        assert parquet.read_table(path).to_pylist() == wanted
        return
    cells = list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))
    assert [one["path"] for one in cells] == ALL
    for one, row in zip(cells, wanted, strict=True):
        assert one["answer"] == (row["answer"] or "")
        assert json.loads(one["nearest_ids"] or "null") == row["nearest_ids"]
        assert json.loads(one["probability"] or "null") == row["probability"]


def test_a_summary_says_what_became_of_them(tmp_path: Path) -> None:
    done = hf_knn("predict", "model", "in", "-o", tmp_path / "answers.csv")
    said = " ".join(done.stdout.split())
    assert "11 of 12 pictures were answered." in said
    assert f"1 was not readable, see the column error; the first: {BROKEN}: not a" in said
    assert re.search(r"Next: hf-knn predict model in/\w+/\d\.png --explain", said)
    done = hf_knn("predict", "model", "in", "-o", tmp_path / "more.csv", "--json")
    told = json.loads(done.stdout)
    assert (told["pictures"], told["answered"], told["broken"]) == (12, 11, 1)
    assert sum(one["pictures"] for one in told["classes"].values()) == 11
    assert told["output"] == str(tmp_path / "more.csv")


def test_no_picture_at_all_is_an_error_and_still_a_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    done = hf_knn("predict", "model", BROKEN, "gone.txt", "-o", path)
    assert done.exit_code == 1
    assert "gone.txt" in done.stderr
    (tmp_path / "list.txt").write_text(f"{Path(BROKEN).absolute()}\n/nowhere.png\n")
    done = hf_knn("predict", "model", tmp_path / "list.txt", "-o", path)
    assert done.exit_code == 1
    assert "none of 2 can" in done.stderr
    assert [bool(row["error"]) for row in rows_of(path)] == [True, True]


# ---- stopped and gone on with -------------------------------------------------------------------


def run_in_child(path: Path, before: Any = None) -> str:
    """The command in a child of its own, where something was changed first."""

    def work() -> None:
        if before is not None:
            before()
        done = hf_knn("predict", "model", "in", "-o", path)
        if done.exit_code:
            raise RuntimeError(done.output)

    return outcome(work)


def die_after(count: int, torn: bytes = b"") -> Any:
    """Kills the process as soon as so many more answers are kept, and perhaps a half one."""

    def prepare() -> None:
        add, kept = AnswerFile.add, [0]

        def add_and_die(self: AnswerFile, rows: Any) -> None:
            for one in rows:
                if kept[0] == count:
                    assert self._file is not None
                    self._file.write(torn)
                    self._file.flush()
                    die()
                add(self, [one])
                kept[0] += 1

        AnswerFile.add = add_and_die  # type: ignore[method-assign]

    return prepare


def die_before_the_journal_goes() -> None:
    AnswerFile.discard = lambda self: die()  # type: ignore[method-assign]


def test_killed_at_many_points_every_picture_is_one_row(tmp_path: Path) -> None:
    wanted = answered(tmp_path, "in")
    path = tmp_path / "killed" / "answers.jsonl"
    journal = path.with_name("answers.jsonl.unfinished")
    lengths = []
    points = [die_after(0), die_after(1), die_after(2, b'["x'), die_after(0, b"["), die_after(3)]
    for point in points:
        assert run_in_child(path, point) == "ended by -9"
        assert not path.exists()
        lengths.append(journal.read_bytes().count(b"\n") - 1)
    assert lengths == [0, 1, 3, 3, 6]
    assert run_in_child(path, lambda: stop_before("answers.jsonl", die)) == "ended by -9"
    assert not path.exists()
    assert run_in_child(path, die_before_the_journal_goes) == "ended by -9"
    assert rows_of(path) == wanted
    done = hf_knn("predict", "model", "in", "-o", path)
    assert done.exit_code == 0, done.output
    assert "12 of 12 pictures were answered before" in done.stdout
    assert rows_of(path) == wanted
    assert [each.name for each in path.parent.iterdir()] == ["answers.jsonl"]


def stop(path: Path, *words: object) -> None:
    """What a run leaves that is stopped by Ctrl-C behind two answers."""
    add = AnswerFile.add

    def interrupt(self: AnswerFile, rows: Any) -> None:
        add(self, [*rows][:2])
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnswerFile, "add", interrupt)
        done = hf_knn("predict", "model", "in", "-o", path, *words)
    assert done.exit_code == 130
    assert "Kept: 2 of 12 answers" in done.stderr
    assert "To go on, or to begin again: " in done.stderr


def refused(*words: object) -> str:
    done = hf_knn("predict", *words)
    assert done.exit_code == 1, done.output
    return " ".join(done.stderr.split())


def test_another_checkpoint_or_other_options_are_refused(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    stop(path)
    model = KnnForImageClassification.from_pretrained(made / "model")
    model.config.knn_temperature *= 2
    model.save_pretrained(tmp_path / "settings")
    model = KnnForImageClassification.from_pretrained(made / "model")
    model.forget(ids=model.datastore.ids[:1].tolist())
    model.save_pretrained(tmp_path / "rows")
    model = KnnForImageClassification.from_pretrained(made / "model")
    with torch.no_grad():
        next(model.head.parameters()).mul_(1.5)
    model.save_pretrained(tmp_path / "weights")
    for other in ("settings", "rows", "weights"):
        assert "another checkpoint;" in refused(tmp_path / other, "in", "-o", path)
    assert "another --max-error;" in refused("model", "in", "-o", path, "--max-error", 0.1)
    assert "another --neighbors;" in refused("model", "in", "-o", path, "--neighbors", 2)
    assert "columns" in refused("model", "in", "-o", path, "--explain")
    assert "another --top" in refused("model", "in", "-o", path, "--top", 2)
    assert "--max-pixels or" in refused("model", "in", "-o", path, "--max-pixels", 9999)
    assert not path.exists()
    done = hf_knn("predict", "model", "in", "-o", path, "--backend", "torch")
    assert done.exit_code == 0, done.output
    assert "2 of 12 pictures were answered before" in done.stdout
    assert "not to be there yet" in refused("model", "in", "-o", path)
    done = hf_knn("predict", "model", "in/fox", "-o", path, "--overwrite")
    assert done.exit_code == 0, done.output
    assert len(path.read_text("utf-8").splitlines()) == 4


def test_other_pictures_than_before_are_answered_too(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    stop(path)
    extra = made / "in" / "ant" / "00.png"
    changed = made / FILES[0]
    before = changed.read_bytes()
    try:
        extra.write_bytes(encoded(picture(2, 7)))
        changed.write_bytes(b"broken meanwhile")
        done = hf_knn("predict", "model", "in", "-o", path)
        assert done.exit_code == 0, done.output
        rows = {row["path"]: row for row in rows_of(path)}
        assert list(rows) == sorted([*ALL, "in/ant/00.png"])
        assert "not a picture" in rows[FILES[0]]["error"]
    finally:
        extra.unlink()
        changed.write_bytes(before)


# ---- screen, JSON and page ----------------------------------------------------------------------


def screen(*words: object) -> Result:
    done = hf_knn("predict", "model", *words)
    assert done.exit_code == 0, done.output
    return done


def test_many_are_one_table_with_a_summary_and_what_to_do_next() -> None:
    said = screen("in").stdout
    for path in ALL:
        assert said.count(path) == 1 + (path == BROKEN)
    assert "11 of 12 pictures were answered." in said
    assert "1 was not readable; the first:" in said
    assert "Next: hf-knn predict model in -o answers.csv" in said
    assert "nearest training pictures" not in said
    unsure = screen("in", "--max-error", 0.1).stdout
    model = KnnForImageClassification.from_pretrained("model")
    features = features_of(model, FILES)
    count = sum(not one.answers for one in model.explain(features=features, max_error=0.1))
    assert count
    assert f"{count} not sure enough." in unsure


def test_of_very_many_the_first_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "KEPT", 3)
    said = screen("in").stdout
    assert "12 pictures; the first 3 are shown. -o answers.csv keeps every answer" in said
    assert "… and 9 more." in said
    assert ALL[2] in said
    assert ALL[3] not in said


def test_reasons_of_many_on_the_screen(made: Path) -> None:
    said = screen("in", "--explain").stdout
    assert said.count("Margin of the vote") == 11
    assert f"{BROKEN}: not a picture" in said
    assert "11 of 12 pictures were answered." in said


def test_json_of_many_is_a_list_and_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = json.loads(screen("in", "--json").stdout)
    assert [one["image"] for one in answers] == ALL
    assert {bool(one["error"]) for one in answers if one["image"] == BROKEN} == {True}
    assert [one["error"] for one in answers if one["image"] != BROKEN] == [None] * 11
    assert len({frozenset(one) for one in answers}) == 1
    monkeypatch.setattr(predict, "_MOST_JSON", 11)
    done = hf_knn("predict", "model", "in", "--json")
    assert done.exit_code == 1
    assert "at most 11 pictures with --json, but got 12; write" in done.stderr
    assert done.stdout == ""


def test_a_page_of_many_holds_those_it_is_least_sure_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    said = screen("in", "--html", page, "--neighbors", 0).stdout
    assert "11 of 12 pictures were answered." in said
    text = page.read_text("utf-8")
    assert text.count("<figure") == 11
    assert "1 more could not be read." in text
    assert "least sure" not in text
    monkeypatch.setattr(answering, "KEPT", 3)
    rows = answered(tmp_path, "in", "--html", page, "--neighbors", 0)
    text = page.read_text("utf-8")
    assert text.count("<figure") == 3
    assert "Shown are the 3 that it is least sure of." in text
    good = sorted((row for row in rows if row["error"] is None), key=lambda row: row["probability"])
    for row in good[:3]:
        assert f"{Path(row['path']).name}: {row['answer']}" in text


def test_a_page_is_written_of_a_run_that_was_stopped(tmp_path: Path) -> None:
    path, page = tmp_path / "answers.csv", tmp_path / "page.html"
    stop(path, "--neighbors", 0)
    screen("in", "-o", path, "--html", page, "--neighbors", 0)
    assert page.read_text("utf-8").count("<figure") == 11


def test_one_picture_in_a_folder_is_shown_whole(tmp_path: Path) -> None:
    os.makedirs(tmp_path / "one")
    (tmp_path / "one" / "a.png").write_bytes(encoded(picture(1, 1)))
    assert "nearest training pictures" in screen(tmp_path / "one").stdout


def test_the_next_command_can_be_typed(tmp_path: Path) -> None:
    assert "Next: the same command with -o answers.csv" in screen(*FILES[:6]).stdout
    dataset_of([0, 1]).to_parquet(tmp_path / "some.parquet")
    said = screen(tmp_path / "some.parquet", "-o", tmp_path / "answers.csv").stdout
    assert "Next: the same command with --html page.html" in said


@pytest.mark.parametrize(
    ("words", "match"), [(["in", "--overwrite"], "-o with --overwrite"), ([], "Missing argument")]
)
def test_what_does_not_fit_is_refused(words: list[str], match: str) -> None:
    done = hf_knn("predict", "model", *words)
    assert done.exit_code == 2
    assert match in " ".join(done.output.split())
