"""Lists of pictures as people write them: every cell is text, and a refusal names its cause."""

import codecs
import os
from pathlib import Path

import pytest

from hf_knn.data.tables import Table, is_table, read_table


def table_of(folder: Path, content: str | bytes, name: str = "list.csv") -> Table:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path)


def refusal(folder: Path, content: str | bytes, name: str = "list.csv") -> str:
    with pytest.raises(
        ValueError, match=rf"^Expected .*{name} to be a list of pictures, but "
    ) as e:
        table_of(folder, content, name)
    return str(e.value)


# ---- labels are text ----------------------------------------------------------------------------

WORDS = [
    "007", "01", "1", "1.0", "1e3", "NA", "N/A", "None", "null", "nan", "NaN", "<NA>", "#N/A", "-",
    "True", "false", "2024-01-01", "1,5", "  a", "a", "a ", " ", "Früchte",
    "猫", "0x10", "-1", "inf", "",
]  # fmt: skip


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_label_is_what_was_typed(separator: str, end: str, tmp_path: Path) -> None:
    cells = [f'"{word}"' if separator in word else word for word in WORDS]
    lines = [f"path{separator}label"] + [f"{i}.png{separator}{c}" for i, c in enumerate(cells)]
    table = table_of(tmp_path, end.join(lines) + end)
    assert table.labels == WORDS
    assert table.places == [f"{row}.png" for row in range(len(WORDS))]
    assert table.splits is None
    assert table.notes == []


def test_a_decimal_comma_beside_semicolons(tmp_path: Path) -> None:
    table = table_of(tmp_path, "path;label;size\na.png;1,5;2,25\nb.png;1.5;3\n")
    assert table.labels == ["1,5", "1.5"]
    assert table.columns["size"] == ["2,25", "3"]


def test_quotes_hold_separators_quotes_and_line_ends(tmp_path: Path) -> None:
    text = 'path,label\n"a, b.png","he said ""cat"""\nc.png,"two\nlines"\nd.png,x,y\n'
    assert "line 5 has 3 cells" in refusal(tmp_path, text)  # lines of the file, not rows
    table = table_of(tmp_path, text.replace(",y", ""))
    assert table.places == ["a, b.png", "c.png", "d.png"]
    assert table.labels == ['he said "cat"', "two\nlines", "x"]


# ---- encodings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "note"),
    [
        ("é.png,Früchte".encode(), None),
        (codecs.BOM_UTF8 + b"path,label\n" + "é.png,Früchte".encode(), None),
        ("path,label\né.png,Früchte".encode("utf-16"), None),
        (codecs.BOM_UTF16_BE + "path,label\né.png,Früchte".encode("utf-16-be"), None),
        (codecs.BOM_UTF16_LE + "\ufeffpath,label\né.png,Früchte".encode("utf-16-le"), None),
        ("path,label\né.png,Früchte".encode("utf-32"), None),
        ("path,label\né.png,Früchte".encode("utf-16-le"), "UTF-16"),
        ("path,label\né.png,Früchte".encode("utf-16-be"), "UTF-16"),
        ("path,label\né.png,Früchte".encode("cp1252"), "cp1252"),
    ],
)
def test_encodings(data: bytes, note: str | None, tmp_path: Path) -> None:
    if note is None and not data.startswith(b"\xc3"):
        assert table_of(tmp_path, data).notes == []
    elif note is not None:
        assert note in " ".join(table_of(tmp_path, data).notes)
    table = table_of(tmp_path, data)
    assert (table.places, table.labels) == (["é.png"], ["Früchte"])


def test_what_is_no_text_is_called_what_it_is(tmp_path: Path) -> None:
    assert "an Excel or Numbers workbook; save it as csv" in refusal(tmp_path, b"PK\x03\x04xxxx")
    assert "an Excel workbook" in refusal(tmp_path, b"\xd0\xcf\x11\xe0xx")
    assert "a parquet file" in refusal(tmp_path, b"PAR1xx")
    assert "a compressed file" in refusal(tmp_path, b"\x1f\x8bxx")
    assert "line 3 has a NUL byte" in refusal(tmp_path, b"path,label\na.png,cat\nb.\0png,dog\n")
    assert "line 2 is neither UTF-8 nor cp1252" in refusal(
        tmp_path, b"path,label\na\x81.png,\xe9\n"
    )
    assert "no whole utf-16 text" in refusal(tmp_path, codecs.BOM_UTF16_LE + b"p\0a\0t")


# ---- headers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["path", "file", "filename", "file_name", "image", "File Name"])
@pytest.mark.parametrize("label", ["label", "class", "category", " Class "])
def test_header_synonyms(path: str, label: str, tmp_path: Path) -> None:
    table = table_of(tmp_path, f"{label};{path};size\ncat;a.png;3\n")
    assert (table.places, table.labels, table.notes) == (["a.png"], ["cat"], [])
    assert table.columns == {label.strip(): ["cat"], path: ["a.png"], "size": ["3"]}


@pytest.mark.parametrize("name", ["list.CSV", "list.tsv", "list.TXT", "my list [1].csv"])
def test_no_header(name: str, tmp_path: Path) -> None:
    assert is_table(name)
    path = tmp_path / name
    path.write_text("a.png\timage\nb.JPG\tpath\n")  # the labels are words that a header has
    table = read_table(path)
    assert (table.places, table.labels) == (["a.png", "b.JPG"], ["image", "path"])
    assert "has no header: its tab-separated columns were read as path, label" in table.notes[0]
    path.write_text("image\ta.png\npath\tb.JPG\n")
    assert read_table(path)[:2] == table[:2]
    path.write_text("a.png\nb.png\n")
    assert read_table(path)[:2] == (["a.png", "b.png"], None)


def test_what_is_no_list() -> None:
    assert not any(map(is_table, ["a.png", "csv", "a.csv.gz", "a.parquet", "a.xlsx"]))


def test_which_columns_are_meant(tmp_path: Path) -> None:
    table = table_of(tmp_path, "image,path,category,label\n1,a.png,animal,cat\n")
    assert (table.places, table.labels) == (["a.png"], ["cat"])
    assert "The column path of list.csv was read as the path, not image." in table.notes
    assert "The column label of list.csv was read as the label, not category." in table.notes
    assert "both path and Path may be its path" in refusal(tmp_path, "path,Path\na.png,b.png\n")
    assert "several of its columns are called label" in refusal(
        tmp_path, "path,label,label\na,b,c\n"
    )
    assert "['picture of', 'kind']" in refusal(tmp_path, "picture of,kind\na.png,cat\n")
    assert "no header, and 2 columns of which 2" in refusal(tmp_path, "a.png,mask/a.png\n")
    assert "no header, and 3 columns of which 1" in refusal(tmp_path, "a.png,cat,big\n")
    assert "separated by commas" in refusal(tmp_path, "a.png 3\nb.png 4\n", "list.txt")


def test_pictures_without_labels(tmp_path: Path) -> None:
    assert table_of(tmp_path, "file_name\na.png\nb.png\n")[:2] == (["a.png", "b.png"], None)
    empty = table_of(tmp_path, "path,label\na.png,\nb.png,\n")
    assert empty.labels is None
    assert "The column label of list.csv is empty" in empty.notes[0]
    assert table_of(tmp_path, 'path,label\na.png,""\nb.png,x\n').labels == ["", "x"]


def test_a_split_column(tmp_path: Path) -> None:
    table = table_of(tmp_path, "Split,path,label\ntrain,a.png,cat\nVal,b.png,dog\n")
    assert table.splits == ["train", "Val"]
    assert "line 3 names no split" in refusal(tmp_path, "split,path\ntrain,a.png\n,b.png\n")


def test_excel_and_editors(tmp_path: Path) -> None:
    assert table_of(tmp_path, "sep=;\r\npath;label\r\na,b.png;cat\r\n").places == ["a,b.png"]
    # Excel ends all lines with a separator, or some without one
    table = table_of(tmp_path, "path,label,,\na.png,cat,,\nb.png,dog\n,,,\n\n   \n")
    assert (table.places, table.labels) == (["a.png", "b.png"], ["cat", "dog"])
    table = table_of(tmp_path, "path,label,note\na.png,cat,x\nb.png,dog\n")
    assert table.columns["note"] == ["x", ""]
    assert table_of(tmp_path, ",path,label\n0,a.png,cat\n").columns["column 1"] == ["0"]  # pandas
    table = table_of(tmp_path, "# by hand\n#\n#path,label\n#1.png,cat\n")
    assert (table.places, table.labels) == (["#1.png"], ["cat"])
    assert "2 lines of remarks" in table.notes[0]


def test_spaces_behind_every_separator(tmp_path: Path) -> None:
    table = table_of(tmp_path, 'path, label\na.png, cat\nb.png, "big, cat"\n')
    assert table.labels == ["cat", "big, cat"]
    assert "spaces behind every comma" in table.notes[0]
    table = table_of(tmp_path, "path, label\na.png, cat\nb.png,cat\n")  # then they are of the label
    assert (table.labels, table.notes) == ([" cat", "cat"], [])


# ---- rows ---------------------------------------------------------------------------------------


def test_a_line_that_does_not_fit_is_named(tmp_path: Path) -> None:
    assert "line 3 has 3 cells where the first has 2" in refusal(
        tmp_path, "path,label\na.png,cat\nb,c.png,dog\n"
    )
    assert "line 4 has 1 of the 2 cells, and no label" in refusal(
        tmp_path, "path,label\na.png,cat\n\nb.png\n"
    )
    assert "line 2 names no picture" in refusal(tmp_path, "path,label\n,cat\n")
    assert "quotes of line 3 do not close" in refusal(tmp_path, 'path,label\na.png,x\nb.png,"cat\n')
    assert "quotes of line 2 do not close" in refusal(tmp_path, 'path,label\n"a"b.png,x\n')
    long = 'path,label\na.png,"' + "cat\n" * 50_000
    assert "quotes of line 2 do not close" in refusal(tmp_path, long)


@pytest.mark.parametrize("text", ["", "\n\n", "\ufeff", "sep=;\n", "# nothing\n", ",,\n;\n"])
def test_nothing_in_it(text: str, tmp_path: Path) -> None:
    assert "it is empty; write one line per picture" in refusal(tmp_path, text)


def test_a_header_alone(tmp_path: Path) -> None:
    assert "it has a header and no rows" in refusal(tmp_path, "path,label\n")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "gone.csv")


@pytest.mark.parametrize(
    ("place", "wanted"),
    [
        ("cat\\a b.png", "cat/a b.png"),
        (".\\..\\cat\\a.png", "./../cat/a.png"),
        ("C:\\pictures\\a.png", "C:/pictures/a.png"),
        ("\\\\server\\share\\a.png", "//server/share/a.png"),
        ("file:///data/a%20b%23.png", "/data/a b#.png"),
        ("file:/data/a.png", "/data/a.png"),
        ("file://localhost/data/a.png", "/data/a.png"),
        ("file:///C:/data/a.png", "C:/data/a.png"),
        ("file://server/share/a.png", "//server/share/a.png"),
        ("x[1]*?%20#.png", "x[1]*?%20#.png"),
        ("12:30.png", "12:30.png"),
    ],
)
def test_paths_of_other_systems(place: str, wanted: str, tmp_path: Path) -> None:
    assert table_of(tmp_path, f"path,label\n{place},cat\n").places == [wanted]


@pytest.mark.skipif(os.sep != "/", reason="a backslash is no part of a name here")
def test_a_backslash_may_be_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "a\\b.png").write_bytes(b"x")
    assert table_of(tmp_path, "path\na\\b.png\nc\\d.png\n").places == ["a\\b.png", "c/d.png"]


def test_an_address_is_no_path(tmp_path: Path) -> None:
    for address in ("https://a.org/b.png", "s3://bucket/b.png", "hf://datasets/a/b.png"):
        assert f"line 2 names an address ({address}); download" in refusal(
            tmp_path, f"path\n{address}\n"
        )


def test_a_picture_under_several_labels_is_said(tmp_path: Path) -> None:
    text = "path,label\na.png,cat\na.png,dog\nb.png,cat\nb.png,cat\nc.png,cat\n"
    assert table_of(tmp_path, text).notes == [
        "2 pictures of list.csv are listed more than once, 1 of them under several labels (a.png)."
    ]


def test_many_rows(tmp_path: Path) -> None:
    text = "path,label\n" + "".join(f"{row:06}.png,{row % 7:03}\n" for row in range(200_000))
    table = table_of(tmp_path, text)
    assert (len(table.places), table.places[-1]) == (200_000, "199999.png")
    assert table.labels is not None
    assert sorted(set(table.labels)) == [f"00{label}" for label in range(7)]
