"""Commands of `hf-knn` about what a checkpoint remembers."""

from functools import partial
from pathlib import Path
from typing import Annotated, cast

import typer

from . import places
from .choices import (
    LARGEST_SEED,
    BackendOption,
    FindingsOption,
    IdsOption,
    JsonOption,
    OnBadImage,
    Span,
    SplitsOption,
    kinds_option,
)
from .forwarding import Command, hand_over
from .limits import reads_pictures
from .places import ChangedCheckpoint, CheckpointArgument, ReportFolder

app = typer.Typer()


def _renamed(value: bool) -> bool:
    """Says what an option of version 0.2 is called now."""
    if value:
        typer.echo("Note: --skip-bad-images is now --on-bad-image skip.", err=True)
    return value


@app.command()
@reads_pictures
def teach(
    checkpoint: ChangedCheckpoint,
    pictures: Annotated[
        Path,
        typer.Argument(
            callback=places.local_pictures,
            help="A folder with one sub-folder per label, or a csv of path,label; with --label "
            "one picture, or a folder of pictures.",
        ),
    ],
    label: Annotated[
        str | None, typer.Option(help="The label of all these pictures; a new name adds a class.")
    ] = None,
    splits: SplitsOption = "auto",
    on_bad_image: Annotated[
        OnBadImage, typer.Option(help="What to do at a picture that cannot be read.")
    ] = "fail",
    skip_bad_images: Annotated[
        bool,
        typer.Option(
            "--skip-bad-images", callback=_renamed, hidden=True, help="Now --on-bad-image skip."
        ),
    ] = False,
    again: Annotated[
        bool,
        typer.Option(
            "--again", help="Also add pictures that are stored already, with the same label."
        ),
    ] = False,
    relabel: Annotated[
        bool,
        typer.Option(
            "--relabel", help="Give pictures that are stored with another label the new one."
        ),
    ] = False,
    backend: BackendOption = None,
    json_output: JsonOption = False,
) -> None:
    """Teach new pictures or classes, without training; what is stored already is left out."""
    from hf_knn.commands.console import run
    from hf_knn.commands.memory import teach_pictures

    how = "skip" if skip_bad_images else on_bad_image
    command = partial(teach_pictures, checkpoint, pictures, label, how, json_output, splits, again)
    run(partial(command, relabel=relabel), json_output=json_output)


@app.command()
@reads_pictures
def forget(
    checkpoint: ChangedCheckpoint,
    ids: IdsOption,
    paths: Annotated[
        list[str],
        typer.Option(
            "--path",
            default_factory=list,
            show_default=False,
            help="Path of a stored picture, as `hf-knn inspect` lists it; repeat the option for "
            "more.",
        ),
    ],
    kinds: Annotated[
        list[str],
        kinds_option(
            "With --from or --duplicates: which findings. Default: exact_duplicate,near_duplicate"
        ),
    ],
    label: Annotated[str | None, typer.Option(help="Forget all pictures of this class.")] = None,
    findings: FindingsOption = None,
    duplicates: Annotated[
        bool,
        typer.Option(
            "--duplicates", help="Look for copies and keep one of each group; asks before it does."
        ),
    ] = False,
    root: Annotated[
        Path | None,
        typer.Option(
            "--pictures",
            callback=places.stored_pictures,
            help="With --duplicates: the folder that the model was trained on, to compare pixels; "
            "else features are compared.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    recenter: Annotated[
        bool,
        typer.Option(
            "--recenter",
            help="Also compute the mean of all features anew, which these pictures had a part in.",
        ),
    ] = False,
    backup: Annotated[
        Path | None,
        typer.Option(
            callback=places.new_place,
            help="Keep what is forgotten in this folder; `hf-knn merge` adds it again.",
        ),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Forget stored pictures: nothing of them stays in the checkpoint.

    Heads of the kinds ridge, kernel and lda become what they would be without them. A linear or
    mlp head keeps what it learned from them, until it is trained again.
    """
    if duplicates and (ids or paths or label is not None or findings):
        raise typer.BadParameter("Expected --duplicates alone, without --ids, --path, --label, "
                                 "--from; it finds the rows itself.")  # fmt: skip
    if (root or yes) and not duplicates:
        raise typer.BadParameter("Expected --pictures and --yes with --duplicates only.")
    from hf_knn.commands.console import run
    from hf_knn.commands.rows import Wanted, forget_duplicates, forget_rows

    last = (recenter, backup, json_output)
    if duplicates:
        command = partial(forget_duplicates, checkpoint, root, kinds, yes, *last)
    else:
        spans = cast(list[Span], ids)  # by its callback
        wanted = Wanted(spans, paths, label, findings, kinds)
        command = partial(forget_rows, checkpoint, wanted, *last)
    run(command, json_output=json_output)


@app.command()
@hand_over
def relabel(
    checkpoint: ChangedCheckpoint,
    ids: IdsOption,
    label: Annotated[
        str | None, typer.Option(help="The label they get; a new name adds a class.")
    ] = None,
    findings: FindingsOption = None,
    json_output: JsonOption = False,
) -> Command:
    """Give stored pictures another label: the one of --label, or what a csv suggests."""
    from hf_knn.commands.rows import relabel_rows

    return relabel_rows


@app.command()
@hand_over
def undo(
    checkpoint: ChangedCheckpoint,
    steps: Annotated[
        int, typer.Argument(min=1, help="How many steps; `hf-knn log` lists the changes.")
    ] = 1,
    training: Annotated[
        bool,
        typer.Option(
            "--training",
            help="Go back to the version before the last training, and drop what was changed "
            "since.",
        ),
    ] = False,
    json_output: JsonOption = False,
) -> Command:
    """Take the last change back: teach, relabel, merge, or a training.

    A change that was interrupted is taken back first. With STEPS, all of them are taken back or
    none: what was forgotten cannot come back. Behind the changes come versions that a training
    replaced (`hf-knn train --keep` says how many are kept). Undo once more after a training was
    taken back, and the newer version is there again.
    """
    if training and steps > 1:
        raise typer.BadParameter("Expected --training alone; it leaves no step out.")
    from hf_knn.commands.memory import undo_change

    return undo_change


@app.command()
@hand_over
def log(checkpoint: CheckpointArgument, json_output: JsonOption = False) -> Command:
    """List what was taught, forgotten and relabelled since the training, the newest last."""
    from hf_knn.commands.memory import show_log

    return show_log


@app.command()
@hand_over
def refit(checkpoint: ChangedCheckpoint) -> Command:
    """Fit the head anew on all stored pictures, in seconds; for the heads ridge, kernel and lda."""
    from hf_knn.commands.memory import refit_head

    return refit_head


@app.command()
@hand_over
def merge(
    checkpoint: ChangedCheckpoint,
    other: Annotated[
        str,
        typer.Argument(
            callback=places.rows_or_checkpoint,
            help="Another checkpoint, or a backup, of the same backbone. It stays as it is.",
        ),
    ],
    json_output: JsonOption = False,
) -> Command:
    """Add the stored pictures of another checkpoint."""
    from hf_knn.commands.memory import merge_stores

    return merge_stores


@app.command()
@hand_over
def diff(
    first: CheckpointArgument,
    second: Annotated[str, typer.Argument(callback=places.checkpoint, help="Another one.")],
    json_output: JsonOption = False,
) -> Command:
    """Say how two checkpoints differ: stored pictures, classes, settings, measured numbers."""
    from hf_knn.commands.memory import show_difference

    return show_difference


@app.command()
@reads_pictures
@hand_over
def inspect(
    checkpoint: CheckpointArgument,
    output: ReportFolder = Path("knn-inspect"),
    root: Annotated[
        Path | None,
        typer.Option(
            "--pictures",
            callback=places.stored_pictures,
            help="The folder that the model was trained on, to show the pictures.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Random seed of what is drawn by lot.")
    ] = 0,
    json_output: JsonOption = False,
) -> Command:
    """Check the stored pictures: doubled, mislabelled, strange ones, and a map of all."""
    from hf_knn.commands.checks import inspect_checkpoint

    return inspect_checkpoint


@app.command()
@hand_over
def milvus(
    checkpoint: ChangedCheckpoint,
    uri: Annotated[
        str, typer.Option(help="http://host:19530, or a path that ends in .db (Milvus Lite).")
    ],
    collection: Annotated[str, typer.Option(help="What the rows are called there.")],
    token: Annotated[
        str | None, typer.Option(help="Of the server. Default: $MILVUS_TOKEN.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are sent at once.")] = 1000,
    index: Annotated[
        str,
        typer.Option(
            help="flat (exact), ivf_flat, ivf_sq8, hnsw, hnsw_sq or autoindex; on a server, which "
            "Milvus Lite is not, also scann, ivf_rabitq and ivf_rabitq_fastscan. All but flat may "
            "miss a neighbour now and then; how often is measured and said."
        ),
    ] = "flat",
) -> Command:
    """Move the datastore into Milvus, a vector database; stopped, the same line goes on."""
    from hf_knn.commands.use import move_to_milvus

    return move_to_milvus
