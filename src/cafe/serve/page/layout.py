"""The whole page: its two halves side by side, and what joins them."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from cafe.serve.page import told
from cafe.serve.page.ask_half import BEFORE, AskHalf, ask_half
from cafe.serve.page.pictures import Pictures
from cafe.serve.page.search_half import search_half
from cafe.serve.service import Service

AT_ONCE = 64
"""Visitors that are answered at a time; the engine's own queue bounds the work."""

_TO_QUESTION = """() => setTimeout(() => {
  const block = innerWidth < 760 ? "start" : "nearest";
  document.querySelector("#ask").scrollIntoView({block, behavior: "smooth"});
  document.querySelector("#question :is(input, textarea)").focus({preventScroll: true});
}, 50)"""


def layout(service: Service, pictures: Pictures) -> gr.Blocks:
    """Without an index only the second half."""
    with gr.Blocks(
        title=f"cafe · {service.name}", analytics_enabled=False, fill_width=True
    ) as blocks:
        gr.HTML(_title(service), elem_id="title")
        gallery = None
        with gr.Row(elem_id="halves"):
            if service.search is not None:
                with gr.Column(scale=3, min_width=320):
                    gallery = search_half(service, pictures)
            with gr.Column(scale=2, min_width=320, elem_id="ask"):
                ask = ask_half(service, searches=gallery is not None)
        if gallery is not None:
            _join(gallery, ask, pictures)
    blocks.queue(default_concurrency_limit=AT_ONCE, max_size=4 * AT_ONCE, api_open=False)
    return blocks


def _title(service: Service) -> str:
    title, does = (
        ("Ask about a picture", "Give a picture and type a question.")
        if service.search is None
        else ("Search pictures, and ask about them", "Find some, choose one, type a question.")
    )
    return f"<h1>{title}</h1><p>{does} Model: <b>{escape(service.name)}</b></p>"


def _join(gallery: gr.Gallery, ask: AskHalf, pictures: Pictures) -> None:
    """A hit that is chosen becomes the picture to ask about."""

    # Gradio has checked that the gallery's files are its own; the event says only which of them.
    def choose(tiles: list[Any] | None, event: gr.SelectData) -> tuple[str | None, str]:
        index = event.index
        known = isinstance(index, int) and 0 <= index < len(tiles or [])
        picture = pictures.large((tiles or [])[index][0]) if known else None
        return picture, told.note(BEFORE)

    gallery.select(
        choose,
        gallery,
        [ask.picture, ask.answer],
        cancels=[ask.asking],
        show_progress="hidden",
        api_visibility="private",
    ).then(None, js=_TO_QUESTION)
