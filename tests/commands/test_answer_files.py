"""Files of answers: what they hold, what a kill leaves, and what is refused."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from hf_knn.commands.answering import PredictOptions, cut
from hf_knn.commands.answers import Row, open_answers, safe_cell

COLUMNS = PredictOptions(top=2, explain=True).columns
FACTS: dict[str, Any] = {"checkpoint": "abc", "--max-error": None}
ASKED: dict[str, str | None] = {"--backend": None}


def row(path: str, **values: Any) -> Row:
    return {column.name: None for column in COLUMNS} | {"path": path} | values


FULL = row(
    "=1+1.png", answer="-dog", probability=0.75, head_answer="@x", head_probability=0.5,
    nearest_ids=[3, 2**40], nearest_similarities=[-0.5, 1e-8], abstained=False,
    classes=["-dog", "é, \"q\"\n"], class_probabilities=[0.75, 0.25], notices=[],
)  # fmt: skip
BAD = row("b.png", error="+not a picture")


def write(path: Path, rows: list[Row], **options: Any) -> list[Row]:
    """All at once; returns what was heard of."""
    heard: list[Row] = []
    with open_answers(path, COLUMNS, FACTS, ASKED, **options) as file:
        file.begin({"--backend": "torch"})
        file.add((each["path"], each) for each in rows if each["path"] not in file)
        file.finish([each["path"] for each in rows], heard.append)
    return heard


def test_jsonl_is_read_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    assert write(path, [FULL, BAD]) == [FULL, BAD]
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == [FULL, BAD]
    assert [each.name for each in path.parent.iterdir()] == ["answers.jsonl"]


def test_parquet_has_types(tmp_path: Path) -> None:
    from pyarrow import parquet

    path = tmp_path / "answers.parquet"
    write(path, [FULL, BAD])
    table = parquet.read_table(path)
    assert table.to_pylist() == [FULL, BAD]
    kinds = {name: str(table.schema.field(name).type) for name in table.column_names}
    assert kinds["path"] == kinds["error"] == "string"
    assert kinds["probability"] == kinds["p_value"] == "double"
    assert kinds["abstained"] == "bool"
    assert kinds["nearest_ids"] == "list<element: int64>"
    assert kinds["nearest_similarities"] == "list<element: double>"


def test_parquet_of_more_rows_than_are_written_at_once(tmp_path: Path) -> None:
    from pyarrow import parquet

    path = tmp_path / "answers.parquet"
    rows = [row(f"{number}.png", probability=number / 3) for number in range(2345)]
    write(path, rows)
    assert parquet.read_table(path).to_pylist() == rows


def test_csv_has_no_formulas_and_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    write(path, [FULL, BAD])
    with path.open(encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == [column.name for column in COLUMNS]
    for cells in (first, second):
        assert not [cell for cell in cells.values() if cell.startswith(tuple("=+-@\t\r"))]
    for column in COLUMNS:
        for cells, wanted in ((first, FULL), (second, BAD)):
            cell, value = cells[column.name], wanted[column.name]
            if column.kind == "text":
                assert cell.removeprefix("'") == (value or "")
            else:
                assert (json.loads(cell) if cell else None) == value


@pytest.mark.parametrize("text", ["=x", "+1", "-1", "@a", "\ta", "\ra", "'a", "'=a", "''"])
def test_a_formula_becomes_text_and_comes_back(text: str) -> None:
    assert safe_cell(text)[0] == "'"
    assert safe_cell(text).removeprefix("'") == text


@pytest.mark.parametrize("text", ["", "a", "a=b", " =a", "0", "é"])
def test_any_other_text_stays(text: str) -> None:
    assert safe_cell(text) == text


def test_lists_are_as_long_as_was_asked_and_numbers_finite() -> None:
    full = FULL | {"margin": float("nan")}
    short = cut(full, PredictOptions(neighbors=1))
    assert short["nearest_ids"] == [3]
    assert "classes" not in short
    assert "margin" not in short
    assert cut(full, PredictOptions(explain=True, neighbors=0))["margin"] is None
    assert cut(full, PredictOptions(top=1))["classes"] == ["-dog"]


# ---- a run that was stopped ---------------------------------------------------------------------


def stopped(path: Path, *rows: Row) -> Path:
    """What a run leaves that was killed behind these."""
    with open_answers(path, COLUMNS, FACTS, ASKED) as file:
        file.begin({"--backend": "torch"})
        file.add((each["path"], each) for each in rows)
    return path.with_name(path.name + ".unfinished")


def test_it_goes_on_behind_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    journal = stopped(path, FULL)
    whole = journal.read_bytes()
    assert not path.exists()
    for torn in (b'["b.png",[', b'["b.png"]', b"\0\0\0\n", b'{"no": "answer"}\n["b.png",[]]\n'):
        journal.write_bytes(whole + torn)
        with open_answers(path, COLUMNS, FACTS, ASKED) as file:
            assert [key in file for key in ("=1+1.png", "b.png")] == [True, False]
            assert file.settled == {"--backend": "torch"}
            file.begin({"--backend": "onnx"})  # what was settled stays
            file.add([("b.png", BAD)])
        with open_answers(path, COLUMNS, FACTS, ASKED) as file:
            assert len(file) == 2
            assert file.settled == {"--backend": "torch"}
    assert write(path, [BAD, FULL]) == [BAD, FULL]  # in the order of the pictures
    assert not journal.exists()


def test_one_that_was_killed_in_its_first_line_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    journal = stopped(path)
    for size in (0, 20, len(journal.read_bytes()) - 1):
        journal.write_bytes(journal.read_bytes()[:size])
        with open_answers(path, COLUMNS, FACTS, ASKED) as file:
            assert not len(file)
            file.begin({"--backend": "torch"})
        with open_answers(path, COLUMNS, FACTS, ASKED) as file:
            assert file.settled == {"--backend": "torch"}


@pytest.mark.parametrize(
    ("facts", "asked", "match"),
    [
        ({"checkpoint": "other"}, {}, "another checkpoint;"),
        ({"--max-error": 0.1}, {}, "another --max-error;"),
        ({"--top": 3}, {}, "another --top;"),
        ({"checkpoint": "x", "--max-error": 1}, {}, "another checkpoint and another --max-error;"),
        ({}, {"--backend": "onnx"}, "another --backend;"),
    ],
)
def test_another_run_is_refused_and_can_be_replaced(
    facts: dict[str, Any], asked: dict[str, str], match: str, tmp_path: Path
) -> None:
    path = tmp_path / "answers.csv"
    journal = stopped(path, FULL)
    before = journal.read_bytes()
    with (
        pytest.raises(ValueError, match=match),
        open_answers(path, COLUMNS, FACTS | facts, ASKED | asked),
    ):
        pass
    assert journal.read_bytes() == before
    with open_answers(path, COLUMNS, FACTS | facts, ASKED | asked, overwrite=True) as file:
        assert not len(file)


def test_the_same_backend_by_its_name_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    stopped(path, FULL)
    with open_answers(path, COLUMNS, FACTS, {"--backend": "torch"}) as file:
        assert len(file) == 1


def test_a_file_that_is_there_is_refused_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"not to be there yet.*pass --overwrite"):
        write(path, [FULL])
    assert path.read_text() == "mine"
    with open_answers(path, COLUMNS, FACTS, ASKED, overwrite=True) as file:
        file.begin({"--backend": "torch"})
        file.add([("=1+1.png", FULL)])
    assert path.read_text() == "mine"  # until all answers are there
    write(path, [FULL, BAD])  # and the run that began so goes on
    assert path.read_text("utf-8").startswith("path,answer,")
    assert [each.name for each in tmp_path.iterdir()] == ["answers.csv"]


def test_a_strange_file_in_the_place_of_answers_under_way_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    other = tmp_path / "answers.csv.unfinished"
    other.write_text("my notes\n")
    with pytest.raises(ValueError, match="to be answers of a run that was stopped, but it is not"):
        write(path, [FULL])
    assert other.read_text() == "my notes\n"


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    with FileLock(tmp_path / ".answers.csv.lock"), pytest.raises(ValueError, match="one run"):
        write(path, [FULL])
    write(path, [FULL])
