"""The page's second half: a picture, a question, and the answer as it is written."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, NamedTuple

import gradio as gr

from cafe.serve.page import given, told
from cafe.serve.page.turns import answer
from cafe.serve.service import Service

BEFORE = "The answer appears here, word by word."

# The answer stays as far as it got, and the keyboard is not left on a button that is gone.
_STOPPED = """() => {
  document.querySelector("#answer [aria-busy]")?.setAttribute("aria-busy", "false");
  document.querySelector("#question :is(input, textarea)").focus({preventScroll: true});
}"""


class AskHalf(NamedTuple):
    """asking: the event that writes `answer` about `picture`."""

    picture: gr.Image
    answer: gr.HTML
    asking: Any


def ask_half(service: Service, searches: bool) -> AskHalf:
    """searches: the other half is there too."""
    if searches:
        gr.HTML("<h2>Ask</h2>")
    picture = given.picture_box(
        "Picture to ask about",
        ("Choose one that you found,\ndrop" if searches else "Drop")
        + " a picture here\nor click to choose one",
        height=300,
        elem_id="asked-picture",
    )
    with gr.Row(elem_id="asking"):
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
    shown = gr.HTML(told.note(BEFORE), elem_id="answer")

    async def ask(text: Any, file: Any) -> AsyncIterator[str]:
        yield told.note("Looking at the picture …", busy=True)
        said = ""
        try:
            async with aclosing(answer(service, given.words(text), given.path(file))) as pieces:
                async for said in pieces:
                    yield told.note(said, "answer", busy=True)
            yield told.note(said or "The answer is empty.", "answer")
        except Exception as failure:
            yield told.error(failure)

    asking = gr.on(
        [button.click, question.submit],
        ask,
        [question, picture],
        shown,
        show_progress="hidden",
        trigger_mode="once",
        preprocess=False,
        api_visibility="private",
    )
    stop.click(None, cancels=[asking], js=_STOPPED, api_visibility="private")
    given.checked(service, picture, shown, BEFORE, asking)
    picture.clear(
        lambda: told.note(BEFORE), None, shown, cancels=[asking], api_visibility="private"
    )
    if searches:
        gr.HTML('<a href="#gallery">Back to what was found</a>', elem_id="back")
    return AskHalf(picture, shown, asking)
