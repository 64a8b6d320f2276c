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

DATA, HEAD, LOSS = "Pictures", "Head (the classifier)", "What training minds more"
TUNING, STORE = "Fine-tuning (training the backbone too)", "Neighbours and blend"
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
            help="Replace the model there, even if it was taught since or trained on other "
            "pictures; "
            "`hf-knn undo` brings it back.",
        ),
    ] = False
    keep: Annotated[
        int,
        typer.Option(
            min=1, help="How many of the versions that were replaced are kept for `hf-knn undo`."
        ),
    ] = 1
    backbone: Annotated[
        str,
        typer.Option(
            callback=places.backbone,
            help="The pretrained model that makes features: a short name such as dinov2-s or "
            "siglip2-b "
            "(`hf-knn backbones` lists them), a Hub id, a timm name, a folder or a checkpoint.",
        ),
    ] = DEFAULT_BACKBONE
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=LARGEST_SEED, help="Random seed: the same one gives the same model."
        ),
    ] = 0
    pooling: Annotated[
        str | None,
        typer.Option(
            help="How one feature is made of what the backbone says about each patch: cls, mean, "
            "max, "
            "pooler or cls_mean. Default: what suits the backbone."
        ),
    ] = None
    knn_pooling: Annotated[
        str | None,
        typer.Option(help="Likewise for the neighbours, if they shall have another one."),
    ] = None
    batch_size: Annotated[
        int, typer.Option(min=1, help="Pictures that go through the backbone at once.")
    ] = 32
    precision: Annotated[
        Precision, typer.Option(help="Of the numbers in the backbone; less than fp32 is for GPUs.")
    ] = "fp32"
    test_share: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.9,
            rich_help_panel=DATA,
            help="Share of the pictures that is held out to measure on, if there is no test split.",
        ),
    ] = 0.2
    splits: Annotated[
        Splits,
        typer.Option(
            rich_help_panel=DATA,
            help="Whether folders called train, validation or test (or a csv's column split) "
            "divide "
            "the pictures: auto finds out, none reads such folders as classes.",
        ),
    ] = "auto"
    group_by: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DATA,
            help="Column of a csv that says what belongs together, such as the patient or the "
            "camera: "
            "it is never on both sides, so that nothing is measured on what was seen.",
        ),
    ] = None
    shots: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=DATA,
            help="Use only so many pictures of each class.",
        ),
    ] = None
    fraction: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            rich_help_panel=DATA,
            help="Use only this fraction of each class, from 0 to 1.",
        ),
    ] = None
    on_bad_image: Annotated[
        OnBadImage,
        typer.Option(rich_help_panel=DATA, help="What to do at a picture that cannot be read."),
    ] = "skip"
    head: Annotated[
        HeadKind,
        typer.Option(
            rich_help_panel=HEAD,
            help="The kind of classifier. auto compares linear, ridge, kernel and lda on pictures "
            "held "
            "out and takes the best; with --fine-tune it is linear. ridge, kernel and lda are "
            "computed at once, and follow what is taught and forgotten later; linear and mlp are "
            "trained in epochs.",
        ),
    ] = "auto"
    hidden: Annotated[
        list[int],
        typer.Option(
            min=1,
            rich_help_panel=HEAD,
            help="With --head mlp: the width of a hidden layer; repeat the option for more layers.",
        ),
    ] = field(default_factory=list)
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=HEAD,
            help=f"Default: {HEAD_EPOCHS}, or {FINE_TUNING_EPOCHS} with --fine-tune: how often "
            "training goes through all pictures.",
        ),
    ] = None
    learning_rate: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=HEAD,
            help=f"Default: {HEAD_LEARNING_RATE:g}, or {FINE_TUNING_LEARNING_RATE:g} with "
            "--fine-tune: how large the steps of training are.",
        ),
    ] = None
    sweep: Annotated[
        Sweep | None,
        typer.Option(
            rich_help_panel=HEAD,
            help="Train many linear heads with other learning rates at once, and keep the best.",
        ),
    ] = None
    alpha: Annotated[
        float,
        typer.Option(
            min=0,
            rich_help_panel=LOSS,
            help="Give pictures that their neighbours get wrong more weight in training: 0 is "
            "none.",
        ),
    ] = 0.0
    class_weights: Annotated[
        ClassWeights,
        typer.Option(
            rich_help_panel=LOSS, help="Give pictures of small classes more weight in training."
        ),
    ] = "none"
    label_smoothing: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.99,
            rich_help_panel=LOSS,
            help="Trust the labels a little less: 0 is fully, 0.1 is usual.",
        ),
    ] = 0.0
    fine_tune: Annotated[
        bool,
        typer.Option(
            "--fine-tune",
            rich_help_panel=TUNING,
            help="Train the backbone too: slower, and mostly for a GPU.",
        ),
    ] = False
    blocks: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=TUNING,
            help="Train only the last so many blocks of the backbone.",
        ),
    ] = None
    augmentation: Annotated[
        Augmentation,
        typer.Option(
            rich_help_panel=TUNING, help="How training pictures are varied: cut, flipped, coloured."
        ),
    ] = "paper"
    refresh: Annotated[
        str,
        typer.Option(
            rich_help_panel=TUNING,
            help="With --alpha: how often neighbours are looked up anew while the backbone "
            "changes: "
            "epoch, never, or a number of steps.",
        ),
    ] = "epoch"
    queries: Annotated[
        Queries,
        typer.Option(
            rich_help_panel=TUNING,
            help="With --alpha: find neighbours by the features of the last such look-up, or of "
            "now.",
        ),
    ] = "snapshot"
    accumulate: Annotated[
        int, typer.Option(min=1, rich_help_panel=TUNING, help="Batches that make one step.")
    ] = 1
    bf16: Annotated[
        bool,
        typer.Option(
            "--bf16", rich_help_panel=TUNING, help="Compute in bfloat16, for GPUs: half the memory."
        ),
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
            help="Stop after so many epochs that brought nothing on the validation pictures.",
        ),
    ] = None
    workers: Annotated[
        int, typer.Option(min=0, rich_help_panel=TUNING, help="Processes that read pictures.")
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
            help="How neighbours are searched: flat compares all rows; auto does so where that is "
            "quick, else it looks at the likely ones, as auto:latency does for single pictures; or "
            "a faiss factory string.",
        ),
    ] = "auto"
    max_memory: Annotated[
        str | None,
        typer.Option(rich_help_panel=STORE, help="Memory that the search may take, such as 2GB."),
    ] = None
    criterion: Annotated[
        Criterion | None,
        typer.Option(
            rich_help_panel=STORE,
            help="What decides how many neighbours vote and how much they count beside the head. "
            "Default: by how many labels there are.",
        ),
    ] = None
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            rich_help_panel=STORE,
            help="Also make the probabilities honest: 80 % sure shall be right 80 times of 100.",
        ),
    ] = False
    learn_metric: Annotated[
        bool,
        typer.Option(
            "--learn-metric",
            rich_help_panel=STORE,
            help="Learn which directions of the features matter for being alike; it is kept only "
            "where "
            "neighbours answer better with it on pictures held out.",
        ),
    ] = False
    show_neighbors: Annotated[
        bool,
        typer.Option(
            "--show-neighbors",
            rich_help_panel=STORE,
            help="Draw test pictures with the pictures that voted, for the model card, which then "
            "shows "
            "training pictures.",
        ),
    ] = False
    thumbnails: Annotated[
        bool | None,
        typer.Option(
            "--thumbnails/--no-thumbnails",
            rich_help_panel=STORE,
            show_default=False,
            help="Keep small copies of the training pictures in the checkpoint, to explain "
            "answers; "
            "whoever opens the folder sees them, a push leaves them behind. Default: kept of up to "
            "20,000 pictures that lie on this machine.",
        ),
    ] = None
    report_to: Annotated[
        list[str],
        typer.Option(
            help="Where to log the training: tensorboard, trackio, …; repeat it for more."
        ),
    ] = field(default_factory=list)
