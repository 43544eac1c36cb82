"""How a conversation becomes text: the chat template, and the embedding template made from it.

An embedding is the hidden state at one last token that closes an empty assistant turn, after a
prompt that asks for one word (paper §1.3):

    <|im_start|>user\n<image>\nCompress this image in one word:<|im_end|>\n
    <|im_start|>assistant\n<|im_end|>
                           └─ pooled here

The embedding template is a Jinja program: it appends the prompt to the last user message and then
runs the model's own chat template. The same text is saved with the checkpoint as the named chat
template "embedding", so this library, sentence-transformers and vLLM format an input alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cafe.errors import CheckpointError
from cafe.types import Conversation, Image, Video


@dataclass(frozen=True, slots=True)
class EmbeddingPrompt:
    """What is asked of an input that holds pictures, text, or both."""

    image: str
    text: str
    both: str
    separator: str = "\n"


PROMPTS = {
    "compress": EmbeddingPrompt(
        image="Compress this image in one word:",
        text="Compress this sentence in one word:",
        both="Compress this image and sentence in one word:",
    ),
    # MMEB: the instruction is part of the text, nothing is appended (paper §1.6).
    "none": EmbeddingPrompt(image="", text="", both=""),
}

DEFAULT_PROMPT = "compress"

_APPEND_PROMPT = """\
{%- set seen = namespace(picture=false, text=false) -%}
{%- for message in messages if message['role'] == 'user' -%}
  {%- if message['content'] is string -%}
    {%- set seen.text = true -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'text' -%}{%- set seen.text = true -%}
      {%- else -%}{%- set seen.picture = true -%}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endfor -%}
{%- set prompt = <<both>> if seen.picture and seen.text \
else (<<image>> if seen.picture else <<text>>) -%}
{%- set last = messages[-1] -%}
{%- set parts = [{'type': 'text', 'text': last['content']}] if last['content'] is string \
else last['content'] | list -%}
{%- if prompt -%}
  {%- if parts and parts[-1]['type'] == 'text' -%}
    {%- set parts = parts[:-1] + \
[{'type': 'text', 'text': parts[-1]['text'] + <<separator>> + prompt}] -%}
  {%- else -%}
    {%- set parts = parts + [{'type': 'text', 'text': prompt}] -%}
  {%- endif -%}
{%- endif -%}
{%- set messages = messages[:-1] + [{'role': last['role'], 'content': parts}] -%}
{%- set add_generation_prompt = true -%}
"""


def embedding_template(chat_template: str, prompt: EmbeddingPrompt, pooled_token: str) -> str:
    """The Jinja text that renders an embedding input in the style of `chat_template`.

    pooled_token   the token that ends an assistant turn; its hidden state is the embedding
    """
    head = _APPEND_PROMPT
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


def _jinja_string(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


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
