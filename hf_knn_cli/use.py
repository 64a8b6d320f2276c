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
)
from .forwarding import Command, hand_over
from .limits import reads_pictures
from .places import ChangedCheckpoint, CheckpointArgument, ReportFolder

WHY, REPORT = "Reasons", "Report"
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
    images: Annotated[
        list[Path], typer.Argument(callback=places.picture_files, help="Pictures to classify.")
    ],
    top: Annotated[int, typer.Option(min=1, help="Classes shown per picture.")] = 5,
    neighbors: Annotated[
        int | None,
        typer.Option(
            min=0, help="Neighbours shown per picture, of the k that vote; 5, on a page 24."
        ),
    ] = None,
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
            help="Write the reasons with pictures into this file.",
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
    """Classify pictures, show the neighbours that voted, and say why."""
    if stored and not html:
        raise typer.BadParameter("Expected --html with --pictures; name the file to write.")
    from hf_knn.commands.console import run
    from hf_knn.commands.predict import PredictOptions, predict_images

    options = PredictOptions(
        top, neighbors, explain or html is not None or max_error is not None, html, stored,
        max_error, json_output,
    )  # fmt: skip
    run(partial(predict_images, checkpoint, images, options), json_output=json_output)


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


@app.command()
@reads_pictures
@hand_over
def doctor(
    pictures: Annotated[
        str,
        typer.Argument(
            callback=places.pictures,
            help="Pictures as for `train`; without labels less is looked for.",
        ),
    ],
    output: ReportFolder = Path("knn-doctor"),
    backbone: Annotated[
        str,
        typer.Option(
            callback=places.backbone,
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
    backend: BackendOption = None,
    json_output: JsonOption = False,
) -> Command:
    """Check pictures before training: broken, doubled, mislabelled, strange, too few.

    Nothing is changed. The exit code is 0 whatever was found; --json has the counts.
    """
    from hf_knn.checkup.doctor import DoctorOptions
    from hf_knn.commands.checks import diagnose_pictures

    return lambda **options: diagnose_pictures(DoctorOptions(**options))


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
    """List what is kept to be fast: features, indexes, graphs, choices of backends; clear it."""
    from hf_knn.commands.use import show_cache

    return show_cache
