"""What a session leaves: a csv that training reads, folders that overwrite nothing, checkpoints."""

import csv
from pathlib import Path

import pytest
from support.labelling import made_pool, name_of, word_of

from hf_knn.data.folders import read_folder, read_list
from hf_knn.labelling.outcome import COPY, LINK, Outcome, Place, write_outcome

LABELS = {name_of(number): word_of(Path(name_of(number))) for number in range(6)}


def write(place: Path, labels: dict[str, str], folders: str | None = None) -> Outcome:
    pool = made_pool(place / "pictures", 9)
    where = Place.of(place / "out")
    where.home.mkdir(exist_ok=True)
    return write_outcome(where, pool, labels, {}, "tiny", None, folders, False)


def contents(folder: Path) -> dict[str, str]:
    paths = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def test_the_csv_is_read_as_a_list_of_pictures(tmp_path: Path) -> None:
    done = write(tmp_path, LABELS | {name_of(7): "=1, or 'more'"})
    assert (done.labelled, done.folder, done.model) == (7, None, None)
    with done.csv.open(encoding="utf-8", newline="") as file:
        assert next(csv.reader(file)) == ["path", "label"]
    rows = read_list(done.csv).splits["train"]
    there = (tmp_path / "pictures").resolve()
    found = {Path(file).relative_to(there).as_posix(): label
             for file, label in zip(rows.files, rows.labels, strict=True)}  # fmt: skip
    assert found == LABELS | {name_of(7): "=1, or 'more'"}


def test_the_csv_may_be_named_itself(tmp_path: Path) -> None:
    place = Place.of(tmp_path / "mine.csv")
    assert (place.home, place.csv) == (tmp_path / "mine", tmp_path / "mine.csv")
    (tmp_path / "mine").write_text("a file")
    with pytest.raises(ValueError, match="to be a folder, but it is a file"):
        Place.of(tmp_path / "mine.csv")


@pytest.mark.parametrize("how", [COPY, LINK])
def test_a_folder_for_each_class(tmp_path: Path, how: str) -> None:
    done = write(tmp_path, LABELS, how)
    assert done.folder is not None
    wanted = {f"{label}/{Path(name).name}": name for name, label in LABELS.items()}
    assert contents(done.folder) == wanted
    assert {(done.folder / path).is_symlink() for path in wanted} == {how == LINK}
    assert len(contents(tmp_path / "pictures")) == 9  # none was moved
    assert sorted(set(map(str, read_folder(done.folder).splits["train"].labels))) == [
        "ant", "bee", "cat",
    ]  # fmt: skip


def test_of_two_with_one_name_the_second_gets_a_number(tmp_path: Path) -> None:
    pool = made_pool(tmp_path / "pictures", 3)
    for name in ("ant/same.png", "bee/same.png"):
        (pool.folder / name).write_text(name)
        pool.names.append(name)
    where = Place.of(tmp_path / "out")
    where.home.mkdir()
    labels = {"ant/same.png": "dog", "bee/same.png": "dog"}
    for _ in range(2):  # and it stays so
        done = write_outcome(where, pool, labels, {}, "tiny", None, COPY, False)
        assert done.folder is not None
        assert contents(done.folder) == {
            "dog/same.png": "ant/same.png", "dog/same (2).png": "bee/same.png",
        }  # fmt: skip


@pytest.mark.parametrize("how", [COPY, LINK])
def test_another_label_moves_what_was_made_and_leaves_what_was_not(
    tmp_path: Path, how: str
) -> None:
    folder = tmp_path / "out" / "pictures"
    write(tmp_path, LABELS, how)
    (folder / "ant" / "notes.txt").write_text("mine")
    (folder / "bee" / "001.png").unlink()
    (folder / "bee" / "001.png").write_text("changed")
    labels = {name: "dog" for name in LABELS if name != name_of(5)}
    done = write(tmp_path, labels, how)
    found = contents(folder)
    assert found.pop("ant/notes.txt") == "mine"
    assert found.pop("bee/001.png") == "changed"
    assert found == {f"dog/{Path(name).name}": name for name in labels}
    assert any("bee/001.png was changed since it was made" in note for note in done.notes)
    assert not (folder / "cat").exists()


def test_what_somebody_changed_is_left_under_its_label(tmp_path: Path) -> None:
    write(tmp_path, LABELS, COPY)
    own = tmp_path / "out" / "pictures" / "bee" / "001.png"
    own.write_text("cropped")
    for _ in range(2):
        done = write(tmp_path, LABELS, COPY)
        assert own.read_text() == "cropped"
        assert [note for note in done.notes if "bee/001.png was changed" in note]


def test_links_become_copies(tmp_path: Path) -> None:
    write(tmp_path, LABELS, LINK)
    done = write(tmp_path, LABELS, COPY)
    assert done.folder is not None
    assert not any(path.is_symlink() for path in done.folder.rglob("*"))
    assert len(contents(done.folder)) == len(LABELS)


def test_a_file_that_is_in_the_way_stays(tmp_path: Path) -> None:
    own = tmp_path / "out" / "pictures" / "ant" / "000.png"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    done = write(tmp_path, {name_of(0): "ant"}, COPY)
    assert done.folder is not None
    assert contents(done.folder) == {"ant/000.png": "mine", "ant/000 (2).png": name_of(0)}


def test_nothing_is_written_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected at least one picture with a label"):
        write(tmp_path, {})
    with pytest.raises(ValueError, match="Expected `folders` to be"):
        write(tmp_path, LABELS, "move")
    assert [*(tmp_path / "out").iterdir()] == []
