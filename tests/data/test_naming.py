"""Folders of classes and names of files: valid everywhere, and no two alike."""

import os
from pathlib import Path

import pytest

from hf_knn.data.naming import MOST_BYTES, FreeNames, folder_names


@pytest.mark.parametrize(
    ("label", "folder"),
    [
        ("cat", "cat"),
        ('a/b\\c:d*e?f"g<h>i|j', "a_b_c_d_e_f_g_h_i_j"),
        ("..", "__"),
        (".", "_"),
        (".hidden", "_hidden"),
        ("ends in a dot.", "ends in a dot_"),
        (" spaces ", "spaces"),
        ("", "_"),
        ("  ", "_"),
        ("CON", "CON_"),
        ("con.txt", "con_.txt"),
        ("Lpt1", "Lpt1_"),
        ("console", "console"),
        ("🦊 fox", "🦊 fox"),
        ("tab\tand\nline\x7f", "tab_and_line_"),
        ("lone \ud800", "lone _"),
        ("e\u0301te\u0301", "\xe9t\xe9"),
        ("unsure", "unsure (2)"),
        ("Strange", "Strange (2)"),
    ],
)
def test_a_class_is_a_folder_anywhere(label: str, folder: str, tmp_path: Path) -> None:
    assert folder_names([label], ["unsure", "strange"]) == [folder]
    (tmp_path / folder).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [folder]


def test_no_two_classes_share_a_folder_and_later_ones_change_nothing() -> None:
    labels = ["Cat", "cat", "CAT", "a/b", "a_b", "a:b", "cat (2)", "stra\xdfe", "STRASSE"]
    names = folder_names(labels, [])
    assert names[:6] == ["Cat", "cat (2)", "CAT (3)", "a_b", "a_b (2)", "a_b (3)"]
    assert len({name.casefold() for name in names}) == len(labels)
    for count in range(len(labels)):
        assert folder_names(labels[:count], []) == names[:count]


def test_long_names_are_cut_and_stay_apart(tmp_path: Path) -> None:
    names = folder_names(["🦊" * 300, "🦊" * 301], [])
    for name in names:
        (tmp_path / name).mkdir()
    assert len(names[0]) == 50
    assert names[1].endswith(" (2)")


def test_names_of_a_group_get_one_number(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "A.jpg").touch()
    (tmp_path / "cat" / "a (2).xmp").touch()
    names = FreeNames(tmp_path)
    group = ["cat/a.jpg", "cat/a.xmp", "cat/a.jpg.json"]
    assert names.of(group) == ["cat/a (3).jpg", "cat/a (3).xmp", "cat/a (3).jpg.json"]
    assert names.of(group[:1]) == ["cat/a (2).jpg"]
    assert names.of(["dog/a.jpg"]) == ["dog/a.jpg"]  # there is no such folder yet
    assert names.of(["dog/A.JPG"]) == ["dog/A (2).JPG"]


def test_a_name_that_is_as_long_as_it_may_be_is_cut_for_a_number(tmp_path: Path) -> None:
    names, long = FreeNames(tmp_path), "é" * 125 + ".jpeg"
    assert len(os.fsencode(long)) == MOST_BYTES
    assert names.of([long]) == [long]
    second = names.of([long])[0]
    assert second.endswith("é (2).jpeg")
    assert len(os.fsencode(second)) <= MOST_BYTES
