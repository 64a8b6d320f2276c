"""The options of `hf-knn train`, each declared here and nowhere else."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from . import places
from .choices import (
    DEFAULT_BACKBONE,
    LARGEST_SEED,
    Augmentation,
    ClassWeights,
    Criterion,
    HeadKind,
    OnBadImage,
    Precision,
    Queries,
    Splits,
    Sweep,
)

HEAD_EPOCHS, HEAD_LEARNING_RATE = 60, 1e-3
FINE_TUNING_EPOCHS, FINE_TUNING_LEARNING_RATE = 10, 5e-5

DATA, HEAD, LOSS = "Pictures", "Head", "Loss"
TUNING, STORE = "Fine-tuning", "Datastore and blend"
"""Groups of options in `--help`."""


@dataclass(frozen=True)
class TrainOptions:
    """The options of `hf-knn train`; the help of each says what it does."""

    pictures: Annotated[
        str,
        typer.Argument(
            callback=places.pictures,
            help="A folder with one sub-folder per label (train/validation/test inside are used), "
            "a csv of path,label, a parquet file, or a Hub dataset id.",
        ),
    ]
    output: Annotated[
        Path, typer.Option("--output", "-o", callback=places.new_folder, help="Checkpoint folder.")
    ] = Path("knn-model")
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace a model there that was taught since, or trained on other pictures; "
            "`hf-knn undo` brings it back.",
        ),
    ] = False
    keep: Annotated[
        int,
        typer.Option(min=1, help="How many replaced versions to keep for `hf-knn undo`."),
    ] = 1
    backbone: Annotated[
        str,
        typer.Option(
            callback=places.backbone,
            help="Hub id, timm name, local folder or another k-NN checkpoint.",
        ),
    ] = DEFAULT_BACKBONE
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Of splits, folds and the head.")
    ] = 0
    pooling: Annotated[
        str | None, typer.Option(help="cls, mean, max, pooler or cls_mean; default by backbone.")
    ] = None
    knn_pooling: Annotated[
        str | None, typer.Option(help="Pooling of the datastore, if it is another.")
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 32
    precision: Annotated[
        Precision, typer.Option(help="Of the forward pass that computes features.")
    ] = "fp32"
    test_share: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.9,
            rich_help_panel=DATA,
            help="Held out for the report, if there is no test split.",
        ),
    ] = 0.2
    splits: Annotated[
        Splits,
        typer.Option(
            rich_help_panel=DATA,
            help="Folders called train, validation or test, and a csv's column split: auto finds "
            "out what they are; none reads such folders as classes.",
        ),
    ] = "auto"
    group_by: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DATA,
            help="Column of what belongs together (a patient, a camera): never split.",
        ),
    ] = None
    shots: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=DATA,
            help="Use so many labelled pictures per class, to learn and to choose from.",
        ),
    ] = None
    fraction: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, rich_help_panel=DATA, help="Likewise, a fraction of each class."
        ),
    ] = None
    on_bad_image: Annotated[
        OnBadImage,
        typer.Option(rich_help_panel=DATA, help="At a picture that cannot be decoded."),
    ] = "skip"
    head: Annotated[
        HeadKind,
        typer.Option(
            rich_help_panel=HEAD,
            help="auto takes the best of linear, ridge, kernel and lda on pictures held out, and "
            "linear with --fine-tune. ridge, kernel and lda are solved in closed form, without "
            "epochs, and follow what is taught and forgotten.",
        ),
    ] = "auto"
    hidden: Annotated[
        list[int],
        typer.Option(
            min=1, rich_help_panel=HEAD, help="Width of a hidden layer of an mlp; repeat it."
        ),
    ] = field(default_factory=list)
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=HEAD,
            help=f"Default: {HEAD_EPOCHS}, or {FINE_TUNING_EPOCHS} with --fine-tune.",
        ),
    ] = None
    learning_rate: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=HEAD,
            help=f"Default: {HEAD_LEARNING_RATE:g}, or {FINE_TUNING_LEARNING_RATE:g} with "
            "--fine-tune.",
        ),
    ] = None
    sweep: Annotated[
        Sweep | None,
        typer.Option(
            rich_help_panel=HEAD,
            help="Train many heads at once and keep the best on held-out pictures.",
        ),
    ] = None
    alpha: Annotated[
        float,
        typer.Option(
            min=0,
            rich_help_panel=LOSS,
            help="How much harder the loss looks at what k-NN finds hard.",
        ),
    ] = 0.0
    class_weights: Annotated[
        ClassWeights,
        typer.Option(rich_help_panel=LOSS, help="For classes of very different size."),
    ] = "none"
    label_smoothing: Annotated[
        float, typer.Option(min=0, max=0.99, rich_help_panel=LOSS, help="Of the targets.")
    ] = 0.0
    fine_tune: Annotated[
        bool, typer.Option("--fine-tune", rich_help_panel=TUNING, help="Train the backbone too.")
    ] = False
    blocks: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=TUNING, help="Only the last so many blocks of it."),
    ] = None
    augmentation: Annotated[
        Augmentation, typer.Option(rich_help_panel=TUNING, help="Of training pictures.")
    ] = "paper"
    refresh: Annotated[
        str,
        typer.Option(
            rich_help_panel=TUNING,
            help="When --alpha asks a new datastore: epoch, never, or a number of steps.",
        ),
    ] = "epoch"
    queries: Annotated[
        Queries,
        typer.Option(rich_help_panel=TUNING, help="Features of the last refresh, or of the step."),
    ] = "snapshot"
    accumulate: Annotated[
        int, typer.Option(min=1, rich_help_panel=TUNING, help="Batches per update.")
    ] = 1
    bf16: Annotated[
        bool, typer.Option("--bf16", rich_help_panel=TUNING, help="Train in bfloat16.")
    ] = False
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", rich_help_panel=TUNING, help="Less memory, more time."
        ),
    ] = False
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=TUNING,
            help="Stop after so many epochs without a better blend on validation.",
        ),
    ] = None
    workers: Annotated[
        int, typer.Option(min=0, rich_help_panel=TUNING, help="Processes that decode pictures.")
    ] = 0
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", rich_help_panel=TUNING, help="Go on with a run that was interrupted."
        ),
    ] = False
    index: Annotated[
        str,
        typer.Option(
            rich_help_panel=STORE,
            help="auto, auto:latency, flat (exact) or a faiss factory string.",
        ),
    ] = "auto"
    max_memory: Annotated[
        str | None,
        typer.Option(rich_help_panel=STORE, help="What the index may take, such as 2GB."),
    ] = None
    criterion: Annotated[
        Criterion | None,
        typer.Option(
            rich_help_panel=STORE,
            help="What k, temperature and the blend are chosen by; default by how many labels.",
        ),
    ] = None
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            rich_help_panel=STORE,
            help="Also scale the temperatures of head and blend.",
        ),
    ] = False
    learn_metric: Annotated[
        bool,
        typer.Option(
            "--learn-metric",
            rich_help_panel=STORE,
            help="Learn a linear map for what neighbours compare; it is kept where they find more "
            "of the pictures held out with it.",
        ),
    ] = False
    show_neighbors: Annotated[
        bool,
        typer.Option(
            "--show-neighbors",
            rich_help_panel=STORE,
            help="Draw test pictures and who voted for the model card; it shows training pictures.",
        ),
    ] = False
    thumbnails: Annotated[
        bool | None,
        typer.Option(
            "--thumbnails/--no-thumbnails",
            rich_help_panel=STORE,
            show_default=False,
            help="Keep small pictures of the training pictures in the checkpoint, for explanations "
            "and the demo; whoever opens the folder sees them, a push leaves them behind. Default: "
            "kept of up to 20,000 pictures that lie on this machine.",
        ),
    ] = None
    report_to: Annotated[
        list[str],
        typer.Option(help="tensorboard, trackio, …; repeatable. Logs of the training."),
    ] = field(default_factory=list)
