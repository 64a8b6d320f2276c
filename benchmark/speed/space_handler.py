"""What the Space's `/classify` costs above the backbone's forward pass, picture by picture.

Measured inside the server: from the uploaded file to the answer with its neighbours, what would
flip it and how typical it is; without HTTP and waiting in the queue.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from harness import report, timings_of

from hf_knn import Datastore

SPACE = Path(__file__).parents[2] / "space"
_WARM_UP = 3
FORWARD, CLASSIFY, PAGE = "backbone forward", "/classify", "page, above /classify"
READ, PIXELS, EXPLAIN = "of it: reading", "of it: pixels", "of it: explaining"


def main(
    pictures: Annotated[int, typer.Option(min=2, help="Each is timed once.")] = 100,
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path(
        "outputs/speed/space_handler.json"
    ),
) -> None:
    """Time the handler beside the forward pass on the same pictures, alternately."""
    sys.path += [str(SPACE), str(Path(__file__).parents[1])]  # the page is no part of the package
    from catalog.offline_tasks import load_pictures
    from hf_knn_space.builtin import open_builtin
    from hf_knn_space.explanations import as_json
    from hf_knn_space.page.answer_views import answer_page, rows_of
    from hf_knn_space.page.contents import Page
    from hf_knn_space.pictures import NoPictures
    from hf_knn_space.service import Service
    from hf_knn_space.settings import Settings
    from hf_knn_space.uploads import Upload, reading
    from hf_knn_space.visitors import Visitors

    model = open_builtin().model
    store = model.datastore
    assert isinstance(store, Datastore)
    service = Service(model, Visitors(model, None))
    page = Page.of(service, NoPictures(), [])
    rows = load_pictures("openmoji-categories")
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        made = work()
        seconds.setdefault(name, []).append(time.perf_counter() - started)
        return made

    def pixels_of(image: Any) -> torch.Tensor:
        return model.image_processor(images=[image], return_tensors="pt")["pixel_values"]

    @torch.inference_mode()
    def forward(pixels: torch.Tensor) -> None:
        model.backbone(pixels)

    def read(path: str) -> Upload:
        with reading(path) as upload:
            return upload

    def classify(path: str) -> dict[str, Any]:
        return as_json(service.explain(service.look(path), Settings(), ""))

    with tempfile.TemporaryDirectory() as folder:
        for number in range(pictures + _WARM_UP):
            path = str(Path(folder) / f"{number}.jpg")
            image = rows[number * (len(rows) // (pictures + _WARM_UP))]["image"].convert("RGB")
            image.save(path)
            pixels = pixels_of(image)
            timed(FORWARD, partial(forward, pixels))
            timed(CLASSIFY, partial(classify, path))
            upload = timed(READ, partial(read, path))
            timed(PIXELS, partial(pixels_of, upload.image))
            look = service.look(path)  # known by now: the backbone does not run again
            found = timed(EXPLAIN, partial(service.explain, look, Settings(), ""))
            find = page.picture_of("", rows_of(found))
            timed(PAGE, partial(answer_page, [look], 0, [found], "", find))
    kept = {name: values[_WARM_UP:] for name, values in seconds.items()}
    title = f"/classify inside the server, {len(store)} stored pictures"
    milliseconds = {name: 1000 * median(values) for name, values in kept.items()}
    report(
        title, timings_of(kept, FORWARD), FORWARD, output, rows=len(store),
        milliseconds=milliseconds, times_forward=milliseconds[CLASSIFY] / milliseconds[FORWARD],
    )  # fmt: skip
    print({name: f"{value:.2f} ms" for name, value in milliseconds.items()})
    print(f"{CLASSIFY}: {milliseconds[CLASSIFY] / milliseconds[FORWARD]:.2f} x {FORWARD}")


if __name__ == "__main__":
    typer.run(main)
