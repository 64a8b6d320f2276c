"""The Space around a tiny model, in a process of its own, until it is killed.

Beside it runs a page whose only handler does nothing, with the same queue: what a request costs
before anything is computed.
"""

import json
import sys
import time
from pathlib import Path

import gradio as gr

from hf_knn_space.page.events import HEAVY, QUEUE_SIZE
from support.space_app import running


def empty_app() -> gr.Blocks:
    """A page that answers without doing anything."""
    with gr.Blocks() as app:
        asked, answer = gr.JSON(visible=False), gr.JSON(visible=False)
        button = gr.Button(visible=False)
        button.click(lambda value: value, asked, answer, api_name="nothing", **HEAVY)
    app.queue(max_size=QUEUE_SIZE)
    return app


def main(folder: Path, data: Path, ready: Path) -> None:
    """Serves, and says where in a file that appears whole."""
    with running(folder, data) as app:
        _, url, _ = empty_app().launch(
            prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", ssr_mode=False
        )
        partial = ready.with_suffix(".partial")
        partial.write_text(json.dumps({"space": app.url, "empty": url}), "utf-8")
        partial.replace(ready)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
