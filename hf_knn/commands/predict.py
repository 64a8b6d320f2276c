"""`hf-knn predict`: answers and who voted; with `--explain` or `--html` also why."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from ..checkup.examine import open_picture
from ..data.decode import read_picture
from ..data.walk import StoredPictures
from ..fit.html import Fact, Group, Section, Tile, Tone, thumbnail, webp_uri, write_page
from ..fit.html import Table as PageTable
from ..model.explain import Explanation, Voter
from ..model.modeling import KnnForImageClassification
from ..model.pictures import Thumbnails, features_of
from .console import as_called, console, escape, open_checkpoint, print_json, right

_ROWS, _TILES = 5, 24
_CHANGED = (
    "The threshold for this error rate was found before the model was taught or made to forget; "
    "`hf-knn tune` finds it anew."
)


@dataclass(frozen=True)
class PredictOptions:
    """What `hf-knn predict` was asked.

    Attributes:
        top: classes shown per picture, >= 1.
        neighbors: neighbours shown per picture, >= 0; None is 5, and 24 on a page.
        explain: also say why.
        page: an HTML file to write; None prints.
        pictures: folder that the stored paths are relative to; None shows no stored picture.
        max_error: error rate at which it abstains; None always answers.
        json_output: print JSON instead.
    """

    top: int
    neighbors: int | None = None
    explain: bool = False
    page: Path | None = None
    pictures: Path | None = None
    max_error: float | None = None
    json_output: bool = False

    @property
    def shown_neighbors(self) -> int:
        """How many on the screen, and in JSON."""
        return _ROWS if self.neighbors is None else self.neighbors


def predict_images(checkpoint: str, images: Sequence[Path], options: PredictOptions) -> None:
    """Classifies pictures, shows the neighbours that voted, and says why if that is asked.

    Args:
        checkpoint: a folder or a Hub id.
        images: picture files.
        options: see `PredictOptions`.

    Raises:
        ValueError: if a picture cannot be decoded, for an error rate without a threshold, a folder
            that is not there, or a damaged checkpoint.
        OSError: if something is not there or cannot be written.
    """
    if options.pictures is not None and not options.pictures.is_dir():
        raise ValueError(f"Expected {options.pictures} to be the folder of the stored pictures.")
    model = open_checkpoint(checkpoint)
    stored = None if options.pictures is None else StoredPictures(options.pictures)
    seen: dict[int, bool] = {}
    show = partial(_stored, stored, model.thumbnails, seen)
    answers, reasons, sections = [], [], []
    for number, path in enumerate(images):
        image = read_picture(path, number)
        features = features_of(model, [image])
        answers.append(_answer(model, path, features, options))
        if options.explain:
            found = model.explain(features=features, max_error=options.max_error)
            explanation = found[0] if isinstance(found, list) else found
            _add_reasons(answers[-1], explanation)
            reasons.append(explanation)
            if options.page is not None:
                sections.append(_section(path, image, explanation, options, show))
    remarks = [_CHANGED] if options.max_error is not None and model.changes else []
    if options.page is not None:
        if stored is not None and not all(seen.values()):
            missed = (
                f"Stored pictures of this page: {sum(seen.values())} of {len(seen)} found under "
                f"{options.pictures}; pass the folder that their paths are relative to."
            )
            remarks.append(missed)
            console.print(f"[yellow]{escape(missed)}[/]", soft_wrap=True)
        lead = [f"{len(images)} pictures, answered by {checkpoint}.", *remarks]
        write_page(options.page, "Answers and their reasons", sections, lead)
        console.print(f"Written: {escape(options.page)}", soft_wrap=True)
    if options.json_output:
        print_json(answers)
    elif options.page is None and options.explain:
        for answer, explanation in zip(answers, reasons, strict=True):
            _print_reasons(answer, explanation, options)
    elif options.page is None:
        for answer in answers:
            _print_answer(answer)
    for remark in remarks if options.page is None else []:
        console.print(f"\n[yellow]{escape(as_called(remark))}[/]", soft_wrap=True)


def notices(explanation: Explanation) -> list[str]:
    """What one should know before one believes an answer, in sentences."""
    said = []
    if not explanation.answers:
        said.append("Not sure enough for the error rate asked for: better ask somebody.")
    if not explanation.is_typical:
        said.append(
            f"Unlike anything seen: only {explanation.typicality:.1%} of the stored pictures are "
            "as far from their nearest."
        )
    head, knn = next(iter(explanation.head)), next(iter(explanation.knn), None)
    if knn is not None and head != knn:
        said.append(f"Head and neighbours disagree: {head} and {knn}.")
    return said


def flip_text(explanation: Explanation) -> str:
    """What would change the answer, in a sentence."""
    flip = explanation.flip
    if flip is None:
        return (
            f"No set of up to {len(explanation.neighbors)} stored pictures was found without which "
            "the answer would be another one."
        )
    count = len(flip.row_ids)
    rows = "1 stored picture" if count == 1 else f"{count} stored pictures"
    least = "" if flip.is_smallest else " (a smaller set may do)"
    return f"Without {rows} the answer would be {flip.answer}{least}."


def _add_reasons(answer: dict[str, Any], explanation: Explanation) -> None:
    """What `--explain` adds to an answer, by the names that it has without."""
    shares = {voter.row_id: voter.share for voter in explanation.neighbors}
    for row in answer["neighbors"]:
        row["share"] = shares.get(row["id"], 0.0)
    flip = explanation.flip
    answer |= {
        "answers": explanation.answers,
        "margin": explanation.margin,
        "typicality": explanation.typicality,
        "is_typical": explanation.is_typical,
        "flip": None if flip is None else flip._asdict(),
        "notices": notices(explanation),
    }


def _answer(
    model: KnnForImageClassification, path: Path, features: Tensor, options: PredictOptions
) -> dict[str, Any]:
    with torch.inference_mode():
        output = model(features=features.to(model.device), return_neighbors=True)
    names = model.config.class_names
    probabilities = output.logits[0].exp()
    head = output.head_logits[0].float().softmax(-1)
    votes = None if output.knn_log_probs is None else output.knn_log_probs[0].exp()
    order = probabilities.argsort(descending=True, stable=True)  # as explanations have it
    classes = order[: options.top].tolist()
    answer: dict[str, Any] = {
        "image": str(path),
        "answer": names[classes[0]],
        "classes": [
            {
                "label": names[c],
                "probability": float(probabilities[c]),
                "head": float(head[c]) if c < len(head) else None,
                "knn": None if votes is None else float(votes[c]),
            }
            for c in classes
        ],
        "neighbors": [],
    }
    if output.neighbors is not None and model.datastore is not None:
        found = output.neighbors
        columns = (found.labels, found.similarities, found.ids)
        rows = zip(
            *(column[0, : options.shown_neighbors].tolist() for column in columns), strict=True
        )
        answer["neighbors"] = [
            {
                "label": names[label],
                "similarity": similarity,
                "id": row_id,
                "path": model.datastore.path_of(row_id),
            }
            for label, similarity, row_id in rows
        ]
    return answer


def _print_answer(answer: dict[str, Any]) -> None:
    voices = map(right, ("blend", "head", "neighbours"))
    table = Table("class", *voices, title=escape(answer["image"]), title_justify="left")
    for row in answer["classes"]:
        shares = [row["probability"], row["head"], row["knn"]]
        table.add_row(
            escape(row["label"]), *["-" if share is None else f"{share:.1%}" for share in shares]
        )
    console.print(table)
    if not answer["neighbors"]:
        return
    near = Table(
        "label", right("similarity"), right("id"), "picture",
        title="nearest training pictures", title_justify="left",
    )  # fmt: skip
    for row in answer["neighbors"]:
        place = escape(row["path"] or "-")
        near.add_row(escape(row["label"]), f"{row['similarity']:.3f}", str(row["id"]), place)
    console.print(near)


def _print_reasons(
    answer: dict[str, Any], explanation: Explanation, options: PredictOptions
) -> None:
    probability = explanation.probabilities[explanation.answer]
    console.print(
        f"\n[bold]{escape(answer['image'])}[/]: {escape(explanation.answer)} {probability:.1%}"
    )
    for notice in answer["notices"]:
        console.print(f"[yellow]{escape(notice)}[/]")
    table = Table("", "blend", "head", "neighbours")
    for cells in _class_rows(explanation, options.top):
        table.add_row(*map(escape, cells))
    console.print(table)
    if explanation.neighbors:
        voters = Table("nearest", "id", "similarity", "share", "picture")
        for row in answer["neighbors"]:
            voters.add_row(
                escape(row["label"]), str(row["id"]), f"{row['similarity']:.3f}",
                f"{row['share']:.1%}", escape(row["path"] or "-"),
            )  # fmt: skip
        if answer["neighbors"]:
            console.print(voters)
        console.print(f"Margin of the vote: {explanation.margin:.1%}.")
        ids = "" if explanation.flip is None else f" Ids: {explanation.flip.row_ids[:10]}"
        console.print(escape(flip_text(explanation) + ids), soft_wrap=True)


def _class_rows(explanation: Explanation, top: int) -> list[tuple[str, str, str, str]]:
    return [
        (name, f"{p:.1%}", _share(explanation.head, name), _share(explanation.knn, name))
        for name, p in list(explanation.probabilities.items())[:top]
    ]


def _share(voice: dict[str, float], name: str) -> str:
    return f"{voice[name]:.1%}" if name in voice else "-"


def _section(
    path: Path,
    image: Image.Image,
    explanation: Explanation,
    options: PredictOptions,
    show: Callable[[Voter], str | None],
) -> Section:
    probability = explanation.probabilities[explanation.answer]
    flip = set() if explanation.flip is None else set(explanation.flip.row_ids)
    own = Tile(explanation.answer, thumbnail(image, 224), [f"{probability:.1%}"], alt=path.name)
    count = _TILES if options.neighbors is None else options.neighbors
    shown = explanation.neighbors[:count]
    tiles = [_tile(voter, explanation.answer, flip, show(voter)) for voter in shown]
    facts = [Fact(f"{probability:.0%}", f"blended probability of {explanation.answer}")]
    if explanation.neighbors:
        facts.append(Fact(f"{explanation.margin:.0%}", "margin of the vote"))
    if explanation.typicality is not None:
        tone = Tone.NEUTRAL if explanation.is_typical else Tone.BAD
        share = f"{explanation.typicality:.1%}"
        facts.append(Fact(share, "of the stored pictures are as unlike the others", tone))
    rows = _class_rows(explanation, options.top)
    groups = [Group([own], "The picture")]
    if tiles:
        rest = len(explanation.neighbors) - len(tiles)
        more = f", {rest} more with smaller shares" if rest else ""
        groups.append(Group(tiles, f"Who voted, nearest first{more}"))
    text = [*notices(explanation), *([flip_text(explanation)] if explanation.neighbors else [])]
    return Section(
        f"{path.name}: {explanation.answer}", text, facts, groups=groups,
        tables=[PageTable(("class", "blend", "head", "neighbours"), rows, numeric=(1, 2, 3))],
    )  # fmt: skip


def _tile(voter: Voter, answer: str, flip: set[int], picture: str | None) -> Tile:
    lines = [f"share {voter.share:.1%}", f"similarity {voter.similarity:.3f}"]
    lines.append(f"id {voter.row_id}" + (", decides" if voter.row_id in flip else ""))
    if picture is None and voter.path:
        lines.append(voter.path)
    tone = Tone.GOOD if voter.label == answer else Tone.BAD
    return Tile(voter.label, picture, lines, tone, voter.path or voter.label)


def _stored(
    pictures: StoredPictures | None,
    thumbnails: Thumbnails | None,
    seen: dict[int, bool],
    voter: Voter,
) -> str | None:
    """A stored picture: from the folder, else from the checkpoint; None where it is in neither."""
    image = None if pictures is None else open_picture(pictures, voter.path)
    seen[voter.row_id] = image is not None
    if image is not None:
        return thumbnail(image)
    small = None if thumbnails is None else thumbnails.get(voter.row_id)
    return None if small is None else webp_uri(small)
