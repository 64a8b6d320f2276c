"""The `hf-knn` command: declarations only, so that `--help` answers without importing torch."""

import os
from pathlib import Path
from typing import Annotated

import typer

from hf_knn_cli_cache import app as cache
from hf_knn_cli_choices import (
    DEFAULT_BACKBONE,
    Augmentation,
    BackendOption,
    ClassWeights,
    Criterion,
    HeadKind,
    OnBadImage,
    Precision,
    Queries,
    Sweep,
    text_of,
)
from hf_knn_cli_demo import app as demonstration
from hf_knn_cli_memory import app as memory
from hf_knn_cli_use import app as use

DATA, HEAD, LOSS = "Pictures", "Head", "Loss"
TUNING, STORE = "Fine-tuning", "Datastore and blend"
"""Groups of options in `--help`."""

app = typer.Typer(
    name="hf-knn",
    help="Image classifiers that also remember: a head and its nearest neighbours, in one model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(use)
app.add_typer(memory)
app.add_typer(demonstration)
app.add_typer(cache)


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
    thumbnails: Annotated[
        bool,
        typer.Option(
            "--thumbnails",
            rich_help_panel=STORE,
            help="Keep small pictures of the training pictures in the checkpoint, for explanations "
            "and the demo; whoever opens it sees them.",
        ),
    ] = False,
    report_to: Annotated[
        list[str] | None,
        typer.Option(help="tensorboard, trackio, …; repeatable. Logs of the training."),
    ] = None,
) -> None:
    """Train on your own pictures: features, head, datastore, tuning, report, checkpoint."""
    from hf_knn.commands.console import run
    from hf_knn.commands.train import TrainOptions, train_pictures

    options = TrainOptions(
        pictures=pictures, output=output, backbone=backbone, epochs=epochs,
        learning_rate=learning_rate, alpha=alpha, head=str(head), hidden=hidden or [],
        sweep=text_of(sweep), class_weights=str(class_weights), label_smoothing=label_smoothing,
        fine_tune=fine_tune, blocks=blocks, augmentation=str(augmentation), refresh=refresh,
        queries=str(queries), accumulate=accumulate, bf16=bf16,
        gradient_checkpointing=gradient_checkpointing, patience=patience, workers=workers,
        resume=resume, index=index, max_memory=max_memory, criterion=text_of(criterion),
        calibrate=calibrate, test_share=test_share, shots=shots, fraction=fraction,
        group_by=group_by, pooling=pooling, knn_pooling=knn_pooling, batch_size=batch_size,
        precision=str(precision), on_bad_image=str(on_bad_image), show_neighbors=show_neighbors,
        thumbnails=thumbnails, report_to=report_to or [], seed=seed,
    )  # fmt: skip
    run(train_pictures, options)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
