"""Conversations -> texts on their way to tokens: the only place that applies a chat template.

Training, evaluation and serving all come through here, so a prompt cannot be formatted in two ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from cafe.errors import DataError
from cafe.model.families import Family
from cafe.model.official import with_system_turn
from cafe.model.pictures import frames_as_pictures
from cafe.model.prompts import (
    OFFICIAL_PROMPT,
    PROMPTS,
    default_chat_template,
    disarm,
    embedding_template,
    template_messages,
)
from cafe.types import Conversation, Image, Message, Video


@dataclass(frozen=True, slots=True)
class RenderedSequence:
    """Text on its way to tokens.

    images    its pictures and videos, in the order of their markers
    longest   the longest piece of text that somebody wrote: what is cut when it does not fit
    labelled  so many characters at the end carry the language loss
    pooled    whether its last token is read out
    """

    text: str
    images: tuple[Image | Video, ...]
    longest: str = ""
    labelled: int = 0
    pooled: bool = False

    @classmethod
    def of(
        cls, text: str, conversation: Conversation, labelled: int = 0, pooled: bool = False
    ) -> Self:
        """`text` is what a template made of `conversation`."""
        return cls(text, _pictures(conversation), _longest(conversation), labelled, pooled)


@dataclass(frozen=True, slots=True)
class Renderer:
    """A model's own templates; the fields are those of `cafe.model.collate.Collator`."""

    processor: Any
    family: Family
    pooled_token: str
    max_frames: int
    official: bool

    def template(self, prompt: str) -> str:
        """The Jinja text of the embedding template of a named prompt.

        Raises DataError when no prompt has that name.
        """
        if prompt not in PROMPTS:
            raise DataError(f"embedding prompt {prompt!r}: use one of {', '.join(PROMPTS)}")
        return embedding_template(
            default_chat_template(self.processor), PROMPTS[prompt], self.pooled_token
        )

    def _apply(self, conversation: Conversation, **kwargs: Any) -> str:
        return self.processor.apply_chat_template(
            template_messages(conversation), tokenize=False, **kwargs
        )

    def _readable(self, conversation: Conversation) -> Conversation:
        """What somebody wrote is text only, and a family without videos gets their frames."""
        family, processor = self.family, self.processor
        if family.video_marker(processor) is None:
            conversation = frames_as_pictures(conversation, self.max_frames)
        added = self.processor.tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special}
        ids = [family.placeholder_id(processor), family.video_placeholder_id(processor)]
        markers = {family.marker(processor), *self.processor.tokenizer.convert_ids_to_tokens(ids)}
        return disarm(conversation, special | markers)

    def embedding(self, conversation: Conversation, prompt: str) -> RenderedSequence:
        conversation = self._readable(conversation)
        if self.official or prompt == OFFICIAL_PROMPT:
            conversation = with_system_turn(conversation)
        text = self._apply(conversation, chat_template=self.template(prompt))
        return RenderedSequence.of(text, conversation, pooled=True)

    def prompt(self, conversation: Conversation) -> RenderedSequence:
        conversation = self._readable(conversation)
        text = self._apply(conversation, add_generation_prompt=True)
        return RenderedSequence.of(text, conversation)

    def answers(self, dialogue: Conversation) -> list[RenderedSequence]:
        """Each assistant turn after what the model is given when it must write that turn.

        The trie merges the turns of a dialogue again wherever the template renders a past turn
        as it was generated; where it does not, each turn is trained as it will be asked for.
        """
        if self.official:
            return [self._whole(with_system_turn(self._readable(dialogue)))]
        rendered = []
        history: Conversation = ()
        for message in self._readable(dialogue):
            if message.role == "assistant":
                message = Message("assistant", (_answer(message),))
                prompt = self._apply(history, add_generation_prompt=True)
                whole = self._apply((*history, Message("assistant", (_STAND_IN,))))
                at = whole.rindex(_STAND_IN)
                # What the template writes between its prompt and an answer: "Assistant:", " cat".
                between = whole[len(prompt) : at] if whole.startswith(prompt) else ""
                target = between + message.text + whole[at + 1 :].rstrip()
                said = (*history, message)
                rendered.append(RenderedSequence.of(prompt + target, said, labelled=len(target)))
            history = (*history, message)
        if not rendered:
            raise DataError("a dialogue without an assistant turn has nothing to learn")
        return rendered

    def _whole(self, dialogue: Conversation) -> RenderedSequence:
        """One sequence of all turns, as the published code trains a dialogue."""
        text = self._apply(dialogue)
        return RenderedSequence.of(text, dialogue, labelled=len(text))


_STAND_IN = "\ue000"
"""Where an answer goes in a rendered turn, to see what the template writes after it."""


def _answer(message: Message) -> str:
    answer = message.text.strip()
    if not answer:
        raise DataError("an assistant turn is empty; remove it or write its text")
    if not all(isinstance(part, str) for part in message.content):
        raise DataError("an assistant turn holds a picture; answers are text")
    return answer


def _pictures(conversation: Conversation) -> tuple[Image | Video, ...]:
    """Pictures and videos, in the order of their markers."""
    parts = [part for message in conversation for part in message.content]
    return tuple(part for part in parts if not isinstance(part, str))


def _longest(conversation: Conversation) -> str:
    """The longest piece of text, as templates write it."""
    parts = [part for message in conversation for part in message.content]
    return max((part.strip() for part in parts if isinstance(part, str)), key=len, default="")
