"""The page of a report: what it says in sentences first, then classes, confusions and pictures."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..model.card import VOICE_NAMES
from .html import Drawing, Fact, Group, Heat, Section, Table, Tile, Tone, svg_uri, write_page
from .intervals import percent
from .picking import Pick, Picking
from .svg import reliability_svg

if TYPE_CHECKING:
    from .report import ClassRow, Confusion, Near, Report, Wrong

MOST_PICTURES = 40
"""Wrong answers that are shown with their neighbours; `report.json` has all."""

LARGEST_MATRIX = 50
"""Classes up to which all confusions are one table; of more the most frequent are listed."""

MOST_PAIRS, MOST_PAIRS_BESIDE, MOST_CLASSES = 50, 10, 500
"""Pairs that are listed by themselves and beside a matrix; classes that are listed."""

_SURE, _LEAST_P, _LONGEST_NAME = 0.9, 0.001, 60
_COLUMNS = {"top1": "top-1", "top5": "top-5", "mean_class": "mean per class"}
_REST = {"nll": "NLL", "brier": "Brier score", "ece": "ECE"}


def write_report(report: "Report", path: Path) -> Path:
    """Writes the page of a report; see `Report.write_page`."""
    shown = report.wrong[:MOST_PICTURES]
    asked = report.gallery.asked(each.id for each in shown)
    stored = report.gallery.stored(near.id for each in shown for near in each.neighbors)
    sections = [
        _summary(report), _voices(report), _classes(report), _confusions(report),
        _errors(report, asked, stored), _calibration(report), _limits(report),
    ]  # fmt: skip
    lead = [
        f"{_pictures(report.count)} of {len(report.class_names):,} classes, asked about once. "
        "Whoever has this page sees the pictures in it."
    ]
    picking = Picking("hf-knn forget CHECKPOINT", "hf-knn relabel CHECKPOINT")
    return write_page(path, "How good this model is", sections, [*lead, *report.notes], picking)


def findings(report: "Report") -> list[str]:
    """What a person may want to act on, in sentences.

    Args:
        report: of a model.
    """
    top1 = report.voices["blend"]["top1"].say_share(report.count)
    said = [f"The blend answers {_pictures(report.count)}: {top1} right."]
    compared = (each.say(VOICE_NAMES) for each in report.comparisons[:2])
    said += [sentence[0].upper() + sentence[1:] for sentence in compared]
    worst = next((row for row in report.classes if row.count), None)
    if worst is not None and worst.right < worst.count:
        line = f"Found worst: {_name(report, worst.label)}, {worst.right} of {worst.count}"
        if worst.confused_with is not None:
            line += f", most often taken for {_name(report, worst.confused_with)}"
        said.append(f"{line}.")
    pair = next((cell for cell in report.confusion if cell.label != cell.answer), None)
    if pair is not None:
        names = f"{_name(report, pair.label)} answered as {_name(report, pair.answer)}"
        said.append(f"Most frequent mistake: {names}, {pair.count} of {len(report.wrong)}.")
    sure = sum(each.confidence >= _SURE for each in report.wrong)
    if sure:
        said.append(
            f"{sure} of {len(report.wrong)} wrong answers are at least {_SURE:.0%} sure: look at "
            "those first, their labels may be wrong."
        )
    return said


def _summary(report: "Report") -> Section:
    numbers, count = report.voices["blend"], report.count
    found = sum(row.right > 0 for row in report.classes if row.count)
    facts = [
        Fact(numbers["top1"].say_share(count), "answered right"),
        Fact(numbers["mean_class"].say_share(count), "mean per class"),
        Fact(f"{count:,}", "pictures"),
        Fact(f"{len(report.wrong):,}", "wrong answers", _tone(len(report.wrong))),
        Fact(f"{found:,} of {sum(row.count > 0 for row in report.classes):,}", "classes found"),
    ]
    if report.stored:
        facts.append(Fact(f"{report.stored:,}", "stored in the model", Tone.NEUTRAL))
    return Section("Summary", findings(report), facts)


def _tone(count: int) -> Tone:
    return Tone.BAD if count else Tone.GOOD


def _voices(report: "Report") -> Section:
    rows = [
        (
            VOICE_NAMES[voice],
            *(numbers[name].say_share(report.count) for name in _COLUMNS),
            *(numbers[name].say() for name in _REST),
        )
        for voice, numbers in report.voices.items()
    ]
    columns = ("", *_COLUMNS.values(), *_REST.values())
    tables = [Table(columns, rows, "With 95 % intervals", range(1, len(columns)))]
    pairs = [
        (
            f"{VOICE_NAMES[each.second]} against {VOICE_NAMES[each.first]}", each.verdict,
            each.say_points(), f"{each.only_second:,} : {each.only_first:,}",
            f"{each.p:.3f}" if each.p >= _LEAST_P else f"< {_LEAST_P}",
        )
        for each in report.comparisons
    ]  # fmt: skip
    if pairs:
        header = ("voices", "the first is", "points", "right alone", "p")
        caption = "On the same pictures; p of McNemar's exact test"
        tables.append(Table(header, pairs, caption, (2, 3, 4)))
    text = [
        "The head is trained, the neighbours are stored pictures that vote, and the blend of both "
        "is the answer. Where so many pictures show no difference, more pictures may."
    ]
    return Section("Head, neighbours and blend", text, tables=tables)


def _classes(report: "Report") -> Section:
    shown = report.classes[:MOST_CLASSES]
    knows_rows = any(row.rows is not None for row in shown)
    header = ["class", "pictures", "found (recall)", "answered", "right of these (precision)"]
    header += ["most confused with", "stored"] if knows_rows else ["most confused with"]
    rows = [_class_cells(report, row, knows_rows) for row in shown]
    text = [
        "The worst found first. Teach more pictures of the classes at the top (hf-knn teach), and "
        "ask whether two classes that are confused are two."
    ]
    if len(report.classes) > len(shown):
        text.append(f"{len(report.classes) - len(shown):,} more classes are in report.json.")
    numeric = [1, 3, 6] if knows_rows else [1, 3]
    return Section("Classes", text, tables=[Table(header, rows, "Each class", numeric)])


def _class_cells(report: "Report", row: "ClassRow", knows_rows: bool) -> list[str]:
    confused = ""
    if row.confused_with is not None:
        confused = f"{_name(report, row.confused_with)} ({row.confused})"
    cells = [
        report.name_of(row.label), f"{row.count:,}", row.recall.say_share(row.count),
        f"{row.answered:,}", row.precision.say_share(row.answered), confused,
    ]  # fmt: skip
    return [*cells, "" if row.rows is None else f"{row.rows:,}"] if knows_rows else cells


def _confusions(report: "Report") -> Section:
    wrong = [cell for cell in report.confusion if cell.label != cell.answer]
    heats, tables, text = [], [], []
    most = MOST_PAIRS
    if len(report.class_names) <= LARGEST_MATRIX:
        text = ["A row for what pictures are, a column for what they are answered as."]
        heats, most = [_matrix(report)], MOST_PAIRS_BESIDE
    if wrong:
        pairs = [_pair_cells(report, cell) for cell in wrong[:most]]
        header = ("pictures of", "answered as", "times", "of")
        tables = [Table(header, pairs, "The most frequent mistakes", (2, 3))]
    if len(wrong) > most:
        text.append(f"{len(wrong) - most:,} more pairs of classes are in report.json.")
    return Section("What is taken for what", text, heats=heats, tables=tables)


def _matrix(report: "Report") -> Heat:
    size = len(report.class_names)
    has_silence = any(cell.answer < 0 for cell in report.confusion)
    counts = [[0] * (size + has_silence) for _ in range(size)]
    for cell in report.confusion:
        counts[cell.label][cell.answer] += cell.count  # -1, nothing, is the last column
    more = [report.name_of(None)] if has_silence else []
    return Heat(report.class_names, counts, "Confusion matrix", more)


def _pair_cells(report: "Report", cell: "Confusion") -> tuple[str, ...]:
    total = next(row.count for row in report.classes if row.label == cell.label)
    names = _name(report, cell.label), _name(report, cell.answer)
    return (*names, f"{cell.count:,}", f"{total:,}")


def _errors(report: "Report", asked: dict[int, str], stored: dict[int, str]) -> Section:
    count = len(report.wrong)
    if not count:
        return Section("Wrong answers", ["None."])
    text = [
        "The surest first, each with the stored pictures nearest to it. A frame says whether a "
        "neighbour has the label of the picture (✓) or that of the wrong answer (✗). Where the "
        "answer is right and the label is not, mend the label; where a neighbour has a wrong "
        "label, hf-knn relabel changes it by its id: choose it, and the command is below."
    ]
    if count > MOST_PICTURES:
        text.append(f"{count - MOST_PICTURES:,} more wrong answers are in report.json.")
    shown = report.wrong[:MOST_PICTURES]
    missing = sum(each.id not in asked for each in shown)
    if missing:
        text.append(f"Pictures that are not at hand here: {missing} of {len(shown)}.")
    ids = {near.id for each in shown for near in each.neighbors}
    unseen = len(ids - stored.keys())
    if unseen:
        text.append(f"Stored pictures that are not at hand here: {unseen} of {len(ids)}.")
    groups = [_group(report, each, asked, stored) for each in shown]
    return Section(f"Wrong answers ({count:,})", text, groups=groups)


def _group(
    report: "Report", wrong: "Wrong", asked: dict[int, str], stored: dict[int, str]
) -> Group:
    label, answer = _name(report, wrong.label), _name(report, wrong.answer)
    lines = [f"answered {answer}, {percent(wrong.confidence)} sure"]
    lines.append(f"{label}: {percent(wrong.label_confidence)}")
    if wrong.knn is not None:
        lines.append(f"head: {_name(report, wrong.head)}")
        lines.append(f"neighbours: {_name(report, wrong.knn)}")
    lines.append(wrong.path or f"sample {wrong.id}")
    own = Tile(label, asked.get(wrong.id), lines, alt=f"A picture of {label}")
    tiles = [_neighbor(report, wrong, near, stored) for near in wrong.neighbors]
    return Group([own, *tiles], f"{label}, answered as {answer}")


def _neighbor(report: "Report", wrong: "Wrong", near: "Near", stored: dict[int, str]) -> Tile:
    tone = {wrong.label: Tone.GOOD, wrong.answer: Tone.BAD}.get(near.label, Tone.NEUTRAL)
    lines = [f"similarity {near.similarity:.3f}", f"id {near.id}"]
    lines += [near.path] if near.path else []
    name = _name(report, near.label)
    pick = Pick(f"{near.path or name}, id {near.id}", str(near.id))
    return Tile(name, stored.get(near.id), lines, tone, f"A stored picture of {name}", pick)


def _calibration(report: "Report") -> Section:
    error, chance = report.voices["blend"]["ece"].value, report.chance_error
    verdict = "no more than chance makes of" if error <= chance else "more than chance makes of"
    text = [
        f"What the blend says of its sureness is off by {percent(error)} on average (ECE), "
        f"{verdict} a model that is as often right as it says: up to {percent(chance)} on so many "
        "pictures."
    ]
    shown = ", ".join(f"{right:.0%} at {sure:.0%}" for sure, right, _ in report.reliability)
    drawing = Drawing(svg_uri(reliability_svg(report.reliability)), f"Right, by how sure: {shown}.")
    return Section("How sure, and how often right", text, drawings=[drawing])


def _limits(report: "Report") -> Section:
    facts = [(name, _said(value)) for name, value in report.facts.items() if value != ""]
    text = [
        "Intervals hold the truth in 95 of 100 reports, if the pictures are drawn as those to come "
        "will be, each by itself: of shares Wilson's score interval, of the mean per class that of "
        "as many pictures as vary as much, of NLL and Brier score Student's t, of differences "
        "Bonett and Price's, widened to the exact test. Pictures that belong together tell less.",
        "Numbers of several classes looked at together stray further: of 20 intervals one misses.",
    ]
    return Section("What to know", text, tables=[Table(("", ""), facts, "The model")])


def _name(report: "Report", label: int | None) -> str:
    """The name of a class for a sentence or a tile; the table of classes has the whole one."""
    name = report.name_of(label)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _said(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count:,} pictures"
