"""A checkup as a page with pictures: the most urgent first, each with what to do about it."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
from PIL import Image

from ..fit.html import Drawing, Fact, Group, Section, Table, Tile, Tone, svg_uri, thumbnail
from ..fit.picking import Pick
from .examine import Checkup
from .findings import OF_ONE_PICTURE, STORED, Finding, Kind, Pictures, csv_line, in_order
from .labels import counts_by_split
from .svg import curve_svg

MOST_SHOWN = 48
"""Pictures, or groups of them, shown of each kind; the csv has all."""

MOST_IN_A_GROUP = 8

Show = Callable[[int], Image.Image | None]
"""From the number of a picture to the picture; None where it cannot be shown."""

GivePick = Callable[[int], Pick | None]
"""From the number of a picture to its check box; None for no box."""

TITLES = {
    Kind.BROKEN: "Broken files",
    Kind.UNREAD: "Pictures of a format or size that is not read",
    Kind.NO_LABEL: "Pictures without a label",
    Kind.CROSS_SPLIT: "Duplicates across splits",
    Kind.GROUP_ACROSS: "Groups across splits",
    Kind.CONFLICT: "Label conflicts",
    Kind.LABEL_ERROR: "Likely label errors",
    Kind.EXACT: "Exact duplicates",
    Kind.NEAR: "Near duplicates",
    Kind.OUTLIER: "Outliers",
    Kind.LOOK_ALIKE: "Classes spelled alike",
    Kind.IMBALANCE: "Small classes",
}
ADVICE = {
    Kind.BROKEN: "Repair or delete them. Training leaves them out.",
    Kind.UNREAD: (
        "Convert them to JPEG or PNG. Where only the size is too much, --max-pixels or --max-bytes "
        "may allow it. Training leaves them out."
    ),
    Kind.NO_LABEL: "Give them a label or take them out. Training refuses them.",
    Kind.CROSS_SPLIT: (
        "Remove those marked as copies. A picture that is trained on and tested on makes the test "
        "number too good."
    ),
    Kind.GROUP_ACROSS: "Move each group to one side. Else nothing measured is about a new group.",
    Kind.CONFLICT: "Decide on one label for each. The same picture has several.",
    Kind.LABEL_ERROR: (
        "Look at them and relabel what is wrong. Head and neighbours that have not seen the "
        "picture agree on another class."
    ),
    Kind.EXACT: "Remove the copies. The same pixels twice weigh twice.",
    Kind.NEAR: (
        "Keep one of each, unless the difference is what you want to tell apart. They are resized, "
        "recompressed or slightly cropped copies, or pictures that differ in very little."
    ),
    Kind.OUTLIER: "Ask whether they belong to the task. They are far from all other pictures.",
    Kind.LOOK_ALIKE: "Merge them if they are one class. Each costs the other its pictures.",
    Kind.IMBALANCE: "Add pictures, merge classes, or train with class weights.",
}
_DUPLICATES = (Kind.CROSS_SPLIT, Kind.GROUP_ACROSS, Kind.CONFLICT, Kind.EXACT, Kind.NEAR)


def sections_of(checkup: Checkup, show: Show, *, picks: bool = False) -> list[Section]:
    """The parts of a page about a checkup.

    Args:
        checkup: done.
        show: gives the pictures.
        picks: whether pictures have check boxes.
    """
    by_kind = groupby(in_order(checkup.findings), lambda finding: finding.kind)
    sections = [_summary(checkup)]
    sections += [_section(kind, list(found), checkup, show, picks) for kind, found in by_kind]
    if checkup.pictures.label_names:
        sections.append(_classes(checkup))
    if checkup.curve is not None:
        sections.append(_curve(checkup))
    return [*sections, _limits(checkup)]


def first_things(findings: Sequence[Finding], most: int = 3) -> list[str]:
    """What to do first, one line each.

    Args:
        findings: in any order.
        most: how many lines.
    """
    counts = Counter(finding.kind for finding in findings)
    return [
        f"{TITLES[kind]} ({counts[kind]}): {ADVICE[kind].split('. ')[0].rstrip('.')}."
        for kind in Kind
        if counts[kind]
    ][:most]


def label_note(checkup: Checkup) -> str:
    """How far the two voices are to be believed on these pictures; empty if nothing was asked."""
    if checkup.voices is None:
        return ""
    asked = checkup.voices.asked
    labels = checkup.pictures.labels[checkup.usable]
    answers = checkup.voices.blend.argmax(1).numpy()
    agree = float((answers == labels)[asked.numpy()].mean())
    return (
        f"Out of fold, the two voices agree with {agree:.0%} of the labels. The lower that is, the "
        "more of the pictures named here are merely hard."
    )


def _summary(checkup: Checkup) -> Section:
    pictures = checkup.pictures
    facts = [Fact(f"{len(pictures):,}", "pictures")]
    if pictures.label_names:
        facts.append(Fact(f"{len(pictures.label_names):,}", "classes"))
    facts += [
        Fact(f"{count:,}", TITLES[kind].lower(), _tone(kind, count))
        for kind, count in checkup.counts().items()
    ]
    first = first_things(checkup.findings)
    text = [f"{number}. {line}" for number, line in enumerate(first, 1)]
    text = ["To do first:", *text] if first else ["Nothing was found that has to be done."]
    if checkup.curve is not None:
        text.append(checkup.curve.statement())
    return Section("Summary", text, facts)


def _tone(kind: Kind, count: int) -> Tone:
    if not count:
        return Tone.GOOD
    return Tone.NEUTRAL if kind in (Kind.NEAR, Kind.OUTLIER, Kind.IMBALANCE) else Tone.BAD


def _section(
    kind: Kind, found: list[Finding], checkup: Checkup, show: Show, picks: bool
) -> Section:
    of = {one.picture: one for one in found}

    def pick(picture: int) -> Pick | None:
        return _pick(kind, picture, of.get(picture), checkup.pictures) if picks else None

    heading, text = f"{TITLES[kind]} ({len(found):,})", [ADVICE[kind]]
    if kind is Kind.LABEL_ERROR:
        text.append(label_note(checkup))
    if kind in (Kind.BROKEN, Kind.UNREAD, Kind.NO_LABEL):
        return Section(heading, text, tables=[_places(found, checkup.pictures)])
    if kind in (Kind.LOOK_ALIKE, Kind.IMBALANCE):
        names = checkup.pictures.label_names
        rows = [(str(names[one.label]), one.detail) for one in found]
        return Section(heading, text, tables=[Table(("class", "what is wrong"), rows)])
    if kind in _DUPLICATES:
        bundles = _bundles(found)
        groups = [_group(kind, *bundle, checkup, show, pick) for bundle in bundles[:MOST_SHOWN]]
        return Section(heading, [*text, *_hidden(len(bundles), "groups")], groups=groups)
    tiles = [_tile(one, checkup, show, pick) for one in found[:MOST_SHOWN]]
    return Section(heading, [*text, *_hidden(len(found), "pictures")], tiles=tiles)


def _hidden(count: int, what: str) -> list[str]:
    more = count - MOST_SHOWN
    return [f"{more:,} more {what} are in findings.csv."] if more > 0 else []


def _bundles(found: list[Finding]) -> list[tuple[int, list[int]]]:
    """The picture that is kept and those that go with it, in order."""
    bundles: dict[int, list[int]] = {}
    for one in found:
        if one.kind in (Kind.CONFLICT, Kind.GROUP_ACROSS):
            bundles[one.picture] = list(one.others)
        else:
            bundles.setdefault(one.others[0], []).append(one.picture)
    return list(bundles.items())


def _group(
    kind: Kind, kept: int, others: list[int], checkup: Checkup, show: Show, pick: GivePick
) -> Group:
    pictures = checkup.pictures
    is_choice = kind in (Kind.CONFLICT, Kind.GROUP_ACROSS)
    tone = Tone.NEUTRAL if is_choice else Tone.GOOD
    first = _plain_tile(kept, "" if is_choice else "keep", tone, pictures, show)
    tiles = [replace(first, pick=pick(kept)) if is_choice else first]
    other = Tone.BAD if kind is Kind.CROSS_SPLIT else Tone.NEUTRAL
    role = "" if is_choice else "copy"
    shown = others[: MOST_IN_A_GROUP - 1]
    tiles += [
        replace(_plain_tile(picture, role, other, pictures, show), pick=pick(picture))
        for picture in shown
    ]
    is_cut = len(shown) < len(others)
    return Group(tiles, f"{pictures.name_of(kept)} and {len(others)} more" if is_cut else "")


def _plain_tile(picture: int, role: str, tone: Tone, pictures: Pictures, show: Show) -> Tile:
    lines = [", ".join(filter(None, (_place_of(picture, pictures), role)))]
    lines.append(pictures.name_of(picture))
    label = pictures.label_of(picture) or "no label"
    return Tile(label, _thumbnail(picture, show), lines, tone, alt=f"A picture of {label}")


def _tile(finding: Finding, checkup: Checkup, show: Show, pick: GivePick) -> Tile:
    pictures, picture = checkup.pictures, finding.picture
    label = pictures.label_of(picture)
    lines = [pictures.name_of(picture), _place_of(picture, pictures)]
    tone = Tone.NEUTRAL
    if finding.suggested >= 0:
        tone = Tone.BAD
        lines.insert(0, f"rather {pictures.label_names[finding.suggested]}?")
    alt = f"A picture labelled {label}"
    return Tile(label, _thumbnail(picture, show), lines, tone, alt, pick(picture))


def _pick(kind: Kind, picture: int, finding: Finding | None, pictures: Pictures) -> Pick | None:
    """What a check box chooses: a row by its id, a file by its line of the csv."""
    name = f"{pictures.name_of(picture)}, {TITLES[kind].lower()}"
    if pictures.splits[picture] == STORED:
        suggested = -1 if finding is None else finding.suggested
        label = str(pictures.label_names[suggested]) if suggested >= 0 else ""
        return Pick(name, str(pictures.ids[picture]), label, str(kind))
    if finding is None or kind not in OF_ONE_PICTURE:
        return None
    return Pick(name, kind=str(kind), line=csv_line(finding, pictures))


def _place_of(picture: int, pictures: Pictures) -> str:
    """The split; of a stored row its id, which commands ask for."""
    split = pictures.splits[picture]
    return f"id {pictures.ids[picture]}" if split == STORED else split


def _thumbnail(picture: int, show: Show) -> str | None:
    image = show(picture)
    return None if image is None else thumbnail(image)


def _places(found: list[Finding], pictures: Pictures) -> Table:
    rows = [
        (pictures.splits[one.picture], str(pictures.rows[one.picture]),
         pictures.paths[one.picture], pictures.label_of(one.picture), one.detail)
        for one in found
    ]  # fmt: skip
    return Table(("split", "row", "file", "label", "what is wrong"), rows, numeric=[1])


def _classes(checkup: Checkup) -> Section:
    pictures = checkup.pictures
    counts = counts_by_split(pictures)
    total = sum(counts.values(), np.zeros(len(pictures.label_names), np.int64))
    rows = [
        (str(pictures.label_names[label]), *(f"{of[label]:,}" for of in counts.values()))
        for label in np.argsort(-total, kind="stable").tolist()
    ]
    numeric = range(1, 1 + len(counts))
    table = Table(("class", *counts), rows, "Labelled pictures, largest class first", [*numeric])
    return Section("Classes", tables=[table])


def _curve(checkup: Checkup) -> Section:
    curve = checkup.curve
    assert curve is not None
    means = curve.accuracies.mean(axis=0)
    shown = ", ".join(
        f"{mean:.1%} with {size:.1f}" for mean, size in zip(means, curve.per_class, strict=True)
    )
    text = [
        curve.statement(),
        "Each point: the blend of a ridge head and the neighbours, fitted on a part of the "
        "pictures, asked about pictures held out, nothing tuned. Through them a power law.",
    ]
    alt = f"Accuracy over pictures per class: {shown}."
    return Section("Learning curve", text, drawings=[Drawing(svg_uri(curve_svg(curve)), alt)])


def _limits(checkup: Checkup) -> Section:
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in checkup.seconds.items())
    text = [f"Not looked at: {line}" for line in checkup.skipped]
    text.append(f"Time: {phases}." if phases else "")
    text += [
        "Copies that are mirrored, rotated, or cropped by more than about a twentieth of each side "
        "are not found. A label error is named only where both voices are sure, so many stay "
        "unnamed; the order of the csv's label errors is the order of their score.",
        "The check itself changes nothing in your folder.",
    ]
    return Section("What to know", [line for line in text if line])
