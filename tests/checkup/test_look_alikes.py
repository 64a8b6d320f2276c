"""Classes that are spelled alike are named by doctor; others are left alone."""

import json

import numpy as np
import pytest
from support.commands import hf_knn
from support.pictures import small_backbone, small_processor, write_folder

from hf_knn.checkup.findings import Kind, Pictures
from hf_knn.checkup.labels import look_alike_findings


def of_classes(*names: str, counts: tuple[int, ...] = ()) -> Pictures:
    labels = np.repeat(np.arange(len(names)), counts or (1,) * len(names))
    rows = np.arange(len(labels))
    return Pictures(["train"] * len(rows), rows, rows, [""] * len(rows), labels, names)


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        ("Cat", "cat", "capital letters"),
        ("cat ", "cat", "spaces"),
        (" cat", "cat", "spaces"),
        ("black  cat", "black cat", "spaces"),
        ("c\u0430t", "cat", "letters of several alphabets"),
        ("\u0421at", "cat", "letters of several alphabets"),
        ("\u03bfwl", "owl", "letters of several alphabets"),
        ("ca\u200bt", "cat", "invisible characters"),
        ("cat\ufeff", "cat", "invisible characters"),
        ("\u2764\ufe0f", "\u2764", "invisible characters"),
        ("\uff43\uff41\uff54", "cat", "the width of letters"),
        ("\ufb01sh", "fish", "the width of letters"),
        ("ice_cream", "ice cream", "spaces, dashes and underscores"),
        ("ice\u2013cream", "ice-cream", "spaces, dashes and underscores"),
        ("icecream", "Ice Cream", "spaces, dashes and underscores"),
        ("cats", "cat", "an s at the end"),
        ("STRASSE", "straße", "capital letters"),
    ],
)
def test_two_names_of_one_class(one: str, other: str, difference: str) -> None:
    pictures = of_classes(one, other, "dog", counts=(2, 5, 9))
    (found,) = look_alike_findings(pictures)
    assert (found.kind, found.label, found.suggested) == (Kind.LOOK_ALIKE, 0, 1)  # the larger stays
    assert found.detail.endswith(f"differ in {difference} only.")
    assert "2 pictures" in found.detail
    assert "5 pictures" in found.detail


@pytest.mark.parametrize(
    "names",
    [
        ("cat", "dog"),
        ("C", "C++", "C#"),
        ("1", "-1", "01"),
        ("10", "1-0", "1 0"),
        ("glass", "gas"),
        ("bus", "bu"),
        ("schön", "schon"),
        ("año", "ano"),
        ("की", "का"),  # vowel signs are part of the word
        ("☀", "☁"),
        ("がぎ", "かき"),
    ],
)
def test_names_that_are_different(names: tuple[str, ...]) -> None:
    assert look_alike_findings(of_classes(*names)) == []


def test_three_names_of_one_class() -> None:
    found = look_alike_findings(of_classes("Cat", "cat", "cats", counts=(1, 9, 2)))
    assert [(one.label, one.suggested) for one in found] == [(0, 1), (2, 1)]


def test_doctor_names_them(tmp_path) -> None:
    backbone = tmp_path / "backbone"
    small_backbone().save_pretrained(backbone)
    small_processor().save_pretrained(backbone)
    write_folder(tmp_path / "pets", {"cat": 6, "Cat": 5, "dog": 6})
    (tmp_path / "pets" / "dog" / "notes.txt").write_text("x")
    done = hf_knn("doctor", tmp_path / "pets", "--backbone", backbone, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "Classes spelled alike" in done.stdout
    assert "1 .txt in dog was left out" in " ".join(done.output.split())
    lines = (tmp_path / "out" / "findings.csv").read_text(encoding="utf-8")
    assert "look_alike_classes" in lines
    assert "'Cat' (5 pictures) and 'cat' (6 pictures) differ in capital letters only." in lines
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "differ in capital letters only." in page
    again = hf_knn(
        "doctor", tmp_path / "pets", "--backbone", backbone, "-o", tmp_path / "out", "--json"
    )
    assert json.loads(again.stdout)["counts"]["look_alike_classes"] == 1
