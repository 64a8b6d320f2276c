"""`hf-knn suggest`: the next pictures to label, for other tools."""

from pathlib import Path

from ..labelling.suggest import Suggestions, suggest
from .answers import Column, write_answers
from .console import console, escape, print_json, say_what_was_left_out

_COLUMNS = (Column("path", "text"), Column("guess", "text"), Column("probability", "number"))


def suggest_pictures(
    folder: Path,
    most: int,
    model: str | None,
    backbone: str | None,
    batch_size: int,
    output: Path | None,
    json_output: bool,
    lines: list[str],
) -> None:
    """Chooses pictures; everything that is said of them goes to stderr.

    Args:
        folder: of the pictures.
        most: how many.
        model: a checkpoint, or None.
        backbone: without a checkpoint; None is the default.
        batch_size: pictures per forward pass.
        output: a .csv, .jsonl or .parquet to write, or None.
        json_output: print JSON.
        lines: gets what is printed else, a path each.

    Raises:
        ValueError: for a folder without pictures.
        OSError: if something is not there or cannot be written.
    """
    found = suggest(
        folder, most, model=model, backbone=backbone, batch_size=batch_size, progress=True
    )
    say_what_was_left_out(found.pool.notes)
    for row in found.pool.skipped:
        console.print(f"[yellow]Skipped[/] {escape(row.path)}: {escape(row.reason)}.")
    if found.known:
        console.print(f"{found.known} pictures have a label in the checkpoint already.")
    if not found.pictures:
        console.print("Every picture has a label.")
    rows = _rows(folder, found)
    if output is not None:
        write_answers(output, _COLUMNS, rows)
        console.print(f"Written: {escape(output)}", soft_wrap=True)
    if json_output:
        print_json(rows)
    elif output is None:
        lines += [str(row["path"]) for row in rows]


def _rows(folder: Path, found: Suggestions) -> list[dict[str, object]]:
    return [
        {
            "path": str(folder / name),
            "guess": None if guess is None else guess.label,
            "probability": None if guess is None else guess.probability,
        }
        for name, guess in found.pictures
    ]
