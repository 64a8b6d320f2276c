"""Reports of made-up runs: what is refused, what is said, and that the page is safe and whole."""

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss
from support.benchmark_cells import POOL, Plan, cell_name, cells_of, write_cell, write_run
from typer.testing import CliRunner

from report import app
from reporting import markdown, sections
from reporting.baseline import baseline_report, compare
from reporting.build import build_report
from reporting.cells import Results, Setting, load_results
from reporting.clean import without_near_duplicates
from reporting.document import Figures, Gallery, Grid, Report, Section, Text
from reporting.markdown import write_markdown
from reporting.page import render_html, write_html
from reporting.pairs import (
    Across,
    Comparison,
    across_pairs,
    comparisons_of,
    differences_of,
    nll_of,
    shared_arms,
)
from reporting.parquet import as_dataset
from reporting.pictures import Picture, PicturesMissingError, galleries, local_pictures, pick
from reporting.sections import heat_section, peers_blocks
from reporting.statistics import signed_rank
from reporting.summary import across_line, summary_lines, where_not
from reporting.trackio import log_to_trackio

HOSTILE = "<img src=x onerror=alert(1)>|*\u202e"
SMALL = Plan(("digits",), ("lite0",), ("knn",), (0, 1), near=0.0)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """One task, two backbones, every protocol; a class with a hostile name; a failed cell."""
    names = (HOSTILE, "dog", "fox", "hen", "owl")
    plan = Plan(tasks=("digits",), seeds=(0, 1), shots=(1, 4), label_names=names, groups=True)
    folder = write_run(tmp_path_factory.mktemp("run") / "results", plan)
    failure = {"cell": {"task": "digits", "shots": None}, "error": "E", "message": HOSTILE}
    (folder / "failures").mkdir()
    (folder / "failures" / "one.json").write_text(json.dumps(failure))
    return load_results(folder)


def source(task: str, ids: object) -> list[Picture]:
    labels = np.random.default_rng(1).integers(0, 5, POOL)
    assert isinstance(ids, list)
    return [Picture(Image.new("RGB", (40, 30), (i % 256, 90, 20)), int(labels[i])) for i in ids]


@pytest.fixture(scope="module")
def written(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    cells = [cell for cell in results.cells if cell.setting.backbone == "lite0"]
    report = build_report(replace(results, cells=cells), source)
    write_markdown(report, folder)
    write_html(report, folder / "report.html")
    return folder


def change(path: Path, *keys: str, to: object) -> None:
    document = json.loads(path.read_text())
    place = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    path.write_text(json.dumps(document))


# ---- what is refused ----------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", SMALL)


def first_cell(folder: Path) -> Path:
    return min((folder / "cells").glob("*.json"))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (
            ("task", "revision"),
            "2",
            r"one revision of task digits, but got '1' in run.json and '2'",
        ),
        (("model", "revision"), "w2", r"one revision of backbone lite0, but got 'w2' in digits"),
        (("format",), 2, "format 1, but got 2"),
        (("arms", "knn", "test", "top1"), 0.5, "answers of knn"),
        (("arrays_sha256",), "0" * 64, "sha256 0000"),
        (("arms", "svm"), {"test": {"top1": 0.5}}, "predicted/svm"),
    ],
)
def test_a_cell_that_does_not_belong_is_refused(keys, value, message, small):
    change(first_cell(small), *keys, to=value)
    with pytest.raises(ValueError, match=message):
        load_results(small)


def test_missing_parts_are_named(small, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run\.json, but it has none; do run"):
        load_results(tmp_path)
    first_cell(small).with_suffix(".npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"npz beside the cell's JSON.*do delete"):
        load_results(small)
    first_cell(small).write_text("{")
    with pytest.raises(ValueError, match="to be JSON, but got"):
        load_results(small)
    first_cell(small).write_text('{"format": 1}')
    with pytest.raises(ValueError, match="to hold cell, task, model"):
        load_results(small)
    for path in (small / "cells").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="Expected finished cells"):
        load_results(small)


def test_other_commits_and_versions_are_only_said(small):
    assert load_results(small).warnings == []
    change(first_cell(small), "provenance", "commit", to="def456")
    change(first_cell(small), "provenance", "versions", "torch", to="2.15")
    warnings = load_results(small).warnings
    assert any("abc123, def456" in line for line in warnings)
    assert any("torch: 2.14.1, 2.15" in line for line in warnings)


# ---- numbers ------------------------------------------------------------------------------------


def test_differences_are_those_of_the_answers(results):
    """Against plain numpy, and scikit-learn's log loss."""
    found = differences_of(results)
    setting = Setting("digits", "lite0", "knn")
    (difference,) = (
        d for d in found if d.setting == setting and d.comparison == ("knn", "blend", "head")
    )
    cells = results.settings()[setting]
    top1 = [c.correct("blend").mean() - c.correct("head").mean() for c in cells]
    assert difference.top1.mean == pytest.approx(np.mean(top1))
    kept = [~c.arrays["near_duplicate"] for c in cells]
    clean = [
        c.correct("blend")[k].mean() - c.correct("head")[k].mean()
        for c, k in zip(cells, kept, strict=True)
    ]
    assert difference.clean is not None
    assert difference.clean.mean == pytest.approx(np.mean(clean))
    assert np.mean(clean) != pytest.approx(np.mean(top1))
    assert difference.top1.low < difference.top1.mean < difference.top1.high
    true = cells[0].arrays["true/head"].astype(np.float64)
    pairs = np.stack([1 - true, true], axis=1)
    wanted = log_loss(np.ones(len(true)), pairs, labels=[0, 1])
    assert nll_of(cells[0], "head").mean() == pytest.approx(wanted)


def test_results_without_near_duplicates_are_those_of_the_run(results):
    """The top-1 that the run measured on clean items, and the same differences as in the tables."""
    rest = without_near_duplicates(results)
    for before, after in zip(results.cells, rest.cells, strict=True):
        assert len(after.arrays["ids"]) == (~before.arrays["near_duplicate"]).sum()
        for arm in before.arms:
            wanted = before.arms[arm]["test_clean"]
            assert after.arms[arm]["test"] == pytest.approx(wanted)
    clean = [d.clean for d in differences_of(results)]
    assert clean == [d.top1 for d in differences_of(rest)]


def test_groups_are_drawn_where_they_repeat(results, small):
    grouped = results.cells[0]
    assert np.array_equal(grouped.clusters(), grouped.arrays["groups"])
    single = load_results(small).cells[0]
    assert np.array_equal(single.clusters(), single.arrays["ids"])


def test_each_second_voice_is_compared_with_k_nn():
    arms = ["head", "knn", "lda", "blend:head+knn", "blend:head+lda", "blend:lda+knn"]
    found = {comparison[1:] for comparison in comparisons_of("peers", arms)}
    assert found == {
        ("blend:head+knn", "head"),
        ("blend:head+lda", "head"),
        ("blend:head+lda", "blend:head+knn"),
    }
    assert comparisons_of("knn", ["head"]) == []


def test_two_second_voices_are_shown_beside_the_better_of_both(results):
    _, grid = peers_blocks(results, differences_of(results))
    assert isinstance(grid, Grid)
    gaps = []
    for cells in results.settings("peers").values():
        lda, ncm = ([c.arms[v]["test"]["top1"] for c in cells] for v in ("lda", "ncm"))
        both = [c.document["pairs"]["lda+ncm"] for c in cells]
        gaps.append(np.mean(both) - max(np.mean(lda), np.mean(ncm)))
    shown = float(grid.rows[1][3].replace("\u2212", "-"))  # lda beside ncm
    assert shown == pytest.approx(100 * np.mean(gaps), abs=0.05)
    assert grid.rows[2][2] == grid.rows[1][3]
    assert [row[0] for row in grid.rows] == list(grid.columns[1:])


def test_across_pairs_has_one_difference_per_pair(results):
    found = {row.comparison: row for row in across_pairs(differences_of(results))}
    row = found[Comparison("lowdata", "blend", "head")]
    assert set(row.by_pair) == {("digits", "lite0"), ("digits", "tiny-vit")}
    assert row.settings == 4
    assert all(row.comparison.tested for row in found.values())
    assert Comparison("peers", "blend:head+lda", "head") not in found


# ---- what is said -------------------------------------------------------------------------------


def made_up(values: list[float]) -> Across:
    pairs = {("task", f"b{n}"): value for n, value in enumerate(values)}
    test = signed_rank(values)
    return Across(Comparison("knn", "blend", "head"), pairs, (2, 1), len(values), test, test.p)


def test_a_sentence_follows_its_numbers():
    row = made_up([0.01, 0.02, 0.03, -0.01, 0.005, 0.0, 0.015])
    line = across_line(row)
    assert "Blend is above head in 5 of 7 task-backbone pairs (equal in 1)" in line
    assert "mean +1.00 points" in line
    assert "in 2 of 7 settings above and in 1 below" in line
    assert f"p\u00a0=\u00a0{row.test.p:.3f}" in line
    assert where_not(row, lambda pair: pair[1]) == (
        "Where it does not help: b3 (\u22121.00), b5 (+0.00)."
    )


def test_too_few_pairs_are_said_instead_of_a_p_value():
    line = across_line(made_up([0.01, 0.02]))
    assert "Too few pairs differ (2)" in line
    assert "p\u00a0" not in line
    assert where_not(made_up([0.01]), str) == ""


@pytest.mark.parametrize(("strength", "above"), [(3.0, "2 of 2"), (-3.0, "0 of 2")])
def test_a_planted_effect_is_found(strength, above, tmp_path):
    plan = Plan(
        tasks=("digits",), protocols=("knn",), seeds=(0, 1), extra_strength={"blend": strength}
    )
    results = load_results(write_run(tmp_path / "run", plan))
    differences = differences_of(results)
    lines = dict(summary_lines(results, differences, across_pairs(differences)))
    line = lines["Does the blend help?"]
    assert f"above head in {above}" in line
    assert ("Where it does not help" in line) == (strength < 0)
    sign = 1 if strength > 0 else -1
    found = [d for d in differences if d.comparison[1:] == ("blend", "head")]
    assert [d.top1.sign for d in found] == [sign, sign]


# ---- the report ---------------------------------------------------------------------------------


class Seen(HTMLParser):
    """Tags and what pictures and links point at."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.sources += [v for name, v in attrs if name in ("src", "srcset", "href") and v]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_one_safe_file(written):
    seen = Seen()
    seen.feed((written / "report.html").read_text(encoding="utf-8"))
    assert seen.tags & {"script", "iframe", "link", "object", "form"} == set()
    assert all(s.startswith(("data:image/", "#")) for s in seen.sources)
    assert sum(s.startswith("data:image/png") for s in seen.sources) > 10
    text = " ".join(seen.texts)
    assert HOSTILE.removesuffix("\u202e") in text
    assert "\u202e" not in text
    for heading in (
        "In short", "Head, neighbours and blend", "Few labelled pictures", "Across tasks",
        "Loss of the linear head", "Is it k-NN, or any second voice?", "k and temperature",
        "Reliability", "The same without near duplicates", "Cost",
        "Repaired and broken answers", "What failed", "How it was measured",
    ):  # fmt: skip
        assert heading in text


def test_the_markdown_has_its_pictures_and_no_markup_of_strangers(written):
    text = (written / "report.md").read_text(encoding="utf-8")
    assert "<img" not in text.replace(r"\<img", "")
    assert r"\<img src=x onerror=alert(1)\>\|\*" in text
    named = set(re.findall(r"\]\((figures/[^)]+)\)", text))
    assert named == {f"figures/{path.name}" for path in (written / "figures").iterdir()}
    assert any("heat-" in name for name in named)
    assert any("picture-" in name for name in named)
    for name in named:
        with Image.open(written / name) as picture:
            picture.verify()
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = [len(re.split(r"(?<!\\)\|", line)) for line in tables]
    starts = [n for n, line in enumerate(tables) if line.startswith(("| ---", "| ---:"))]
    assert all(widths[n - 1] == widths[n] == widths[n + 1] for n in starts)


@pytest.mark.parametrize("count", [markdown.LONGEST_FOLDED, markdown.LONGEST_FOLDED + 1])
@pytest.mark.parametrize("folded", ["", "One by one"])
def test_a_long_folded_table_is_in_the_page_alone(count, folded, tmp_path):
    grid = Grid(["a"], [[f"cell {n}"] for n in range(count)], words=1, folded=folded)
    report = Report("title", [], [Section("heading", [grid])])
    text = write_markdown(report, tmp_path).read_text(encoding="utf-8")
    is_left_out = bool(folded) and count > markdown.LONGEST_FOLDED
    assert (f"cell {count - 1}" in text) != is_left_out
    assert (f"One by one: {count:,} rows, in report.html" in text) == is_left_out
    assert f"cell {count - 1}" in render_html(report)


def test_drawings_beyond_the_most_are_said(results, monkeypatch):
    monkeypatch.setattr(sections, "MOST_PANELS", 1)
    text, figures = heat_section(results).blocks
    assert isinstance(text, Text)
    assert text.text.endswith("The first 1 of 2 are drawn.")
    assert isinstance(figures, Figures)
    (figure,) = figures.figures
    assert "best 80.0 % at k 50, T 0.01" in figure.alt


def test_the_same_results_give_the_same_page(tmp_path):
    plan = Plan(("digits",), ("lite0",), ("linear",), (0, 1), near=0)
    results = load_results(write_run(tmp_path / "run", plan))
    pages = [render_html(build_report(results)) for _ in range(2)]
    assert pages[0] == pages[1]


def test_a_gallery_shows_what_the_blend_changed(results):
    blocks = galleries(results, source)
    tiles = [tile for block in blocks if isinstance(block, Gallery) for tile in block.tiles]
    cell = next(c for c in results.cells if c.setting.protocol == "knn" and c.seed == 0)
    head, blend = cell.correct("head"), cell.correct("blend")
    for place in pick(cell, good=True):
        assert blend[place] > head[place]
    for place in pick(cell, good=False):
        assert head[place] > blend[place]
    assert {tile.good for tile in tiles} == {True, False}
    texts = [block.text for block in blocks if isinstance(block, Text)]
    assert "Pictures: Digits. Licence: CC-BY-SA-4.0." in texts


def test_pictures_that_are_not_there_or_not_the_same_are_said(results):
    def missing(task: str, ids: object) -> list[Picture]:
        raise PicturesMissingError("no such task here")

    def other(task: str, ids: object) -> list[Picture]:
        return [Picture(picture.image, picture.label + 1) for picture in source(task, ids)]

    for wrong, words in ((missing, "no such task here"), (other, "in the task as it is loaded")):
        blocks = galleries(results, wrong)
        assert not any(isinstance(block, Gallery) for block in blocks)
        assert any(words in block.text for block in blocks if isinstance(block, Text))


def test_pictures_of_tasks_that_need_no_network():
    """Row numbers are those of the run; a task of the Hub is never downloaded for a report."""
    pytest.importorskip("catalog.loading", reason="needs the extra `offline`, which draws them")
    (row,) = local_pictures()("digits", [7])
    assert row.label == load_digits().target[7]
    with pytest.raises(PicturesMissingError, match="not on this machine"):
        local_pictures()("cifar10", [0])
    with pytest.raises(PicturesMissingError, match="row 5000 was asked for, the task has 1797"):
        local_pictures()("digits", [5000])


# ---- table, baseline, command -------------------------------------------------------------------


def test_the_table_has_a_row_per_cell_and_arm(results):
    table = as_dataset(results)
    assert len(table) == sum(len(cell.arms) for cell in results.cells)
    rows = table.to_pandas().set_index(["backbone", "protocol", "seed", "arm"]).sort_index()
    cell = next(c for c in results.cells if c.setting[1:3] == ("lite0", "knn") and c.seed == 1)
    row = rows.loc[("lite0", "knn", 1, "blend")]
    assert row["test_top1"] == cell.arms["blend"]["test"]["top1"]
    assert np.isnan(row["test_auroc"])
    assert json.loads(row["chosen"])["k"] == 20
    assert set(table["shift"]) == {"", "blur", "noise"}


def test_a_folder_against_itself_has_not_changed(small):
    results = load_results(small)
    changes, left_out = compare(results, results)
    assert left_out == []
    assert {change.arm for change in changes} == {"head", "knn", "blend", "fixed", "dino"}
    assert all(change.top1 == (0, 0, 0) for change in changes)
    text = render_html(baseline_report(results, results))
    assert "0 are clearly better, 0 clearly worse and 5 are right on the same items" in text


def test_a_change_is_found_item_by_item(small, tmp_path):
    """Also when the items are stored in another order."""
    better = Plan(**SMALL.__dict__ | {"extra_strength": {"head": 4.0}})
    new = load_results(write_run(tmp_path / "new", better))
    for cell in new.cells:
        for name in cell.arrays:
            cell.arrays[name] = cell.arrays[name][::-1]
    old = load_results(small)
    for cell in old.cells:
        for name in cell.arrays:
            cell.arrays[name] = np.roll(cell.arrays[name], 7)
    changes, _ = compare(new, old)
    (head,) = (change for change in changes if change.arm == "head")
    wanted = [
        n.correct("head").mean() - o.correct("head").mean()
        for n, o in zip(new.cells, old.cells, strict=True)
    ]
    assert head.top1.mean == pytest.approx(np.mean(wanted))
    assert head.top1.sign == 1
    assert head.nll.sign == -1
    knn = next(change for change in changes if change.arm == "knn")
    assert knn.top1 == (0, 0, 0)


def test_folders_that_cannot_be_compared(small, tmp_path):
    old = load_results(small)
    other = write_run(tmp_path / "other", Plan(**SMALL.__dict__ | {"revision": "2"}))
    with pytest.raises(ValueError, match=r"task digits of one revision in both.*'2'.*'1'"):
        compare(load_results(other), old)
    shifted = old.cells[0]
    shifted.arrays["ids"] = shifted.arrays["ids"] + 1
    _, left_out = compare(load_results(small), old)
    assert left_out == ["knn · digits · lite0: 1 splits with other test items"]
    more = write_run(tmp_path / "more", Plan(**SMALL.__dict__ | {"backbones": ("vit",)}))
    changes, left_out = compare(load_results(more), old)
    assert changes == []
    reasons = [line.split(": ")[1] for line in left_out]
    assert reasons == ["not in the baseline", "in the baseline only"]


def test_the_command_writes_everything(small, tmp_path):
    found = CliRunner().invoke(app, [str(small), "--no-pictures"])
    assert found.exit_code == 0, found.output
    assert {"report.md", "report.html", "results.parquet"} <= {p.name for p in small.iterdir()}
    table = Dataset.from_parquet(str(small / "results.parquet"), cache_dir=str(tmp_path / "cache"))
    assert len(table) == 10
    output = tmp_path / "out"
    found = CliRunner().invoke(app, [str(small), "--baseline", str(small), "--output", str(output)])
    assert found.exit_code == 0, found.output
    assert "item by item" in (output / "report.md").read_text()


def test_the_command_refuses_in_one_line(small):
    about = next(iter(cells_of(SMALL))) | {"seed": 5}
    write_cell(small, Plan(**SMALL.__dict__ | {"revision": "2"}), about)
    found = CliRunner().invoke(app, [str(small)])
    assert found.exit_code == 1
    assert "Expected one revision of task digits" in " ".join(found.output.split())
    assert cell_name(about) in "".join(found.output.split())
    assert not (small / "report.md").exists()
    found = CliRunner().invoke(app, [str(small), "--push", "a/b", "--output", "x"])
    assert found.exit_code == 2


def test_results_are_logged_to_trackio(results, monkeypatch):
    """A run per setting and arm, a step per split, with the numbers of the cells."""
    logged: list[tuple[str, list[dict[str, float]]]] = []
    fake = SimpleNamespace(
        init=lambda **options: logged.append((options["name"], [])),
        log=lambda numbers: logged[-1][1].append(numbers), finish=lambda: None,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "trackio", fake)
    assert log_to_trackio(results, "mine") == len(logged)
    settings = results.settings()
    assert len(logged) == sum(len(shared_arms(cells)) for cells in settings.values())
    setting, cells = next(iter(settings.items()))
    name = ", ".join([*setting.pair, setting.protocol, *filter(None, [setting.detail]), "head"])
    steps = dict(logged)[name]
    assert [step["seed"] for step in steps] == [cell.seed for cell in cells]
    assert steps[0]["test_top1"] == cells[0].arms["head"]["test"]["top1"]
