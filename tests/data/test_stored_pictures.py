"""Pictures found again by the paths that a datastore keeps, and sources with unusual names."""

import unicodedata
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageColumn
from support.pictures import dataset_of, encoded, picture, string_dataset, write_folder

from hf_knn.data import StoredPictures
from hf_knn.data.loading import from_files, label_names, labels_of, load_splits, prepare
from hf_knn.data.places import fingerprint_of, paths_of


def test_what_was_loaded_is_found_again(tmp_path: Path) -> None:
    write_folder(tmp_path / "a" / "train", {"ant": 2, "bee": 1})
    write_folder(tmp_path / "a" / "test", {"ant": 1})
    stored = StoredPictures(tmp_path / "a")
    for rows in load_splits(tmp_path / "a").values():
        for path, cell in zip(paths_of(rows), rows["image"], strict=True):
            assert stored.find(path) == Path(cell["path"]).resolve()


@pytest.mark.parametrize(
    ("lying", "path", "found"),
    [
        ("train/ant/0.png", "ant/0.png", "train/ant/0.png"),
        ("Train/ant/0.png", "ant/0.png", "Train/ant/0.png"),
        ("val/ant/0.png", "ant/0.png", "val/ant/0.png"),
        ("ant/0.png", "train/ant/0.png", "ant/0.png"),
        ("ant/0.png", "Valid/ant/0.png", "ant/0.png"),
        ("TRAIN/ant/0.png", "train/ant/0.png", "TRAIN/ant/0.png"),
        ("ant/x/0.png", "ant\\x\\0.png", "ant/x/0.png"),
        ("ant/x/0.png", "ant/0.png", None),
        ("old/ant/0.png", "ant/0.png", None),
        ("ant/0.png", "old/ant/0.png", None),
        ("ant/0.png", "", None),
        ("ant/0.png", "ant", None),
        (".hidden/0.png", "hidden/0.png", None),
        ("[a]*?/é#%.png", "[a]*?/é#%.png", "[a]*?/é#%.png"),
    ],
)
def test_a_path_is_found_below_a_split_and_without_one(
    lying: str, path: str, found: str | None, tmp_path: Path
) -> None:
    (tmp_path / lying).parent.mkdir(parents=True)
    (tmp_path / lying).write_bytes(encoded(picture(0, 0)))
    wanted = None if found is None else (tmp_path / found).resolve()
    assert StoredPictures(tmp_path).find(path) == wanted


def test_training_pictures_come_first(tmp_path: Path) -> None:
    for split in ("test", "train", "val"):
        write_folder(tmp_path / split, {"ant": 1})
    assert StoredPictures(tmp_path).find("ant/0.png") == tmp_path / "train" / "ant" / "0.png"


def test_a_split_is_not_taken_for_another(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"ant": 1})
    stored = StoredPictures(tmp_path / "train")  # the folder of the split itself was passed
    assert stored.find("train/ant/0.png") == tmp_path / "train" / "ant" / "0.png"
    assert stored.find("test/ant/0.png") is None


@pytest.mark.parametrize(("lying", "asked"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_path_is_found_in_the_other_form_of_unicode(
    lying: str, asked: str, tmp_path: Path
) -> None:
    name, other = (unicodedata.normalize(form, "Früchte/é.png") for form in (lying, asked))  # type: ignore[arg-type]
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(encoded(picture(0, 0)))
    assert StoredPictures(tmp_path).find(other) is not None


def test_linked_folders_of_classes_are_found_and_nothing_else_outside(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", {"bee": 1})
    write_folder(tmp_path / "pets", {"ant": 1})
    (tmp_path / "pets" / "bee").symlink_to("../elsewhere/bee")
    (tmp_path / "secret.png").write_bytes(encoded(picture(0, 0)))
    stored = StoredPictures(tmp_path / "pets")
    assert stored.find("bee/0.png") is not None
    for path in ("../secret.png", "bee/../../secret.png", "train/../../secret.png",
                 str(tmp_path / "secret.png"), "..\\secret.png"):  # fmt: skip
        assert stored.find(path) is None


# ---- other sources ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["[a]", "a*b", "what?", "#1", "100%", "a b", "ü", "~", "{y}"])
def test_any_name_of_a_saved_dataset_or_parquet_file(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    dataset_of([2, 0, 1]).to_parquet(folder / f"{name}.parquet")
    for other in ("aXb.parquet", "whatX.parquet"):  # that a pattern would take for it
        dataset_of([1] * 9).to_parquet(folder / other)
    dataset_of([2, 0, 1]).save_to_disk(folder / "saved")
    for source in (folder / f"{name}.parquet", folder / "saved"):
        assert labels_of(load_splits(source)["train"]).tolist() == [2, 0, 1]


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_two_colons_are_refused_where_datasets_reads(kind: str, tmp_path: Path) -> None:
    dataset_of([2, 0]).save_to_disk(tmp_path / "saved")
    dataset_of([2, 0]).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "saved").rename(tmp_path / "a::saved")
    (tmp_path / "rows.parquet").rename(tmp_path / "a::rows.parquet")
    source = tmp_path / ("a::saved" if kind == "saved" else "a::rows.parquet")
    with pytest.raises(ValueError, match=r"without '::'.*rename it"):
        load_splits(source)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing behind it")
    with pytest.raises(ValueError, match=r"a\.parquet to be whole, but it cannot be read: "):
        load_splits(tmp_path / "a.parquet")


@pytest.mark.parametrize("splits", [True, False])
def test_splits_that_a_source_names_itself(splits: bool, tmp_path: Path) -> None:
    dataset_of([2, 0]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="names its splits itself"):
        load_splits(tmp_path / "a.parquet", splits=splits)


def test_two_splits_of_one_name_are_refused(tmp_path: Path) -> None:
    both = {"val": dataset_of([1, 0]), "dev": dataset_of([0, 1])}
    DatasetDict(both).save_to_disk(tmp_path / "a")
    with pytest.raises(ValueError, match=r"one split validation in .*\['val', 'dev'\]"):
        load_splits(tmp_path / "a")


def test_names_of_a_dataset_are_compared_in_one_form_of_unicode(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    kinds = Features({"image": ImageColumn(), "label": ClassLabel(names=["b", decomposed])})
    images = [{"bytes": encoded(picture(0, 0)), "path": "0.png"}] * 2
    rows = Dataset.from_dict({"image": images, "label": [1, 0]}, features=kinds)
    rows.save_to_disk(tmp_path / "a")
    loaded = load_splits(tmp_path / "a")["train"]
    assert label_names(loaded) == ["b", composed]
    assert labels_of(prepare(loaded, [decomposed, "b"])).tolist() == [0, 1]
    assert labels_of(prepare(rows, [composed, "b"])).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("written", "names", "numbers"),
    [
        (["2", "1"], ["ant", "bee", "cat"], [2, 1]),  # plain numbers stay what they are
        (["2", "1"], ["LABEL_0", "LABEL_1", "LABEL_2"], [2, 1]),
        (["2", "1"], ["1", "2"], [1, 0]),
        (["007", "7"], ["7", "007"], [1, 0]),
        (["cat", "ant"], ["ant", "bee", "cat"], [2, 0]),
    ],
)
def test_labels_of_a_csv_among_those_of_a_model(
    written: list[str], names: list[str], numbers: list[int], tmp_path: Path
) -> None:
    write_folder(tmp_path, {"p": 2})
    (tmp_path / "l.csv").write_text(f"path,label\np/0.png,{written[0]}\np/1.png,{written[1]}\n")
    rows = load_splits(tmp_path / "l.csv")["train"]
    assert labels_of(prepare(rows, names)).tolist() == numbers


@pytest.mark.parametrize("written", [["3", "1"], ["007", "1"], ["ant", "x"]])
def test_labels_that_the_model_has_no_class_for(written: list[str], tmp_path: Path) -> None:
    write_folder(tmp_path, {"p": 2})
    (tmp_path / "l.csv").write_text(f"path,label\np/0.png,{written[0]}\np/1.png,{written[1]}\n")
    with pytest.raises(ValueError, match="among the model's 3 classes"):
        prepare(load_splits(tmp_path / "l.csv")["train"], ["ant", "bee", "cat"])


def test_cells_of_a_csv_are_kept_as_texts_and_empty_ones_as_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path, {"p": 3})
    (tmp_path / "l.csv").write_text(
        "path,label,patient,sample_id\np/0.png,a,007,5\np/1.png,b,,3\np/2.png,b,7,4\n"
    )
    rows = load_splits(tmp_path / "l.csv")["train"]
    assert rows["patient"][:] == ["007", None, "7"]
    assert rows.features["patient"] == Value("string")
    assert rows["sample_id"][:] == [5, 3, 4]
    (tmp_path / "l.csv").write_text("path,label,sample_id\np/0.png,a,x1\np/1.png,b,2\n")
    with pytest.raises(ValueError, match="whole numbers in the column sample_id, but got 'x1'"):
        load_splits(tmp_path / "l.csv")


def test_all_pictures_below_a_folder_get_one_label(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 2, "b": 1})
    (tmp_path / "Thumbs.db").write_text("x")
    (tmp_path / "notes.txt").write_text("x")
    found = from_files(tmp_path, unicodedata.normalize("NFD", "é"))
    rows = found.splits["train"]
    assert label_names(rows) == [unicodedata.normalize("NFC", "é")]
    assert paths_of(rows) == ["0.png", "1.png", "0.png"]
    assert found.notes == ["1 .txt in the folder itself was left out: it is no picture."]


def test_the_fingerprint_is_that_of_the_files_and_their_labels(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", {"ant": 2, "bee": 2})
    first = fingerprint_of(load_splits(tmp_path / "a")["train"])
    assert fingerprint_of(load_splits(tmp_path / "a")["train"]) == first
    (tmp_path / "a" / "bee" / "1.png").rename(tmp_path / "a" / "ant" / "9.png")
    assert fingerprint_of(load_splits(tmp_path / "a")["train"]) != first


def test_text_labels_of_a_dataset_stay_names(tmp_path: Path) -> None:
    string_dataset(["cat", "ant"]).to_parquet(tmp_path / "a.parquet")
    assert label_names(load_splits(tmp_path / "a.parquet")["train"]) == ["ant", "cat"]
