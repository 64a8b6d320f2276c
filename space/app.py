"""The demo: `python space/app.py [CHECKPOINT]`, or pushed as a Space by `hf-knn demo --push`."""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from api import add_api
from benchmark_tab import add_benchmark_tab, find_report
from builtin import open_builtin
from classify_tab import add_classify_tab
from explore_tab import add_explore_tab
from guard import Guard, shelf
from hub_pictures import HubPictures
from service import Service
from shared import PRIVATE, QUEUE_SIZE, Page
from starlette.middleware import Middleware
from style import CSS, HEAD
from teach_tab import add_teach_tab, list_taught, names_for
from thumbnails import FolderPictures, NoPictures, Pictures, ZipPictures
from uploads import MAX_BYTES, MAX_FILES, SpaceError
from views import labels_page, said_page, text
from visitors import Visitors, token_of

from hf_knn import KnnForImageClassification

_HERE = Path(__file__).parent
_CACHE_SECONDS = (600, 3600)
_FONTS = ["system-ui", "sans-serif"]  # nothing is fetched from elsewhere
_LOCAL = "http://127.0.0.1:7860"
_ADDRESS_JS = f"""(text) => text.replaceAll('{_LOCAL}',
  (location.origin + location.pathname).replace(/\\/$/, ''))"""
"""The examples of the API name the page that is open."""


def make_app(page: Page) -> gr.Blocks:
    """The page around a model.

    Args:
        page: what answers.
    """
    model = page.service.model
    rows = 0 if model.datastore is None else len(model.datastore)
    shelf()  # before the page asks where to keep files
    with gr.Blocks(title="A classifier that also remembers", delete_cache=_CACHE_SECONDS) as app:
        # whoever reads the browser's storage reads the page's source too: the secret is none, and
        # a fixed one lets the token survive a restart
        token = gr.BrowserState("", storage_key="hf-knn-visitor", secret="hf-knn-visitor")
        add_api(page)  # first, since names are given out in order
        gr.HTML(
            '<header class="knn-header"><h1>A classifier that also remembers</h1><p>It answers '
            f"with a head and with the nearest of {rows:,} stored pictures, shows them, and can be "
            f"taught. {model.config.classes} classes: "
            f"{text(', '.join(model.config.class_names[:12]))}"
            f"{', …' if model.config.classes > 12 else ''}.</p></header>"
        )
        with gr.Tab("Classify", id="classify"):
            answer_after = add_classify_tab(page, token)
        with gr.Tab("Teach", id="teach"):
            taught = add_teach_tab(page, token)
        for change in taught.changes:
            answer_after(change)
        with gr.Tab("Explore", id="explore") as explore:
            add_explore_tab(page, explore, token)
        report = find_report()
        if report is not None:
            with gr.Tab("Benchmark", id="benchmark") as benchmark:
                add_benchmark_tab(report, benchmark)
        with gr.Tab("API", id="api"):
            api = gr.Markdown(_api_text(), elem_id="knn-api")
        app.load(_open(page), [token], [token, taught.listed, taught.known], **PRIVATE)
        app.load(None, [api], [api], js=_ADDRESS_JS)
    app.queue(max_size=QUEUE_SIZE)
    return app


def launch(app: gr.Blocks, **options: Any) -> Any:
    """Starts the server, with the limits of reliability.

    Args:
        app: of `make_app`.
        options: of `gr.Blocks.launch`.
    """
    return app.launch(
        theme=gr.themes.Soft(font=_FONTS), css=CSS, head=HEAD, max_file_size=MAX_BYTES,
        show_error=False, run_history=False, footer_links=[], state_session_capacity=1000,
        ssr_mode=False, app_kwargs={"middleware": [Middleware(Guard, shelf=shelf())]}, **options,
    )  # fmt: skip


def open_page(
    checkpoint: str | None, pictures: str | None, data: str | None, backend: str = "torch"
) -> Page:
    """Opens a model, or the embedded one.

    Args:
        checkpoint: a folder or a Hub id; None takes `model` or what `model.txt` names, beside this
            file, else the embedded one.
        pictures: the folder that the model was trained on, or `none`; None takes `pictures.zip`
            beside this file, else the dataset on the Hub that the rows came from.
        data: where to keep what visitors teach; None keeps it in memory.
        backend: what makes features, see `hf_knn.PictureEncoder`.

    Raises:
        ValueError: for a damaged checkpoint, or a backend that cannot run it.
        ImportError: for a backend that is not installed.
        OSError: if something is not there.
    """
    samples = sorted(str(path) for path in (_HERE / "examples").glob("*.*"))[:6]
    if checkpoint is None and (_HERE / "model").is_dir():
        checkpoint = str(_HERE / "model")
    if checkpoint is None and (_HERE / "model.txt").is_file():
        checkpoint = (_HERE / "model.txt").read_text(encoding="utf-8").strip()
    if checkpoint is None:
        embedded = open_builtin()
        model = embedded.model
        folder = Path(tempfile.mkdtemp(prefix="hf-knn-samples-"))
        for number, image in enumerate(embedded.samples):
            image.save(folder / f"{number}.png")
        samples = sorted(map(str, folder.iterdir()))
    else:
        model = KnnForImageClassification.from_pretrained(checkpoint)
    visitors = Visitors(model, None if data is None else Path(data))
    return Page.of(Service(model, visitors, backend), find_pictures(model, pictures), samples)


def find_pictures(model: KnnForImageClassification, given: str | None) -> Pictures:
    """Where pictures are that the checkpoint does not hold.

    Args:
        model: what remembers the rows.
        given: see `open_page`.
    """
    if given == "none":
        return NoPictures()
    if given is not None:
        return FolderPictures(Path(given))
    if (_HERE / "pictures.zip").is_file():
        return ZipPictures(_HERE / "pictures.zip")
    source = {} if model.datastore is None else model.datastore.source
    is_pinned = re.fullmatch("[0-9a-f]{40}", source.get("revision", ""))
    return HubPictures(source) if is_pinned and model.thumbnails is None else NoPictures()


def _open(page: Page) -> Callable[[Any], list[Any]]:
    """What is filled in when a visitor opens the page."""

    def opened(known: Any) -> list[Any]:
        token = token_of(known)  # at once, so that all tabs of a browser have the same one
        try:
            return [token, list_taught(page, token, []), labels_page(names_for(page, token))]
        except SpaceError as error:
            return [token, said_page(str(error), is_error=True), gr.skip()]

    return opened


def _api_text() -> str:
    """The part of the README on the API."""
    _, _, body = (_HERE / "README.md").read_text(encoding="utf-8").partition("## API\n")
    return body.partition("\n## ")[0].replace("MAX_FILES", str(MAX_FILES))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point.

    Args:
        arguments: of the command line; None takes the process's.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", default=os.environ.get("HF_KNN_MODEL") or None)
    parser.add_argument("--port", type=int, default=None)
    parser.add_argument("--pictures", default=os.environ.get("HF_KNN_PICTURES") or None)
    parser.add_argument("--backend", default=os.environ.get("HF_KNN_BACKEND") or "torch")
    given = parser.parse_args(arguments)
    data = os.environ.get("HF_KNN_DATA") or None
    try:
        app = make_app(open_page(given.checkpoint, given.pictures, data, given.backend))
    except (SpaceError, ValueError, OSError, ImportError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    launch(app, server_port=given.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
