"""Commands of `hf-knn` that use a checkpoint, check pictures, and tidy up what is kept."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from . import places
from .choices import (
    DEFAULT_BACKBONE,
    LARGEST_SEED,
    BackendOption,
    Criterion,
    JsonOption,
    OnBadImage,
    SplitsOption,
    kinds_option,
)
from .forwarding import Command, hand_over
from .limits import reads_pictures
from .places import ChangedCheckpoint, CheckpointArgument, ReportFolder

WHY, REPORT, FILE, MOVING = "Reasons", "Report", "Answers in a file", "Moving files"
"""Groups of options in `--help`."""

app = typer.Typer()


@app.command()
@reads_pictures
@hand_over
def evaluate(
    checkpoint: CheckpointArgument,
    pictures: Annotated[
        str, typer.Argument(callback=places.pictures, help="Labelled pictures, as for `train`.")
    ],
    split: Annotated[
        str | None, typer.Option(help="Which split; test, or the only one there is.")
    ] = None,
    splits: SplitsOption = "auto",
    on_bad_image: Annotated[
        OnBadImage, typer.Option(help="At a picture that cannot be decoded.")
    ] = "skip",
    report: Annotated[
        Path | None,
        typer.Option(
            callback=places.new_report,
            rich_help_panel=REPORT,
            help="Folder for report.html and report.json: each class, what is taken for what, and "
            "the wrong answers with their neighbours.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            callback=places.new_file, rich_help_panel=REPORT, help="Write the page alone."
        ),
    ] = None,
    stored: Annotated[
        Path | None,
        typer.Option(
            "--pictures",
            callback=places.stored_pictures,
            rich_help_panel=REPORT,
            help="Folder that the stored paths are relative to, to show neighbours.",
        ),
    ] = None,
    backend: BackendOption = None,
    json_output: JsonOption = False,
) -> Command:
    """Measure head, neighbours and blend on labelled pictures, with 95 % intervals."""
    if stored and not (html or report):
        raise typer.BadParameter("Expected --report or --html with --pictures; name the place.")
    from hf_knn.commands.evaluate import evaluate_pictures

    return evaluate_pictures


@app.command()
@reads_pictures
@hand_over
def tune(
    checkpoint: ChangedCheckpoint,
    pictures: Annotated[
        str,
        typer.Argument(
            callback=places.pictures, help="Labelled pictures that the model was not trained on."
        ),
    ],
    split: Annotated[
        str | None, typer.Option(help="Which split; validation, or the only one there is.")
    ] = None,
    splits: SplitsOption = "auto",
    criterion: Annotated[
        Criterion | None, typer.Option(help="Default: by how many labels there are.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Also scale the temperatures of head and blend.")
    ] = False,
    on_bad_image: Annotated[
        OnBadImage, typer.Option(help="At a picture that cannot be decoded.")
    ] = "skip",
    plot: Annotated[
        Path | None,
        typer.Option(
            callback=places.new_file, help="Draw what was tried as heat maps into this PNG."
        ),
    ] = None,
    backend: BackendOption = None,
) -> Command:
    """Choose k, temperature and the blend anew, on pictures of your own."""
    from hf_knn.commands.use import tune_checkpoint

    return tune_checkpoint


@app.command()
@reads_pictures
def predict(
    checkpoint: CheckpointArgument,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            callback=places.picture_sources,
            help="Pictures to classify: files, folders, patterns in quotes ('in/**/*.jpg'), web "
            "addresses, a text or csv of paths, - for paths from standard input, a parquet file, a "
            "saved dataset or a Hub dataset id.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            callback=places.answer_file,
            rich_help_panel=FILE,
            help="Write all answers into this .csv, .jsonl or .parquet, one row for each picture; "
            "a run that was stopped goes on when the same command is typed again.",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            rich_help_panel=FILE,
            help="Replace the file of -o, and what an unlike run left unfinished.",
        ),
    ] = False,
    split: Annotated[
        str | None, typer.Option(help="Which split of a dataset; all if left out.")
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=False,
            help="Classes shown per picture: 5; with -o as two more columns.",
        ),
    ] = None,
    neighbors: Annotated[
        int | None,
        typer.Option(
            min=0, help="Neighbours shown per picture, of the k that vote; 5, on a page 24."
        ),
    ] = None,
    backend: BackendOption = None,
    json_output: JsonOption = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", rich_help_panel=WHY, help="Shares of the vote, and what would change it."
        ),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            callback=places.new_file,
            rich_help_panel=WHY,
            help="Write the reasons with pictures into this file; of more than 100 pictures, those "
            "it is least sure of.",
        ),
    ] = None,
    stored: Annotated[
        Path | None,
        typer.Option(
            "--pictures",
            callback=places.stored_pictures,
            rich_help_panel=WHY,
            help="Folder that the stored paths are relative to, for --html.",
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=WHY,
            help="Rather abstain than be wrong more often: 0.01, 0.02, 0.05, 0.1 or 0.2.",
        ),
    ] = None,
) -> None:
    """Classify one picture or many, show the neighbours that voted, and say why.

    A picture that cannot be read gets a row with the reason, and the others are answered. The exit
    code is 0 as long as one picture could be read.

    A file or address that is named twice is answered once. The addresses are http or https; of
    each at most 64 MiB (or --max-bytes) are fetched, in at most a minute. No other command fetches
    any.

    In a csv, a ' stands before a text that begins with = + - @ ' or a tab, so that no spreadsheet
    takes it for a formula: leave it out when you read the file. Lists are written as in JSON.
    """
    if stored and not html:
        raise typer.BadParameter("Expected --html with --pictures; name the file to write.")
    if overwrite and not output:
        raise typer.BadParameter("Expected -o with --overwrite; name the file to write.")
    from hf_knn.commands.answering import PredictOptions
    from hf_knn.commands.console import run
    from hf_knn.commands.predict import predict_pictures

    options = PredictOptions(
        top, neighbors, explain, html, stored, max_error, json_output, output, overwrite, split
    )
    run(partial(predict_pictures, checkpoint, sources, options), json_output=json_output)


@app.command()
@hand_over
def push(
    checkpoint: Annotated[
        Path, typer.Argument(callback=places.checkpoint_folder, help="A checkpoint folder.")
    ],
    repo_id: Annotated[
        str, typer.Argument(callback=places.repo_id, help="org/name; made if it is not there.")
    ],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a repository that is made.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch; main if left out.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead.")
    ] = False,
    parent_commit: Annotated[
        str | None, typer.Option(help="Refuse if the branch is at another commit.")
    ] = None,
    message: Annotated[str, typer.Option("--message", "-m", help="Of the commit.")] = (
        "Upload model"
    ),
    token: Annotated[
        str | None, typer.Option(help="Default: the one you are logged in with.")
    ] = None,
    model_license: Annotated[
        str | None,
        typer.Option("--license", help="For the card, such as apache-2.0; else as it says."),
    ] = None,
    endpoint: Annotated[
        bool,
        typer.Option(
            "--endpoint",
            help="Also push handler.py and requirements.txt, with which Inference Endpoints "
            "answers; a later push without it removes them.",
        ),
    ] = False,
) -> Command:
    """Push a checkpoint to the Hub: model, datastore, code and card in one commit."""
    from hf_knn.commands.use import push_checkpoint

    return push_checkpoint


@app.command()
@hand_over
def export(
    checkpoint: CheckpointArgument,
    folder: Annotated[
        Path,
        typer.Option(
            "--onnx",
            callback=places.new_folder,
            help="Folder for the graph, its settings and a script that uses them.",
        ),
    ],
) -> Command:
    """Export to one ONNX graph: backbone, head, neighbours and blend."""
    from hf_knn.commands.use import export_checkpoint

    return export_checkpoint


def _backbone_if_looked_at(context: typer.Context, name: str) -> str:
    """Where files are only moved, nobody needs a backbone; what says so comes first (eager)."""
    known = context.params
    is_idle = known.get("undo") or known.get("findings") or not known.get("pictures")
    return name if is_idle else places.backbone(name)


@app.command()
@reads_pictures
def doctor(
    kinds: Annotated[
        list[str], kinds_option("With --move-to, which; else broken,exact_duplicate", panel=MOVING)
    ],
    pictures: Annotated[
        str | None,
        typer.Argument(
            callback=places.pictures_if_named,
            is_eager=True,
            show_default=False,
            help="Pictures as for `train`; without labels less is looked for.",
        ),
    ] = None,
    output: ReportFolder = Path("knn-doctor"),
    backbone: Annotated[
        str,
        typer.Option(
            callback=_backbone_if_looked_at,
            help="As for `train`; its features are kept and used again there.",
        ),
    ] = DEFAULT_BACKBONE,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 32,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Look at about so many pictures of each split, class by class."),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(help="Column of what belongs together (a patient, a camera)."),
    ] = None,
    splits: SplitsOption = "auto",
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Of folds, parts and --limit.")
    ] = 0,
    move_to: Annotated[
        Path | None,
        typer.Option(
            callback=places.new_report,
            rich_help_panel=MOVING,
            help="Move the files of some findings into this folder, with a journal.",
        ),
    ] = None,
    findings: Annotated[
        Path | None,
        typer.Option(
            "--from",
            callback=places.findings_csv,
            is_eager=True,
            rich_help_panel=MOVING,
            help="With --move-to: do not look again, take what this findings.csv names.",
        ),
    ] = None,
    undo: Annotated[
        Path | None,
        typer.Option(
            callback=places.quarantine,
            is_eager=True,
            rich_help_panel=MOVING,
            help="Put all files back that --move-to moved into this folder; name no pictures.",
        ),
    ] = None,
    backend: BackendOption = None,
    json_output: JsonOption = False,
) -> None:
    """Check pictures before training: broken, doubled, mislabelled, strange, too few.

    Nothing is changed, unless --move-to says so; --undo takes that back. The exit code is 0
    whatever was found; --json has the counts.
    """
    if (pictures is None) == (undo is None):
        raise typer.BadParameter("Expected PICTURES to check, or --undo and the folder that "
                                 "files were moved into.")  # fmt: skip
    if (kinds or findings) and not move_to:
        raise typer.BadParameter("Expected --move-to with --kind and --from; name a new folder.")
    from hf_knn.checkup.doctor import DoctorOptions
    from hf_knn.commands.checks import diagnose_pictures, put_files_back
    from hf_knn.commands.console import run

    if undo is not None:
        run(put_files_back, undo, json_output, json_output=json_output)
        return
    assert pictures is not None  # or --undo was named
    options = DoctorOptions(
        pictures, output, backbone, batch_size, limit, group_by, seed, json_output, splits,
        move_to, kinds, findings,
    )  # fmt: skip
    run(diagnose_pictures, options, json_output=json_output)


@app.command()
@hand_over
def code(
    checkpoint: Annotated[
        str, typer.Argument(callback=places.code_of, help="A checkpoint folder or a Hub id.")
    ],
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit of a Hub id; main if left out.")
    ] = None,
) -> Command:
    """Say whether the code in a checkpoint is that of this package; the exit code is 1 if not."""
    from hf_knn.commands.checks import check_code

    return check_code


@app.command()
@hand_over
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove what is listed.")] = False,
    older_than: Annotated[
        int | None,
        typer.Option(min=0, help="Only what was not used for so many days.", show_default=False),
    ] = None,
    json_output: JsonOption = False,
) -> Command:
    """List what is kept to be fast: features, graphs and choices of backends; clear it."""
    from hf_knn.commands.use import show_cache

    return show_cache
