"""The whole page: both panels, and the connection between them."""

from __future__ import annotations

from html import escape
from typing import Any
from urllib.parse import quote

import gradio as gr

from cafe.retrieval.documents import location_of, page_number
from cafe.serving.page import components
from cafe.serving.page.ask_panel import INITIAL_NOTE, AskPanel, ask_panel
from cafe.serving.page.search_panel import search_panel
from cafe.serving.page.thumbnails import Thumbnails
from cafe.serving.service import Service
from cafe.types import Hit

MAX_CONCURRENT_EVENTS = 64
"""Number of events handled concurrently; the engine's own queue bounds the work."""

_FOCUS_QUESTION = """() => setTimeout(() => {
  const block = innerWidth < 760 ? "start" : "nearest";
  document.querySelector("#ask").scrollIntoView({block, behavior: "smooth"});
  document.querySelector("#question :is(input, textarea)").focus({preventScroll: true});
}, 50)"""

# By the page's load event, not by `autofocus`: a field has the focus of the browser before the page
# listens, and an Enter pressed that early is lost.
_FOCUS_FIRST = """() => {
  if (document.activeElement === document.body)
    document.querySelector("#words input, #question input").focus({preventScroll: true});
}"""


def layout(service: Service, thumbnails: Thumbnails) -> gr.Blocks:
    """Build the page; without an index it is the panel for questions alone."""
    with gr.Blocks(
        title=f"cafe · {service.name}", analytics_enabled=False, fill_width=True
    ) as blocks:
        gr.HTML(_title(service), elem_id="title")
        gallery = None
        with gr.Row(elem_id="panels"):
            if service.search is not None:
                with gr.Column(scale=3, min_width=320):
                    gallery = search_panel(service, thumbnails)
            with gr.Column(scale=2, min_width=320, elem_id="ask"):
                ask = ask_panel(service, has_search=gallery is not None)
        if gallery is not None:
            _connect(gallery, ask, thumbnails)
        blocks.load(None, js=_FOCUS_FIRST, api_visibility="private")
    blocks.queue(
        default_concurrency_limit=MAX_CONCURRENT_EVENTS,
        max_size=4 * MAX_CONCURRENT_EVENTS,
        api_open=False,
    )
    return blocks


def _source(hit: Hit | None) -> str:
    """The file and page of a hit, as a link that opens the document there."""
    number = None if hit is None else page_number(hit)
    if hit is None or number is None:
        return ""
    path = quote(str(hit.metadata["path"]))
    link = f'<a href="document/{path}#page={number}" target="_blank" rel="noopener">'
    return f"<p>{link}Open {escape(location_of(hit))}</a></p>"


def _title(service: Service) -> str:
    title, instructions = (
        ("Ask about an image", "Add an image and type a question.")
        if service.search is None
        else ("Search images, and ask about them", "Search, choose an image, and type a question.")
    )
    return f"<h1>{title}</h1><p>{instructions} Model: <b>{escape(service.name)}</b></p>"


def _connect(gallery: gr.Gallery, ask: AskPanel, thumbnails: Thumbnails) -> None:
    """A hit that the visitor chooses becomes the image to ask about."""

    # `mount.PageGuard` and gradio have checked the gallery's files; the event says which of them.
    def choose(tiles: list[Any] | None, event: gr.SelectData) -> tuple[str | None, str, str]:
        index = event.index
        valid = isinstance(index, int) and 0 <= index < len(tiles or [])
        small = (tiles or [])[index][0] if valid else ""
        image = thumbnails.large(small) if valid else None
        return image, _source(thumbnails.hit_of(small)), components.note(INITIAL_NOTE)

    gallery.select(
        choose,
        gallery,
        [ask.image, ask.source, ask.answer],
        cancels=[ask.answering],
        show_progress="hidden",
        api_visibility="private",
    ).then(None, js=_FOCUS_QUESTION)
