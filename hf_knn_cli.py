"""The `hf-knn` command: declarations only, so that `--help` answers without importing torch."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_BACKBONE = "facebook/dinov2-small"

app = typer.Typer(
    name="hf-knn",
    help="Image classifiers that also remember: a head and its nearest neighbours, in one model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    epochs: Annotated[int, typer.Option(min=1, help="Passes of the head over the features.")] = 60,
    learning_rate: Annotated[float, typer.Option(help="Of the head, AdamW.")] = 1e-3,
    alpha: Annotated[
        float, typer.Option(min=0, help="How much harder the loss looks at what k-NN finds hard.")
    ] = 0.0,
    head: Annotated[
        HeadKind, typer.Option(help="ridge is solved in closed form, without epochs.")
    ] = HeadKind.LINEAR,
    hidden: Annotated[
        list[int] | None, typer.Option(min=1, help="Width of a hidden layer of an mlp; repeat it.")
    ] = None,
    sweep: Annotated[
        Sweep | None,
        typer.Option(help="Train many heads at once and keep the best on held-out pictures."),
    ] = None,
    class_weights: Annotated[
        ClassWeights, typer.Option(help="For classes of very different size.")
    ] = ClassWeights.NONE,
    index: Annotated[
        str, typer.Option(help="auto, flat (exact) or a faiss factory string.")
    ] = "auto",
    max_memory: Annotated[
        str | None, typer.Option(help="What the index may take, such as 2GB.")
    ] = None,
    test_share: Annotated[
        float,
        typer.Option(min=0, max=0.9, help="Held out for the report, if there is no test split."),
    ] = 0.2,
    pooling: Annotated[
        str | None, typer.Option(help="cls, mean, max, pooler or cls_mean; default by backbone.")
    ] = None,
    knn_pooling: Annotated[
        str | None, typer.Option(help="Pooling of the datastore, if it is another.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 32,
    precision: Annotated[Precision, typer.Option(help="Of the forward pass.")] = Precision.FP32,
    on_bad_image: Annotated[
        OnBadImage, typer.Option(help="At a picture that cannot be decoded.")
    ] = OnBadImage.SKIP,
    seed: Annotated[int, typer.Option(help="Of splits, folds and the head.")] = 0,
) -> None:
    """Train on your own pictures: features, head, datastore, tuning, report, checkpoint."""
    from hf_knn.cli import TrainOptions, run, train_pictures

    options = TrainOptions(
        pictures=pictures, output=output, backbone=backbone, epochs=epochs,
        learning_rate=learning_rate, alpha=alpha, head=str(head), hidden=hidden or [],
        sweep=None if sweep is None else str(sweep), class_weights=str(class_weights), index=index,
        max_memory=max_memory, test_share=test_share, pooling=pooling,
        knn_pooling=knn_pooling, batch_size=batch_size, precision=str(precision),
        on_bad_image=str(on_bad_image), seed=seed,
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
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Measure head, neighbours and blend on labelled pictures."""
    from hf_knn.cli import evaluate_pictures, run

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
        str | None,
        typer.Option(help="one_standard_error, accuracy, mean_class or log_likelihood."),
    ] = None,
    on_bad_image: Annotated[
        OnBadImage, typer.Option(help="At a picture that cannot be decoded.")
    ] = OnBadImage.SKIP,
    plot: Annotated[
        Path | None, typer.Option(help="Draw what was tried as heat maps into this PNG.")
    ] = None,
) -> None:
    """Choose k, temperature and the blend anew, on pictures of your own."""
    from hf_knn.cli import run, tune_checkpoint

    run(tune_checkpoint, checkpoint, pictures, split, criterion, str(on_bad_image), plot)


@app.command()
def predict(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder or a Hub id.")],
    images: Annotated[list[Path], typer.Argument(help="Pictures to classify.")],
    top: Annotated[int, typer.Option(min=1, help="Classes shown per picture.")] = 5,
    neighbors: Annotated[int, typer.Option(min=0, help="Neighbours shown per picture.")] = 5,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Classify pictures, and show the neighbours that voted."""
    from hf_knn.cli import predict_images, run

    run(predict_images, checkpoint, images, top, neighbors, json_output)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
