"""Folders and lists as people have them: what goes in, and what comes out.

The table says of each situation which pictures of which class are in which split, what was said,
or why it was refused.
"""

import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.pictures import encoded, picture

from hf_knn.data.decode import decode_image
from hf_knn.data.folders import read_folder
from hf_knn.data.loading import label_names, load_splits, read_labelled, read_source
from hf_knn.data.places import check_classes, paths_of

PICTURE = encoded(picture(0, 0))
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".avif", ".heic")
NFC_NAME, NFD_NAME = (unicodedata.normalize(form, "Früchte") for form in ("NFC", "NFD"))

NO_LABEL = "(no label)"

Wanted = dict[str, dict[str, int]]
"""How many pictures of each class are in each split."""


class Situation(NamedTuple):
    """A folder or a list, and what comes of it.

    Attributes:
        what: in words.
        files: their paths; a text behind one is its content, `->` begins the target of a link.
        wanted: what comes out, or a pattern of the refusal.
        notes: patterns of all that is said, in any order; nothing else may be.
        source: what is opened, inside the folder.
        splits: the argument.
    """

    what: str
    files: Sequence[str] | dict[str, str]
    wanted: Wanted | str
    notes: Sequence[str] = ()
    source: str = ""
    splits: bool | None = None


def some(*folders: str, count: int = 2) -> list[str]:
    """So many pictures in each folder."""
    return [f"{folder}/{n}.png" for folder in folders for n in range(count)]


def with_texts(files: Sequence[str], **texts: str) -> dict[str, str]:
    """Pictures, and files of text; `__` stands for the dot in a name."""
    return dict.fromkeys(files, "") | {k.replace("__", "."): v for k, v in texts.items()}


CAT_DOG = {"train": {"cat": 2, "dog": 2}}
LIST = "file_name,label\n0.png,cat\n1.png,dog\n"

FOLDERS = [
    Situation("one sub-folder per label", some("cat", "dog"), CAT_DOG),
    Situation(
        "folders of years below the labels",
        some("dog/2023", "dog/2024", "cat/2023"),
        {"train": {"cat": 2, "dog": 4}},
    ),
    Situation(
        "pictures in a label and in a folder below it",
        some("dog", "dog/blurry", "cat"),
        {"train": {"cat": 2, "dog": 4}},
    ),
    Situation(
        "a folder crops in each label",
        some("dog/crops", "cat/crops"),
        CAT_DOG,
    ),
    Situation(
        "five folders deep",
        some("dog/a/b/c/d", "cat/a/b/c/d"),
        CAT_DOG,
    ),
    Situation(
        "train, validation and test",
        some("train/cat", "train/dog", "validation/cat", "test/dog"),
        CAT_DOG | {"validation": {"cat": 2}, "test": {"dog": 2}},
    ),
    Situation(
        "Train, Val and TEST",
        some("Train/cat", "Train/dog", "Val/cat", "TEST/dog"),
        CAT_DOG | {"validation": {"cat": 2}, "test": {"dog": 2}},
    ),
    Situation(
        "splits with folders below the labels",
        some("train/cat/2023", "train/dog/x/y", "valid/cat/2023"),
        CAT_DOG | {"validation": {"cat": 2}},
    ),
    Situation(
        "a class called train beside bus and car",
        some("bus", "car", "train"),
        "train is called like a split and bus, car are not.*--splits none.*split",
    ),
    Situation(
        "the same with --splits none",
        some("bus", "car", "train"),
        {"train": {"bus": 2, "car": 2, "train": 2}},
        splits=False,
    ),
    Situation(
        "classes beside a folder test of pictures to classify",
        some("cat", "dog", "test"),
        "test is called like a split and cat, dog are not",
    ),
    Situation(
        "train, dev and test: dev is no split of a folder",
        some("train/cat", "dev/cat", "test/cat"),
        "test, train are called like splits and dev is not",
    ),
    Situation(
        "splits read as classes with --splits none",
        some("train/cat", "test/dog"),
        {"train": {"train": 2, "test": 2}},
        splits=False,
    ),
    Situation(
        "splits=True with folders of classes",
        some("cat", "dog"),
        "called train, validation or test, but got cat, dog",
        splits=True,
    ),
    Situation(
        "val and valid at once",
        some("train/cat", "val/cat", "valid/cat"),
        "one folder of .* the split validation, but got val, valid",
    ),
    Situation(
        "train and Train at once",
        some("train/cat", "Train/cat"),
        "one folder of .* the split train, but got Train, train",
    ),
    Situation(
        "a class called training set, crash test and my_val",
        some("training set", "crash test", "my_val"),
        {"train": {"training set": 2, "crash test": 2, "my_val": 2}},
    ),
    Situation(
        "pictures called test.png, IMG_val_7.png and train.jpg",
        ["cat/test.png", "cat/IMG_val_7.png", "dog/train.jpg", "dog/0.png"],
        CAT_DOG,
    ),
    Situation(
        "a text training_log.txt beside the pictures",
        with_texts(some("cat", "dog"), training_log__txt="epoch 1"),
        CAT_DOG,
        [r"1 \.txt in the folder itself was left out: it is no picture\."],
    ),
    Situation(
        "an empty folder train beside the classes",
        {**with_texts(some("cat", "dog")), "train/": ""},
        CAT_DOG,
        [r"no picture in train\."],
    ),
    Situation(
        "splits below the labels",
        some("cat/train", "cat/test", "dog/train", "dog/test"),
        {"train": {"cat": 4, "dog": 4}},
        ["cat/test, cat/train, dog/test, dog/train are below a class"],
    ),
    Situation(
        "splits without folders of classes",
        some("train", "test"),
        {"train": {NO_LABEL: 2}, "test": {NO_LABEL: 2}},
    ),
    Situation(
        "a test split without labels",
        some("train/cat", "train/dog", "test"),
        CAT_DOG | {"test": {NO_LABEL: 2}},
    ),
    Situation(
        "pictures beside the folders of a split",
        [*some("train/cat", "train/dog"), "train/map.png"],
        CAT_DOG,
        [r"train/map\.png was left out: beside the folders of the classes"],
    ),
    Situation(
        "pictures beside the splits",
        [*some("train/cat", "train/dog", "test/cat"), "overview.png"],
        CAT_DOG | {"test": {"cat": 2}},
        [r"overview\.png was left out: beside the folders of the splits"],
    ),
    Situation(
        "pictures beside the classes",
        [*some("cat", "dog"), "b.png", "a.png"],
        CAT_DOG,
        [r"a\.png, b\.png were left out: beside the folders of the classes"],
    ),
    Situation("pictures without folders", ["a.png", "b.png"], {"train": {NO_LABEL: 2}}),
    Situation(
        "hidden folders and what systems leave behind",
        [
            *some("cat", "dog", "cat/.ipynb_checkpoints", ".thumbnails", "__MACOSX/dog"),
            *some(".git/dog", "dog/@eaDir", "$RECYCLE.BIN"),
            "cat/._0.png",
            "__MACOSX/dog/._0.png",
            "cat/Thumbs.db",
            "dog/.DS_Store",
            "dog/desktop.ini",
            "dog/Icon\r",
        ],
        CAT_DOG,
    ),
    Situation(
        "a hidden class and a hidden picture",
        [*some("cat", "dog", ".fox"), "cat/.secret.png"],
        CAT_DOG,
        [r"as hidden: \.fox, cat/\.secret\.png\."],
    ),
    Situation(
        "our own outputs beside the classes",
        [
            *some("cat", "dog"),
            "knn-model/config.json",
            "knn-model/model.safetensors",
            "knn-model/neighbors.png",
            "big/config.json",
            "big/model.safetensors.index.json",
            "big/0.png",
            "rows/datastore.json",
            "rows/0.png",
            "knn-doctor/report.html",
            "knn-doctor/findings.csv",
            "knn-doctor/0.png",
            "out.training/checkpoint-5/config.json",
            "out.training/checkpoint-5/model.safetensors",
            "out.training/checkpoint-5/0.png",
            "cat/.before/0.png",
            "graph/model.onnx",
            "graph/classify.py",
            "graph/0.png",
        ],
        CAT_DOG,
        [
            "as a checkpoint: big, knn-model, out.training/checkpoint-5",
            "as a datastore: rows",
            "as an exported model: graph",
            "as a report of hf-knn: knn-doctor",
            r"no picture in out\.training",
        ],
    ),
    Situation(
        "doctor's report written into the folder itself",
        [*some("cat", "dog"), "report.html", "findings.csv"],
        CAT_DOG,
        [r"1 \.csv in the folder itself .*pass the file itself", r"1 \.html .*it is no picture"],
    ),
    Situation(
        "a checkpoint instead of pictures",
        ["config.json", "model.safetensors", "neighbors.png"],
        "to be a folder of pictures, but it is a checkpoint",
    ),
    Situation(
        "characters that mean something to somebody",
        some("[x]", "a*b", "what?", "c::d", "#1", "100%", " ", "a b", "~", "$HOME", "{y}", "a&b"),
        {
            "train": dict.fromkeys(
                (
                    "[x]",
                    "a*b",
                    "what?",
                    "c::d",
                    "#1",
                    "100%",
                    " ",
                    "a b",
                    "~",
                    "$HOME",
                    "{y}",
                    "a&b",
                ),
                2,
            )
        },
    ),
    Situation(
        "the same in the names of pictures",
        [f"cat/{name}.png" for name in ("[0]", "*", "?", "a::b", "#", "%20", "a b", "-", "\n")]
        + ["dog/0.png"],
        {"train": {"cat": 9, "dog": 1}},
    ),
    Situation(
        "Unicode of every kind",
        some("日本語", "собака", "עברית", "🐈", "e\u0301te\u0301", "line\nbreak"),
        {
            "train": dict.fromkeys(
                ("日本語", "собака", "עברית", "🐈", "\xe9t\xe9", "line\nbreak"), 2
            )
        },
    ),
    Situation(
        "a label in composed and decomposed Unicode is one class",
        some(f"train/{NFC_NAME}", "train/dog", f"test/{NFD_NAME}"),
        {"train": {NFC_NAME: 2, "dog": 2}, "test": {NFC_NAME: 2}},
    ),
    Situation(
        "both forms beside each other",
        some(NFC_NAME, NFD_NAME, "dog"),
        {"train": {NFC_NAME: 4, "dog": 2}},
        ["2 folders are called Früchte, in other bytes: one class"],
    ),
    Situation(
        "labels that look alike stay apart",
        some("cat", "Cat", "cat ", "c\u0430t"),
        {"train": {"cat": 2, "Cat": 2, "cat ": 2, "c\u0430t": 2}},
    ),
    Situation(
        "numbers as labels keep their zeros, in the order of numbers",
        some("10", "9", "1"),
        {"train": {"1": 2, "9": 2, "10": 2}},
    ),
    Situation(
        "labels of every kind of number and nothing",
        some("007", "7", "NA", "None", "nan", "1e3", "True"),
        {"train": dict.fromkeys(("007", "7", "NA", "None", "nan", "1e3", "True"), 2)},
    ),
    Situation(
        "endings in capitals, and with a space behind",
        ["cat/a.PNG", "cat/b.Png ", "dog/a.JPG", "dog/b.Jpeg"],
        CAT_DOG,
    ),
    Situation(
        "pictures of formats that are not read",
        [*some("cat", "dog"), *[f"Früchte/{n}.jxl" for n in range(6)], "cat/x.NEF"],
        CAT_DOG,
        [
            r"6 \.jxl in Früchte were left out: convert them to PNG or JPEG",
            r"1 \.nef in cat was left out: convert it",
            "no picture in Früchte",
        ],
    ),
    Situation(
        "archives, films, texts and files without an ending",
        [*some("cat", "dog"), "cat/a.zip", "dog/a.mov", "dog/b.mov", "cat/README", "cat/a.json"],
        CAT_DOG,
        [
            r"1 \.zip in cat was left out: unpack it",
            r"2 \.mov in dog .*single frames of them",
            "1 without an ending in cat was left out: give it the ending of its format",
            r"1 \.json in cat",
        ],
    ),
    Situation(
        "one ending in many folders is one sentence",
        [*some(*[f"c{n}" for n in range(8)]), *[f"c{n}/0.xml" for n in range(8)]],
        {"train": dict.fromkeys([f"c{n}" for n in range(8)], 2)},
        [r"8 \.xml in 8 folders, such as c0, were left out: they are no pictures"],
    ),
    Situation(
        "empty folders of classes",
        {**with_texts(some("cat", "dog")), "lion/": "", "tiger/old/": ""},
        CAT_DOG,
        [r"no picture in lion, tiger\."],
    ),
    Situation(
        "an empty class in a split, and an empty split",
        {**with_texts(some("train/cat", "train/dog", "test/cat")), "test/dog/": "", "val/": ""},
        CAT_DOG | {"test": {"cat": 2}},
        [r"no picture in test/dog\.", r"no picture in val\."],
    ),
    Situation("nothing at all", {"cat/": ""}, "one sub-folder of pictures per label.*no picture"),
    Situation(
        "only what cannot be read",
        ["cat/a.jxl", "dog/b.jxl"],
        r"no picture in it\. 2 \.jxl in cat, dog were left out: convert them",
    ),
    Situation(
        "a class that is a link to a folder elsewhere",
        {**with_texts([*some("pets/cat"), *some("elsewhere")]), "pets/dog": "->../elsewhere"},
        CAT_DOG,
        source="pets",
    ),
    Situation(
        "a link back to a folder above",
        {**with_texts(some("cat", "dog")), "dog/again": "->.."},
        "dog/again is a link back to a folder above it; remove the link",
    ),
    Situation(
        "a link to itself, and one to nothing",
        {**with_texts(some("cat", "dog")), "dog/self": "->self", "cat/9.png": "->gone.png"},
        CAT_DOG,
        [r"as a link to nothing: cat/9\.png, dog/self"],
    ),
    Situation(
        "a link to a folder of classes inside",
        {**with_texts(some("a/cat")), "b": "->a/cat"},
        {"train": {"a": 2, "b": 2}},
    ),
]

LISTS = [
    Situation(
        "metadata.csv", with_texts(["0.png", "1.png"], metadata__csv=LIST),
        {"train": {"cat": 1, "dog": 1}},
    ),
    Situation(
        "metadata.csv in each split",
        {
            **with_texts([*some("train"), *some("test")]),
            "train/metadata.csv": LIST, "test/metadata.csv": "file_name,label\n1.png,dog\n",
        },
        {"train": {"cat": 1, "dog": 1}, "test": {"dog": 1}},
        [r"test/0\.png was left out: test/metadata\.csv does not name it"],
    ),
    Situation(
        "metadata.csv above the splits",
        with_texts(
            ["train/0.png", "train/1.png", "test/2.png"],
            metadata__csv="file_name,label\ntrain/0.png,a\ntrain/1.png,b\ntest/2.png,a\n",
        ),
        {"train": {"a": 1, "b": 1}, "test": {"a": 1}},
    ),
    Situation(
        "metadata.csv without labels beside folders of classes",
        with_texts(
            some("cat", "dog", count=1),
            metadata__csv="file_name,patient\ncat/0.png,7\ndog/0.png,8\n",
        ),
        {"train": {"cat": 1, "dog": 1}},
    ),
    Situation(
        "metadata.jsonl, which imagefolder reads, is named",
        with_texts(["0.png"], metadata__jsonl='{"file_name": "0.png", "label": "cat"}'),
        {"train": {NO_LABEL: 1}},
        [r"since only metadata\.csv is read: metadata\.jsonl"],
    ),
    Situation(
        "metadata.csv in the folder of a class does not count",
        {**with_texts(some("cat", "dog")), "cat/metadata.csv": LIST},
        CAT_DOG,
        [r"cat/metadata\.csv was left out: a metadata\.csv counts in the folder itself"],
    ),
    Situation(
        "a csv with a column of splits, of every spelling",
        with_texts(
            some("p", count=6),
            l__csv="path,label,split\np/0.png,a,Train\np/1.png,b,training\np/2.png,a,val\n"
            "p/3.png,a,Valid\np/4.png,b,dev\np/5.png,b,TEST\n",
        ),
        {"train": {"a": 1, "b": 1}, "validation": {"a": 2, "b": 1}, "test": {"b": 1}},
        source="l.csv",
    ),
    Situation(
        "a csv with a column of splits, with --splits none",
        with_texts(
            some("p", count=2), l__csv="path,label,split\np/0.png,a,train\np/1.png,b,holdout\n"
        ),
        {"train": {"a": 1, "b": 1}},
        source="l.csv",
        splits=False,
    ),
    Situation(
        "a split of another name",
        with_texts(
            some("p", count=2), l__csv="path,label,split\np/0.png,a,train\np/1.png,b,holdout\n"
        ),
        r"column split of .*l\.csv to say train.*but got 'holdout' \(1 rows\)",
        source="l.csv",
    ),
    Situation(
        "labels that look like nothing or like numbers",
        with_texts(
            some("p", count=6),
            l__csv="path,label\np/0.png,NA\np/1.png,None\np/2.png,007\np/3.png,01\np/4.png,1\n"
            "p/5.png,\n",
        ),
        {"train": {"NA": 1, "None": 1, "007": 1, "01": 1, "1": 1, NO_LABEL: 1}},
        source="l.csv",
    ),
    Situation(
        "a csv of numbers without 0 invents no class",
        with_texts(some("p", count=3), l__csv="path,label\np/0.png,10\np/1.png,2\np/2.png,2\n"),
        {"train": {"2": 2, "10": 1}},
        source="l.csv",
    ),
    Situation(
        "labels of a csv in both forms of Unicode",
        with_texts(
            some("p", count=2), l__csv=f"path,label\np/0.png,{NFC_NAME}\np/1.png,{NFD_NAME}\n"
        ),
        {"train": {NFC_NAME: 2}},
        source="l.csv",
    ),
    Situation(
        "paths of a csv in another form of Unicode than the files",
        with_texts(
            [f"{NFD_NAME}/0.png", f"{NFC_NAME}s/0.png"],
            l__csv=f"path,label\n{NFC_NAME}/0.png,a\n{NFD_NAME}s/0.png,b\n",
        ),
        {"train": {"a": 1, "b": 1}},
        source="l.csv",
    ),
    Situation(
        "a csv that points outside its folder",
        with_texts(
            some("photos/cat", count=2),
            **{"lists/l__csv": "path,label\n../photos/cat/0.png,a\n../photos/cat/1.png,b\n"},
        ),
        {"train": {"a": 1, "b": 1}},
        source="lists/l.csv",
    ),
    Situation(
        "a csv without labels",
        with_texts(some("p"), l__csv="path,camera\np/0.png,1\np/1.png,2\n"),
        {"train": {NO_LABEL: 2}},
        source="l.csv",
    ),
    Situation(
        "one of three pictures of a csv is missing",
        with_texts(some("p"), l__csv="path,label\np/0.png,a\np/1.png,b\np/9.png,b\n"),
        {"train": {"a": 1, "b": 2}},
        [r"1 pictures of l\.csv are not there: p/9\.png"],
        source="l.csv",
    ),
    Situation(
        "a csv whose own name is full of characters",
        {**with_texts(some("p")), "[a]*?::#%.CSV": "path,label\np/0.png,a\np/1.png,b\n"},
        {"train": {"a": 1, "b": 1}},
        source="[a]*?::#%.CSV",
    ),
    Situation(
        "a folder whose own name is full of characters",
        some("[a] *?::#%ü/cat", "[a] *?::#%ü/dog"),
        CAT_DOG,
        source="[a] *?::#%ü",
    ),
    Situation(
        "an archive instead of a folder", {"a.zip": "PK"}, "unpack an archive", source="a.zip"
    ),
    Situation(
        "a mistyped folder", some("pictures/cat"), r"nothing there; did you mean .*pictures\?",
        source="picturs",
    ),
]  # fmt: skip


def lay_out(root: Path, files: Sequence[str] | dict[str, str]) -> None:
    """Writes pictures, texts, folders (they end in /) and links."""
    contents = files if isinstance(files, dict) else dict.fromkeys(files, "")
    for name, content in contents.items():
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            place.mkdir(parents=True, exist_ok=True)
        elif content.startswith("->"):
            place.symlink_to(content[2:])
        elif content:
            place.write_text(content, encoding="utf-8")
        else:
            place.write_bytes(PICTURE if place.suffix.lower().strip() in PICTURE_ENDINGS else b"")


def counted(rows: Any, has_labels: bool) -> dict[str, int]:
    """How many pictures of each class there are."""
    names = label_names(rows)
    labels = rows["label"][:]
    return dict(Counter(names[n] if has_labels and n >= 0 else NO_LABEL for n in labels))


def in_order(path: str) -> tuple[str, str]:
    """What pictures are sorted by: the same on systems that decompose names."""
    return unicodedata.normalize("NFC", path), path


@pytest.mark.parametrize("one", [*FOLDERS, *LISTS], ids=lambda one: one.what)
def test_what_goes_in_and_what_comes_out(one: Situation, tmp_path: Path) -> None:
    root = tmp_path / "pictures of mine"
    root.mkdir()
    lay_out(root, one.files)
    if isinstance(one.wanted, str):
        with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){one.wanted}") as refusal:
            read_source(root / one.source, one.splits)
        assert str(root / one.source) in str(refusal.value)  # which of many it was
        assert "\n" not in str(refusal.value)
        return
    found = read_source(root / one.source, one.splits)
    counts = {name: counted(rows, found.has_labels) for name, rows in found.splits.items()}
    assert counts == one.wanted
    assert len(found.notes) == len(one.notes), found.notes
    for pattern in one.notes:
        assert any(re.search(pattern, note) for note in found.notes), (pattern, found.notes)
    for rows in found.splits.values():
        paths = paths_of(rows)
        assert len(set(paths)) == len(paths)
        assert paths == sorted(paths, key=in_order) or one in LISTS
        for path, cell in zip(paths, rows["image"], strict=True):
            assert "\\" not in path
            assert not os.path.isabs(path)
            assert cell["path"].endswith(path)
            if os.path.exists(cell["path"]) and ".heic" not in path:
                assert decode_image(cell["path"]).size == (8, 8)
    again = read_source(root / one.source, one.splits)
    assert {n: rows["path"][:] for n, rows in again.splits.items()} == {
        n: rows["path"][:] for n, rows in found.splits.items()
    }


# ---- what a table cannot say --------------------------------------------------------------------


def test_the_table_is_long_enough() -> None:
    names = [one.what for one in (*FOLDERS, *LISTS)]
    assert len(names) == len(set(names)) >= 40


def test_classes_are_in_the_order_of_numbers_or_letters(tmp_path: Path) -> None:
    lay_out(tmp_path / "a", some("10", "9", "1"))
    lay_out(tmp_path / "b", some("10", "x9", "1"))
    assert label_names(load_splits(tmp_path / "a")["train"]) == ["1", "9", "10"]
    assert label_names(load_splits(tmp_path / "b")["train"]) == ["1", "10", "x9"]


@pytest.mark.parametrize("what", ["folder", "picture"])
def test_names_that_are_not_utf_8(what: str, tmp_path: Path) -> None:
    lay_out(tmp_path, some("cat", "dog"))
    place = os.fsencode(tmp_path / "cat") + b"/caf\xe9"
    if what == "folder":
        os.mkdir(place)
        with pytest.raises(ValueError, match=r"UTF-8 below .*cat/caf\\xe9.*rename it"):
            load_splits(tmp_path)
        return
    with open(place + b".png", "wb") as file:
        file.write(PICTURE)
    found = read_source(tmp_path)
    assert len(found.splits["train"]) == 4
    assert found.notes == [
        r"Left out for a name that is not UTF-8 (rename it): 'cat/caf\udce9.png'."
    ]


def test_a_folder_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path, some("cat", "dog"))
    real = os.scandir

    def scandir(folder: str) -> Any:
        if str(folder).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr("hf_knn.data.walk.os.scandir", scandir)
    with pytest.raises(PermissionError, match=r"Permission denied: .*dog"):
        load_splits(tmp_path)


def test_what_was_left_out_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lay_out(tmp_path, [*some("cat", "dog"), "cat/notes.txt"])
    with caplog.at_level(logging.WARNING):
        load_splits(tmp_path)
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}: 1 .txt in cat was left out")


@pytest.mark.parametrize(
    ("files", "source", "reason"),
    [
        (["0.png", "1.png"], "", "2 pictures lie in no folders of classes; make one sub-folder"),
        (some("train", "test"), "", "4 pictures of train, test lie in no .*--splits none reads"),
        (
            with_texts(some("p"), l__csv="path,camera\np/0.png,1\np/1.png,2\n"), "l.csv",
            r"2 pictures have no column `label`, but \['camera'\]",
        ),
        (
            with_texts(["0.png"], labels__csv="path,label\n0.png,a\n"), "",
            r"1 \.csv in the folder itself was left out: pass the file itself",
        ),
    ],
)  # fmt: skip
def test_pictures_without_labels_are_refused_where_labels_are_needed(
    files: Any, source: str, reason: str, tmp_path: Path
) -> None:
    lay_out(tmp_path, files)
    with pytest.raises(ValueError, match=reason) as refusal:
        load_splits(tmp_path / source)
    assert str(tmp_path / source) in str(refusal.value)


def test_a_split_without_labels_is_left_out_where_labels_are_needed(tmp_path: Path) -> None:
    lay_out(tmp_path, some("train/cat", "train/dog", "test"))
    found = read_labelled(tmp_path)
    assert list(found.splits) == ["train"]
    assert found.notes == ["The split test was left out: its 2 pictures have no labels."]


@pytest.mark.parametrize(
    ("folders", "reason"),
    [
        (["cat"], "all pictures of .* are cat; give it at least one more sub-folder"),
        (["pets/cat", "pets/dog"], "are pets; if cat, dog are the classes, pass the folder"),
        (["train/images", "test/images"], "are images; give it"),
        (["test/cat", "test/dog"], r"has the splits \['test'\] only"),
        (["train/cat", "test/cat", "test/dog"], "are cat"),
    ],
)
def test_one_class_is_nothing_to_train_on(folders: list[str], reason: str, tmp_path: Path) -> None:
    lay_out(tmp_path, some(*folders))
    with pytest.raises(ValueError, match=reason):
        check_classes(load_splits(tmp_path), tmp_path)


def test_two_classes_are_enough(tmp_path: Path) -> None:
    lay_out(tmp_path, some("cat", "dog", count=1))
    assert check_classes(load_splits(tmp_path), tmp_path) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "Expected a name to be a folder"),
        ("  ", "to be a folder"),
        ("https://example.com/cats.zip", "addresses are not opened: download"),
        ("hf://datasets/x/y", "addresses are not opened"),
        ("s3://bucket/cats", "addresses are not opened"),
        (r"C:\Users\me\cats", "nothing there"),
        ("gone/", "nothing"),
        ("*.png", "nothing there"),
    ],
)
def test_a_name_of_nothing_is_repeated(name: str, reason: str) -> None:
    with pytest.raises(FileNotFoundError, match=reason) as refusal:
        read_source(name)
    assert name.strip("/") in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_options_of_the_hub_are_refused_for_a_folder(tmp_path: Path) -> None:
    lay_out(tmp_path, some("cat", "dog"))
    with pytest.raises(ValueError, match=r"\['revision'\] with the id of a dataset on the Hub"):
        load_splits(tmp_path, revision="main", token=None)


def test_a_word_for_splits_is_refused_in_python(tmp_path: Path) -> None:
    lay_out(tmp_path, some("cat", "dog"))
    word: Any = "none"
    with pytest.raises(ValueError, match="to be True, False or None, but got 'none'"):
        load_splits(tmp_path, splits=word)


def test_paths_name_the_same_files_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path / "pets", some("dog/2023", "cat"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    rows = load_splits("pets")["train"]
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert paths_of(rows) == ["cat/0.png", "cat/1.png", "dog/2023/0.png", "dog/2023/1.png"]
    assert all(os.path.isfile(cell["path"]) for cell in rows["image"])


def test_a_chosen_part_of_the_rows_keeps_its_paths(tmp_path: Path) -> None:
    lay_out(tmp_path, some("dog/2023", "cat"))
    rows = load_splits(tmp_path)["train"]
    assert paths_of(rows.select([3])) == ["dog/2023/1.png"]  # where one folder is all there is
    assert paths_of(rows.select([])) == []


def test_a_large_folder_is_listed_without_opening_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path, some("cat", "dog", count=50))
    calls: Counter[str] = Counter()

    def count(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return call(*args, **options)

        return counted

    for name in ("stat", "scandir"):
        monkeypatch.setattr(f"hf_knn.data.walk.os.{name}", count(name, getattr(os, name)))
    monkeypatch.setattr("builtins.open", count("open", open))
    assert len(read_folder(tmp_path).splits["train"].files) == 100
    assert dict(calls) == {"stat": 3, "scandir": 3}  # of folders, not of pictures
