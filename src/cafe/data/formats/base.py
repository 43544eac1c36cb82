"""What a format is, and how formats turn conversations and pairs into examples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cafe.data.media_paths import MediaResolver
from cafe.data.records import Mode, ReadOptions, Record, kind
from cafe.errors import DataError
from cafe.types import Conversation, Example, Media, Message, joined_turns, user


@dataclass(frozen=True, slots=True)
class Format:
    """One layout of records.

    name         its name in a recipe
    layout       its columns, for messages
    columns      the column names that it reads; a column map may produce them
    fits         whether records with these columns are of this format
    modes        the modes in which it can be read; the first is the default
    pair_prompt  the embedding prompt in pair mode: "none" where records contain instructions
    read         id, record, resolver of its images, options (mode and prompt filled in) -> its
                 examples, several when the record has several positives. Raises DataError for a
                 record that cannot be used
    """

    name: str
    layout: str
    columns: frozenset[str]
    fits: Callable[[frozenset[str]], bool]
    modes: tuple[Mode, ...]
    pair_prompt: str
    read: Callable[[str, Record, MediaResolver, ReadOptions], tuple[Example, ...]]


NEGATIVES = ("negatives", "negative")
"""Columns of hard negative captions: wrong ones that are nearly right, as in NegCLIP's data."""


def negative_captions(record: Record) -> tuple[Conversation, ...]:
    """The hard negatives of a record with an image and its caption.

    Raises:
        DataError: the column holds something else than text or a list of texts.
    """
    for name in NEGATIVES:
        value = _from_json(record.get(name))
        texts: list[Any] = value if isinstance(value, list) else [value]
        for text in texts:
            if text is not None and not isinstance(text, str):
                raise DataError(f"{name!r} holds {kind(text)}, expected text or a list of texts")
        if filled := [text.strip() for text in texts if text and text.strip()]:
            return tuple(user(text) for text in dict.fromkeys(filled))
    return ()


MAX_SCORE = 1e30
"""The largest score of a teacher: differences of larger ones are not finite in float32."""


def scored(
    examples: tuple[Example, ...], record: Record, column: str, changes: Counter[str]
) -> tuple[Example, ...]:
    """The examples of a record with a teacher's scores, as sentence-transformers stores them.

    A record without scores is contrasted only, and counted.

    Raises:
        DataError: the column does not hold one number for the positive and one per negative, or
            the record has several positives.
    """
    if not any(example.query for example in examples):
        return examples
    value = _from_json(record.get(column))
    if value is None:
        changes[f"no scores in {column!r}, contrasted only"] += 1
        return examples
    example, *others = examples
    if others:
        raise DataError(f"{column!r} scores one positive, and the record has {1 + len(others)}")
    values: list[Any] = value if isinstance(value, list) else [value]
    for number in values:
        wrong = isinstance(number, bool) or not isinstance(number, int | float)
        if wrong or not -MAX_SCORE <= number <= MAX_SCORE:
            raise DataError(f"{column!r} holds {kind(number)}, expected a list of finite numbers")
    count = len(example.negatives)
    if len(values) != 1 + count:
        raise DataError(
            f"{column!r} holds {len(values)} numbers, expected {1 + count}: one for the positive, "
            f"and {count} for its negatives (empty and equal ones do not count)"
        )
    return (replace(example, scores=tuple(map(float, values))),)


def _from_json(value: object) -> object:
    """A list that a table of text (CSV) holds as JSON, or the value as it is."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


# ---------------------------------------------------------------------- conversation -> example


def conversation_example(
    identity: str,
    conversation: Conversation,
    options: ReadOptions,
    changes: Counter[str],
    negatives: tuple[Conversation, ...] = (),
) -> Example:
    """A conversation that has an answer, read in one of the three modes.

    Args:
        identity: The example's id.
        conversation: As the file has it.
        options: The mode, and how turns are read.
        changes: Counts what is changed so that questions and answers alternate (`alternating`).
        negatives: Hard negatives, for the modes that have pairs.

    Raises:
        DataError: The conversation does not fit the mode.
    """
    conversation = alternating(conversation, changes)
    tools = any(message.calls or message.role in ("tool", "tools") for message in conversation)
    if tools and (options.mode != "chat" or options.turns == "branches"):
        raise DataError(
            "it has turns of tools, which are trained with mode: chat and turns: conversation only"
        )
    dialogues = _branches(conversation) if options.turns == "branches" else (conversation,)
    match options.mode:
        case "chat":
            return Example(identity, dialogues=dialogues, task=options.task)
        case "pair":
            return _pair(identity, conversation, options, negatives)
    shown = _shown(conversation)
    if not shown:
        raise DataError("it has no image, and a caption needs one; read it with mode: chat")
    text = " ".join(m.text for m in conversation if m.role == "assistant")
    return Example(
        identity,
        query=user(*shown),
        target=user(text),
        negatives=negatives,
        dialogues=dialogues if options.language_loss else (),
        target_id=text,
        task=options.task,
        embedding_prompt=options.prompt,
    )


def alternating(conversation: Conversation, changes: Counter[str]) -> Conversation:
    """The conversation as question, answer, question, answer, …, after an optional system turn.

    As published loaders do: answers before the first question and a question that nobody answers
    are dropped, neighbouring turns of one role are joined. A system turn within the conversation
    stands in front of the text of the question that it is next to.

    Raises:
        DataError: No answer to a question remains.
    """
    roles = [message.role for message in conversation]
    begin = next((i for i, role in enumerate(roles) if role not in ("system", "tools")), len(roles))
    system = joined_turns(conversation[:begin])
    turns = list(conversation[begin:])
    if any(turn.role == "system" for turn in turns):
        changes["system turns within a conversation, read as the user's"] += 1
        turns = [replace(turn, role="user") if turn.role == "system" else turn for turn in turns]
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), len(turns))
    last = next((i for i, t in reversed(list(enumerate(turns))) if t.role == "assistant"), -1) + 1
    if last <= first:
        raise DataError(
            f"turns must be human, gpt, human, gpt, ... up to an answer, found {', '.join(roles)}"
        )
    if first:
        changes["answers before the first question, dropped"] += 1
    if last < len(turns):
        changes["last questions without an answer, dropped"] += 1
    joined = joined_turns(tuple(turns[first:last]))
    if len(joined) < last - first or len(system) < begin:
        changes["neighbouring turns of one role, joined"] += 1
    return (*system, *joined)


def _pair(
    identity: str,
    conversation: Conversation,
    options: ReadOptions,
    negatives: tuple[Conversation, ...],
) -> Example:
    """The question is the query and the answer the target, which may contain an image (MMEB)."""
    *question, answer = conversation
    if any(message.role == "assistant" for message in question):
        raise DataError("a pair is one question and one answer; read it with mode: caption")
    target = (replace(answer, role="user"),)
    return pair_example(identity, tuple(question), target, options, negatives)


def pair_example(
    identity: str,
    query: Conversation,
    target: Conversation,
    options: ReadOptions,
    negatives: Sequence[Conversation] = (),
    target_id: str | None = None,
) -> Example:
    """An example of a query and a target. A text-only target is also the answer to the query.

    Args:
        identity: The example's id.
        query: One side of the pair.
        target: The other side.
        options: Whether the answer is trained, the prompt and the task.
        negatives: Hard negatives of the query.
        target_id: Equal for targets that are no negatives of one another; None: equal targets.
    """
    answer = replace(target[-1], role="assistant")
    text_only = len(target) == 1 and all(isinstance(part, str) for part in answer.content)
    answered = options.language_loss and text_only and query[-1].role == "user"
    return Example(
        identity,
        query=query,
        target=target,
        negatives=tuple(negatives),
        dialogues=((*query, answer),) if answered else (),
        target_id=target_id,
        task=options.task,
        embedding_prompt=options.prompt,
    )


def _shown(conversation: Conversation) -> tuple[Media, ...]:
    parts = (part for message in conversation for part in message.content)
    return tuple(part for part in parts if not isinstance(part, str))


def _branches(conversation: Conversation) -> tuple[Conversation, ...]:
    """Each question with its answer as a separate dialogue, all images in front of it."""
    shown = _shown(conversation)
    system = tuple(m for m in conversation if m.role == "system")
    turns = conversation[len(system) :]
    return tuple(
        (*system, Message("user", (*shown, *_texts(question))), answer)
        for question, answer in zip(turns[::2], turns[1::2], strict=True)
    )


def _texts(message: Message) -> tuple[str, ...]:
    return tuple(part for part in message.content if isinstance(part, str))
