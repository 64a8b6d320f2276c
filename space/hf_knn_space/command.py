"""The command line of the page."""

import argparse
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path


def main(arguments: Sequence[str] | None = None, beside: Path | None = None) -> int:
    """Opens the page around a checkpoint and waits until it is closed.

    Args:
        arguments: of the command line; None takes the process's.
        beside: the folder of app.py, see `open_page`; None where there is none.

    Returns:
        The exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a name that it cannot encode ends nothing
            stream.reconfigure(errors="backslashreplace")
    given = _parser().parse_args(arguments)  # first: `--help` waits for no library

    from .opening import open_page
    from .page.app import launch, make_app

    data = os.environ.get("HF_KNN_DATA") or None
    try:
        page = open_page(
            beside, given.checkpoint, given.pictures, data, given.backend, given.device
        )
        app = make_app(page, beside)
    except (ValueError, OSError, ImportError) as error:
        said = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
        print(f"Error: {said}", file=sys.stderr)
        return 1
    launch(app, server_port=given.port)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hf_knn_space",
        description="A page to upload pictures, see why they are answered so, and teach new ones.",
    )
    parser.add_argument(
        "checkpoint", nargs="?", default=os.environ.get("HF_KNN_MODEL") or None,
        help="a folder or a Hub id; none builds a small model, once [HF_KNN_MODEL]",
    )  # fmt: skip
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument(
        "--pictures", default=os.environ.get("HF_KNN_PICTURES") or None,
        help="the folder that the checkpoint was trained on, or none [HF_KNN_PICTURES]",
    )  # fmt: skip
    parser.add_argument(
        "--backend", default=os.environ.get("HF_KNN_BACKEND") or "torch",
        help="what makes features: torch, onnx, openvino or auto [HF_KNN_BACKEND]",
    )  # fmt: skip
    parser.add_argument(
        "--device", default=os.environ.get("HF_KNN_DEVICE") or "cpu",
        help="where features are made: cpu, cuda, …; auto takes a GPU if there is one "
        "[HF_KNN_DEVICE]",
    )  # fmt: skip
    return parser
