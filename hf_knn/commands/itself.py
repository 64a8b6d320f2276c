"""What `--verbose` says of a run: versions, places, decisions, time and memory, on stderr."""

import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers

from .. import __version__
from ..store.folders import cache_root
from .devices import device_of_process


@contextmanager
def told_about_itself() -> Iterator[None]:
    """Prints what a run is made of, what it logs, and at its end what it took."""
    started, processor = time.perf_counter(), time.process_time()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger = logging.getLogger("hf_knn")
    logger.addHandler(handler)
    _say(
        f"hf-knn {__version__}, Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"transformers {transformers.__version__}; device {device_of_process()}, "
        f"{torch.get_num_threads()} threads; caches in {cache_root()}."
    )
    try:
        yield
    finally:
        logger.removeHandler(handler)
        seconds = time.perf_counter() - started
        used = time.process_time() - processor
        _say(f"Took {seconds:.1f} s, {used:.1f} s of processor time{_memory()}.")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _memory() -> str:
    if os.name == "nt":  # which counts it otherwise
        return ""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return f", {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB at most"
