"""The panel for searches: a query, and a gallery of the hits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from html import escape
from typing import Any

import gradio as gr

from cafe.retrieval.documents import page_number
from cafe.serving.page import components
from cafe.serving.page.thumbnails import Thumbnails
from cafe.serving.page.turns import find_hits
from cafe.serving.service import Service
from cafe.types import Hit

TOP = 24
"""Number of hits: six rows of four."""

_INITIAL_NOTE = "Search results appear here. Choose an image to ask about it."
_UPLOADED_NOTE = "Press Search to find similar images."

GalleryUpdate = tuple[str, dict[str, Any], str]
"""The note, an update of the gallery, and the list of hits without an image."""


def search_panel(service: Service, thumbnails: Thumbnails) -> gr.Gallery:
    """Build the panel; returns its gallery."""
    gr.HTML("<h2>Search</h2>")
    with gr.Row(elem_id="query"):
        words = gr.Textbox(
            label="Text to search by",
            placeholder="Try: a big red cat",
            container=False,
            elem_id="words",
            max_lines=1,
            scale=1,
            min_width=160,
        )
        button = gr.Button("Search", variant="primary", elem_id="search", scale=0, min_width=110)
    hybrid = gr.Checkbox(
        label="Match the words in captions and texts, too",
        visible=service.search is not None and service.search.has_words,
        container=False,
        elem_id="hybrid",
    )
    with gr.Accordion("Search by an image, with or without text", open=False, elem_id="by-image"):
        image = components.image_box(
            "Image to search by",
            "Drop an image here\nor click to choose one",
            height=200,
            elem_id="search-image",
        )
    status = gr.HTML(components.note(_INITIAL_NOTE), elem_id="search-status")
    gallery = gr.Gallery(
        label="Search results",
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

    async def search(text: Any, file: Any, both: Any) -> AsyncIterator[GalleryUpdate]:
        # Emptying the gallery clears its selection.
        yield components.note("Searching …", busy=True), _gallery_update([]), ""
        try:
            query = components.text_of(text), components.file_of(file)
            hits = await find_hits(service, *query, TOP, both is True)
            yield await service.run_in_thread(_result_updates, hits, thumbnails)
        except Exception as failure:
            yield components.error_note(failure), _gallery_update([]), ""

    components.check_uploads(service, image, status, _UPLOADED_NOTE, button)
    components.press_on_enter(words, button, status)
    button.click(
        search,
        [words, image, hybrid],
        [status, gallery, others],
        show_progress="hidden",
        trigger_mode="always_last",  # hits are shown a moment before the event of a search ends
        preprocess=False,
        api_visibility="private",
    )
    return gallery


def _result_updates(hits: list[Hit], thumbnails: Thumbnails) -> GalleryUpdate:
    copies = [(hit, thumbnails.small(hit)) for hit in hits]
    tiles = [(copy, _caption(hit)) for hit, copy in copies if copy is not None]
    others = [hit for hit, copy in copies if copy is None]
    return (
        components.note(_summary(len(hits), bool(tiles))),
        _gallery_update(tiles),
        _text_list(others),
    )


def _summary(count: int, has_image: bool) -> str:
    """A search always has hits, however dissimilar, unless the index is empty."""
    if not count:
        return "No results: the index is empty."
    results = (
        f"The {count} most similar results, best first"
        if count > 1
        else "The only result in the index"
    )
    return f"{results}, with the similarity (at most 1)." + (
        " Choose an image to ask about it." if has_image else ""
    )


def _gallery_update(tiles: list[tuple[str, str]]) -> dict[str, Any]:
    """Hides an empty gallery, which would be a large empty box."""
    return gr.update(value=tiles, visible=bool(tiles))


def _caption(hit: Hit) -> str:
    name = str(hit.metadata["path"] if page_number(hit) else hit.id).rpartition("/")[2]
    page = f"\npage {page_number(hit)}" if page_number(hit) else ""
    return f"{hit.score:.3f}\n{name}{page}"


def _text_list(hits: list[Hit]) -> str:
    """Hits that are texts, or images that cannot be shown."""
    rows = [
        f"<li><b>{hit.score:.3f}</b> {escape(str(hit.metadata.get('text') or hit.id))}</li>"
        for hit in hits
    ]
    return f"<h3>Results without an image</h3><ol>{''.join(rows)}</ol>" if rows else ""
