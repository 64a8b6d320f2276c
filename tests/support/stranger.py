"""An interpreter that sees what somebody without the package has, and nothing else.

It has torch, torchvision, transformers, safetensors, numpy and pillow with all that they need, by
links to the files of this environment, so that it starts in seconds.
"""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

INSTALLED = ("torch", "torchvision", "transformers", "safetensors", "numpy", "pillow")
ABSENT = ("hf_knn", "hf_knn_cli", "faiss", "datasets", "accelerate", "evaluate", "sklearn",
          "scipy", "pymilvus", "timm")  # fmt: skip
_PREFACE = f"""
import importlib.util
seen = [name for name in {ABSENT} if importlib.util.find_spec(name) is not None]
assert not seen, f"a stranger has no {{seen}}"
"""


def make_site(folder: Path) -> Path:
    """A folder of packages: `INSTALLED` and what they need.

    Args:
        folder: which is made.
    """
    folder.mkdir(parents=True)
    for found in _closure(INSTALLED):
        for name in {path.parts[0] for path in found.files or [] if path.parts[0] != ".."}:
            source, target = Path(str(found.locate_file(name))), folder / name
            if not target.exists() and name not in ("__pycache__", "bin"):
                target.symlink_to(source)
    return folder


def run(code: str, *arguments: Any, site: Path, home: Path, **variables: str) -> Any:
    """Runs a program there, offline unless a variable says otherwise.

    Args:
        code: of the program, which prints JSON in its last line.
        arguments: of its command line.
        site: see `make_site`.
        home: of its caches.
        variables: of the environment.

    Returns:
        What it printed.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    private = {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    done = subprocess.run(
        [sys.executable, "-S", "-c", _PREFACE + code, *map(str, arguments)],
        env=kept | private | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(site)} | variables,
        cwd=home, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def _closure(names: tuple[str, ...]) -> list[Distribution]:
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # for another platform
            continue
        needed = [line for line in found[name].requires or [] if "extra ==" not in line]
        waiting += [re.split(r"[ ;<>=!~(\[]", line, maxsplit=1)[0] for line in needed]
    return list(found.values())
