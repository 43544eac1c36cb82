"""The page's first half: a search, and a gallery of what it finds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from html import escape
from typing import Any

import gradio as gr

from cafe.serve.page import given, told
from cafe.serve.page.pictures import Pictures
from cafe.serve.page.turns import find
from cafe.serve.service import Service
from cafe.types import Hit

TOP = 24
"""So many hits: six rows of four."""

_BEFORE = "What you find appears here; choose a picture to ask about it."
_GIVEN = "Press Search to find what is like this picture."

Shown = tuple[str, dict[str, Any], str]
"""Status, what becomes of the gallery, and the hits that have no picture."""


def search_half(service: Service, pictures: Pictures) -> gr.Gallery:
    gr.HTML("<h2>Search</h2>")
    with gr.Row(elem_id="query"):
        words = gr.Textbox(
            label="Words to search by",
            placeholder="Try: a big red cat",
            container=False,
            elem_id="words",
            autofocus=True,
            max_lines=1,
            scale=1,
            min_width=160,
        )
        button = gr.Button("Search", variant="primary", elem_id="search", scale=0, min_width=110)
    with gr.Accordion("Search by a picture, alone or with words", open=False, elem_id="by-picture"):
        picture = given.picture_box(
            "Picture to search by",
            "Drop a picture here\nor click to choose one",
            height=200,
            elem_id="search-picture",
        )
    status = gr.HTML(told.note(_BEFORE))
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

    async def search(text: Any, file: Any) -> AsyncIterator[Shown]:
        # An empty gallery forgets which of its pictures was chosen.
        yield told.note("Searching …", busy=True), _tiled([]), ""
        try:
            hits = await find(service, given.words(text), given.path(file), TOP)
            yield await service.aside(_shown, hits, pictures)
        except Exception as failure:
            yield told.error(failure), _tiled([]), ""

    looking = given.checked(service, picture, status, _GIVEN)
    gr.on(
        [button.click, words.submit],
        search,
        [words, picture],
        [status, gallery, others],
        cancels=[looking],  # its word would come after the search's
        show_progress="hidden",
        preprocess=False,
        api_visibility="private",
    )
    return gallery


def _shown(hits: list[Hit], pictures: Pictures) -> Shown:
    seen = [(hit, pictures.small(hit)) for hit in hits]
    tiles = [(copy, _caption(hit)) for hit, copy in seen if copy is not None]
    others = [hit for hit, copy in seen if copy is None]
    return told.note(_found(len(hits), bool(tiles))), _tiled(tiles), _listed(others)


def _found(count: int, pictured: bool) -> str:
    """There is always a nearest one, however far."""
    if not count:
        return "Nothing found: the index is empty."
    nearest = f"The {count} nearest, best first," if count > 1 else "The only one there is,"
    return f"{nearest} with their similarity (at most 1)." + (
        " Choose one to ask about it." if pictured else ""
    )


def _tiled(tiles: list[tuple[str, str]]) -> dict[str, Any]:
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
