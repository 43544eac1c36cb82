r"""How a conversation becomes text: the chat template, and the embedding template made from it.

An embedding is the hidden state at one last token that closes an empty assistant turn, after a
prompt that asks for one word (paper §1.3):

    <|im_start|>user\n<image>\nCompress this image in one word:<|im_end|>\n
    <|im_start|>assistant\n<|im_end|>
                           └─ pooled here

The embedding template is a Jinja program: it appends the prompt to the last message (after an
assistant's turn, a user turn of its own holds it) and then runs the model's own chat template. A
last message of texts and then images is read images first, so that the order of the keys of
{"text", "image"} means nothing; images between texts stay where they are. The same text is saved
with the checkpoint as embedding_template.jinja, so this library, sentence-transformers and vLLM
format an input alike.
"""

from __future__ import annotations

import json
import logging
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, groupby
from typing import Any

from cafe.errors import CheckpointError, DataError
from cafe.model.rows.template import render_chat, template_file
from cafe.types import Audio, Conversation, Image, Part, ToolCall, Video

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EmbeddingPrompt:
    """The prompt for an input with images, text, or both; and for one with audio.

    sound, sound_text, sound_image, everything   for audio alone, with text, with images, with both
    """

    image: str
    text: str
    both: str
    separator: str = "\n"
    sound: str = ""
    sound_text: str = ""
    sound_image: str = ""
    everything: str = ""


_COMPRESS = EmbeddingPrompt(
    image="Compress this image in one word:",
    text="Compress this sentence in one word:",
    both="Compress this image and sentence in one word:",
    sound="Compress this sound in one word:",
    sound_text="Compress this sound and sentence in one word:",
    sound_image="Compress this image and sound in one word:",
    everything="Compress this image, sound and sentence in one word:",
)

PROMPTS = {
    "compress": _COMPRESS,
    # MMEB: the instruction is part of the text, nothing is appended (paper §1.6).
    "none": EmbeddingPrompt(image="", text="", both=""),
    # The published code's: nothing between a text and the prompt (`cafe.model.rows.official`).
    "official": replace(_COMPRESS, separator=""),
}

DEFAULT_PROMPT = "compress"
"""Stands for the one-word prompt that the model was trained with (`own_prompt`)."""

OFFICIAL_PROMPT = "official"
UNPROMPTED = "none"

PROMPT_KEY = "embedding_prompt"
"""In config.json: the name in `PROMPTS` of the prompt that the model was trained with."""


TRAINED_PROMPTS_KEY = "trained_embedding_prompts"
"""In config.json: the names of the prompts that the pairs of the last training had."""


def own_prompt(config: Any) -> str:
    """The name of the model's own prompt.

    Raises:
        CheckpointError: an unknown name.
    """
    return as_prompt(getattr(config, PROMPT_KEY, DEFAULT_PROMPT), "config.json")


def as_prompt(value: Any, file: str) -> str:
    """`value`, read from `file`, as the name of a prompt.

    Raises:
        CheckpointError: an unknown name.
    """
    if not isinstance(value, str) or value not in PROMPTS:
        raise CheckpointError(
            f"{file}: {PROMPT_KEY} is {value!r}; use the prompt that the embeddings were trained "
            f"with, one of {', '.join(PROMPTS)}"
        )
    return value


TRAINED_THOUGHTS_KEY = "trained_thought_tokens"
"""In config.json: the number of tokens of the longest thought that the embeddings of the last
training were read after."""


def trained_thought_tokens(config: Any) -> int:
    """The number of tokens of the longest thought of the training; 0: it had none.

    Raises:
        CheckpointError: config.json has something else there.
    """
    return as_thought_tokens(getattr(config, TRAINED_THOUGHTS_KEY, 0), "config.json")


def as_thought_tokens(value: Any, file: str) -> int:
    """`value`, read from `file`, as a number of tokens.

    Raises:
        CheckpointError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(
            f"{file}: {TRAINED_THOUGHTS_KEY} is {value!r}; use the number of tokens of the longest "
            "thought of the training, or drop the key if it had none"
        )
    return value


class TrainedPrompts:
    """Says, once for each prompt, that a model embeds with one that it was not trained with."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._said: set[str] = set()

    def check(self, prompt: str) -> None:
        """Log a warning if the model's configuration names the trained prompts, and not this."""
        trained = getattr(self._config, TRAINED_PROMPTS_KEY, None)
        if not isinstance(trained, list) or prompt in self._said or prompt not in PROMPTS:
            return
        own = own_prompt(self._config)
        same = {prompt, own} if prompt == DEFAULT_PROMPT else {prompt}
        same |= {DEFAULT_PROMPT} if prompt == own else set()
        if same.isdisjoint(trained):
            self._said.add(prompt)
            _log.warning(
                "embedding prompt %s: the model was trained with %s, and embeds worse with another",
                prompt,
                " and ".join(map(str, trained)),
            )


_APPEND_PROMPT = """\
{%- set seen = namespace(picture=false, text=false) -%}
{%- for message in messages if message['role'] == 'user' -%}
  {%- if message['content'] is string -%}
    {%- set seen.text = true -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'text' -%}{%- set seen.text = true -%}
      {%- elif part['type'] == 'message' -%}{{- raise_exception(<<mixed>>) -}}
      {%- else -%}{%- set seen.picture = true -%}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endfor -%}
{%- set prompt = <<both>> if seen.picture and seen.text \
else (<<image>> if seen.picture else <<text>>) -%}
{%- set before = messages[:-1] if messages[-1]['role'] == 'user' else messages -%}
{%- set content = messages[-1]['content'] if messages[-1]['role'] == 'user' else [] -%}
{%- set parts = [{'type': 'text', 'text': content}] if content is string else content | list -%}
{%- set texts = parts | selectattr('type', 'equalto', 'text') | list -%}
{%- set pictures = parts | rejectattr('type', 'equalto', 'text') | list -%}
{%- if parts == texts + pictures -%}{%- set parts = pictures + texts -%}{%- endif -%}
{%- if prompt -%}
  {%- if parts and parts[-1]['type'] == 'text' -%}
    {%- set parts = parts[:-1] + \
[{'type': 'text', 'text': parts[-1]['text'] + <<separator>> + prompt}] -%}
  {%- else -%}
    {%- set parts = parts + [{'type': 'text', 'text': prompt}] -%}
  {%- endif -%}
{%- endif -%}
{%- set messages = before + ([{'role': 'user', 'content': parts}] if parts else []) -%}
{%- set add_generation_prompt = true -%}
"""

_HEAR = (
    ("namespace(picture=false, text=false)", "namespace(picture=false, text=false, sound=false)"),
    (
        "{%- else -%}{%- set seen.picture = true -%}",
        "{%- elif part['type'] == 'audio' -%}{%- set seen.sound = true -%}\n"
        "      {%- else -%}{%- set seen.picture = true -%}",
    ),
    (
        "{%- set before = messages",
        "{%- if seen.sound -%}\n"
        "  {%- set prompt = (<<everything>> if seen.text else <<sound_image>>) if seen.picture "
        "else (<<sound_text>> if seen.text else <<sound>>) -%}\n{%- endif -%}\n"
        "{%- set before = messages",
    ),
)
"""What the template of a model that hears has in place of the same text of the others."""

# sentence-transformers 6.2 would embed the empty text: it wraps such messages once too often.
_MIXED = "sentence-transformers cannot mix chat messages with other inputs; encode them apart"


def embedding_template(
    chat_template: str, prompt: EmbeddingPrompt, pooled_token: str, *, hears: bool = False
) -> str:
    """The Jinja text that renders an embedding input in the style of `chat_template`.

    Args:
        chat_template: the model's.
        prompt: what to append.
        pooled_token: the token that ends an assistant turn; its hidden state is the embedding.
        hears: the model takes audio.
    """
    head = _APPEND_PROMPT
    for silent, hearing in _HEAR if hears else ():
        head = head.replace(silent, hearing)
    head = head.replace("<<mixed>>", jinja_string(_MIXED))
    for name in (field.name for field in fields(prompt)):
        head = head.replace(f"<<{name}>>", jinja_string(getattr(prompt, name)))
    return head + chat_template + "{{- " + jinja_string(pooled_token) + " -}}"


def default_chat_template(processor: Any) -> str:
    """The chat template, or the default one of several named templates."""
    template = processor.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise CheckpointError("the processor has no chat template; add chat_template.jinja")
    return template


def turn_end(processor: Any) -> str:
    """The token that closes an assistant turn in the chat template; else EOS.

    The vocabulary does not say: SmolVLM's contains "<|im_end|>" but closes with
    "<end_of_utterance>".

    Raises:
        CheckpointError: the template cannot be used; names its file.
    """
    tokenizer, answer = processor.tokenizer, "\ue000"
    if processor.chat_template:
        turns = [("user", "a"), ("assistant", answer)]
        messages = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in turns]
        template = default_chat_template(processor)
        try:
            whole = render_chat(processor, messages, chat_template=template)
        except DataError as error:
            raise CheckpointError(f"{template_file(processor)}: {error}") from error
        after = whole.rpartition(answer)[2].lstrip() if answer in whole else ""
        tokens = tokenizer(after, add_special_tokens=False)["input_ids"]
        special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        if tokens and tokens[0] in special:
            return str(tokenizer.convert_ids_to_tokens(tokens[0]))
    return str(tokenizer.eos_token)


def jinja_string(text: str) -> str:
    """`text` as a string literal of Jinja."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def control_pattern(control_tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches the first character of every control token, also of overlapping ones."""
    tokens = "|".join(re.escape(token) for token in control_tokens)
    return re.compile(f"(?=(?:{tokens})).", re.DOTALL)


def escape_control_tokens(conversation: Conversation, pattern: re.Pattern[str]) -> Conversation:
    """`conversation` with control tokens (`control_pattern`) broken by a zero-width space.

    User text is only text: "<image>" in a caption is not an image, "<|im_end|>" ends no turn. Nor
    does one that neighbouring parts give together, which templates write without anything between.
    """
    return tuple(
        replace(
            m,
            content=_escaped(m.content, pattern),
            calls=tuple(
                ToolCall(*_escaped_texts([call.name, call.arguments], pattern)) for call in m.calls
            ),
        )
        for m in conversation
    )


def _escaped(content: Sequence[Part], pattern: re.Pattern[str]) -> tuple[Part, ...]:
    escaped: list[Part] = []
    for _, run in groupby(content, key=lambda part: isinstance(part, str)):
        parts = list(run)
        texts = [part for part in parts if isinstance(part, str)]
        escaped += _escaped_texts(texts, pattern) if texts else parts
    return tuple(escaped)


def _escaped_texts(texts: list[str], pattern: re.Pattern[str]) -> list[str]:
    """The texts, with a zero-width space in every token of what they give together."""
    found: set[tuple[int, int]] = set()  # of a text, the index behind a token's first character
    whole = [(0, text) for text in texts]
    trimmed = [(len(text) - len(text.lstrip()), text.strip()) for text in texts]
    for pieces in (whole, trimmed):  # some templates trim every part
        begins = list(accumulate((len(piece) for _, piece in pieces), initial=0))
        for match in pattern.finditer("".join(piece for _, piece in pieces)):
            i = bisect_right(begins, match.start()) - 1
            found.add((i, pieces[i][0] + match.start() - begins[i] + 1))
    texts = list(texts)
    for i, at in sorted(found, reverse=True):
        texts[i] = texts[i][:at] + "\u200b" + texts[i][at:]
    return texts


def template_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """A conversation in the form that chat templates read; `offered_tools` are not among it."""
    messages: list[dict[str, Any]] = []
    for turn in conversation:
        message: dict[str, Any] = {"role": turn.role}
        message["content"] = [_template_part(part) for part in turn.content]
        if turn.calls:
            message["tool_calls"] = [_template_call(call) for call in turn.calls]
        if turn.role != "tools":
            messages.append(message)
    return messages


def offered_tools(conversation: Conversation) -> list[dict[str, Any]]:
    """The tools that a conversation says there are, as chat templates read them."""
    return [tool for turn in conversation if turn.role == "tools" for tool in json.loads(turn.text)]


def _template_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    return {"type": "function", "function": function}


def _template_part(part: Part) -> dict[str, str]:
    match part:
        case str():
            return {"type": "text", "text": part}
        case Image():
            return {"type": "image"}
        case Video():
            return {"type": "video"}
        case Audio():
            return {"type": "audio"}
