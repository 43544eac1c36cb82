"""The panel for questions: an image, a question, and the answer as it is generated."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, NamedTuple

import gradio as gr

from cafe.serving.page import components
from cafe.serving.page.turns import stream_answer
from cafe.serving.service import Service

INITIAL_NOTE = "The answer appears here, word by word."

# The unfinished answer stays, and the keyboard focus does not stay on a button that disappears.
_ASKED = """(...values) => {
  document.querySelector("#ask").removeAttribute("data-stopped");
  return values;
}"""

# The attribute stays while pieces of the answer arrive that were sent before Stop was pressed.
_STOPPED = """() => {
  document.querySelector("#ask").setAttribute("data-stopped", "");
  document.querySelector("#answer [aria-busy]")?.setAttribute("aria-busy", "false");
  document.querySelector("#question :is(input, textarea)").focus({preventScroll: true});
}"""


class AskPanel(NamedTuple):
    """What the rest of the page needs of the panel.

    image       the image to ask about
    source      which page of which document it is, with a link; empty for other images
    answer      the answer, or a note
    answering   the event that writes the answer
    """

    image: gr.Image
    source: gr.HTML
    answer: gr.HTML
    answering: Any


def ask_panel(service: Service, has_search: bool) -> AskPanel:
    """Build the panel. `has_search`: the search panel is on the page too."""
    if has_search:
        gr.HTML("<h2>Ask</h2>")
    image = components.image_box(
        "Image to ask about",
        ("Choose a search result,\ndrop" if has_search else "Drop")
        + " an image here\nor click to choose one",
        height=300,
        elem_id="asked-image",
    )
    source = gr.HTML(elem_id="source")
    with gr.Row(elem_id="ask-row"):
        question = gr.Textbox(
            label="Question",
            placeholder="Try: what is at the top left?",
            container=False,
            elem_id="question",
            max_lines=1,
            scale=1,
            min_width=120,
        )
        button = gr.Button("Ask", variant="primary", elem_id="ask-button", scale=0, min_width=80)
        stop = gr.Button("Stop", elem_id="stop", scale=0, min_width=80)
    answer_box = gr.HTML(components.note(INITIAL_NOTE), elem_id="answer")

    async def ask(text: Any, file: Any) -> AsyncIterator[str]:
        yield components.note("Looking at the image …", busy=True)
        text_so_far = ""
        try:
            async with aclosing(
                stream_answer(service, components.text_of(text), components.file_of(file))
            ) as pieces:
                async for text_so_far in pieces:
                    yield components.note(text_so_far, "answer", busy=True)
            yield components.note(text_so_far or "The answer is empty.", "answer")
        except Exception as failure:
            yield components.error_note(failure)

    components.press_on_enter(question, button, answer_box)
    answering = button.click(
        ask,
        [question, image],
        answer_box,
        show_progress="hidden",
        trigger_mode="once",
        preprocess=False,
        js=_ASKED,
        api_visibility="private",
    )
    # Again after the cancellation, for screen readers: a piece may have arrived in between.
    stop.click(None, cancels=[answering], js=_STOPPED, api_visibility="private").then(
        None, None, None, js=_STOPPED, api_visibility="private"
    )
    components.check_uploads(service, image, answer_box, INITIAL_NOTE, button, [answering])
    image.upload(None, None, source, js="() => ''", api_visibility="private")
    image.clear(
        lambda: ("", components.note(INITIAL_NOTE)),
        None,
        [source, answer_box],
        cancels=[answering],
        api_visibility="private",
    )
    if has_search:
        gr.HTML('<a href="#gallery">Back to the results</a>', elem_id="back")
    return AskPanel(image, source, answer_box, answering)
