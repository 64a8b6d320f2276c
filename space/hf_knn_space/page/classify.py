"""Upload a picture, see the answer and why."""

from collections.abc import Callable
from typing import Any, NamedTuple

import gradio as gr

from hf_knn.data import check_count

from ..exports import as_csv, write_text
from ..service import Look
from ..settings import MAX_K, WEIGHTINGS, Settings
from ..uploads import SpaceError, small_picture
from .answer_views import EMPTY, answer_page, rows_of, samples_page
from .contents import Page
from .events import HEAVY, as_message, clicked
from .markup import text
from .scripts import ANNOUNCE_JS, DIALOG_JS, SELECT_JS


class Shown(NamedTuple):
    """What a visitor looks at.

    Attributes:
        looks: the pictures.
        chosen: which one.
    """

    looks: tuple[Look, ...] = ()
    chosen: int = 0


def add_classify_tab(page: Page, token: gr.BrowserState) -> Callable[[Any], Any]:
    """Adds the tab.

    Args:
        page: what answers.
        token: of the visitor.

    Returns:
        Given an event, lets the pictures that are shown be answered anew after it.
    """
    shown = gr.State(Shown(), time_to_live=3600)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            files = gr.File(
                label="Drop, choose or paste pictures", file_count="multiple", height=170,
                elem_id="knn-upload",
            )  # fmt: skip
            samples = gr.HTML(
                samples_page(small_picture(path) for path in page.samples),
                js_on_load=SELECT_JS, visible=bool(page.samples), elem_id="knn-samples",
            )  # fmt: skip
            with gr.Accordion("Advanced: how the neighbours vote", open=False):
                controls = _controls(page)
            table = gr.DownloadButton("All answers as csv", visible=False, size="sm")
        with gr.Column(scale=3, min_width=300):
            answer = gr.HTML(
                EMPTY, js_on_load=SELECT_JS + ANNOUNCE_JS, min_height=420, elem_id="knn-page"
            )
            detail = gr.HTML("", js_on_load=SELECT_JS + DIALOG_JS, elem_id="knn-near")
    handlers = _Handlers(page)
    asked = [shown, token, *controls]
    options: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal", **HEAVY}
    files.upload(handlers.upload, [files, *asked], [shown, answer, detail, files, table], **options)
    samples.click(handlers.sample, asked, [shown, answer, detail, files, table], **options)
    answer.click(handlers.click, asked, [shown, answer, detail], **options)
    detail.click(handlers.near, [token], [detail], **options)
    quiet = options | {"show_progress": "hidden"}
    gr.on(
        [control.change for control in controls], handlers.again, asked, [answer, table],
        trigger_mode="always_last", **quiet,
    )  # fmt: skip
    return lambda event: event.success(handlers.again, asked, [answer, table], **quiet)


def _controls(page: Page) -> list[Any]:
    config, store = page.service.model.config, page.service.model.datastore
    most = max(2, min(max(MAX_K, config.k), len(store) if store is not None else 2))
    temperature = config.knn_temperature  # of a tuned model as small as 1e-4, or as large as 10
    finest = min(0.01, temperature)
    return [
        gr.Slider(1, most, min(config.k, most), step=1, label="k: neighbours that vote"),
        gr.Slider(
            finest, max(1.0, temperature), temperature, step=finest,
            label="Temperature: small trusts the nearest, large all alike",
        ),
        gr.Slider(
            0, 1, config.knn_weight, step=0.01,
            label="λ: 0 is the head alone, 1 the neighbours alone",
        ),
        gr.Dropdown(list(WEIGHTINGS), value=config.knn_weighting, label="Weight of a neighbour by"),
    ]  # fmt: skip


class _Handlers:
    """What the events of the tab do."""

    def __init__(self, page: Page) -> None:
        self._page = page

    def upload(self, paths: list[str] | None, _: Shown, token: str, *values: Any) -> list[Any]:
        """New pictures; what cannot be read is said in place of the answer."""
        try:
            looks = tuple(self._page.service.look_at_all(check_count(paths)))
        except SpaceError as error:
            return [Shown(), _alert(str(error)), "", None, gr.DownloadButton(visible=False)]
        shown = Shown(looks)
        answer, table = self._answer(shown, token, values)
        return [shown, answer, "", None, table]

    def sample(self, event: gr.EventData, shown: Shown, token: str, *values: Any) -> list[Any]:
        """One of the pictures to begin with."""
        number = clicked(event, "row")
        if number is None or number >= len(self._page.samples):
            return [gr.skip()] * 5
        return self.upload([self._page.samples[number]], shown, token, *values)

    @as_message
    def click(self, event: gr.EventData, shown: Shown, token: str, *values: Any) -> list[Any]:
        """Another picture of those that were sent, or a neighbour."""
        number, row_id = clicked(event, "look"), clicked(event, "row")
        if number is not None and number < len(shown.looks):
            shown = shown._replace(chosen=number)
            return [shown, self._answer(shown, token, values)[0], ""]
        if row_id is None:
            return [gr.skip()] * 3
        return [gr.skip(), gr.skip(), self._page.near(row_id, token)]

    @as_message
    def near(self, event: gr.EventData, token: str) -> Any:
        """A neighbour of a neighbour."""
        row_id = clicked(event, "row")
        return gr.skip() if row_id is None else self._page.near(row_id, token)

    @as_message
    def again(self, shown: Shown, token: str, *values: Any) -> list[Any]:
        """The same pictures with other settings; the backbone does not run."""
        if not shown.looks:  # none yet, or none any more: after an hour, or a restart
            return [EMPTY, gr.DownloadButton(visible=False)]
        return self._answer(shown, token, values)

    def _answer(self, shown: Shown, token: str, values: tuple[Any, ...]) -> list[Any]:
        """The page, and the table of all answers."""
        settings = Settings(*values)
        answers = [self._page.service.explain(look, settings, token) for look in shown.looks]
        said = (
            f"k = {settings.k}, temperature {settings.temperature:g}, λ = "
            f"{settings.knn_weight:g}, {text(str(settings.weighting).replace('_', ' '))}."
        )
        picture_of = self._page.picture_of(token, rows_of(answers[shown.chosen]))
        page = answer_page(shown.looks, shown.chosen, answers, said, picture_of)
        if len(answers) < 2:
            return [page, gr.DownloadButton(visible=False)]
        table = write_text("answers.csv", as_csv(shown.looks, answers))
        return [page, gr.DownloadButton(value=table, visible=True)]


def _alert(message: str) -> str:
    return f'<div class="knn-empty"><p class="knn-notice" role="alert">{text(message)}</p></div>'
