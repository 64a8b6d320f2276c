"""`hf-knn relabel | forget --from findings.csv`, `forget --duplicates`, and ids as typed."""

import csv
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.commands import hf_knn, wide_terminal  # noqa: F401
from support.pictures import encoded, picture, random_features, small_model

from hf_knn import Datastore, KnnForImageClassification

CLASSES, ROWS = ["ant", "bee", "=cat"], 90
SHIFT = 1000
"""Ids are not places."""


def checkpoint_at(folder: Path, *, paths: bool = True, seed: int = 0) -> Path:
    """90 rows: 1005 has another label, 1007 the features of 1004, 1011 is far from all."""
    rows = random_features([row % 3 for row in range(ROWS)], spread=0.6, seed=seed)
    features, labels = rows.features.clone(), rows.labels.clone()
    labels[5] = (labels[5] + 1) % 3
    features[7] = features[4]
    features[11] = 40 * torch.randn(16, generator=torch.Generator().manual_seed(3))
    model = small_model(CLASSES)
    names = [f"{CLASSES[row % 3]}/{row}.png" for row in range(ROWS)]
    ids = torch.arange(ROWS) + SHIFT
    model.datastore = Datastore.from_features(
        features, labels, ids=ids, paths=names if paths else None
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and what `inspect` says of it."""
    place = tmp_path_factory.mktemp("findings")
    folder = checkpoint_at(place / "model")
    done = hf_knn("inspect", folder, "-o", place / "out")
    assert done.exit_code == 0, done.output
    assert f"hf-knn relabel {folder} --from {place / 'out' / 'findings.csv'}" in done.stdout
    return folder, place / "out" / "findings.csv"


@pytest.fixture
def folder(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "model"))


@pytest.fixture
def table(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(made[1], tmp_path / "findings.csv"))


def lines_of(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(table: Path, lines: list[dict[str, str]], **how: Any) -> None:
    with table.open("w", encoding=how.pop("encoding", "utf-8"), newline="") as file:
        writer = csv.DictWriter(file, [*lines[0]], **how)
        writer.writeheader()
        writer.writerows(lines)


def edited(table: Path, kind: str, **cells: str) -> None:
    write(table, [line | cells if line["kind"] == kind else line for line in lines_of(table)])


def labels_in(folder: Path) -> dict[int, str]:
    model = KnnForImageClassification.from_pretrained(folder)
    names, store = model.config.class_names, model.datastore
    pairs = zip(store.ids.tolist(), store.labels.tolist(), strict=True)
    return {row: names[label] for row, label in pairs}


def receipt_of(*arguments: object) -> dict[str, Any]:
    done = hf_knn(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def refusal(*arguments: object) -> str:
    done = hf_knn(*arguments)
    assert done.exit_code == 1, done.output
    return " ".join(done.stderr.split())


# ---- ids ----------------------------------------------------------------------------------------


def test_ids_are_typed_as_spans(folder: Path) -> None:
    receipt = receipt_of("forget", folder, "--ids", "1003, 1017,1020-1022", "--ids", "1003")
    assert receipt["ids"] == [1003, 1017, 1020, 1021, 1022]
    receipt = receipt_of("forget", folder, "--ids", "1019-1024")  # those that are left
    assert receipt["ids"] == [1019, 1023, 1024]
    receipt = receipt_of("relabel", folder, "--ids", "0-1001", "--label", "new")
    assert receipt["ids"] == [1000, 1001]
    assert receipt["labels"] == ["new"] * 2


def test_negative_ids_are_typed_as_spans(folder: Path) -> None:
    receipt = receipt_of("relabel", folder, "--ids", "-5-1000", "--label", "new")
    assert receipt["ids"] == [1000]


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ("1003,17x", "ids such as 3,17,20-40, but got '17x'"),
        ("1003,,4", "nothing between two commas"),
        ("40-20", "the lower end first, but got '40-20'"),
        (f"1-{2**63}", "the lower end first"),
        ("1.5", "but got '1.5'"),
        ("20-40", "ids from 20 to 40, but there are none"),
        ("1000,17", "does not have"),
    ],
)
def test_ids_that_are_none_are_refused(ids: str, said: str, folder: Path) -> None:
    before = labels_in(folder)
    assert said in refusal("forget", folder, "--ids", ids)
    assert labels_in(folder) == before


# ---- forget --from ------------------------------------------------------------------------------


def test_copies_are_forgotten_and_the_rest_is_named(folder: Path, table: Path) -> None:
    done = hf_knn("forget", folder, "--from", table)
    assert done.exit_code == 0, done.output
    assert "Left out: 1 label_error, 1 outlier." in " ".join(done.stdout.split())
    assert 1000 + ROWS - 1 in labels_in(folder)
    assert set(range(SHIFT, SHIFT + ROWS)) - set(labels_in(folder)) == {1007}
    again = hf_knn("forget", folder, "--from", table.parent)  # of a folder the csv in it
    assert again.exit_code == 0, again.output
    assert "1 rows of the csv are not stored any more" in again.stdout
    assert "no row that the csv names is stored" in again.stdout


def test_the_kinds_that_are_named_are_forgotten(folder: Path, table: Path, tmp_path: Path) -> None:
    kinds = ["--kind", "outlier, label_error"]
    receipt = receipt_of("forget", folder, "--from", table, *kinds, "--backup", tmp_path / "b")
    assert sorted(receipt["ids"]) == [1005, 1011]
    assert sorted(receipt_of("merge", folder, tmp_path / "b")["ids"]) == [1005, 1011]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--from", "{table}", "--ids", "1000"], "or else --from"),
        (["--from", "{table}", "--label", "ant"], "or else --from"),
        (["--ids", "1000", "--kind", "outlier"], "--kind with --from only"),
        (["--from", "{table}x"], "did you mean"),
        (["--from", "{table}", "--kind", "imbalance"], "--kind to be some of broken, "),
    ],
)
def test_what_does_not_go_together_is_refused(
    words: list[str], said: str, folder: Path, table: Path
) -> None:
    assert said in refusal("forget", folder, *(word.format(table=table) for word in words))
    assert len(labels_in(folder)) == ROWS


# ---- forget --duplicates ------------------------------------------------------------------------


def answered(monkeypatch: pytest.MonkeyPatch, *answers: bool) -> list[str]:
    """Somebody at a terminal; what they were asked."""
    asked: list[str] = []
    left = list(answers)

    def confirm(text: str, **_: Any) -> bool:
        asked.append(text)
        return left.pop(0)

    monkeypatch.setattr("hf_knn.commands.console.typer.confirm", confirm)
    monkeypatch.setattr("hf_knn.commands.console.sys", AtTerminal)
    return asked


class AtTerminal:
    stdin = SimpleNamespace(isatty=lambda: True)
    stdout, stderr = sys.stdout, sys.stderr


def test_one_of_each_group_is_kept_when_somebody_agrees(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = labels_in(folder)
    assert "pass --yes to do it" in refusal("forget", folder, "--duplicates")
    assert "--yes with --json" in refusal("forget", folder, "--duplicates", "--json")
    assert labels_in(folder) == before
    from hf_knn.commands.rows import forget_duplicates

    asked = answered(monkeypatch, False, True)
    look = partial(forget_duplicates, folder, None, [], False, False, None, json_output=False)
    look()
    assert labels_in(folder) == before
    look()
    assert asked == ["Forget 1 rows?"] * 2
    assert set(before) - set(labels_in(folder)) == {1007}


def test_what_is_kept_is_said_and_copies_under_two_labels_stay(
    folder: Path, tmp_path: Path
) -> None:
    model = KnnForImageClassification.from_pretrained(folder)
    rows = model.datastore.rows_of(torch.tensor([1020, 1021]))
    features = torch.from_numpy(rows.features).float()
    own = [CLASSES[label] for label in rows.labels.tolist()]
    model.teach(features=features.repeat(2, 1), labels=own * 2, ids=[1, 2, 3, 4])
    model.relabel([4], [own[0]])
    model.save_pretrained(folder)
    done = hf_knn("forget", folder, "--duplicates", "--yes", "--backup", tmp_path / "kept")
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    assert "Of each group the first that was stored is kept" in said
    assert "1004 bee/4.png" in said
    assert "The same pixels as bee/4.png" in said
    assert "One group of copies has several labels" in said
    assert set(labels_in(folder)) & {1, 2, 3, 4, 1007, 1020, 1021} == {4, 1020, 1021}
    again = receipt_of("forget", folder, "--duplicates", "--yes")
    assert (again["scope"], again["kept"]) == ("nothing", {})
    assert len(receipt_of("merge", folder, tmp_path / "kept")["ids"]) == 4
    assert sorted(receipt_of("forget", folder, "--duplicates", "--yes")["kept"].values())[-1] > 1000


def test_pixels_decide_where_they_are_there(folder: Path, tmp_path: Path) -> None:
    """All rows are of pictures of their own: that two have the same features proves nothing."""
    root = tmp_path / "pictures"
    for row in range(ROWS):
        place = root / CLASSES[row % 3] / f"{row}.png"
        place.parent.mkdir(exist_ok=True, parents=True)
        place.write_bytes(encoded(picture(row % 3, row)))
    words = ["forget", folder, "--duplicates", "--yes", "--pictures", root]
    found = receipt_of(*words)
    assert 1007 not in found["ids"]
    (root / "ant" / "0.png").unlink()
    assert f"only {ROWS - 1} of {ROWS} can be opened" in refusal(*words)


def test_rows_that_changed_while_somebody_thought_stay(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_knn.commands.rows import forget_duplicates

    def confirm(text: str, **_: Any) -> bool:
        model = KnnForImageClassification.from_pretrained(folder)
        model.forget([1004])  # what would have been kept
        model.save_pretrained(folder)
        return True

    answered(monkeypatch)
    monkeypatch.setattr("hf_knn.commands.console.typer.confirm", confirm)
    with pytest.raises(ValueError, match="were changed meanwhile"):
        forget_duplicates(folder, None, [], False, False, None, json_output=False)
    assert 1007 in labels_in(folder)


@pytest.mark.parametrize("words", [["--duplicates", "--ids", "1000"], ["--ids", "1000", "--yes"]])
def test_options_of_duplicates_go_with_it_alone(words: list[str], folder: Path) -> None:
    assert hf_knn("forget", folder, *words).exit_code == 2
    assert len(labels_in(folder)) == ROWS


def test_only_copies_are_duplicates(folder: Path) -> None:
    said = refusal("forget", folder, "--duplicates", "--kind", "outlier", "--yes")
    assert "with --duplicates" in said


# ---- relabel --from -----------------------------------------------------------------------------


def test_suggestions_are_taken_once(folder: Path, table: Path) -> None:
    before = labels_in(folder)
    receipt = receipt_of("relabel", folder, "--from", table)
    wanted = CLASSES[5 % 3]
    assert (receipt["ids"], receipt["labels"]) == ([1005], [wanted])
    assert labels_in(folder) == before | {1005: wanted}
    assert receipt_of("relabel", folder, "--from", table)["scope"] == "nothing"
    assert receipt_of("undo", folder)["rows_after"] == ROWS
    assert labels_in(folder) == before


def test_suggestions_of_ones_own_and_names_that_look_like_formulas(
    folder: Path, table: Path
) -> None:
    """As a spreadsheet saves it: semicolons, a mark of UTF-8, other kinds with suggestions."""
    edited(table, "outlier", suggested_label="'=cat")
    edited(table, "exact_duplicate", suggested_label="'+new")
    write(table, lines_of(table), delimiter=";", encoding="utf-8-sig")
    receipt = receipt_of("relabel", folder, "--from", table)
    after = labels_in(folder)
    assert after[1007] == "+new"
    assert after[1005] == CLASSES[2]
    assert receipt["new_classes"] == ["+new"]
    assert 1011 not in receipt["ids"]  # it is a =cat already


def test_findings_of_another_checkpoint_are_refused(folder: Path, tmp_path: Path) -> None:
    other = checkpoint_at(tmp_path / "other", paths=False, seed=1)
    done = hf_knn("inspect", other, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    before = labels_in(folder)
    for command in ("relabel", "forget"):
        said = refusal(command, folder, "--from", tmp_path / "out" / "findings.csv")
        assert "findings of this checkpoint" in said
    assert labels_in(folder) == before
    # its own are believed by their labels, where nobody knows paths
    assert receipt_of("forget", other, "--from", tmp_path / "out")["ids"] == [1007]


def test_a_row_that_was_relabelled_otherwise_is_refused(folder: Path, table: Path) -> None:
    hf_knn("relabel", folder, "--ids", "1005", "--label", "elk")
    said = refusal("relabel", folder, "--from", table)
    assert "row 1005 is labelled 'elk' now" in said
    assert labels_in(folder)[1005] == "elk"


def test_two_suggestions_for_one_row_are_refused(folder: Path, table: Path) -> None:
    lines = lines_of(table)
    (error,) = [line for line in lines if line["kind"] == "label_error"]
    write(table, [*lines, error | {"suggested_label": "ant"}])
    assert "one suggested label for each row" in refusal("relabel", folder, "--from", table)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: edited(t, "label_error", sample_id="1.005E+03"), "rounds long numbers"),
        (lambda t: edited(t, "label_error", split="train"), "about stored rows"),
        (lambda t: edited(t, "label_error", sample_id=""), "delete lines without an id"),
        (lambda t: edited(t, "label_error", path="ant/elsewhere.png"), "of this checkpoint"),
        (lambda t: t.write_text("path,label\na,b\n"), "no column 'kind'"),
        (lambda t: t.write_bytes(b"kind,\xff\n"), "in UTF-8"),
        (lambda t: t.write_text(t.read_text() + "label_error,datastore\n"), "another number"),
        (lambda t: t.write_text(t.read_text() + 'label_error,"x'), "quotes of line"),
    ],
)
def test_a_csv_that_cannot_be_meant_is_refused(
    change: Any, said: str, folder: Path, table: Path
) -> None:
    before = labels_in(folder)
    change(table)
    assert said in refusal("relabel", folder, "--from", table)
    assert labels_in(folder) == before


@pytest.mark.parametrize("words", [[], ["--ids", "1000"], ["--label", "x"]])
def test_relabel_says_what_it_needs(words: list[str], folder: Path) -> None:
    assert "--ids and --label, or else --from" in refusal("relabel", folder, *words)
