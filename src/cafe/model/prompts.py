r"""How a conversation becomes text: the chat template, and the embedding template made from it.

An embedding is the hidden state at one last token that closes an empty assistant turn, after a
prompt that asks for one word (paper §1.3):

    <|im_start|>user\n<image>\nCompress this image in one word:<|im_end|>\n
    <|im_start|>assistant\n<|im_end|>
                           └─ pooled here

The embedding template is a Jinja program: it appends the prompt to the last message (after an
assistant's turn, a user turn of its own holds it) and then runs the model's own chat template. A
last message of texts and then pictures is read pictures first, so that the order of the keys of
{"text", "image"} means nothing; pictures between texts stay where they are. The same text is saved
with the checkpoint as the named chat template "embedding", so this library, sentence-transformers
and vLLM format an input alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from cafe.errors import CheckpointError
from cafe.types import Conversation, Image, Message, Video


@dataclass(frozen=True, slots=True)
class EmbeddingPrompt:
    """What is asked of an input that holds pictures, text, or both."""

    image: str
    text: str
    both: str
    separator: str = "\n"


_COMPRESS = EmbeddingPrompt(
    image="Compress this image in one word:",
    text="Compress this sentence in one word:",
    both="Compress this image and sentence in one word:",
)

PROMPTS = {
    "compress": _COMPRESS,
    # MMEB: the instruction is part of the text, nothing is appended (paper §1.6).
    "none": EmbeddingPrompt(image="", text="", both=""),
    # The published code's: nothing between a text and the prompt (`cafe.model.official`).
    "official": replace(_COMPRESS, separator=""),
}

DEFAULT_PROMPT = "compress"
OFFICIAL_PROMPT = "official"

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

# sentence-transformers 6.2 would embed the empty text: it wraps such messages once too often.
_MIXED = "sentence-transformers cannot mix chat messages with other inputs; encode them apart"


def embedding_template(chat_template: str, prompt: EmbeddingPrompt, pooled_token: str) -> str:
    """The Jinja text that renders an embedding input in the style of `chat_template`.

    pooled_token   the token that ends an assistant turn; its hidden state is the embedding
    """
    head = _APPEND_PROMPT.replace("<<mixed>>", _jinja_string(_MIXED))
    for name in ("image", "text", "both", "separator"):
        head = head.replace(f"<<{name}>>", _jinja_string(getattr(prompt, name)))
    return head + chat_template + "{{- " + _jinja_string(pooled_token) + " -}}"


def default_chat_template(processor: Any) -> str:
    """The chat template, also when the processor holds several named ones."""
    template = processor.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise CheckpointError("the processor has no chat template; add chat_template.jinja")
    return template


def turn_end(processor: Any) -> str:
    """The token that closes an assistant turn, as the chat template writes it; else EOS.

    A vocabulary does not tell: SmolVLM's holds "<|im_end|>" and closes with "<end_of_utterance>".
    """
    tokenizer, answer = processor.tokenizer, "\ue000"
    if processor.chat_template:
        turns = [("user", "a"), ("assistant", answer)]
        messages = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in turns]
        whole = processor.apply_chat_template(
            messages, tokenize=False, chat_template=default_chat_template(processor)
        )
        after = whole[whole.rindex(answer) + 1 :].lstrip()
        tokens = tokenizer(after, add_special_tokens=False)["input_ids"]
        special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        if tokens and tokens[0] in special:
            return str(tokenizer.convert_ids_to_tokens(tokens[0]))
    return str(tokenizer.eos_token)


def _jinja_string(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def disarm(conversation: Conversation, control_tokens: Iterable[str]) -> Conversation:
    """`conversation` with every control token in its texts broken by a zero-width space.

    What somebody writes is text: "<image>" in a caption is no picture, "<|im_end|>" ends no turn.
    """
    tokens = "|".join(re.escape(token) for token in control_tokens)
    # A lookahead finds overlapping ones too.
    pattern = re.compile(f"(?=(?:{tokens})).", re.DOTALL)

    def disarmed(part: Any) -> Any:
        return pattern.sub("\\g<0>\u200b", part) if isinstance(part, str) else part

    return tuple(Message(m.role, tuple(disarmed(p) for p in m.content)) for m in conversation)


def template_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """A conversation in the shape that chat templates read."""
    return [
        {"role": message.role, "content": [_template_part(part) for part in message.content]}
        for message in conversation
    ]


def _template_part(part: str | Image | Video) -> dict[str, str]:
    match part:
        case str():
            return {"type": "text", "text": part}
        case Image():
            return {"type": "image"}
        case Video():
            return {"type": "video"}


MATCH_QUESTION = 'Does the picture show "{statement}"? Answer yes or no.'
"""What `score` asks. The bundled world trains this question, near misses included."""
