"""Parts of both panels: notes to the visitor, and an image box whose uploads are checked."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from html import escape
from typing import Any, Literal

import gradio as gr

from cafe.serving.errors import ApiError
from cafe.serving.page.turns import check_image
from cafe.serving.service import Service

log = logging.getLogger(__name__)


def note(text: str, kind: Literal["note", "answer", "error"] = "note", busy: bool = False) -> str:
    """A note to the visitor as HTML, which a screen reader reads aloud when it changes.

    Args:
        text: The note, without markup.
        kind: Its role and style.
        busy: Whether more of it will follow.
    """
    role = "alert" if kind == "error" else "status"
    return f'<p class="{kind}" role="{role}" aria-busy="{str(busy).lower()}">{escape(text)}</p>'


def error_note(failure: Exception) -> str:
    """A note that explains a failure; the details of an unexpected exception go to the log only."""
    if not isinstance(failure, ApiError):
        log.error("the page could not answer", exc_info=failure)
        return note("Something went wrong on the server. Its log has the details.", "error")
    text = str(failure).removeprefix(f"{failure.param}: ")  # the field's name helps programs only
    return note(text[:1].upper() + text[1:], "error")


def image_box(label: str, placeholder: str, height: int, elem_id: str) -> gr.Image:
    """A box to drop, paste or choose an image."""
    return gr.Image(
        label=label,
        show_label=False,  # it would cover a corner of the image
        type="filepath",
        sources=["upload", "clipboard"],
        buttons=["fullscreen"],
        placeholder=placeholder,
        height=height,
        elem_id=elem_id,
    )


def check_uploads(
    service: Service,
    image: gr.Image,
    status: gr.HTML,
    uploaded_note: str,
    button: gr.Button,
    answering: Sequence[Any] = (),
) -> None:
    """Reject a file that is not an image as soon as it is uploaded, and remove it.

    Args:
        service: The limits to check against.
        image: The box to watch.
        status: Where notes are shown.
        uploaded_note: Replaces the note immediately: an answer about another image must not stay.
        button: Disabled until the file has been checked.
        answering: Events to cancel, which write an answer about another image.
    """

    async def check_file(value: Any) -> tuple[Any, Any]:
        try:
            await check_image(service, file_of(value))
        except Exception as failure:
            return None, error_note(failure)
        # No update of the note: the first words of an answer may be there already.
        return gr.skip(), gr.skip()

    # Gradio's client closes its event stream when no event is pending: the response to an event
    # that is sent at the moment another one ends may be lost. So nothing is sent during the check.
    image.upload(
        None,
        None,
        [status, button],
        js=_browser_update(note(uploaded_note), interactive=False),
        cancels=list(answering),
        api_visibility="private",
    )
    image.upload(
        check_file,
        image,
        [image, status],
        show_progress="hidden",
        trigger_mode="always_last",
        preprocess=False,
        api_visibility="private",
    ).then(None, None, button, js=_browser_update(interactive=True), api_visibility="private")


_PRESS = """() => {
  const button = () => document.querySelector("#%(button)s");
  const press = () => {
    if (button().disabled) setTimeout(press, 50);
    else if (!document.querySelector("#%(status)s .error")) button().click();
  };
  button().disabled ? press() : button().click();
}"""


def press_on_enter(text: gr.Textbox, button: gr.Button, status: gr.HTML) -> None:
    """Enter in `text` clicks `button`.

    While the button is disabled the click waits, and is dropped if the check of the upload reports
    an error in `status`. An event of the text field's own could be sent during that check (see
    `check_uploads`).
    """
    script = _PRESS % {"button": button.elem_id, "status": status.elem_id}
    text.submit(None, None, None, js=script, api_visibility="private")


def _browser_update(*values: str, interactive: bool) -> str:
    """JavaScript that returns these values and an update that enables or disables the button."""
    update = {"__type__": "update", "interactive": interactive}
    returned = [*values, update] if values else update
    return f"() => ({json.dumps(returned)})"


# Events with `preprocess=False` arrive as the browser sent them: gradio would open an image before
# the reader does, without its limits and without an error message.


def file_of(value: Any) -> str | None:
    """The file of an image box, which is an upload or a thumbnail (see `mount.PageGuard`)."""
    name = value.get("path") if isinstance(value, dict) else None
    return name if isinstance(name, str) else None


def text_of(value: Any) -> str:
    """The text of a text field."""
    return value if isinstance(value, str) else ""
