r"""Protocols: how a published embedder wants its inputs written, and where it is read.

Embedders were trained with one format each, and with another they find less, in silence. A
protocol is the set of these facts. It is kept in the model's directory as cafe_protocol.json and
compiled into the embedding template (`cafe.model.rows.prompts`), so `encode`, training,
evaluation, the server, and the exported directory follow it alike:

    {"name": "gme", "instruction": "system", "default_instruction": "You are a helpful assistant.",
     "ends_with": "<|endoftext|>", …}

A file with a known name needs no other key; other keys replace that protocol's facts. The
instruction of an input is its system turn; an input without one (a target) has the default.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from cafe.errors import CheckpointError, first_line

PROTOCOL_FILE = "cafe_protocol.json"


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a model's embeddings are asked for and read.

    instruction   where it stands: in the system turn, or before the user's text
    default_instruction   of an input without one; "": it has none
    punctuated    an instruction that ends without punctuation gets a full stop
    one_word      the words that ask for an embedding are appended (`cafe.model.rows.prompts`)
    chat          the chat template writes the turns; false: markers and texts, joined by spaces
    opens_answer  an assistant turn is opened after the input
    ends_with     the token after that, whose state is the embedding; "": the last token there is;
                  None: the one that closes an assistant turn
    empty         stands for an empty text
    max_frames    of a video
    """

    name: str
    instruction: Literal["system", "text"] = "system"
    default_instruction: str = ""
    punctuated: bool = False
    one_word: bool = False
    chat: bool = True
    opens_answer: bool = True
    ends_with: str | None = None
    empty: str = ""
    max_frames: int = 16


CAFE_PROTOCOL = Protocol("cafe", one_word=True)

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        CAFE_PROTOCOL,
        Protocol(
            "qwen3-vl-embedding",
            default_instruction="Represent the user's input.",
            punctuated=True,
            ends_with="<|endoftext|>",
            empty="NULL",
            max_frames=64,
        ),
        Protocol(
            "gme",
            default_instruction="You are a helpful assistant.",
            punctuated=True,
            ends_with="<|endoftext|>",
        ),
        Protocol("vlm2vec", instruction="text", chat=False, ends_with="", max_frames=8),
        Protocol(
            "wemm", instruction="text", opens_answer=False, ends_with="<embedding>", max_frames=64
        ),
    )
}
"""By name. docs/python.md says where each fact was read."""

_STATED = "default_system_message = 'Represent the user\\'s input.'"
"""In the chat template of Qwen3-VL-Embedding."""

_PUNCTUATION = ".!?,;:…。！？，；：)]}\"'”’»"

_PREPARE = """\
{%- set said = namespace(text='', seen=false) -%}
{%- for message in messages if message['role'] == 'system' -%}
  {%- if message['content'] is string -%}{%- set said.text = said.text + message['content'] -%}
  {%- else -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}
      {%- set said.text = said.text + part['text'] -%}
    {%- endfor -%}
  {%- endif -%}
{%- endfor -%}
{%- set instruction = said.text | trim or <<default>> -%}
{%- if <<punctuated>> and instruction and instruction[-1] not in <<marks>> -%}
  {%- set instruction = instruction + '.' -%}
{%- endif -%}
{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list -%}
{%- set content = turns[-1]['content'] -%}
{%- set parts = [{'type': 'text', 'text': content}] if content is string else content | list -%}
{%- set texts = parts | selectattr('type', 'equalto', 'text') | list -%}
{%- set media = parts | rejectattr('type', 'equalto', 'text') | list -%}
{%- if parts == texts + media -%}{%- set parts = media + texts -%}{%- endif -%}
{%- if not media and not texts | map(attribute='text') | join | trim -%}
  {%- set parts = [{'type': 'text', 'text': <<empty>>}] -%}
{%- endif -%}
"""

_SYSTEM = """\
{%- set before = [{'role': 'system', 'content': [{'type': 'text', 'text': instruction}]}] \
if instruction else [] -%}
"""

_TEXT = """\
{%- set before = [] -%}
{%- if instruction -%}
  {%- set given = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') \
| join(' ') | trim -%}
  {%- set text = (instruction + ' ' + given) | trim -%}
  {%- set parts = media + [{'type': 'text', 'text': text}] -%}
{%- endif -%}
"""

_TURNS = """\
{%- set last = {'role': turns[-1]['role'], 'content': parts} -%}
{%- set messages = before + turns[:-1] + [last] -%}
{%- set add_generation_prompt = <<opens>> -%}
"""

_PLAIN = """\
{%- set written = namespace(text='') -%}
{%- for part in parts -%}
  {%- set piece = part['text'] if part['type'] == 'text' else \
(<<video>> if part['type'] == 'video' else <<image>>) -%}
  {%- set written.text = written.text + ' ' + piece -%}
{%- endfor -%}
{{- written.text | trim -}}
"""


def protocol_template(
    protocol: Protocol, chat_template: str, end: str, image: str, video: str | None
) -> str:
    """The Jinja text that writes an input as `protocol` says.

    Args:
        protocol: not `CAFE_PROTOCOL`, whose template is `prompts.embedding_template`.
        chat_template: the model's.
        end: what follows, the pooled token last.
        image: the marker of an image in rendered text.
        video: the marker of a video; None: the model takes none.
    """
    place = _SYSTEM if protocol.instruction == "system" else _TEXT
    written = _TURNS + chat_template if protocol.chat else _PLAIN
    text = _PREPARE + place + written
    values = {
        "default": _quoted(protocol.default_instruction),
        "punctuated": "true" if protocol.punctuated else "false",
        "marks": _quoted(_PUNCTUATION),
        "empty": _quoted(protocol.empty),
        "opens": "true" if protocol.opens_answer else "false",
        "image": _quoted(image),
        "video": _quoted(video or image),
    }
    for name, value in values.items():
        text = text.replace(f"<<{name}>>", value)
    return text + "{{- " + _quoted(end) + " -}}"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


# ---------------------------------------------------------------------- which, and where it is kept


def protocol_of(
    named: str | Protocol | None, directories: list[Path], config: Any, processor: Any
) -> Protocol:
    """The protocol of a loaded model: the named one, that of its file, or the recognised one.

    Args:
        named: a name in `PROTOCOLS`, or facts; None: what the directory says.
        directories: of the adapter, if there is one, and of the model.
        config: the model's.
        processor: the model's.

    Raises:
        CheckpointError: no protocol has that name, the file cannot be used, or the tokenizer lacks
            the token that the protocol names.
    """
    files = [d / PROTOCOL_FILE for d in directories if (d / PROTOCOL_FILE).is_file()]
    if named is not None:
        protocol = named if isinstance(named, Protocol) else _known(named, "protocol")
        origin = f"protocol {protocol.name!r}"
    elif files:
        protocol, origin = read_protocol(files[0]), str(files[0])
    else:
        protocol = PROTOCOLS[_recognised(directories, config, processor)]
        origin = f"protocol {protocol.name!r}"
    token, tokenizer = protocol.ends_with, processor.tokenizer
    if token and token not in tokenizer.get_vocab():
        raise CheckpointError(
            f"{origin}: ends_with is {token!r}, a token that the model's tokenizer does not have; "
            "name the token that its embeddings are read at, or the protocol of this model "
            f"({', '.join(PROTOCOLS)})"
        )
    return protocol


def _recognised(directories: list[Path], config: Any, processor: Any) -> str:
    if "WeMMEmbedding" in (getattr(config, "architectures", None) or ()):
        return "wemm"
    template = processor.chat_template
    if isinstance(template, str) and _STATED in template:
        return "qwen3-vl-embedding"
    # Nothing in these two models' own files tells them from their base.
    names = [part for directory in directories for part in directory.parts[-3:]]
    if getattr(config, "model_type", "") == "qwen2_vl":
        for begin, protocol in (("gme-Qwen2-VL", "gme"), ("VLM2Vec", "vlm2vec")):
            if any(name.split("--")[-1].startswith(begin) for name in names):
                return protocol
    return "cafe"


def _known(name: str, where: str) -> Protocol:
    if name not in PROTOCOLS:
        raise CheckpointError(f"{where}: {name!r} is unknown; use one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def read_protocol(file: Path) -> Protocol:
    """The protocol in a file.

    Raises:
        CheckpointError: it is no protocol; names the key.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        name = content["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f'{file}: cannot be read ({first_line(error)}); write {{"name": …}}, one of '
            f"{', '.join(PROTOCOLS)}"
        ) from error
    known = {field.name for field in fields(Protocol)}
    if unknown := sorted(set(content) - known):
        raise CheckpointError(f"{file}: key {unknown[0]!r} is unknown; use {', '.join(known)}")
    facts = set(content) == known
    base = CAFE_PROTOCOL if facts else _known(str(name), f"{file}: name")
    for key, value in content.items():
        example = getattr(CAFE_PROTOCOL, key)
        kinds = (str, type(None)) if key == "ends_with" else (type(example),)
        if type(value) not in kinds:
            raise CheckpointError(f"{file}: {key} is {value!r}; use {kinds[0].__name__}")
    protocol = replace(base, **content)
    if protocol.instruction not in ("system", "text"):
        raise CheckpointError(
            f"{file}: instruction is {protocol.instruction!r}; use system or text"
        )
    if protocol.max_frames < 1:
        raise CheckpointError(f"{file}: max_frames is {protocol.max_frames}; use 1 or more")
    return protocol


def write_protocol(protocol: Protocol, directory: Path) -> None:
    """Write the facts to the model's directory."""
    content = json.dumps(asdict(protocol), indent=2, ensure_ascii=False) + "\n"
    (directory / PROTOCOL_FILE).write_text(content, encoding="utf-8")
