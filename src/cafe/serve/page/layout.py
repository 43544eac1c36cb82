"""What is on the page, and which function answers what."""

from __future__ import annotations

from collections.abc import AsyncIterator
from html import escape
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]

from cafe.serve.page.pictures import Pictures
from cafe.serve.page.turns import answer, find
from cafe.serve.refusal import Refused
from cafe.serve.service import Service
from cafe.types import Hit

TOP = 24
"""So many hits: six rows of four."""

AT_ONCE = 64
"""Visitors that are answered at a time; the engine's own queue bounds the work."""

_TO_QUESTION = """() => setTimeout(() => {
  const block = innerWidth < 760 ? "start" : "nearest";
  document.querySelector("#ask").scrollIntoView({block, behavior: "smooth"});
  document.querySelector("#question :is(input, textarea)").focus({preventScroll: true});
}, 50)"""

Shown = tuple[str, dict[str, Any], str]
"""Status, what becomes of the gallery, and the hits that have no picture."""


def layout(service: Service, pictures: Pictures) -> gr.Blocks:
    """The whole page; without an index only its second half."""
    with gr.Blocks(
        title=f"cafe · {service.name}", analytics_enabled=False, fill_width=True
    ) as blocks:
        gr.HTML(_title(service), elem_id="title")
        gallery = None
        with gr.Row(elem_id="halves"):
            if service.search is not None:
                with gr.Column(scale=3, min_width=320):
                    gallery = _search_half(service, pictures)
            with gr.Column(scale=2, min_width=320, elem_id="ask"):
                picture = _ask_half(service)
        if gallery is not None:
            _chosen(gallery, picture, pictures)
    blocks.queue(default_concurrency_limit=AT_ONCE, max_size=4 * AT_ONCE, api_open=False)
    return blocks


def _title(service: Service) -> str:
    does = "Search pictures, and ask about them" if service.search else "Ask about a picture"
    return f"<h1>{does}</h1><p>answered by <b>{escape(service.name)}</b></p>"


# ---------------------------------------------------------------------- search


def _search_half(service: Service, pictures: Pictures) -> gr.Gallery:
    gr.HTML("<h2>Search</h2>")
    words = gr.Textbox(
        label="Words",
        placeholder="a big red cat at the top left",
        elem_id="words",
        autofocus=True,
        max_lines=1,
    )
    with gr.Accordion("Search by a picture, alone or with words", open=False, elem_id="by-picture"):
        picture = gr.Image(
            label="Picture to search by",
            type="filepath",
            image_mode=None,  # the reader opens it, within its limits
            sources=["upload", "clipboard"],
            height=180,
            elem_id="search-picture",
        )
    button = gr.Button("Search", variant="primary", elem_id="search")
    status = gr.HTML(_status("What you find appears here; choose a picture to ask about it."))
    gallery = gr.Gallery(
        label="Found",
        show_label=False,
        height="auto",
        visible=False,
        object_fit="cover",
        allow_preview=False,
        buttons=[],
        interactive=False,
        elem_id="gallery",
    )
    others = gr.HTML(elem_id="others")

    async def search(text: str, file: str | None) -> Shown:
        try:
            hits = await find(service, text, file, TOP)
            return await service.aside(_shown, hits, pictures)
        except Refused as refused:
            return _status(str(refused), "error"), _gallery([]), ""

    gr.on(
        [button.click, words.submit],
        search,
        [words, picture],
        [status, gallery, others],
        show_progress="minimal",
        api_visibility="private",
    )
    return gallery


def _shown(hits: list[Hit], pictures: Pictures) -> Shown:
    seen = [(hit, pictures.small(hit)) for hit in hits]
    tiles = [(copy, _caption(hit)) for hit, copy in seen if copy is not None]
    others = [hit for hit, copy in seen if copy is None]
    found = "Nothing found: the index is empty." if not hits else f"{len(hits)} found, best first"
    return _status(found), _gallery(tiles), _listed(others)


def _gallery(tiles: list[tuple[str, str]]) -> dict[str, Any]:
    """An empty one would be a large empty box."""
    return gr.update(value=tiles, visible=bool(tiles))


def _caption(hit: Hit) -> str:
    return f"{hit.score:.3f}\n{hit.id.rpartition('/')[2]}"


def _listed(hits: list[Hit]) -> str:
    """Texts, and pictures that cannot be shown."""
    rows = [
        f"<li><b>{hit.score:.3f}</b> {escape(str(hit.metadata.get('text') or hit.id))}</li>"
        for hit in hits
    ]
    return f"<h3>Without a picture</h3><ol>{''.join(rows)}</ol>" if rows else ""


# ---------------------------------------------------------------------- ask


def _ask_half(service: Service) -> gr.Image:
    gr.HTML("<h2>Ask</h2>")
    picture = gr.Image(
        label="Picture to ask about",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=260,
        elem_id="asked-picture",
    )
    question = gr.Textbox(
        label="Question",
        placeholder="What is at the top left?",
        elem_id="question",
        max_lines=1,
    )
    with gr.Row():
        button = gr.Button("Ask", variant="primary", elem_id="ask-button", min_width=80)
        stop = gr.Button("Stop", elem_id="stop", min_width=80)
    shown = gr.HTML(_status("The answer appears here, word by word."), elem_id="answer")

    async def ask(text: str, file: str | None) -> AsyncIterator[str]:
        yield _status("…")
        said = ""
        try:
            async for said in answer(service, text, file):
                yield _answer(said, "true")
            yield _answer(said or "The answer is empty.", "false")
        except Refused as refused:
            yield _status(str(refused), "error")

    asking = gr.on(
        [button.click, question.submit],
        ask,
        [question, picture],
        shown,
        show_progress="hidden",
        trigger_mode="once",
        api_visibility="private",
    )
    stop.click(None, cancels=[asking], api_visibility="private")
    return picture


def _chosen(gallery: gr.Gallery, picture: gr.Image, pictures: Pictures) -> None:
    """A hit that is chosen becomes the picture to ask about."""

    # Gradio has checked that the gallery's files are its own; the event says only which of them.
    def choose(tiles: list[Any] | None, event: gr.SelectData) -> str | None:
        index = event.index
        if not isinstance(index, int) or not 0 <= index < len(tiles or []):
            return None
        return pictures.large((tiles or [])[index][0])

    gallery.select(choose, gallery, picture, show_progress="hidden", api_visibility="private").then(
        None, js=_TO_QUESTION
    )


# ---------------------------------------------------------------------- words on the page


def _status(text: str, kind: str = "note") -> str:
    """Read aloud by a screen reader when it changes."""
    role = "alert" if kind == "error" else "status"
    return f'<p class="{kind}" role="{role}">{escape(text)}</p>'


def _answer(text: str, busy: str) -> str:
    """busy: "true" while it is being written, so that it is read aloud once."""
    return f'<p class="answer" role="status" aria-busy="{busy}">{escape(text)}</p>'
