"""Conversations rendered to text: the only place that applies a chat template.

Training, evaluation and serving all come through here, so a prompt cannot be formatted in two ways.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, Self

from cafe.errors import CheckpointError, DataError, check_unicode
from cafe.model.families import Family
from cafe.model.rows.images import frames_as_images
from cafe.model.rows.official import (
    TURN_END,
    as_written,
    published_template,
    verbatim_messages,
    with_system_turn,
)
from cafe.model.rows.prompts import (
    DEFAULT_PROMPT,
    OFFICIAL_PROMPT,
    PROMPTS,
    UNPROMPTED,
    control_pattern,
    default_chat_template,
    embedding_template,
    escape_control_tokens,
    offered_tools,
    template_messages,
)
from cafe.model.rows.protocol import CAFE_PROTOCOL, Protocol, protocol_template
from cafe.model.rows.template import render_chat, template_file
from cafe.types import Audio, Conversation, Media, Message, joined_turns

_CAUTION = 0.9
"""How much of the turns that seem to be too many is left out at once."""


@dataclass(frozen=True, slots=True)
class RenderedSequence:
    """A rendered conversation, ready for the tokenizer.

    images    its images, videos and recordings, in the order of their markers
    texts     its pieces of text, in order: the longest are cut when the sequence does not fit
    labelled  number of characters at the end that carry the language loss
    answers   number of answers among them
    turns     what it was rendered from
    again     renders fewer turns, for a sequence that is too long; None: no turn is left out
    """

    text: str
    images: tuple[Media, ...]
    texts: tuple[str, ...] = ()
    labelled: int = 0
    answers: int = 0
    turns: Conversation = ()
    again: Callable[[Conversation], RenderedSequence] | None = None

    @classmethod
    def of(cls, text: str, conversation: Conversation, **facts: Any) -> Self:
        """`text` is the rendered `conversation`; `facts` are the other fields."""
        return cls(text, _images(conversation), _texts(conversation), **facts)

    def without_oldest(self, share: float) -> RenderedSequence | None:
        """The sequence without its oldest questions and answers.

        Turns with images stay, and so do the system turn and the last question.

        Args:
            share: of the text to leave out. It is estimated, and rather too little is left out than
                too much, but one question at least.

        Returns:
            None where no turn can be left out.
        """
        asked = [i for i, message in enumerate(self.turns) if message.role == "user"]
        exchanges = [
            range(*ends) for ends in pairwise(asked) if not _images(self.turns[slice(*ends)])
        ]
        if self.again is None or not exchanges:
            return None
        lengths = [len(message.text) for message in self.turns]
        markup = max(0, len(self.text) - sum(lengths)) / len(lengths)
        wanted = _CAUTION * share * len(self.text)
        dropped: set[int] = set()
        for exchange in exchanges:
            dropped.update(exchange)
            wanted -= sum(lengths[i] + markup for i in exchange)
            if wanted <= 0:
                break
        return self.again(tuple(m for i, m in enumerate(self.turns) if i not in dropped))


@dataclass(frozen=True)  # without slots, so that cached_property works
class Renderer:
    """A model's own templates; the fields are those of `cafe.model.rows.collate.Collator`."""

    processor: Any
    family: Family
    pooled_token: str
    max_frames: int
    official: bool
    own_prompt: str
    latent: str = ""
    protocol: Protocol = CAFE_PROTOCOL

    def template(self, prompt: str) -> str:
        """The Jinja text of the embedding template of a named prompt.

        Raises:
            DataError: no prompt has that name.
        """
        if prompt not in PROMPTS:
            raise DataError(f"embedding prompt {prompt!r}: use one of {', '.join(PROMPTS)}")
        if not self.protocol.one_word:
            ends_with, family = self.protocol.ends_with, self.family
            return protocol_template(
                self.protocol,
                default_chat_template(self.processor) if self.protocol.chat else "",
                self.latent + (self.pooled_token if ends_with is None else ends_with),
                family.marker(self.processor),
                family.video_marker(self.processor),
            )
        if prompt == DEFAULT_PROMPT:
            prompt = self.own_prompt
        published = self.official or prompt == OFFICIAL_PROMPT
        return embedding_template(
            self.published_template if published else default_chat_template(self.processor),
            PROMPTS[prompt],
            self.latent + (TURN_END if published else self.pooled_token),
            hears=self.hears,
        )

    @property
    def hears(self) -> bool:
        """Whether the model takes audio."""
        return self.family.audio_marker(self.processor) is not None

    @property
    def published_template(self) -> str:
        """The published code's chat template, for this model's images."""
        marker, video = self.family.marker, self.family.video_marker
        return published_template(self.processor, marker(self.processor), video(self.processor))

    def _apply(self, conversation: Conversation, **kwargs: Any) -> str:
        """The text of a conversation.

        Where the template refuses it, neighbouring turns of one role are joined: some templates
        (Gemma's) want roles to alternate.

        Raises:
            DataError: the template refuses that, too.
            CheckpointError: the template's work has no bounds.
        """
        refusal: DataError | None = None
        for turns in dict.fromkeys((conversation, joined_turns(conversation))):
            try:
                tools = offered_tools(turns) or None
                text = render_chat(self.processor, template_messages(turns), tools=tools, **kwargs)
            except DataError as error:
                refusal = refusal or error
            else:
                self._check_tools(turns, text)
                return text
        assert refusal is not None
        raise refusal

    def _check_tools(self, turns: Conversation, text: str) -> None:
        """Raises DataError where the template leaves out tools or what they returned."""
        results = [turn.text.strip() for turn in turns if turn.role == "tool"]
        if not all(result in text for result in results):
            raise self._without_tools("what tools return")
        tools = [tool.get("function", tool) for tool in offered_tools(turns)]
        if not all(str(tool.get("name")) in text for tool in tools):
            raise self._without_tools("which tools there are")

    def _without_tools(self, what: str) -> DataError:
        return DataError(
            f"{template_file(self.processor)}: the chat template does not write {what}; train a "
            "model whose template does, such as Qwen3-VL, or leave the record out"
        )

    def _published(self, conversation: Conversation, **kwargs: Any) -> tuple[str, Conversation]:
        """A conversation as the published code renders it, and the turns that the text contains."""
        if any(turn.calls or turn.role in ("tool", "tools") for turn in conversation):
            raise DataError("objective.compat is official, and the published code has no tools")
        turns = self._readable(with_system_turn(as_written(conversation)))
        text = render_chat(
            self.processor,
            verbatim_messages(turns),
            chat_template=self.published_template,
            **kwargs,
        )
        return text, turns

    def _readable(self, conversation: Conversation) -> Conversation:
        """`conversation` with control tokens escaped, and as frames if the family has no videos.

        Raises:
            DataError: a text is not Unicode, or there is audio and the family does not hear.
        """
        for message in conversation:
            for part in message.content:
                if isinstance(part, str):
                    check_unicode(part)
                elif isinstance(part, Audio) and not self.hears:
                    raise DataError(
                        f"it has audio, and {self.family.model_type} models do not hear; use a "
                        "model that does, such as Qwen2.5-Omni"
                    )
        if self.family.video_marker(self.processor) is None:
            conversation = frames_as_images(conversation, self.max_frames)
        return escape_control_tokens(conversation, self._control_tokens)

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        """Matches tokens that no text may contain. Cached: it walks the whole added vocabulary."""
        family, tokenizer = self.family, self.processor.tokenizer
        added = tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special}
        ids = [
            family.placeholder_id(self.processor),
            family.video_placeholder_id(self.processor),
        ]
        markers = {family.marker(self.processor), *tokenizer.convert_ids_to_tokens(ids)}
        if (audio := family.audio_marker(self.processor)) is not None:
            sound = tokenizer.convert_ids_to_tokens(family.audio_placeholder_id(self.processor))
            markers |= {audio, sound}
        return control_pattern(special | markers)

    def embedding(self, conversation: Conversation, prompt: str) -> RenderedSequence:
        if self.official and prompt == UNPROMPTED:
            text, turns = self._published(conversation, add_generation_prompt=True)
            return RenderedSequence.of(text + TURN_END, turns)
        readable = self._readable(conversation)
        if self.official:
            readable = with_system_turn(readable)
        text = self._apply(readable, chat_template=self.template(prompt))
        again = partial(self.embedding, prompt=prompt)
        return RenderedSequence.of(text, readable, turns=conversation, again=again)

    def prompt(self, conversation: Conversation) -> RenderedSequence:
        readable = self._readable(conversation)
        text = self._apply(readable, add_generation_prompt=True)
        return RenderedSequence.of(text, readable, turns=conversation, again=self.prompt)

    def answers(self, dialogue: Conversation) -> list[RenderedSequence]:
        """Each assistant turn, after the prompt that the model gets when it generates that turn.

        The trie merges the turns of a dialogue again wherever the template renders a past turn
        as it was generated; where it does not, each turn is still trained on its own prompt.
        """
        if self.official:
            return [self._whole(dialogue)]
        rendered = []
        history: Conversation = ()
        for message in self._readable(dialogue):
            if message.role == "assistant":
                text = () if message.calls and not message.text.strip() else (_answer(message),)
                message = Message("assistant", text, calls=message.calls)
                rendered.append(self._answered((*history, message)))
            history = (*history, message)
        if not rendered:
            raise DataError("a dialogue without an assistant turn has no tokens to train on")
        return rendered

    def _answered(self, turns: Conversation) -> RenderedSequence:
        """The last of `turns`, after the prompt that the model gets when it generates it."""
        *history, answer = turns
        prompt = self._apply(tuple(history), add_generation_prompt=True)
        if not answer.content:
            return self._called(prompt, turns)
        whole = self._apply((*history, replace(answer, content=(_STAND_IN,))))
        at = whole.rfind(_STAND_IN)
        if at < 0:
            raise CheckpointError(
                f"{template_file(self.processor)}: the chat template does not write the text of an "
                "assistant turn, so no answer can be trained or scored; copy it from the model's "
                "publisher"
            )
        # What the template writes between its prompt and an answer: "Assistant:", " cat".
        between = whole[len(prompt) : at] if whole.startswith(prompt) else ""
        # Some templates (GLM's) close no turn; a model learns to stop from a token that ends it.
        end = whole[at + 1 :].rstrip() or self.pooled_token
        return self._target(prompt, between + answer.text + end, turns)

    def _called(self, prompt: str, turns: Conversation) -> RenderedSequence:
        """As `_answered`, where the last turn calls tools and says nothing."""
        whole = self._apply(turns)
        if not whole.startswith(prompt):
            raise self._without_tools("a turn that only calls tools as it asks for one")
        return self._target(prompt, whole[len(prompt) :].rstrip(), turns)

    def _target(self, prompt: str, target: str, turns: Conversation) -> RenderedSequence:
        if not all(call.name in target for call in turns[-1].calls):
            raise self._without_tools("calls of tools")
        return RenderedSequence.of(
            prompt + target,
            turns,
            labelled=len(target),
            answers=1,
            turns=turns,
            again=self._answered,
        )

    def _whole(self, dialogue: Conversation) -> RenderedSequence:
        """One sequence of all turns, as the published code trains a dialogue."""
        text, turns = self._published(dialogue)
        answers = sum(message.role == "assistant" for message in dialogue)
        return RenderedSequence.of(text, turns, labelled=len(text), answers=answers)


_STAND_IN = "\ue000"
"""Stands in for an answer in a rendered turn, to find what the template writes around it."""


def _answer(message: Message) -> str:
    answer = message.text.strip()
    if not answer:
        raise DataError("an assistant turn is empty; remove it or write its text")
    if not all(isinstance(part, str) for part in message.content):
        raise DataError("an assistant turn contains an image; answers are text only")
    return answer


def _images(conversation: Conversation) -> tuple[Media, ...]:
    """Images, videos and recordings, in the order of their markers."""
    parts = [part for message in conversation for part in message.content]
    return tuple(part for part in parts if not isinstance(part, str))


def _texts(conversation: Conversation) -> tuple[str, ...]:
    """The pieces of text, as templates write them."""
    turns = (message for message in conversation if message.role != "tools")
    parts = (part for message in turns for part in message.content)
    return tuple(part.strip() for part in parts if isinstance(part, str))
