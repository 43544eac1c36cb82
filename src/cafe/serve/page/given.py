"""Where a visitor gives a picture, and what events say that was given."""

from __future__ import annotations

from typing import Any

import gradio as gr

from cafe.serve.page import told
from cafe.serve.page.turns import check
from cafe.serve.service import Service


def picture_box(label: str, placeholder: str, height: int, elem_id: str) -> gr.Image:
    return gr.Image(
        label=label,
        show_label=False,  # it would lie on the picture's corner
        type="filepath",
        sources=["upload", "clipboard"],
        buttons=[],
        placeholder=placeholder,
        height=height,
        elem_id=elem_id,
    )


def checked(service: Service, picture: gr.Image, status: gr.HTML, fine: str, *asking: Any) -> Any:
    """A file that is no picture is said to be none when it is given, and taken out again.

    fine     what is told of a good one; an answer about another picture must not stay
    asking   events that write such an answer
    Returns the event.
    """

    async def look(given: Any) -> tuple[Any, str]:
        try:
            await check(service, path(given))
        except Exception as failure:
            return None, told.error(failure)
        return gr.skip(), told.note(fine)

    return picture.upload(
        look,
        picture,
        [picture, status],
        cancels=list(asking),
        show_progress="hidden",
        preprocess=False,
        api_visibility="private",
    )


# Events whose `preprocess` is off come as the browser sent them: gradio would open a picture before
# the reader does, without its limits and without a word for what is wrong.


def path(given: Any) -> str | None:
    """A picture's file. That it is one of the page's own was looked at before (`mount`)."""
    name = given.get("path") if isinstance(given, dict) else None
    return name if isinstance(name, str) else None


def words(given: Any) -> str:
    return given if isinstance(given, str) else ""
