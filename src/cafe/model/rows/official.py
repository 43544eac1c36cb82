r"""The published code's text and labels, for ChatML (Qwen) models; see `preprocess_qwen` there.

**Template.** The published code ignores the tokenizer's template and sets its own, so a model
whose directory has another template is trained with this one, and keeps it:

    <|im_start|>system\nYou are a helpful assistant.<|im_end|>\n
    <|im_start|>user\n<image>\nWhat is it?<|im_end|>\n
    <|im_start|>assistant\nA mug.<|im_end|>\n

**System turn.** Always this one; a turn that a record has before the first question is dropped.

**Images.** A turn's only image, where it is not in front, is moved there (`<image>`, a newline,
and the rest without spaces at its ends); images that are in front, or several, stay. All other
spaces and newlines are those of the record (`Message.written`): "<image>What is it?" gets no
newline, an answer keeps its spaces, and an image that no `<image>` places is in the query only.
Control tokens in user text are text here, as everywhere in this library, but not there.

**Labels.** Of an assistant turn everything, its header and its last newline too. Of the other turns
`<|im_start|>`, `<|im_end|>` and every token that is exactly one newline: the code unmasks these
three ids wherever they are, so also the newline after `<image>`, which is predicted from the
image's last token. Only the very first token is never predicted.

**Prompt.** A text is followed by "Compress this sentence in one word:" without a space
(`cafe.model.rows.prompts`, "official"); several answers of one record are joined without one.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe.errors import DataError
from cafe.model.rows.prompts import (
    DEFAULT_PROMPT,
    OFFICIAL_PROMPT,
    default_chat_template,
    jinja_string,
    template_messages,
)
from cafe.model.rows.template import render_chat
from cafe.types import Conversation, Example, Message, user

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Int

SYSTEM_TURN = Message("system", ("You are a helpful assistant.",))

TURN_END = "<|im_end|>"

_TEMPLATE = """\
{%- if not messages or messages[0]['role'] != 'system' -%}
  {{- '<|im_start|>system\\n' + <<system>> + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\\n' -}}
  {%- set content = message['content'] -%}
  {%- set parts = [{'type': 'text', 'text': content}] if content is string else content | list -%}
  {%- set images = parts | rejectattr('type', 'equalto', 'text') | list -%}
  {%- set moved = images | length == 1 and parts[0]['type'] == 'text' -%}
  {%- set after = '' if message['verbatim'] else '\\n' -%}
  {%- set turn = namespace(text='', image='') -%}
  {%- for part in parts -%}
    {%- if part['type'] == 'text' -%}
      {%- set turn.text = turn.text + part['text'] -%}
    {%- else -%}
      {%- set turn.image = <<video>> if part['type'] == 'video' else <<image>> -%}
      {%- set turn.text = turn.text + ('' if moved else turn.image) + after -%}
    {%- endif -%}
  {%- endfor -%}
  {{- (turn.image + '\\n' + turn.text | trim) | trim if moved else turn.text -}}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_ASSISTANT_TURN = re.compile(r"<\|im_start\|>assistant\n(.*?)<\|im_end\|>\n?", re.DOTALL)


def published_template(processor: Any, image: str, video: str | None) -> str:
    """The Jinja text of the published code's ChatML.

    A marker is written with the control tokens that the model's own template puts around it.

    Args:
        processor: the model's.
        image: the marker of an image in rendered text.
        video: the marker of a video; None: the model takes none.

    Raises:
        DataError: a tokenizer without ChatML's tokens.
    """
    _always_labelled(processor.tokenizer)
    own = default_chat_template(processor)
    markers = {"image": _marker_in(processor, own, "image", image)}
    markers["video"] = (
        markers["image"] if video is None else _marker_in(processor, own, "video", video)
    )
    text = _TEMPLATE.replace("<<system>>", jinja_string(SYSTEM_TURN.text))
    for kind, marker in markers.items():
        text = text.replace(f"<<{kind}>>", jinja_string(marker))
    return text


@lru_cache(maxsize=16)
def _marker_in(processor: Any, template: str, kind: str, marker: str) -> str:
    """What `template` writes for one image or video: its marker and the tokens around it."""
    messages = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": "a"}]}]
    text = render_chat(processor, messages, chat_template=template)
    turns = ("<|im_start|>", TURN_END)
    added = {str(t) for t in processor.tokenizer.added_tokens_decoder.values() if t.special}
    token = "|".join(re.escape(t) for t in sorted(added.difference(turns, [marker])))
    around = f"(?:{token})*" if token else ""
    match = re.search(f"{around}{re.escape(marker)}{around}", text)
    return marker if match is None else match[0]


def as_written(conversation: Conversation) -> Conversation:
    """The conversation with every space, newline and marker as in the file."""
    return tuple(m if m.written is None else replace(m, content=m.written) for m in conversation)


def verbatim_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """As `template_messages`; nothing is inserted after the images of a verbatim turn."""
    messages = template_messages(conversation)
    for message, turn in zip(messages, conversation, strict=True):
        message["verbatim"] = turn.written is not None
    return messages


def with_system_turn(conversation: Conversation) -> Conversation:
    """The conversation with the published code's only system turn in place of its own."""
    return (SYSTEM_TURN, *(m for m in conversation if m.role != "system"))


def official_labels(
    text: str, tokens: Int[np.ndarray, " t"], spans: Int[np.ndarray, "t 2"], tokenizer: Any
) -> Int[np.ndarray, " labels"]:
    """Indices of the labelled tokens of a rendered dialogue; see the module's docstring.

    Args:
        text: the rendered dialogue.
        tokens: its token ids.
        spans: the first and last + 1 character of `text` of each token.
        tokenizer: the model's.

    Raises:
        DataError: a tokenizer without ChatML's tokens.
    """
    labelled = np.isin(tokens, _always_labelled(tokenizer))
    for turn in _ASSISTANT_TURN.finditer(text):
        labelled |= (spans[:, 0] >= turn.start()) & (spans[:, 1] <= turn.end())
    labelled[:1] = False
    return np.flatnonzero(labelled)


def answers_labelled(text: str, spans: Int[np.ndarray, "t 2"]) -> int:
    """The number of answers with a labelled token, not counting the turn's header."""
    return sum(
        bool(((spans[:, 1] > turn.start(1)) & (spans[:, 0] < turn.end(1))).any())
        for turn in _ASSISTANT_TURN.finditer(text)
    )


def _always_labelled(tokenizer: Any) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    special = ("<|im_start|>", TURN_END)
    if any(token not in vocabulary for token in special) or len(newline) != 1:
        raise DataError(
            "objective.compat is official, and the published code is for ChatML (Qwen): this "
            "model's tokenizer lacks <|im_start|>, <|im_end|> or a newline; set compat to none"
        )
    return [*newline, *(vocabulary[token] for token in special)]


def official_example(example: Example) -> Example:
    """The example with the published prompt, and its answers joined as the published code does.

    Only examples with the default prompt change; MMEB's pairs have no prompt there either.
    """
    if example.target is None or example.embedding_prompt != DEFAULT_PROMPT:
        return example
    answers = [m for d in example.dialogues for m in d if m.role == "assistant"]
    target = example.target
    if len(target) == 1 and target[0].text == " ".join(m.text for m in answers):
        target = user("".join(m.text for m in as_written(tuple(answers))))
    return replace(example, target=target, embedding_prompt=OFFICIAL_PROMPT)
