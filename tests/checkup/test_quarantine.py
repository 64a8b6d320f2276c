"""`hf-knn doctor --move-to`: files of chosen findings go aside, and come back as they were."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.commands import hf_knn, save_backbone, wide_terminal  # noqa: F401
from support.pictures import encoded, picture


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Pictures of three classes, one broken, one a copy, one of another class; and what was found.

    The broken one is called like a formula.
    """
    place = tmp_path_factory.mktemp("quarantine")
    backbone, root = save_backbone(place / "backbone"), place / "pictures"
    for label, name in enumerate(("ant", "bee", "cat")):
        (root / name).mkdir(parents=True)
        for row in range(8):
            (root / name / f"{row}.png").write_bytes(encoded(picture(label, row)))
    (root / "=x").mkdir()
    (root / "=x" / "broken.png").write_bytes(encoded(picture(0, 1))[:60])
    shutil.copy(root / "bee" / "3.png", root / "bee" / "copy.png")
    done = hf_knn("doctor", root, "--backbone", backbone, "-o", place / "out")
    assert done.exit_code == 0, done.output
    assert f"hf-knn doctor {root} --move-to quarantine --from {place / 'out'}" in done.stdout
    return backbone, root, place / "out" / "findings.csv"


@pytest.fixture
def root(made: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "pictures"))


def state_of(root: Path) -> dict[str, bytes]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def answer(*words: object) -> Any:
    done = hf_knn(*words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_what_is_surely_of_no_use_is_moved_and_put_back(
    made: tuple[Path, Path, Path], root: Path, tmp_path: Path
) -> None:
    before, aside = state_of(root), tmp_path / "aside"
    done = hf_knn("doctor", root, "--backbone", made[0], "-o", tmp_path / "out", "--move-to", aside)
    assert done.exit_code == 0, done.output
    assert f"Moved 2 files into {aside} (broken, exact_duplicate)." in done.stdout
    assert f"hf-knn doctor --undo {aside}" in done.stdout
    moved = {"=x/broken.png", "bee/copy.png"}
    assert {*before} - {*state_of(root)} == moved
    assert state_of(root).items() < before.items()
    there = state_of(aside)
    assert there.keys() - {"journal.jsonl"} == {
        "broken/=x/broken.png", "exact_duplicate/bee/copy.png"
    }  # fmt: skip
    done = hf_knn("doctor", "--undo", aside)
    assert done.exit_code == 0, done.output
    assert "2 files are where they were" in done.stdout
    assert state_of(root) == before
    assert not aside.exists()
    again = ["doctor", root, "--backbone", made[0], "-o", tmp_path / "again"]
    done = hf_knn(*again, "--move-to", aside, "--kind", "broken")
    assert f"Moved 1 file into {aside} (broken)." in done.stdout
    assert "1 file is where it was" in hf_knn("doctor", "--undo", aside).stdout


def test_a_csv_says_what_to_move_without_another_look(
    made: tuple[Path, Path, Path], root: Path, tmp_path: Path
) -> None:
    before, aside = state_of(root), tmp_path / "aside"
    words = ["doctor", root, "--from", made[2], "--move-to", aside]
    first = answer(*words, "--kind", "broken")["moved"]
    assert first["files"] == {str(root / "=x" / "broken.png"): "broken/=x/broken.png"}
    (root / "bee" / "copy.png").unlink()
    second = answer(*words, "--kind", "exact_duplicate,broken")["moved"]
    assert second["files"] == {}
    reason = "it is not among the pictures"
    assert second["left"] == {"bee/copy.png": reason, "'=x/broken.png": reason}
    back = answer("doctor", "--undo", aside)
    assert back == {"put_back": [str(root / "=x" / "broken.png")], "left": []}
    assert {*before} - {*state_of(root)} == {"bee/copy.png"}


@pytest.mark.parametrize(
    ("typed", "code", "said"),
    [
        (["{root}", "--move-to", "{root}/aside"], 1, "a folder outside of"),
        (["{table}", "--move-to", "{root}-aside"], 1, "a folder of picture files"),
        (["{root}", "--move-to", "{root}/ant"], 1, "a folder outside of"),
        (["{root}", "--move-to", "{other}"], 1, "holds other things"),
        (["{root}", "--kind", "broken"], 2, "--move-to"),
        (["{root}", "--undo", "{other}"], 2, "PICTURES to check, or --undo"),
        ([], 2, "PICTURES to check, or --undo"),
        (["--undo", "{other}"], 1, "has no journal"),
        (["--undo", "{other}/nothing"], 1, "nothing there"),
        (["{root}", "--move-to", "{root}-aside", "--kind", "imbalance"], 1, "some of broken, "),
    ],
)
def test_what_cannot_be_meant_moves_nothing(
    typed: list[str], code: int, said: str, made: tuple[Path, Path, Path], root: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    other, before = tmp_path / "other", state_of(root)
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    places = {"root": root, "table": made[2], "other": other}
    words = [word.format(**places) for word in typed]
    if words and "holds other" in said:
        words += ["--from", str(made[2])]
    if typed and typed[0] != "--undo":
        words += ["--backbone", str(made[0])]
    done = hf_knn("doctor", *words)
    assert done.exit_code == code, done.output
    assert said in " ".join(done.stderr.replace("│", " ").split())
    assert state_of(root) == before
    assert {*state_of(other)} == {"mine.txt"}
