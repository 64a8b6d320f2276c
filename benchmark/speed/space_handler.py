"""What the Space's `/classify` costs above the backbone's forward pass, picture by picture.

Measured inside the server: from the uploaded file to the answer with its neighbours, what would
flip it and how typical it is; without HTTP and waiting in the queue.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from harness import report, timings_of

from hf_knn import Datastore

SPACE = Path(__file__).parents[2] / "space"
FORWARD, CLASSIFY = "backbone forward", "/classify"


def main(
    pictures: Annotated[int, typer.Option(min=2, help="Each is timed once.")] = 100,
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path(
        "outputs/speed/space_handler.json"
    ),
) -> None:
    """Time the handler beside the forward pass on the same pictures, alternately."""
    sys.path += [str(SPACE), str(Path(__file__).parents[1])]  # the page is no part of the package
    from api import as_json
    from builtin import open_builtin
    from offline_tasks import load_pictures
    from service import Service, Settings
    from visitors import Visitors

    model = open_builtin().model
    store = model.datastore
    assert isinstance(store, Datastore)
    service = Service(model, Visitors(model, None))
    rows = load_pictures("openmoji-categories")
    seconds: dict[str, list[float]] = {FORWARD: [], CLASSIFY: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(pictures + 2):
            path = Path(folder) / f"{number}.jpg"
            rows[number * (len(rows) // (pictures + 2))]["image"].convert("RGB").save(path)
            pixels = model.image_processor(images=[rows[number]["image"]], return_tensors="pt")
            started = time.perf_counter()
            with torch.inference_mode():
                model.backbone(pixels["pixel_values"])
            between = time.perf_counter()
            as_json(service.explain(service.look(str(path)), Settings(), ""))
            ended = time.perf_counter()
            if number >= 2:  # after warming up
                seconds[FORWARD].append(between - started)
                seconds[CLASSIFY].append(ended - between)
    title = f"/classify inside the server, {len(store)} stored pictures"
    report(title, timings_of(seconds, FORWARD), FORWARD, output, rows=len(store))


if __name__ == "__main__":
    typer.run(main)
