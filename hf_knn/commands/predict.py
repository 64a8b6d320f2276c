"""`hf-knn predict`: answers to one picture or many, and who voted; if asked, also why."""

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME
from transformers.utils import logging as transformers_logging

from ..checkup.examine import open_picture
from ..core.backbone import hash_tensors
from ..core.manifest import MANIFEST_NAME
from ..core.reading import HubFiles
from ..data.decode import BadImageError, decode_image, limits_of_process
from ..data.sources import STANDARD_INPUT, Picture, SourceRows, find_sources
from ..data.walk import StoredPictures
from ..features.answering import Answer, Answerer, document_of, notices
from ..features.backends import check_backend
from ..features.encoders import AUTO
from ..features.extract import FeatureStream, progress_bars
from ..fit.html import Fact, Group, Section, Tile, Tone, thumbnail, webp_uri, write_page
from ..fit.html import Table as PageTable
from ..model.explain import Explanation, Voter
from ..model.modeling import KnnForImageClassification
from ..model.pictures import Thumbnails
from .answering import KEPT, PredictOptions, Summary, cut, doubts_of, flip_text, row_of
from .answers import Row, open_answers
from .console import (
    as_called,
    console,
    escape,
    open_checkpoint,
    print_json,
    right,
    say_what_was_left_out,
    typed,
)
from .stopping import stands

_TILES = 24
_FEW = 5
"""Sources that a command is repeated with."""

_MOST_JSON = 10_000
"""Pictures whose answers are held in memory."""

_CHANGED = (
    "The threshold for this error rate was found before the model was taught or made to forget; "
    "`hf-knn tune` finds it anew."
)


def predict_pictures(checkpoint: str, sources: Sequence[str], options: PredictOptions) -> None:
    """Classifies pictures: prints the answers or writes them, and says why if that is asked.

    A picture that cannot be read is an answer with its reason, and the others are answered.

    Args:
        checkpoint: a folder or a Hub id.
        sources: what names pictures, see `find_sources`.
        options: see `PredictOptions`.

    Raises:
        ValueError: if no picture at all can be read, for an error rate without a threshold, a
            source or a folder that is not there, a file of another run, or a damaged checkpoint.
        OSError: if something is not there or cannot be written.
    """
    if options.pictures is not None and not options.pictures.is_dir():
        raise ValueError(f"Expected {options.pictures} to be the folder of the stored pictures.")
    found = find_sources(sources, _standard_input, options.split)
    say_what_was_left_out(found.notes)
    count = len(found.pictures)
    is_printed = options.output is None and not options.json_output
    if options.json_output and options.output is None and count > _MOST_JSON:
        raise ValueError(
            f"Expected at most {_MOST_JSON} pictures with --json, but got {count}; write a line of "
            "JSON for each with -o answers.jsonl."
        )
    if is_printed and count > KEPT:
        console.print(
            f"{count} pictures; the first {KEPT} are shown. -o answers.csv keeps every answer, and "
            "goes on where it was stopped."
        )
    _Run(checkpoint, sources, found.pictures, options).go()


class _Run:
    """One call of the command.

    Args:
        checkpoint: a folder or a Hub id.
        sources: as they were named.
        pictures: what they name, at least one.
        options: what was asked.
    """

    def __init__(
        self,
        checkpoint: str,
        sources: Sequence[str],
        pictures: Sequence[Picture],
        options: PredictOptions,
    ) -> None:
        self.checkpoint, self.sources, self.options = checkpoint, sources, options
        self.pictures, self.rows = pictures, SourceRows(pictures)
        self.model = open_checkpoint(checkpoint)
        self.names = self.model.config.class_names
        is_one = len(pictures) == 1 and options.output is None
        # one picture, and JSON, say why as soon as one of these is asked for
        wants_reasons = options.page is not None or options.max_error is not None
        self.prints_whole = options.json_output or is_one
        self.explains = options.explain or (
            wants_reasons and options.output is None and self.prints_whole
        )
        judge = options.output is not None or not self.prints_whole
        self.answerer = Answerer(
            self.model, options.max_error, explain=self.explains, judge=judge
        )  # fmt: skip
        self.summary = Summary()
        self.remarks = [_CHANGED] if options.max_error is not None and self.model.changes else []

    def go(self) -> None:
        """Answers all pictures and tells the answers."""
        options = self.options
        if options.output is not None:
            stream = self._into_file(options.output)
        else:
            stands("No answer was kept; with -o answers.csv the same line goes on where it was.")
            stream = FeatureStream(self.model, self.rows)
            self._to_screen(stream)
        self._refuse_none()
        if options.page is not None:
            self._write_page(options.page, stream)
        if len(self.pictures) > 1 or options.output is not None:
            self._tell()
        for remark in self.remarks if options.page is None else []:
            console.print(f"\n[yellow]{escape(as_called(remark))}[/]", soft_wrap=True)

    def _answered(self, stream: FeatureStream, numbers: list[int]) -> Iterator[list[Answer]]:
        """The answers part by part, with a bar."""
        total, is_shown = len(self.pictures), len(self.pictures) > 1
        with progress_bars(), transformers_logging.tqdm(
            total=total, initial=total - len(numbers), desc="Answering", unit="img",
            disable=not is_shown,
        ) as bar:  # fmt: skip
            for part in stream(numbers):
                answers = self.answerer(part)
                yield answers
                bar.update(len(answers))

    # ---- a file ---------------------------------------------------------------------------------

    def _into_file(self, output: Path) -> FeatureStream:
        options = self.options
        keys = [picture.key() for picture in self.pictures]
        facts = {
            "checkpoint": _fingerprint(self.checkpoint, self.model),
            "columns (--top, --explain)": [column.name for column in options.columns],
            "--top": options.top,
            "--neighbors": options.shown_neighbors,
            "--max-error": options.max_error,
            "--max-pixels or --max-bytes": list(limits_of_process()),
        }
        backend = check_backend(None)
        asked = {"--backend": None if backend == AUTO else backend}
        with open_answers(
            output, options.columns, facts, asked, overwrite=options.overwrite
        ) as file:  # fmt: skip
            stream = FeatureStream(self.model, self.rows, file.settled.get("--backend"))
            file.begin({"--backend": stream.backend})
            missing = [number for number, key in enumerate(keys) if key not in file]
            if len(missing) < len(keys):
                done = len(keys) - len(missing)
                console.print(f"Going on: {done} of {len(keys)} pictures were answered before.")
            stands(lambda: f"Kept: {len(file)} of {len(self.pictures)} answers, in {file}.")
            for answers in self._answered(stream, missing):
                file.add((keys[answer.number], self._row(answer)) for answer in answers)
            file.finish(keys, self.summary.see)
        console.print(f"Written: {escape(output)}", soft_wrap=True)
        return stream

    def _row(self, answer: Answer) -> Row:
        row = row_of(
            answer, self.pictures[answer.number].name, self.names, self.answerer.threshold
        )  # fmt: skip
        why = answer.explanation
        if why is not None:
            row["margin"], row["notices"] = why.margin, notices(why)
            if why.flip is not None:
                row["flip_ids"], row["flip_answer"] = why.flip.row_ids, why.flip.answer
        return cut(row, self.options)

    # ---- the screen -----------------------------------------------------------------------------

    def _to_screen(self, stream: FeatureStream) -> None:
        """Prints or collects the answers; of many, the first are shown."""
        shown: list[Answer] = []
        documents: list[dict[str, Any]] = []
        for answers in self._answered(stream, [*range(len(self.pictures))]):
            for answer in answers:
                self.summary.see(self._row(answer))
                if self.options.json_output:
                    documents.append(self._document(answer))
                elif len(shown) < KEPT:
                    shown.append(answer)
        if self.options.json_output:
            if self.summary.answered:
                print_json(documents)
        elif not self.prints_whole and not self.options.explain:
            self._print_lines(shown)
        elif self.options.page is None:
            for answer in shown:
                self._print_whole(answer)

    def _document(self, answer: Answer) -> dict[str, Any]:
        name = self.pictures[answer.number].name
        options = self.options
        return document_of(self.model, name, answer, options.shown_classes, options.shown_neighbors)

    def _print_whole(self, answer: Answer) -> None:
        document = self._document(answer)
        if answer.error:
            if len(self.pictures) > 1:  # one alone is the error of the command
                console.print(f"\n[bold]{escape(document['image'])}[/]: {escape(answer.error)}")
        elif answer.explanation is not None:
            _print_reasons(document, answer.explanation, self.options)
        else:
            _print_answer(document)

    def _print_lines(self, answers: Sequence[Answer]) -> None:
        table = Table("picture", "answer", right("probability"), "unsure")
        for row in map(self._row, answers):
            if row["error"] is not None:
                table.add_row(escape(row["path"]), "-", "-", f"[red]{escape(row['error'])}[/]")
                continue
            table.add_row(
                escape(row["path"]), escape(row["answer"]), f"{row['probability']:.1%}",
                ", ".join(doubts_of(row)),
            )  # fmt: skip
        console.print(table)
        rest = len(self.pictures) - len(answers)
        if rest:
            console.print(f"… and {rest} more.")

    # ---- all of them ----------------------------------------------------------------------------

    def _refuse_none(self) -> None:
        first = self.summary.first_broken
        if self.summary.answered or first is None:
            return
        if len(self.pictures) == 1:
            raise ValueError(f"Expected {first['path']} to be readable, but {first['error']}.")
        raise ValueError(
            f"Expected at least one picture that can be read, but none of {len(self.pictures)} "
            f"can; {first['path']}: {first['error']}."
        )

    def _tell(self) -> None:
        """The classes, what could not be read, and what to do next."""
        summary, options = self.summary, self.options
        if options.json_output:
            if options.output is not None:
                print_json(summary.as_json() | {"output": str(options.output)})
            return
        table = Table("answer", right("pictures"), right("mean probability"), right("unsure"))
        for name, one in summary.by_size()[:KEPT]:
            mean = f"{one.probability / one.pictures:.1%}"
            table.add_row(escape(name), str(one.pictures), mean, str(one.doubtful))
        console.print(table)
        said = [f"{summary.answered} of {summary.seen} pictures were answered."]
        said += [f"{count} {doubt}." for doubt, count in summary.doubts.items()]
        console.print(escape(" ".join(said)), soft_wrap=True, highlight=False)
        first = summary.first_broken
        if first is not None:
            are = "1 was" if summary.broken == 1 else f"{summary.broken} were"
            where = "" if options.output is None else ", see the column error"
            console.print(
                f"[yellow]{are} not readable{where}; the first: {escape(first['path'])}: "
                f"{escape(first['error'])}[/]", soft_wrap=True, highlight=False,
            )  # fmt: skip
        console.print(f"Next: {self._next()}", soft_wrap=True)

    def _next(self) -> str:
        """What one would type now."""
        if self.options.output is not None:
            picture = self.pictures[self.summary.most_doubtful]
            if picture.rows is None:
                return typed("predict", self.checkpoint, picture.name, "--explain")
            return "the same command with --html page.html shows those it is least sure of."
        if len(self.sources) > _FEW:
            return "the same command with -o answers.csv keeps every answer."
        return typed("predict", self.checkpoint, *self.sources, "-o", "answers.csv")

    def _write_page(self, page: Path, stream: FeatureStream) -> None:
        """The reasons of all pictures, or of those that it is least sure of."""
        stored = self.options.pictures
        seen: dict[int, bool] = {}
        found = None if stored is None else StoredPictures(stored)
        show = partial(_stored, found, self.model.thumbnails, seen)
        count = self.summary.answered
        chosen = self.summary.least_sure
        answerer = Answerer(self.model, self.options.max_error, explain=True, judge=False)
        answers = [answer for part in stream(chosen) for answer in answerer(part)]
        sections = [section for answer in answers for section in self._sections(answer, show)]
        lead = [f"{count} pictures, answered by {self.checkpoint}.", *self.remarks]
        if count > len(chosen):
            lead.insert(1, f"Shown are the {len(chosen)} that it is least sure of.")
        if self.summary.broken:
            lead.insert(1, f"{self.summary.broken} more could not be read.")
        if stored is not None and not all(seen.values()):
            missed = (
                f"Stored pictures of this page: {sum(seen.values())} of {len(seen)} found under "
                f"{stored}; pass the folder that their paths are relative to."
            )
            lead.append(missed)
            console.print(f"[yellow]{escape(missed)}[/]", soft_wrap=True)
        write_page(page, "Answers and their reasons", sections, lead)
        console.print(f"Written: {escape(page)}", soft_wrap=True)

    def _sections(self, answer: Answer, show: Callable[[Voter], str | None]) -> Iterator[Section]:
        """What the page says of one picture; nothing if it has gone meanwhile."""
        picture, why = self.pictures[answer.number], answer.explanation
        if why is None:
            return
        try:
            image = decode_image(self.rows.source_of(answer.number))
        except (BadImageError, OSError):
            return
        name = Path(picture.name).name if picture.rows is None else picture.name
        yield _section(name, image, why, self.options, show)


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise ValueError(f"Expected paths from the standard input for {STANDARD_INPUT}, but it is "
                         "closed; name the pictures.")  # fmt: skip
    if sys.stdin.isatty():
        print("Paths of pictures, one a line; end with Ctrl-D.", file=sys.stderr)
    return sys.stdin.buffer.read()


def _fingerprint(checkpoint: str, model: KnnForImageClassification) -> str:
    """A name of everything in a checkpoint that an answer depends on."""
    total = hashlib.sha256(hash_tensors(sorted(model.state_dict().items())).encode())
    files = HubFiles(checkpoint, {})
    for name in (CONFIG_NAME, MANIFEST_NAME, IMAGE_PROCESSOR_NAME):
        path = files.resolve(name)
        total.update(b"-" if path is None else hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


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
    for cells in _class_rows(explanation, options.shown_classes):
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
    name: str,
    image: Image.Image,
    explanation: Explanation,
    options: PredictOptions,
    show: Callable[[Voter], str | None],
) -> Section:
    probability = explanation.probabilities[explanation.answer]
    flip = set() if explanation.flip is None else set(explanation.flip.row_ids)
    own = Tile(explanation.answer, thumbnail(image, 224), [f"{probability:.1%}"], alt=name)
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
    rows = _class_rows(explanation, options.shown_classes)
    groups = [Group([own], "The picture")]
    if tiles:
        rest = len(explanation.neighbors) - len(tiles)
        more = f", {rest} more with smaller shares" if rest else ""
        groups.append(Group(tiles, f"Who voted, nearest first{more}"))
    text = [*notices(explanation), *([flip_text(explanation)] if explanation.neighbors else [])]
    return Section(
        f"{name}: {explanation.answer}", text, facts, groups=groups,
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
