"""Where the time goes: extraction, a probe with tuning, and a search, each under a profiler.

Says per phase which functions took it themselves, in shares of the phase; a profiler slows Python
down, so the seconds are no claim.
"""

import cProfile
import os
import pstats
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from harness import write
from jpegs import jpeg_folder
from rich.console import Console
from rich.table import Table

from hf_knn import (
    Datastore,
    KnnForImageClassification,
    KnnTrainer,
    KnnTrainingArguments,
    extract_features,
)

sys.path.append(str(Path(__file__).parents[1]))  # the backbones lie beside this folder

from offline_backbones import build_backbone


def profiled(work: Callable[[], object], count: int) -> dict[str, float]:
    """Seconds of a piece of work, and the shares of the functions that took most themselves.

    Args:
        work: runs once, in this thread.
        count: how many functions are named, >= 1.
    """
    profiler = cProfile.Profile()
    started = time.perf_counter()
    profiler.runcall(work)
    seconds = time.perf_counter() - started
    rows = pstats.Stats(profiler).get_stats_profile().func_profiles
    own = sorted(rows.items(), key=lambda row: -row[1].tottime)[:count]
    total = sum(row.tottime for row in rows.values())
    found = {"seconds": seconds}
    for name, row in own:
        place = Path(row.file_name)
        where = f"{place.parent.name}/{place.name}: " if place.suffix == ".py" else ""
        found[f"{where}{name.strip('<>')}"] = row.tottime / total
    return found


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

        def extract() -> Any:
            return extract_features(model, dataset, backend="torch", progress=False)

        found[f"extraction of {pictures} JPEG files, torch"] = profiled(extract, top)
        features = extract()
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
    _print(found)
    write(output, {"title": "Share of each phase, by function, without what it calls"} | found)


def _print(found: dict[str, dict[str, float]]) -> None:
    for phase, shares in found.items():
        table = Table(title=f"{phase}: {shares['seconds']:.2f} s", title_justify="left")
        table.add_column("function")
        table.add_column("% of it", justify="right")
        for name, share in list(shares.items())[1:]:
            table.add_row(name, f"{100 * share:.0f}")
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
