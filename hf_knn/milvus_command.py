"""`hf-knn milvus`: the rows of a checkpoint go into Milvus, and it keeps a reference to them."""

from pathlib import Path

from rich.markup import escape

from .console import console, progress_bars
from .datastore import Datastore
from .datastore_reference import DatastoreReference, read_manifest
from .manifest import MANIFEST_NAME
from .milvus_store import MilvusDatastore
from .modeling_knn import KnnForImageClassification
from .storage import exclusive_lock


def move_to_milvus(
    checkpoint: Path,
    uri: str,
    collection: str,
    token: str | None,
    batch_size: int,
    index: str = "flat",
) -> None:
    """Loads the rows of a checkpoint into Milvus and saves the checkpoint with a reference.

    The checkpoint is changed when all rows were read back; until then it is as it was, and the
    command may be called again to go on.

    Args:
        checkpoint: a folder whose rows lie beside the model.
        uri: of the server, or a file of Milvus Lite.
        collection: name for the rows.
        token: of the server; None takes `MILVUS_TOKEN`.
        batch_size: rows per call.
        index: see `MilvusDatastore.from_datastore`.

    Raises:
        ValueError: for another folder, or one whose rows lie elsewhere.
        ImportError: without pymilvus.
        OSError: if the server does not answer, or something cannot be written.
    """
    if not checkpoint.is_dir():
        raise ValueError(
            f"Expected {checkpoint} to be a checkpoint folder, since it will be changed."
        )
    manifest = checkpoint / MANIFEST_NAME
    with exclusive_lock(checkpoint.resolve()):  # or a row that is taught meanwhile would be lost
        if manifest.is_file() and isinstance(read_manifest(manifest), DatastoreReference):
            raise ValueError(
                f"Expected {checkpoint} to hold rows of its own, but it refers to Milvus already."
            )
        model = KnnForImageClassification.from_pretrained(checkpoint)
        if not isinstance(model.datastore, Datastore):
            raise ValueError(f"Expected {checkpoint} to hold a datastore, but it has none.")
        with progress_bars():
            store = MilvusDatastore.from_datastore(
                model.datastore, uri, collection, token=token, batch_size=batch_size, index=index
            )
        model.datastore = store
        model.save_pretrained(checkpoint)
    console.print(
        f"{len(store):,} rows lie in {escape(str(store.location))}, read back and compared, "
        f"searched by {escape(str(store.index))}. "
        f"{escape(str(checkpoint))} holds a reference to them, and no rows."
    )
    console.print(
        f"Next: [bold]HF_KNN_MILVUS_URI={escape(store.collection.server.uri)} hf-knn predict "
        f"{escape(str(checkpoint))} PICTURE.jpg[/]", soft_wrap=True,
    )  # fmt: skip
