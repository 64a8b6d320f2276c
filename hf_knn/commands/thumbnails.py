"""Small pictures that `hf-knn train` keeps in a checkpoint, and says so."""

from pathlib import Path
from typing import Any

from hf_knn_cli.train_options import TrainOptions

from ..data.batches import RowPictures
from ..data.decode import BadImageError
from ..model.modeling import KnnForImageClassification
from .console import console, escape

MOST = 20_000
"""Of more pictures none are kept unless somebody asks: to open the model is to read them all."""


def keep_thumbnails(model: KnnForImageClassification, train: Any, options: TrainOptions) -> None:
    """Keeps small pictures of the stored rows, unless somebody does not want them.

    Args:
        model: with a datastore.
        train: the dataset that its rows came from.
        options: where nothing is said, pictures of this machine are kept, up to `MOST`.

    Raises:
        BadImageError: for a picture that was changed meanwhile, where somebody asked for them.
    """
    assert model.datastore is not None
    count, wanted = len(model.datastore), options.thumbnails
    is_here = Path(options.pictures).exists()  # else on the Hub, and shown from there
    if wanted is None and is_here and count > MOST:
        console.print(f"Above {MOST:,} pictures small copies are kept with --thumbnails only.")
        return
    if not (is_here if wanted is None else wanted):
        return
    try:
        with console.status("Making small pictures of the stored rows …"):
            model.keep_thumbnails(RowPictures(train, model.datastore.ids.tolist()))
    except (BadImageError, OSError) as error:
        if wanted:
            raise
        said = f"[yellow]Note:[/] no small pictures are kept: {escape(error)}"
        console.print(said, soft_wrap=True, highlight=False)
        return
    console.print(
        f"Small copies of the {count:,} pictures are kept in {escape(options.output)}, to explain "
        "answers: whoever opens the folder sees them. A push leaves them behind, and "
        "--no-thumbnails keeps none.", soft_wrap=True, highlight=False,
    )  # fmt: skip
