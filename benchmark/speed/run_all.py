"""Runs the speed scripts, each in a process of its own with a time limit, and writes SPEED.md."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from speed_page import write_page

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Script:
    """One claim and how it is run.

    Attributes:
        name: of the JSON file.
        file: beside this one.
        quick: arguments of the run within 15 minutes.
        seconds: how long that run may take.
        full: arguments of the run without limits.
        in_folder: whether it is told a folder for its files, not a file.
        headline: the contestants that are named at the top of the page.
    """

    name: str
    file: str
    quick: tuple[str, ...] = ()
    seconds: int = 90
    full: tuple[str, ...] = ()
    in_folder: bool = False
    headline: tuple[str, ...] = ()


_OURS = ("hf_knn, torch", "hf_knn, onnx", "hf_knn, openvino")
SCRIPTS = (
    Script(
        "extraction-efficientnet-lite0", "extraction.py", ("--pictures", "192"), 170,
        headline=_OURS,
    ),
    Script(
        "extraction-vit-tiny", "extraction.py", ("--model", "vit-tiny", "--pictures", "128"), 120,
        ("--model", "vit-tiny"), headline=_OURS,
    ),
    Script(
        "path", "path.py", ("--pictures", "200", "--epochs", "5", "--many", "0"), 150,
        headline=("hf_knn",),
    ),
    Script(
        "space_handler", "space_handler.py", ("--pictures", "60"), 60, headline=("/classify",)
    ),
    Script(
        "serving", "serving.py", ("--rounds", "2", "--requests", "4"), 150,
        headline=("hf-knn serve",),
    ),
    Script(
        "teaching", "teaching.py", ("--rounds", "5"), headline=("teach one", "forget one")
    ),
    Script(
        "search", "search.py", ("--rows", "100000", "--rounds", "3"),
        headline=("Datastore, flat", "Datastore, flat, torch float32"),
    ),
    Script(
        "approximate", "approximate.py",
        ("--rows", "50000", "--data", "jittered", "--rounds", "2", "--queries", "200"),
        headline=("hnswlib", "usearch"),
    ),
    Script("leave_one_out", "leave_one_out.py", ("--rows", "30000")),
    Script("growth", "growth.py", ("--rows", "5000", "--rows", "20000"), in_folder=True),
    Script(
        "heads", "heads.py", ("--rows", "2000", "--epochs", "20", "--rounds", "2"),
        headline=("32 heads at once",),
    ),
    Script("tuning", "tuning.py", ("--rows", "4000", "--rounds", "2"), headline=("hf_knn.tune",)),
    Script(
        "fine_tuning", "fine_tuning.py", ("--pictures", "96", "--rounds", "2"),
        headline=("KnnTrainer, snapshot", "KnnTrainer, live"),
    ),
    Script(
        "scale-clusters", "scale.py",
        ("--rows", "200000", "--rounds", "3", "--queries", "200", "--data", "clusters"),
        in_folder=True, headline=("Datastore, auto",),
    ),
    Script(
        "opening", "opening.py", ("--rows", "150000", "--rounds", "2"), 150, ("--full",),
        headline=("second process",),
    ),
    Script("profile", "profiling.py", ("--pictures", "100", "--rows", "50000"), 80),
)  # fmt: skip
"""The newest claims first: what the time does not reach is said in the page."""


def run_script(script: Script, output: Path, full: bool, left: float) -> str | None:
    """Runs one script; returns why there is no result, or None.

    Args:
        script: which.
        output: folder for JSON files and logs.
        full: without time limit, at its full size.
        left: seconds that remain for all.
    """
    limit = None if full else min(script.seconds, left)
    if limit is not None and limit < 5:
        return "not run: the time for all scripts was spent"
    place, log = output / f"{script.name}.json", output / f"{script.name}.log"
    arguments = script.full if full else script.quick
    command = [sys.executable, str(HERE / script.file), *arguments, "--output"]
    command.append(str(output if script.in_folder else place))
    with log.open("w", encoding="utf-8") as stream:
        child = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            return f"not finished within {limit:.0f} s; `python benchmark/speed/run_all.py --full`"
        finally:
            if child.poll() is None:  # with what it started itself
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    return None if code == 0 else f"failed with {code}, see {log}"


def main(
    output: Annotated[Path, typer.Option(help="Folder for JSON files and logs.")] = Path(
        "outputs/speed"
    ),
    page: Annotated[Path, typer.Option(help="The page; plots lie beside it.")] = HERE / "SPEED.md",
    minutes: Annotated[float, typer.Option(help="For all scripts.")] = 14.0,
    full: Annotated[bool, typer.Option("--full", help="Full sizes, no limits: hours.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Scripts by name; repeat it. Others stay as they are.")
    ] = None,
) -> None:
    """Run the scripts one after the other and write the page from what they found."""
    names = [script.name for script in SCRIPTS]
    unknown = sorted(set(only or []) - set(names))
    if unknown:
        raise typer.BadParameter(f"Expected some of {names}, but got {unknown}.")
    output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    missing: dict[str, str] = {}
    for script in SCRIPTS:
        if only and script.name not in only:
            continue
        (output / f"{script.name}.json").unlink(missing_ok=True)
        started = time.monotonic()
        reason = run_script(script, output, full, deadline - started)
        print(f"{script.name}: {reason or 'done'} ({time.monotonic() - started:.0f} s)", flush=True)
        if reason:
            missing[script.name] = reason
    write_page(page, output, {script.name: script.headline for script in SCRIPTS}, missing)
    print(f"Written: {page}")


if __name__ == "__main__":
    typer.run(main)
