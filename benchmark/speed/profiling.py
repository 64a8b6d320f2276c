"""Where the time goes: extraction, a probe with tuning, and a search, each under a profiler.

Says per phase which functions took processor time themselves, in shares of the phase; a profiler
slows Python down, so the seconds are no claim.
"""

import cProfile
import os
import pstats
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from harness import write
from jpegs import jpeg_folder
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1]))  # benchmark/, where the catalog lies

from catalog.offline_backbones import build_backbone
from hf_knn import (
    Datastore,
    KnnForImageClassification,
    KnnTrainer,
    KnnTrainingArguments,
    extract_features,
)
from hf_knn.data import decode_image

ALL, _BATCH = "all", 4


def profiled(work: Callable[[], object], count: int) -> dict[str, float]:
    """Processor seconds of a piece of work, and of the functions that took most themselves.

    Args:
        work: runs once, in this thread, whose waiting is not counted.
        count: how many functions are named, >= 1.
    """
    profiler = cProfile.Profile(time.thread_time)
    profiler.runcall(work)
    rows = pstats.Stats(profiler).get_stats_profile().func_profiles
    found = {ALL: sum(row.tottime for row in rows.values())}
    for name, row in sorted(rows.items(), key=lambda row: -row[1].tottime)[:count]:
        place = Path(row.file_name)
        where = f"{place.parent.name}/{place.name}: " if place.suffix == ".py" else ""
        found[f"{where}{name.strip('<>')}"] = row.tottime
    return found


def encode(model: KnnForImageClassification, files: list[Path]) -> None:
    """What one thread of an extraction does with its share of the pictures."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for start in range(0, len(files), _BATCH):
        images = [decode_image(path) for path in files[start : start + _BATCH]]
        pixels = model.image_processor(images=images, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            model.backbone(pixel_values=pixels.contiguous(memory_format=torch.channels_last))
    torch.set_num_threads(threads)


def main(
    pictures: Annotated[int, typer.Option(help="JPEG files that are encoded.")] = 200,
    rows: Annotated[int, typer.Option(help="Stored rows that are searched.")] = 100_000,
    top: Annotated[int, typer.Option(min=1, help="Functions named per phase.")] = 8,
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path("outputs/speed/profile.json"),
) -> None:
    """Profile the three phases, PyTorch's backend and one thread that decodes."""
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    folder = jpeg_folder(pictures, 20)
    dataset = load_dataset("imagefolder", data_dir=str(folder), split="train")
    names = dataset.features["label"].names
    model = KnnForImageClassification.from_backbone(build_backbone("efficientnet-lite0"), names)
    queries = torch.randn(256, 384, generator=torch.Generator().manual_seed(1))
    stored = torch.randn(rows, 384, generator=torch.Generator().manual_seed(0))
    store = Datastore.from_features(stored, torch.arange(rows) % 100)
    store.search(queries[:1], 20)  # builds the first pass
    found: dict[str, Any] = {}
    with TemporaryDirectory() as scratch:
        os.environ["HF_KNN_CACHE"] = scratch

        files = sorted(folder.rglob("*.jpg"))
        model.eval()
        found[f"{pictures} JPEG files by PyTorch, one thread"] = profiled(
            partial(encode, model, files), top
        )
        features = extract_features(model, dataset, backend="torch", progress=False)
        arguments = KnnTrainingArguments(
            scratch, freeze_backbone=True, probe_grid="small", disable_tqdm=True, report_to=[],
            save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        trainer = KnnTrainer(model, arguments, train_dataset=features)
        found["probe: a sweep of heads"] = profiled(trainer.train, top)
        found["probe: tuning k, T and λ"] = profiled(trainer.tune, top)
    found[f"search of 256 queries in {rows} x 384"] = profiled(
        lambda: store.search(queries, 20), top
    )
    functions = [
        {"phase": phase, "function": name, "% of it": round(100 * value / seconds[ALL])}
        for phase, seconds in found.items()
        for name, value in seconds.items()
        if name != ALL
    ]
    title = "Processor time of each phase by function, without what it calls"
    table = Table(*functions[0], title=title)
    for row in functions:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    seconds = {phase: values[ALL] for phase, values in found.items()}
    write(output, {"title": title, "seconds": seconds, "functions": functions})


if __name__ == "__main__":
    typer.run(main)
