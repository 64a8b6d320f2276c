"""Reports: against scikit-learn, at their edges, as JSON and as a page."""

import json
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from support.pictures import picture
from support.reports import known_model, report_of, rows_of, with_prints

from hf_knn.fit import Report
from hf_knn.fit.picking import PICK_SCRIPT
from hf_knn.fit.report import NOBODY, Confusion
from hf_knn.fit.report_page import MOST_PICTURES, findings
from hf_knn.model.pictures import small_webp

NAMES = ["ant", "bee", "cat", "dog"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def noisy() -> Any:
    """A model of ten classes that is often wrong, and what it is asked."""
    names = [f"class {i}" for i in range(10)]
    generator = np.random.default_rng(0)
    model = known_model(names, [i % 10 for i in range(60)], noise=1.5, knn_weight=0.5)
    return model, rows_of(names, generator.integers(0, 10, 300).tolist(), noise=1.5)


def answers_in(report: Report, labels: list[int]) -> list[int]:
    """The answers to all pictures, from what the report says of the wrong ones."""
    wrong = {each.id: each.answer for each in report.wrong}
    return [wrong.get(row, label) for row, label in enumerate(labels)]


def test_classes_and_confusions_are_scikit_learns(noisy: Any) -> None:
    model, rows = noisy
    report, labels = report_of(model, rows), rows.labels.tolist()
    answers = model(features=rows.features).logits.argmax(1).tolist()
    assert answers_in(report, labels) == answers
    assert 20 < len(report.wrong) < 280
    matrix = np.zeros((10, 10), int)
    for cell in report.confusion:
        matrix[cell.label, cell.answer] += cell.count
    np.testing.assert_array_equal(matrix, confusion_matrix(labels, answers, labels=range(10)))
    precision, recall, _, support = precision_recall_fscore_support(
        labels, answers, labels=range(10), zero_division=np.nan
    )
    by_label = sorted(report.classes, key=lambda row: row.label)
    assert [row.count for row in by_label] == support.tolist()
    np.testing.assert_allclose([row.recall.value for row in by_label], recall)
    np.testing.assert_allclose([row.precision.value for row in by_label], precision)
    np.fill_diagonal(matrix, 0)
    for row in by_label:
        assert row.confused == matrix[row.label].max()
        assert row.confused_with is None or matrix[row.label, row.confused_with] == row.confused
        assert row.rows == 6


def test_numbers_are_those_of_evaluate_inside_of_their_intervals(noisy: Any) -> None:
    report = report_of(*noisy)
    assert report.count == 300
    assert set(report.voices) == {"head", "knn", "blend"}
    for voice, numbers in report.voices.items():
        for name, number in numbers.items():
            assert number.value == pytest.approx(report.metrics[f"eval_{voice}_{name}"], abs=1e-6)
            if name != "ece":
                assert number.low is not None
                assert number.high is not None
                assert number.low <= number.value <= number.high
                assert [number.low, number.high] == report.intervals()[f"eval_{voice}_{name}"]
    assert "eval_blend_ece" not in report.intervals()
    assert report.metrics["eval_blend_gain"] == pytest.approx(
        report.comparisons[0].difference.value
    )
    assert sum(row[2] for row in report.reliability) == 300


def test_wrong_answers_come_with_confidence_and_neighbours_the_surest_first(noisy: Any) -> None:
    model, rows = noisy
    report = report_of(model, rows)
    sure = [each.confidence for each in report.wrong]
    assert sure == sorted(sure, reverse=True)
    for each in report.wrong[:10]:
        with torch.inference_mode():
            output = model(features=rows.features[each.id : each.id + 1], return_neighbors=True)
        probabilities = output.logits[0].exp()
        assert each.label == rows.labels[each.id] != each.answer
        assert each.confidence == pytest.approx(float(probabilities[each.answer]), abs=1e-5)
        assert each.label_confidence == pytest.approx(float(probabilities[each.label]), abs=1e-5)
        assert each.head == int(output.head_logits[0].argmax())
        assert each.knn == int(output.knn_log_probs[0].argmax())
        assert [near.id for near in each.neighbors] == output.neighbors.ids[0].tolist()
        similarities = [near.similarity for near in each.neighbors]
        assert similarities == pytest.approx(output.neighbors.similarities[0].tolist())
        for near in each.neighbors:
            assert near.path == model.datastore.path_of(near.id)
            assert near.path.split("/")[1] == report.name_of(near.label)
        assert each.path == rows.paths[each.id]


def test_pictures_that_are_stored_are_left_out_and_counted() -> None:
    model = known_model(NAMES, [0, 1, 2, 3] * 3, noise=0.5)
    rows = rows_of(NAMES, [0, 1, 2, 3, 0, 1, 2, 3], looks=[0, 1, 2, 3, 1, 1, 2, 2])
    stored: Any = model.datastore
    rows.features[:3] = stored.features[:3].float()
    report, alone = report_of(model, rows), report_of(model, rows.select([3, 4, 5, 6, 7]))
    assert (report.stored, report.count) == (3, 5)
    assert report.voices == alone.voices
    assert report.classes == alone.classes
    assert report.wrong == alone.wrong
    assert {each.id for each in report.wrong} <= {3, 4, 5, 6, 7}
    assert report.intervals().keys() > alone.intervals().keys()
    for name, number in report.with_stored["blend"].items():
        assert number.value == pytest.approx(report.metrics[f"eval_blend_{name}"], abs=1e-6)
        without = report.metrics[f"eval_without_stored_blend_{name}"]
        assert report.voices["blend"][name].value == pytest.approx(without, abs=1e-6)
    assert "3 of 8 pictures are stored in the model and were left out." in report.notes
    every = report_of(model, rows.select([0, 1, 2]))
    assert (every.stored, every.count, every.with_stored) == (3, 3, {})
    assert "no measure of what it can do" in every.notes[0]


# ---- edges --------------------------------------------------------------------------------------


def saved(report: Report, folder: Path) -> tuple[str, dict[str, Any]]:
    """The page, and the JSON as a strict reader has it."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert report.save(folder) == folder / "report.html"
    text = (folder / "report.json").read_text("utf-8")
    return (folder / "report.html").read_text("utf-8"), json.loads(text, parse_constant=refuse)


def test_all_right(tmp_path: Path) -> None:
    report = report_of(known_model(NAMES, [0, 1, 2, 3] * 3), rows_of(NAMES, [0, 1, 2, 3] * 3))
    page, found = saved(report, tmp_path)
    assert report.wrong == ()
    assert report.voices["blend"]["top1"].say_share(12) == "100 % of 12 (at least 75 %)"
    assert "100 % of 12 (at least 75 %)" in page
    assert "100.0" not in page
    assert found["wrong"] == []
    assert {cell["label"] == cell["answer"] for cell in found["confusion"]} == {True}
    assert all(row["confused_with"] is None for row in found["classes"])


def test_all_wrong(tmp_path: Path) -> None:
    rows = rows_of(NAMES, [0, 1, 2, 3], looks=[1, 2, 3, 0])
    report = report_of(known_model(NAMES, [0, 1, 2, 3] * 3), rows)
    page, found = saved(report, tmp_path)
    assert len(report.wrong) == len(found["wrong"]) == 4
    assert "0 % of 4 (at most 49 %)" in page
    assert [row["confused_with"] for row in found["classes"]] == ["bee", "cat", "dog", "ant"]
    assert findings(report)[-1].startswith("4 of 4 wrong answers are at least 90% sure")
    assert found["findings"] == findings(report)


def test_two_classes_one_of_them_without_a_picture_and_one_picture(tmp_path: Path) -> None:
    report = report_of(known_model(["yes", "no"], [0, 0, 1, 1]), rows_of(["yes", "no"], [0]))
    page, found = saved(report, tmp_path)
    assert "eval_blend_auroc" in report.metrics
    assert found["metrics"]["eval_blend_auroc"] is None  # of one class there is none
    assert [(row["label"], row["count"]) for row in found["classes"]] == [("yes", 1), ("no", 0)]
    assert found["classes"][1]["recall"]["value"] is None
    assert found["voices"]["blend"]["nll"]["low"] is None
    assert "100 % of 1 (at least 20 %)" in page
    assert "nan" not in page


def test_a_class_that_was_taught_later_and_is_unknown_to_the_head(tmp_path: Path) -> None:
    model = known_model(NAMES, [0, 1, 2, 3] * 3)
    model.teach(features=rows_of([*NAMES, "fox"], [4] * 3).features, labels=["fox"] * 3)
    rows = rows_of([*NAMES, "fox"], [0, 4, 4], noise=1e-2)
    report = report_of(model, rows)
    _, found = saved(report, tmp_path)
    assert (report.stored, report.count) == (0, 3)
    fox = next(row for row in found["classes"] if row["label"] == "fox")
    assert (fox["count"], fox["right"], fox["rows"]) == (2, 2, 3)
    assert "The head does not know fox: only the neighbours find such pictures." in found["notes"]
    assert found["voices"]["head"]["nll"]["value"] > 2 / 3 * 27  # of a floor of 1e-12


def test_a_model_without_a_datastore(tmp_path: Path) -> None:
    model = known_model(NAMES, [0])
    model.datastore = None
    page, found = saved(report_of(model, rows_of(NAMES, [0, 1, 2, 3])), tmp_path)
    assert set(found["voices"]) == {"head", "blend"}
    assert found["comparisons"] == []
    assert "stored pictures" not in page.lower().replace("stored pictures nearest", "").replace(
        "stored pictures that vote", ""
    )


def test_a_picture_that_no_voice_knows_an_answer_to(tmp_path: Path) -> None:
    report = report_of(known_model(NAMES, [0, 1] * 3), rows_of(NAMES, [0, 1]))
    silent = Confusion(2, NOBODY, 1)
    page, found = saved(
        Report(**{**vars(report), "confusion": (*report.confusion, silent)}), tmp_path
    )
    assert found["confusion"][-1] == {"label": "cat", "answer": None, "count": 1}
    assert page.count("(no answer)") >= 2


def test_200_classes_are_listed_and_not_drawn(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(200)]
    labels = list(range(200))
    looks = [(label + 1) % 200 if label < 90 else label for label in labels]
    report = report_of(known_model(names, labels * 2), rows_of(names, labels, looks=looks))
    page, found = saved(report, tmp_path)
    assert len(found["classes"]) == 200
    assert len(found["wrong"]) == 90
    assert 'class="table heat"' not in page
    assert "40 more pairs of classes are in report.json." in page
    assert f"{90 - MOST_PICTURES} more wrong answers are in report.json." in page
    assert page.count('class="group"') == MOST_PICTURES
    small = report_of(known_model(NAMES, [0, 1, 2, 3]), rows_of(NAMES, [0, 1, 2, 3]))
    assert 'class="table heat"' in saved(small, tmp_path)[0]


# ---- the page -----------------------------------------------------------------------------------

HOSTILE = ["<script>alert(1)</script>", "ثعلب أحمر", "x" * 300, "\u202e\x1b[31mevil\"'&"]


class Seen(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts += data


def hostile_page(folder: Path, **options: Any) -> Seen:
    rows = rows_of(HOSTILE, [0, 1, 2, 3] * 2, looks=[1, 2, 3, 0, 0, 1, 2, 3])
    rows.paths = [f'{row}/"><img src=x onerror=alert(2)>.png' for row in range(8)]
    report = report_of(known_model(HOSTILE, [0, 1, 2, 3] * 3), rows, **options)
    return Seen(saved(report, folder)[0])


def test_hostile_names_are_texts(tmp_path: Path) -> None:
    page = hostile_page(tmp_path)
    assert {"script", "img"} & {*page.tags[: page.tags.index("section")]} == set()
    assert page.tags.count("script") == 1  # that of the check boxes, by its hash
    assert page.texts.count(PICK_SCRIPT) == 1
    assert page.tags.count("img") == 1  # the drawing
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert HOSTILE[0] in page.texts
    assert HOSTILE[1] in page.texts
    assert '"><img src=x onerror=alert(2)>.png' in page.texts
    assert not any(each in page.texts for each in "\u202e\x1b")
    assert page.attributes.count(("title", "x" * 300)) == 2  # a row and a column of the matrix
    assert page.texts.count("x" * 59 + "…") > 4


def test_a_page_needs_nothing_from_elsewhere_and_its_boxes_are_reached_by_keyboard(
    tmp_path: Path,
) -> None:
    page = hostile_page(tmp_path, pictures={row: picture(row % 4, row) for row in range(8)})
    links = [value for name, value in page.attributes if name in ("src", "href")]
    assert all(link and link.startswith(("data:image/", "#s")) for link in links)
    assert page.tags.count("img") == 1 + 4
    levels = [int(tag[1]) for tag in page.tags if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    boxes = page.tags.count("table")
    assert page.attributes.count(("tabindex", "0")) == boxes >= 4
    assert page.attributes.count(("role", "region")) == boxes


def images_in(folder: Path) -> int:
    return (folder / "report.html").read_text("utf-8").count("<img ") - 1


def test_pictures_are_shown_where_they_are_at_hand_and_are_those_of_the_rows(
    tmp_path: Path,
) -> None:
    model = known_model(NAMES, [0, 1, 2, 3] * 3)
    rows = rows_of(NAMES, [0, 1], looks=[1, 2])
    stored = with_prints(model)
    own = {0: picture(0, 0), 1: picture(1, 1)}
    report_of(model, rows).save(tmp_path)
    assert images_in(tmp_path) == 0
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "Pictures that are not at hand here: 2 of 2." in text
    report_of(model, rows, pictures=own).save(tmp_path)
    assert images_in(tmp_path) == 2
    report_of(model, rows, pictures=own, stored_pictures=stored).save(tmp_path)
    assert images_in(tmp_path) == 2 + 6
    assert "not at hand" not in (tmp_path / "report.html").read_text("utf-8")
    others = {row_id: picture(4, row_id) for row_id in stored}  # of the same ids, but others
    others[501] = stored[501]
    report_of(model, rows, pictures=own, stored_pictures=others).save(tmp_path)
    assert images_in(tmp_path) == 2 + 1
    model.keep_thumbnails({row_id: stored[row_id] for row_id in (501, 505)})
    report_of(model, rows, pictures=own, stored_pictures=others).save(tmp_path)
    assert images_in(tmp_path) == 2 + 2
    assert small_webp(stored[505]) == model.thumbnails.get(505)  # type: ignore[union-attr]


def test_pictures_that_are_gone_or_broken_leave_the_page_whole(tmp_path: Path) -> None:
    model = known_model(NAMES, [0, 1, 2, 3] * 3)
    rows = rows_of(NAMES, [0, 1, 2], looks=[1, 2, 3])
    own = {0: str(tmp_path / "gone.png"), 1: b"no picture"}
    report_of(model, rows, pictures=own).save(tmp_path)
    assert images_in(tmp_path) == 0


def test_a_report_does_not_follow_the_model_that_it_was_made_of(tmp_path: Path) -> None:
    model = known_model(NAMES, [0, 1, 2, 3] * 3)
    stored = with_prints(model)
    report = report_of(model, rows_of(NAMES, [0], looks=[1]), stored_pictures=stored)
    model.forget(ids=[501, 505, 509])
    report.save(tmp_path)
    assert images_in(tmp_path) == 3


def test_the_same_answers_make_the_same_report(noisy: Any, tmp_path: Path) -> None:
    first, second = report_of(*noisy), report_of(*noisy)
    assert first == second
    assert saved(first, tmp_path / "a") == saved(second, tmp_path / "b")
