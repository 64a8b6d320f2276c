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
    FailOnOption,
    JsonOption,
    OnBadImage,
    SplitsOption,
    kinds_option,
)
from .forwarding import Command, hand_over
from .limits import reads_pictures
from .places import ChangedCheckpoint, CheckpointArgument, ReportFolder

WHY, REPORT, FILE, MOVING = "Reasons", "Report", "Answers in a file", "Moving files aside"
"""Groups of options in `--help`."""

app = typer.Typer()


@app.command()
@reads_pictures
@hand_over
def evaluate(
    checkpoint: CheckpointArgument,
    pictures: Annotated[
        str,
        typer.Argument(
            callback=places.pictures,
            help="Pictures with labels: a folder with one sub-folder per label, a csv of "
            "path,label, a "
            "parquet file, or a Hub dataset id.",
        ),
    ],
    split: Annotated[
        str | None, typer.Option(help="Which split to measure on. Default: test, or the only one.")
    ] = None,
    splits: SplitsOption = "auto",
    on_bad_image: Annotated[
        OnBadImage, typer.Option(help="What to do at a picture that cannot be read.")
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
            callback=places.new_file,
            rich_help_panel=REPORT,
            help="Write only the page, as this file.",
        ),
    ] = None,
    stored: Annotated[
        Path | None,
        typer.Option(
            "--pictures",
            callback=places.stored_pictures,
            rich_help_panel=REPORT,
            help="The folder that the model was trained on, to show the pictures that voted.",
        ),
    ] = None,
    backend: BackendOption = None,
    json_output: JsonOption = False,
) -> Command:
    """Measure how often the model is right, on pictures with labels that it has not seen."""
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
            callback=places.pictures, help="Pictures with labels that the model was not trained on."
        ),
    ],
    split: Annotated[
        str | None,
        typer.Option(help="Which split to choose on. Default: validation, or the only one."),
    ] = None,
    splits: SplitsOption = "auto",
    criterion: Annotated[
        Criterion | None,
        typer.Option(help="What is called best. Default: by how many labels there are."),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Also make the probabilities honest: 80 % sure shall be right 80 times of 100.",
        ),
    ] = False,
    on_bad_image: Annotated[
        OnBadImage, typer.Option(help="What to do at a picture that cannot be read.")
    ] = "skip",
    plot: Annotated[
        Path | None,
        typer.Option(
            callback=places.new_file, help="Draw how good each choice would be into this PNG."
        ),
    ] = None,
    backend: BackendOption = None,
) -> Command:
    """Choose anew how many neighbours vote, and how much they count beside the head."""
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
        str | None, typer.Option(help="Which split of a dataset. Default: all.")
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=False,
            help="How many classes are shown of each picture. Default: 5; with -o two more "
            "columns.",
        ),
    ] = None,
    neighbors: Annotated[
        int | None,
        typer.Option(
            min=0, help="How many of the pictures that voted are shown. Default: 5; on a page 24."
        ),
    ] = None,
    backend: BackendOption = None,
    json_output: JsonOption = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            rich_help_panel=WHY,
            help="Say who voted, with how much weight, and without whom the answer would change.",
        ),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            callback=places.new_file,
            rich_help_panel=WHY,
            help="Write a page with pictures that shows why, into this file; of more than 100 "
            "pictures, those that the model is least sure of.",
        ),
    ] = None,
    stored: Annotated[
        Path | None,
        typer.Option(
            "--pictures",
            callback=places.stored_pictures,
            rich_help_panel=WHY,
            help="With --html: the folder that the model was trained on, to show its pictures.",
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=WHY,
            help="Give no answer where it is not sure, so that at most this share of the answers "
            "is "
            "wrong: 0.01, 0.02, 0.05, 0.1 or 0.2.",
        ),
    ] = None,
) -> None:
    """Classify pictures, show the stored pictures that voted, and say why.

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
        str,
        typer.Argument(
            callback=places.repo_id, help="Its name there, org/name; made if it is new."
        ),
    ],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who sees a new repository.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="The branch to push to. Default: main.")
    ] = None,
    create_pr: Annotated[
        bool,
        typer.Option("--create-pr", help="Open a pull request instead of pushing to the branch."),
    ] = False,
    parent_commit: Annotated[
        str | None, typer.Option(help="Push only if the branch is still at this commit.")
    ] = None,
    message: Annotated[str, typer.Option("--message", "-m", help="What the commit says.")] = (
        "Upload model"
    ),
    token: Annotated[
        str | None, typer.Option(help="Of the Hub. Default: that of `hf auth login`.")
    ] = None,
    model_license: Annotated[
        str | None,
        typer.Option(
            "--license",
            help="Licence of the model, such as apache-2.0. Default: what its card says.",
        ),
    ] = None,
    thumbnails: Annotated[
        bool,
        typer.Option(
            "--thumbnails",
            help="Also push the small pictures of the training pictures that the checkpoint keeps; "
            "whoever sees the repository sees them. Else they stay here.",
        ),
    ] = False,
    endpoint: Annotated[
        bool,
        typer.Option(
            "--endpoint",
            help="Also push handler.py and requirements.txt, with which Inference Endpoints "
            "answers; a later push without it removes them.",
        ),
    ] = False,
) -> Command:
    """Put a checkpoint on the Hub, in one commit: model, datastore, code and model card."""
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
            help="Folder for the ONNX file, its settings and a script that uses both.",
        ),
    ],
) -> Command:
    """Export the whole model to one ONNX file, which runs without PyTorch."""
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
        list[str],
        kinds_option(
            "With --move-to: which findings. Default: broken,exact_duplicate", panel=MOVING
        ),
    ],
    fail_on: FailOnOption,
    pictures: Annotated[
        str | None,
        typer.Argument(
            callback=places.pictures_if_named,
            is_eager=True,
            show_default=False,
            help="A folder with one sub-folder per label, a csv of path,label, a parquet file, or "
            "a "
            "Hub dataset id. Without labels it looks for less.",
        ),
    ] = None,
    output: ReportFolder = Path("knn-doctor"),
    backbone: Annotated[
        str,
        typer.Option(
            callback=_backbone_if_looked_at,
            help="The pretrained model that makes features, as for `train`, which uses them again: "
            "a "
            "short name (`hf-knn backbones`), a Hub id, a timm name or a folder.",
        ),
    ] = DEFAULT_BACKBONE,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Pictures that go through the backbone at once.")
    ] = 32,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Look only at about so many pictures of each split."),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            help="Column of a csv that says what belongs together, such as the patient or camera."
        ),
    ] = None,
    splits: SplitsOption = "auto",
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Random seed of what is drawn by lot.")
    ] = 0,
    move_to: Annotated[
        Path | None,
        typer.Option(
            callback=places.new_report,
            rich_help_panel=MOVING,
            help="Move the files with findings into this folder; --undo puts them back.",
        ),
    ] = None,
    findings: Annotated[
        Path | None,
        typer.Option(
            "--from",
            callback=places.findings_csv,
            is_eager=True,
            rich_help_panel=MOVING,
            help="With --move-to: move what this findings.csv names, without checking again.",
        ),
    ] = None,
    undo: Annotated[
        Path | None,
        typer.Option(
            callback=places.quarantine,
            is_eager=True,
            rich_help_panel=MOVING,
            help="Put all files back that --move-to moved into this folder.",
        ),
    ] = None,
    backend: BackendOption = None,
    json_output: JsonOption = False,
) -> None:
    """Check pictures before training: broken, doubled, mislabelled, strange or too few.

    Nothing is changed, unless --move-to says so; --undo takes that back. The exit code is 0
    whatever was found, unless --fail-on names it: then it is 3. --json has the counts.
    """
    if (pictures is None) == (undo is None):
        raise typer.BadParameter("Expected PICTURES to check, or --undo and the folder that "
                                 "files were moved into.")  # fmt: skip
    if (kinds or findings) and not move_to:
        raise typer.BadParameter("Expected --move-to with --kind and --from; name a new folder.")
    if fail_on and (findings or undo):
        raise typer.BadParameter("Expected --fail-on where pictures are looked at, without --from "
                                 "and --undo.")  # fmt: skip
    from hf_knn.checkup.doctor import DoctorOptions
    from hf_knn.commands.checks import diagnose_pictures, put_files_back
    from hf_knn.commands.console import run

    if undo is not None:
        run(put_files_back, undo, json_output, json_output=json_output)
        return
    assert pictures is not None  # or --undo was named
    options = DoctorOptions(
        pictures, output, backbone, batch_size, limit, group_by, seed, json_output, splits,
        move_to, kinds, findings, fail_on,
    )  # fmt: skip
    run(diagnose_pictures, options, json_output=json_output)


@app.command()
@hand_over
def code(
    checkpoint: Annotated[
        str, typer.Argument(callback=places.code_of, help="A checkpoint folder or a Hub id.")
    ],
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit of a Hub id. Default: main.")
    ] = None,
) -> Command:
    """Say whether the code in a checkpoint is the one of this package; if not, exit with 1."""
    from hf_knn.commands.checks import check_code

    return check_code


@app.command()
@hand_over
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove what would be listed.")] = False,
    older_than: Annotated[
        int | None,
        typer.Option(min=0, help="Only what was not used for so many days.", show_default=False),
    ] = None,
    json_output: JsonOption = False,
) -> Command:
    """List what is kept on this machine to be fast next time, such as features; or clear it."""
    from hf_knn.commands.use import show_cache

    return show_cache
