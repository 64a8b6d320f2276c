"""What can name pictures to be answered, and what a web address may do."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.pictures import dataset_of, encoded, picture, write_folder

from hf_knn.data import sources as module
from hf_knn.data.batches import read_batch
from hf_knn.data.decode import BadImageError, decode_image
from hf_knn.data.sources import SourceRows, Sources, fetch, find_sources


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures in folders, in the current folder."""
    write_folder(tmp_path / "in", {"ant": 2, "bee": 1})
    (tmp_path / "in" / "top.png").write_bytes(encoded(picture(0, 9)))
    (tmp_path / "in" / "notes.md").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*named: str, given: bytes = b"", split: str | None = None) -> Sources:
    return find_sources(named, lambda: given, split)


def names(*named: str, given: bytes = b"") -> list[str]:
    return [one.name for one in found(*named, given=given).pictures]


ALL = ["in/ant/0.png", "in/ant/1.png", "in/bee/0.png", "in/top.png"]


def test_files_folders_and_patterns_in_their_order(here: Path) -> None:
    assert names("in/top.png", "in/ant/1.png") == ["in/top.png", "in/ant/1.png"]
    assert names("in") == ALL
    assert names("in/**/*.png") == ALL
    assert names("in/**") == ALL
    assert names("in/a*") == ALL[:2]  # a folder that a pattern names is looked through
    assert names("in/bee", "in/a??/*") == ["in/bee/0.png", *ALL[:2]]
    assert names(str(here / "in" / "bee")) == [str(here / "in" / "bee" / "0.png")]


def test_what_is_left_out_is_said(here: Path) -> None:
    assert "1 .md in the folder itself was left out" in " ".join(found("in").notes)
    assert "no pictures by their names: in/notes.md" in " ".join(found("in/*").notes)


def test_a_name_with_signs_of_a_pattern_is_a_file_first(here: Path) -> None:
    os.rename("in/top.png", "in/t[o]p.png")
    assert names("in/t[o]p.png") == ["in/t[o]p.png"]


def test_named_twice_is_answered_once_and_two_names_of_one_file_twice(here: Path) -> None:
    (here / "in" / "link.png").symlink_to(here / "in" / "top.png")
    again = found("in/top.png", "in", "./in/../in/ant/0.png")
    assert [one.name for one in again.pictures] == ["in/top.png", *ALL[:3], "in/link.png"]
    assert again.notes[-1] == "2 pictures were named again and answered once."


LINES = {
    "unix": "in/top.png\nin/ant/0.png\n",
    "windows": "in/top.png\r\nin/ant/0.png\r\n\r\n",
    "without a last line end": "in/top.png\nin/ant/0.png",
    "find -print0": "in/top.png\0in/ant/0.png\0",
}


@pytest.mark.parametrize("kind", LINES)
def test_paths_on_standard_input_and_in_a_text(kind: str, here: Path) -> None:
    text = LINES[kind].encode()
    assert names("-", given=text) == ["in/top.png", "in/ant/0.png"]
    (here / "list.txt").write_bytes(text)
    assert names("list.txt") == ["in/top.png", "in/ant/0.png"]


def test_paths_as_powershell_and_notepad_write_them(here: Path) -> None:
    for code in ("utf-16", "utf-8-sig"):
        assert names("-", given="in/top.png\r\n".encode(code)) == ["in/top.png"]


def test_a_picture_on_standard_input_is_refused(here: Path) -> None:
    with pytest.raises(ValueError, match="it is a picture; name it"):
        found("-", given=(here / "in" / "top.png").read_bytes())


def test_paths_of_a_list_are_relative_to_it_and_may_be_missing(here: Path) -> None:
    (here / "in" / "list.txt").write_text("top.png\ngone.png\nhttps://example.org/a b.jpg\n")
    wanted = ["in/top.png", "in/gone.png", "https://example.org/a b.jpg"]
    assert names("in/list.txt") == wanted
    (here / "in" / "list.csv").write_text(
        "id;file_name;label\n1;top.png;ant\n2;gone.png;bee\n3;https://example.org/a b.jpg;bee\n"
    )
    assert names("in/list.csv") == wanted


def test_a_text_that_is_a_table_is_read_as_one(here: Path) -> None:
    (here / "list.txt").write_text("path,label\nin/top.png,ant\n")
    assert names("list.txt") == ["in/top.png"]
    (here / "list.txt").write_text("some words\n")
    with pytest.raises(ValueError, match=r"list\.txt to be a list of pictures"):
        found("list.txt")


def test_a_name_that_is_no_text_is_spelled(here: Path) -> None:
    raw = b"in/\xff.png"
    os.rename("in/top.png", raw)
    (one,) = found("-", given=raw + b"\n").pictures
    assert one.name == "in/\\xff.png"
    assert decode_image(SourceRows([one]).source_of(0)).size == (8, 8)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_datasets_and_their_splits(kind: str, here: Path) -> None:
    from datasets import DatasetDict

    data = dataset_of([0, 1, 2], broken=[1])
    if kind == "parquet":
        place, split = "some.parquet", "train"
        data.to_parquet(place)
    else:
        place, split = "kept", "test"
        DatasetDict(train=data, test=data).save_to_disk(place)
    alone = found(place, split=split).pictures
    assert [one.name for one in alone] == [f"{place}:{split}:{row}" for row in range(3)]
    assert len(found(place).pictures) == (3 if kind == "parquet" else 6)
    assert len({one.key() for one in alone}) == 3
    assert [one.key() for one in found(place, split=split).pictures] == [o.key() for o in alone]
    with pytest.raises(ValueError, match=f"Expected a split of {place}.*but got 'dev'"):
        found(place, split="dev")
    batch = read_batch(SourceRows(alone), [2, 1, 0], _processor())
    assert batch.rows == [2, 0]
    assert [bad.row for bad in batch.bad] == [1]


@pytest.mark.slow
def test_a_row_of_a_dataset_has_the_same_key_in_another_process(here: Path) -> None:
    dataset_of([0, 1, 2]).to_parquet("some.parquet")
    code = (
        "from hf_knn.data.sources import find_sources\n"
        "print(*(one.key() for one in find_sources(['some.parquet'], bytes).pictures), sep='\\n')"
    )
    keys = [one.key() for one in found("some.parquet").pictures]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.stdout.splitlines() == keys


def test_labels_of_a_dataset_are_not_looked_at(here: Path) -> None:
    data = dataset_of([0, 1]).remove_columns("label").add_column("labels", [[0, 1], [1]])
    data.rename_column("image", "photo").to_parquet("some.parquet")
    assert len(found("some.parquet").pictures) == 2


def test_nothing_there_says_what_is_there_instead(here: Path) -> None:
    (here / "empty").mkdir()
    (here / "empty" / "scan.pdf").touch()
    with pytest.raises(ValueError, match=r"pictures in empty, but there are none.*1 \.pdf in the"):
        found("empty")
    with pytest.raises(FileNotFoundError, match="nothing fits it"):
        found("in/*.jpeg")
    with pytest.raises(FileNotFoundError, match="there is nothing there"):
        found("./nowhere")
    with pytest.raises(ValueError, match="but there are none"):
        found("-", given=b"\n\n")
    both = found("empty", "in")
    assert len(both.pictures) == 4
    assert "empty holds no picture." in both.notes


def test_a_key_tells_a_file_that_was_changed(here: Path) -> None:
    (one,) = found("in/top.png").pictures
    before = one.key()
    assert before == one.key()
    os.utime("in/top.png", ns=(1, 1))
    assert one.key() != before
    os.remove("in/top.png")
    assert one.key() == f"{one.place} ?"


def test_each_bad_picture_has_its_reason_and_the_others_are_read(here: Path) -> None:
    (here / "in" / "bad.png").write_bytes(b"no picture")
    rows = SourceRows(found("-", given=b"in/bad.png\nin/top.png\nin/gone.png\nin\n").pictures)
    batch = read_batch(rows, range(4), _processor())
    assert batch.rows == [1]
    reasons = {bad.row: bad.reason for bad in batch.bad}
    assert "not a picture" in reasons[0]
    assert reasons[2] == "the file cannot be read (No such file or directory)"
    assert "it is a folder" in reasons[3]


def _processor() -> object:
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": 16, "width": 16})


# ---- the web ------------------------------------------------------------------------------------

PICTURE = encoded(picture(1, 1))


class Site(BaseHTTPRequestHandler):
    """A picture, what leads to it and elsewhere, and what is not there."""

    def do_GET(self) -> None:
        leads = {
            "/on": "/a%20b.png", "/round": "/round", "/file": "file:///etc/passwd",
            "/ftp": "ftp://127.0.0.1/a.png", "/data": "data:image/png;base64,AAAA",
        }  # fmt: skip
        if self.path in leads:
            self.send_response(302)
            self.send_header("Location", leads[self.path])
            self.end_headers()
        elif self.path == "/a%20b.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PICTURE)
        else:
            self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def without_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_picture_from_the_web(site: str) -> None:
    for address in ("/a b.png", "/a%20b.png", "/on"):
        assert fetch(site + address) == PICTURE
    rows = SourceRows(found(site + "/on", site + "/none.png", site + "/on").pictures)
    assert len(rows) == 2
    batch = read_batch(rows, [0, 1], _processor())
    assert batch.rows == [0]
    assert "cannot be fetched (HTTP Error 404" in batch.bad[0].reason


@pytest.mark.parametrize("path", ["/file", "/ftp", "/data"])
def test_nothing_but_the_web_is_followed(path: str, site: str) -> None:
    with pytest.raises(BadImageError, match=r"not on the web|is not allowed"):
        fetch(site + path)


def test_a_ring_of_addresses_ends(site: str) -> None:
    with pytest.raises(BadImageError, match="cannot be fetched"):
        fetch(site + "/round")


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        ({"MAX_ADDRESS_BYTES": 10}, "more than 10 bytes"),
        ({"FETCH_SECONDS": -1.0}, "took more than"),
    ],
)
def test_size_and_time_are_limited(
    limits: dict[str, float], match: str, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(module, name, value)
    with pytest.raises(BadImageError, match=match):
        fetch(site + "/on")


def test_the_limit_of_all_pictures_holds_too(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_KNN_MAX_BYTES", "20")
    with pytest.raises(BadImageError, match="more than 20 bytes"):
        fetch(site + "/on")


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/x.png", "http://[::1/x.png"])
def test_what_cannot_be_reached_is_a_reason(address: str) -> None:
    with pytest.raises(BadImageError, match="cannot be fetched"):
        fetch(address)


def test_only_http_and_https_are_addresses() -> None:
    sources: Sequence[str] = ["file:///etc/passwd", "ftp://example.org/a.png"]
    for source in sources:
        with pytest.raises(FileNotFoundError):
            found(source)
