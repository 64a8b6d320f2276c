"""The `hf-knn` command: declarations only, so that `--help` answers without importing torch."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hf_knn_cli_cache import BackendOption
from hf_knn_cli_cache import app as cache
from hf_knn_cli_demo import app as demonstration
from hf_knn_cli_memory import app as memory

DEFAULT_BACKBONE = "facebook/dinov2-small"
DATA, HEAD, LOSS = "Pictures", "Head", "Loss"
TUNING, STORE, WHY = "Fine-tuning", "Datastore and blend", "Reasons"
"""Groups of options in `--help`."""

app = typer.Typer(
    name="hf-knn",
    help="Image classifiers that also remember: a head and its nearest neighbours, in one model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(memory)
app.add_typer(demonstration)
app.add_typer(cache)


class OnBadImage(StrEnum):
    """What to do at a picture that cannot be decoded."""

    SKIP = "skip"
    FAIL = "fail"


class Precision(StrEnum):
    """Precision of the backbone's forward pass."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class HeadKind(StrEnum):
    """The classifier beside the datastore."""

    LINEAR = "linear"
    MLP = "mlp"
    RIDGE = "ridge"


class Sweep(StrEnum):
    """Grids of learning rates, weight decays and alphas."""

    SMALL = "small"
    PAPER = "paper"
    PAPER_SELF_SUPERVISED = "paper_self_supervised"


class ClassWeights(StrEnum):
    """What a picture weighs in the loss, by the size of its class."""

    NONE = "none"
    INVERSE = "inverse"
    INVERSE_SQRT = "inverse_sqrt"


class Augmentation(StrEnum):
    """What training pictures go through."""

    PAPER = "paper"
    FLIP = "flip"
    NONE = "none"


class Queries(StrEnum):
    """Which features ask the datastore during fine-tuning."""

    SNAPSHOT = "snapshot"
    LIVE = "live"


class Criterion(StrEnum):
    """What makes k, temperature and λ the best."""

    ONE_STANDARD_ERROR = "one_standard_error"
    ACCURACY = "accuracy"
    MEAN_CLASS = "mean_class"
    LOG_LIKELIHOOD = "log_likelihood"


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Takes the options of a file as defaults."""
    if path is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"Expected {path} to be YAML or JSON, but: {error}") from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"Expected {path} to hold options by name, but got a list.")
    found = {str(name).replace("-", "_"): value for name, value in values.items()}
    known = {str(parameter.name) for parameter in context.command.params} - {"config"}
    unknown = sorted(set(found) - known)
    if unknown:
        raise typer.BadParameter(
            f"Expected options of this command in {path}, but got {unknown}; known are "
            f"{sorted(known)}."
        )
    context.default_map = {**(context.default_map or {}), **found}
    return path


def _text(choice: StrEnum | None) -> str | None:
    return None if choice is None else str(choice)


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option(help="Show the whole traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["HF_KNN_DEBUG"] = "1"


@app.command()
def train(
    pictures: Annotated[
        str,
        typer.Argument(
            help="A folder with one sub-folder per label (train/validation/test inside are used), "
            "a csv of path,label, a parquet file, or a Hub dataset id."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Checkpoint folder.")] = Path(
        "knn-model"
    ),
    backbone: Annotated[
        str, typer.Option(help="Hub id, timm name, local folder or another k-NN checkpoint.")
    ] = DEFAULT_BACKBONE,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=_read_config,
            is_eager=True,
            exists=True,
            dir_okay=False,
            help="YAML or JSON with options of this command, by their long names; what is typed "
            "wins.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of splits, folds and the head.")] = 0,
    pooling: Annotated[
        str | None, typer.Option(help="cls, mean, max, pooler or cls_mean; default by backbone.")
    ] = None,
    knn_pooling: Annotated[
        str | None, typer.Option(help="Pooling of the datastore, if it is another.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 32,
    precision: Annotated[
        Precision, typer.Option(help="Of the forward pass that computes features.")
    ] = Precision.FP32,
    backend: BackendOption = None,
    test_share: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.9,
            rich_help_panel=DATA,
            help="Held out for the report, if there is no test split.",
        ),
    ] = 0.2,
    group_by: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DATA,
            help="Column of what belongs together (a patient, a camera): never split.",
        ),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=DATA,
            help="Use so many labelled pictures per class, to learn and to choose from.",
        ),
    ] = None,
    fraction: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, rich_help_panel=DATA, help="Likewise, a fraction of each class."
        ),
    ] = None,
    on_bad_image: Annotated[
        OnBadImage,
        typer.Option(rich_help_panel=DATA, help="At a picture that cannot be decoded."),
    ] = OnBadImage.SKIP,
    head: Annotated[
        HeadKind,
        typer.Option(rich_help_panel=HEAD, help="ridge is solved in closed form, without epochs."),
    ] = HeadKind.LINEAR,
    hidden: Annotated[
        list[int] | None,
        typer.Option(
            min=1, rich_help_panel=HEAD, help="Width of a hidden layer of an mlp; repeat it."
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=HEAD, help="Default: 60, or 10 with --fine-tune."),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(rich_help_panel=HEAD, help="Default: 1e-3, or 5e-5 with --fine-tune."),
    ] = None,
    sweep: Annotated[
        Sweep | None,
        typer.Option(
            rich_help_panel=HEAD,
            help="Train many heads at once and keep the best on held-out pictures.",
        ),
    ] = None,
    alpha: Annotated[
        float,
        typer.Option(
            min=0,
            rich_help_panel=LOSS,
            help="How much harder the loss looks at what k-NN finds hard.",
        ),
    ] = 0.0,
    class_weights: Annotated[
        ClassWeights,
        typer.Option(rich_help_panel=LOSS, help="For classes of very different size."),
    ] = ClassWeights.NONE,
    label_smoothing: Annotated[
        float, typer.Option(min=0, max=0.99, rich_help_panel=LOSS, help="Of the targets.")
    ] = 0.0,
    fine_tune: Annotated[
        bool, typer.Option("--fine-tune", rich_help_panel=TUNING, help="Train the backbone too.")
    ] = False,
    blocks: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=TUNING, help="Only the last so many blocks of it."),
    ] = None,
    augmentation: Annotated[
        Augmentation, typer.Option(rich_help_panel=TUNING, help="Of training pictures.")
    ] = Augmentation.PAPER,
    refresh: Annotated[
        str,
        typer.Option(
            rich_help_panel=TUNING,
            help="When --alpha asks a new datastore: epoch, never, or a number of steps.",
        ),
    ] = "epoch",
    queries: Annotated[
        Queries,
        typer.Option(rich_help_panel=TUNING, help="Features of the last refresh, or of the step."),
    ] = Queries.SNAPSHOT,
    accumulate: Annotated[
        int, typer.Option(min=1, rich_help_panel=TUNING, help="Batches per update.")
    ] = 1,
    bf16: Annotated[
        bool, typer.Option("--bf16", rich_help_panel=TUNING, help="Train in bfloat16.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", rich_help_panel=TUNING, help="Less memory, more time."
        ),
    ] = False,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=TUNING,
            help="Stop after so many epochs without a better blend on validation.",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, rich_help_panel=TUNING, help="Processes that decode pictures.")
    ] = 0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", rich_help_panel=TUNING, help="Go on with a run that was interrupted."
        ),
    ] = False,
    index: Annotated[
        str,
        typer.Option(rich_help_panel=STORE, help="auto, flat (exact) or a faiss factory string."),
    ] = "auto",
    max_memory: Annotated[
        str | None,
        typer.Option(rich_help_panel=STORE, help="What the index may take, such as 2GB."),
    ] = None,
    criterion: Annotated[
        Criterion | None,
        typer.Option(
            rich_help_panel=STORE,
            help="What k, temperature and the blend are chosen by; default by how many labels.",
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            rich_help_panel=STORE,
            help="Also scale the temperatures of head and blend.",
        ),
    ] = False,
    show_neighbors: Annotated[
        bool,
        typer.Option(
            "--show-neighbors",
            rich_help_panel=STORE,
            help="Draw test pictures and who voted for the model card; it shows training pictures.",
        ),
    ] = False,
    report_to: Annotated[
        list[str] | None,
        typer.Option(help="tensorboard, trackio, …; repeatable. Logs of the training."),
    ] = None,
) -> None:
    """Train on your own pictures: features, head, datastore, tuning, report, checkpoint."""
    from hf_knn.console import run
    from hf_knn.training_command import TrainOptions, train_pictures

    options = TrainOptions(
        pictures=pictures, output=output, backbone=backbone, epochs=epochs,
        learning_rate=learning_rate, alpha=alpha, head=str(head), hidden=hidden or [],
        sweep=_text(sweep), class_weights=str(class_weights), label_smoothing=label_smoothing,
        fine_tune=fine_tune, blocks=blocks, augmentation=str(augmentation), refresh=refresh,
        queries=str(queries), accumulate=accumulate, bf16=bf16,
        gradient_checkpointing=gradient_checkpointing, patience=patience, workers=workers,
        resume=resume, index=index, max_memory=max_memory, criterion=_text(criterion),
        calibrate=calibrate, test_share=test_share, shots=shots, fraction=fraction,
        group_by=group_by, pooling=pooling, knn_pooling=knn_pooling, batch_size=batch_size,
        precision=str(precision), on_bad_image=str(on_bad_image), show_neighbors=show_neighbors,
        report_to=report_to or [], seed=seed,
    )  # fmt: skip
    run(train_pictures, options)


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder or a Hub id.")],
    pictures: Annotated[str, typer.Argument(help="Labelled pictures, as for `train`.")],
    split: Annotated[
        str | None, typer.Option(help="Which split; test, or the only one there is.")
    ] = None,
    on_bad_image: Annotated[
        OnBadImage, typer.Option(help="At a picture that cannot be decoded.")
    ] = OnBadImage.SKIP,
    backend: BackendOption = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Measure head, neighbours and blend on labelled pictures."""
    from hf_knn.cli import evaluate_pictures
    from hf_knn.console import run

    run(evaluate_pictures, checkpoint, pictures, split, str(on_bad_image), json_output)


@app.command()
def tune(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder; it will be changed.")],
    pictures: Annotated[
        str, typer.Argument(help="Labelled pictures that the model was not trained on.")
    ],
    split: Annotated[
        str | None, typer.Option(help="Which split; validation, or the only one there is.")
    ] = None,
    criterion: Annotated[
        Criterion | None, typer.Option(help="Default: by how many labels there are.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Also scale the temperatures of head and blend.")
    ] = False,
    on_bad_image: Annotated[
        OnBadImage, typer.Option(help="At a picture that cannot be decoded.")
    ] = OnBadImage.SKIP,
    backend: BackendOption = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw what was tried as heat maps into this PNG.")
    ] = None,
) -> None:
    """Choose k, temperature and the blend anew, on pictures of your own."""
    from hf_knn.cli import tune_checkpoint
    from hf_knn.console import run

    run(
        tune_checkpoint, checkpoint, pictures, split, _text(criterion), calibrate,
        str(on_bad_image), plot,
    )  # fmt: skip


@app.command()
def predict(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder or a Hub id.")],
    images: Annotated[list[Path], typer.Argument(help="Pictures to classify.")],
    top: Annotated[int, typer.Option(min=1, help="Classes shown per picture.")] = 5,
    neighbors: Annotated[int, typer.Option(min=0, help="Neighbours shown per picture.")] = 5,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", rich_help_panel=WHY, help="Shares of the vote, and what would change it."
        ),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(rich_help_panel=WHY, help="Write the reasons with pictures into this file."),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=WHY, help="Folder that the stored paths are relative to, for --html."
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
    from hf_knn.console import run

    if not (explain or html or pictures or max_error is not None):
        from hf_knn.cli import predict_images

        run(predict_images, checkpoint, images, top, neighbors, json_output)
        return
    from hf_knn.explain_command import ExplainOptions, explain_images

    if pictures and not html:
        raise typer.BadParameter("Expected --html with --pictures; name the file to write.")
    options = ExplainOptions(top, neighbors, html, pictures, max_error, json_output)
    run(explain_images, checkpoint, images, options)


@app.command()
def push(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    repo_id: Annotated[str, typer.Argument(help="org/name; made if it is not there.")],
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
) -> None:
    """Push a checkpoint to the Hub: model, datastore, code and card in one commit."""
    from hf_knn.cli import push_checkpoint
    from hf_knn.console import run

    run(push_checkpoint, checkpoint, repo_id, private, revision, create_pr, parent_commit, message,
        token, model_license)  # fmt: skip


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder or a Hub id.")],
    onnx: Annotated[
        Path, typer.Option(help="Folder for the graph, its settings and a script that uses them.")
    ],
) -> None:
    """Export to one ONNX graph: backbone, head, neighbours and blend."""
    from hf_knn.cli import export_checkpoint
    from hf_knn.console import run

    run(export_checkpoint, checkpoint, onnx)


@app.command()
def doctor(
    pictures: Annotated[str, typer.Argument(help="Labelled pictures, as for `train`.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for report.html and findings.csv.")
    ] = Path("knn-doctor"),
    backbone: Annotated[
        str, typer.Option(help="As for `train`; its features are kept and used again there.")
    ] = DEFAULT_BACKBONE,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 32,
    backend: BackendOption = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Look at about so many pictures of each split, class by class."),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(help="Column of what belongs together (a patient, a camera)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of folds, parts and --limit.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Check pictures before training: broken, doubled, mislabelled, strange, too few."""
    from hf_knn.console import run
    from hf_knn.doctor import DoctorOptions
    from hf_knn.doctor_command import diagnose_pictures

    options = DoctorOptions(
        pictures=pictures, output=output, backbone=backbone, batch_size=batch_size, limit=limit,
        group_by=group_by, seed=seed, json_output=json_output,
    )  # fmt: skip
    run(diagnose_pictures, options)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
