"""Encode, generate and score: batches in, answers out. `CAFe` is the front of these functions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from cafe.errors import DataError
from cafe.model.ahead import ahead
from cafe.model.prompts import MATCH_QUESTION
from cafe.types import Conversation, Image, Message

if TYPE_CHECKING:
    from cafe.model.rows import Rows
    from cafe.model.vlm import CAFe

    Vision = dict[str, Tensor]
    Collated = tuple[Rows, Vision]

T = TypeVar("T")


def encode(
    model: CAFe,
    conversations: Sequence[Conversation],
    batch_size: int,
    prompt: str,
    *,
    device: torch.device | str = "cpu",
    done: Callable[[int], None] | None = None,
    numbers: Sequence[int] | None = None,
) -> Tensor:
    """Embeddings before normalisation, float32 [n, d] on `device`, in input order.

    Inputs are batched by length, so short texts do not pay for long ones. Inputs of a batch that
    begin alike share that beginning (`cafe.model.packing`), and on a GPU the next batches are
    collated while it computes.

    done      is told how many more inputs are embedded
    numbers   what errors call the inputs; None: 0, 1, …
    """
    embeddings = torch.zeros(len(conversations), model.embedding_dimension, device=device)

    def collate(chosen: list[Conversation], batch: list[int]) -> Collated:
        names = batch if numbers is None else [numbers[i] for i in batch]
        return model.collator.embedding_rows(chosen, prompt, names, model.token_cost)

    with torch.inference_mode():
        for batch, (rows, vision) in _batches(model, conversations, batch_size, collate):
            embeddings[batch] = model.read(rows, vision).to(embeddings)
            if done is not None:
                done(len(batch))
    return embeddings


def _batches(
    model: CAFe,
    conversations: Sequence[Conversation],
    batch_size: int,
    collate: Callable[[list[Conversation], list[int]], T],
) -> Iterator[tuple[list[int], T]]:
    """Indices of each batch (`buckets`), and what `collate` makes of its conversations."""
    batches = buckets(conversations, batch_size)

    def collated(batch: list[int]) -> T:
        return collate([conversations[i] for i in batch], batch)

    return zip(batches, ahead(collated, batches, _threads(model)), strict=True)


def _threads(model: CAFe) -> int:
    """How many batches are collated while the model computes.

    On a CPU the model has every core already; threads beside it take turns with it, and lose more
    by waiting for the interpreter than they gain.
    """
    return 0 if model.device.type == "cpu" else 2


@torch.inference_mode()
def log_odds(model: CAFe, questions: Sequence[Conversation], batch_size: int) -> Tensor:
    """How far "yes" is ahead of "no" as the answer to each question: float32 [n], on the CPU.

    log P("yes") - log P("no"). Questions about one picture share it: its features are computed once
    for a batch, and its tokens once for a row.
    """
    found, odds = torch.zeros(len(questions)), yes_over_no(model)

    def collate(chosen: list[Conversation], batch: list[int]) -> Collated:
        return model.collator.prompt_rows(chosen, batch, model.token_cost)

    for batch, (rows, vision) in _batches(model, questions, batch_size, collate):
        found[batch] = odds(model.read(rows, vision)).cpu()
    return found


def yes_over_no(model: CAFe) -> Callable[[Tensor], Tensor]:
    """A function: states [n, hidden] -> log P("yes") - log P("no") of what comes next, [n]."""
    yes, no = _answer_ids(model, "yes"), _answer_ids(model, "no")

    def odds(states: Tensor) -> Tensor:
        log_p = _log_probabilities(model, states)
        return log_p[:, yes].logsumexp(-1) - log_p[:, no].logsumexp(-1)

    return odds


@torch.inference_mode()
def log_likelihood(model: CAFe, conversations: Sequence[Conversation], batch_size: int) -> Tensor:
    """Log P of the answer that ends each conversation, given what comes before it: float32 [n].

    In nats, over all tokens of the answer and the one that ends it, on the CPU. Answers in one
    conversation share it, and its picture. Raises DataError for an answer that is empty.
    """
    found = torch.zeros(len(conversations))

    def collate(chosen: list[Conversation], batch: list[int]) -> tuple[Rows, Vision, Tensor]:
        return model.collator.answer_rows(chosen, batch, model.token_cost)

    for batch, (rows, vision, whose) in _batches(model, conversations, batch_size, collate):
        states = model.read(rows, vision, rows.label_source)
        ids = rows.label_ids.to(states.device)
        blocks = zip(states.split(_AT_ONCE), ids.split(_AT_ONCE), strict=True)
        log_p = [_log_probabilities(model, s).gather(1, i[:, None])[:, 0] for s, i in blocks]
        found[batch] = torch.zeros(len(batch)).index_add(0, whose, torch.cat(log_p).cpu())
    return found


_AT_ONCE = 512
"""Tokens whose probabilities are held at once: a vocabulary is 150,000 numbers for each."""


def _log_probabilities(model: CAFe, states: Tensor) -> Tensor:
    """Of every token to come after these states [n, hidden]: float32 [n, vocabulary]."""
    logits = model.lm_head(states).float()
    if (cap := model.logit_softcap) is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits.log_softmax(-1)


def match_question(a: Conversation, b: Conversation) -> Conversation:
    """The question whether a picture shows what a text says.

    Raises DataError unless one side is one picture and the other is text.
    """
    sides = [[p for m in side for p in m.content] for side in (a, b)]
    picture_side, text_side = sorted(
        sides, key=lambda side: not any(isinstance(p, Image) for p in side)
    )
    statement = " ".join(p for p in text_side if isinstance(p, str))
    match picture_side:
        case [Image() as picture] if len(statement) and all(isinstance(p, str) for p in text_side):
            question = MATCH_QUESTION.format(statement=statement)
            return (Message("user", (picture, question)),)
    raise DataError(
        "score compares one picture with a text: one side is a picture alone, the other text alone"
    )


@torch.inference_mode()
def generate(
    model: CAFe,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    batch_size: int,
    sampling: dict[str, Any],
) -> list[str]:
    """Answers in input order."""
    answers = [""] * len(conversations)
    for batch in buckets(conversations, batch_size):
        inputs = generation_inputs(model, [conversations[i] for i in batch], batch)
        tokens = model.decode(**inputs, **generation_settings(model, max_new_tokens, sampling))
        texts = model.processor.tokenizer.batch_decode(
            tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for i, text in zip(batch, texts, strict=True):
            answers[i] = text.strip()
    return answers


def stream(
    model: CAFe, conversation: Conversation, max_new_tokens: int, sampling: dict[str, Any]
) -> Iterator[str]:
    """One answer, piece by piece; joined, the pieces are what `generate` gives.

    An error in generation is raised here, not lost in a thread; closing the iterator early stops
    the generation.
    """
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    inputs = generation_inputs(model, [conversation], [0])
    streamer = TextIteratorStreamer(
        model.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
    )
    failure: list[BaseException] = []
    left = threading.Event()

    def nobody_reads(tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(tokens),), left.is_set(), device=tokens.device)

    def run() -> None:
        try:
            with torch.inference_mode():
                model.decode(
                    **inputs,
                    **generation_settings(model, max_new_tokens, sampling),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([nobody_reads]),
                )
        except BaseException as error:  # handed to the consumer below
            failure.append(error)
            streamer.end()

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    try:
        yield from _stripped(streamer)
    finally:
        left.set()
        worker.join()
    if failure:
        raise failure[0]


def _stripped(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of a text without the white space around the whole."""
    begun, held = False, ""
    for piece in pieces:
        text = held + piece
        text = text if begun else text.lstrip()
        body = text.rstrip()
        held = text[len(body) :]
        if body:
            begun = True
            yield body


_SAMPLING = frozenset({"temperature", "top_p", "top_k", "min_p", "typical_p"})
"""Who gives one of these wants samples; transformers would warn, and not sample."""


def generation_settings(
    model: CAFe, max_new_tokens: int, sampling: dict[str, Any]
) -> dict[str, Any]:
    """Greedy unless `sampling` asks for something that samples; ends where a turn ends."""
    end = model.processor.tokenizer.convert_tokens_to_ids(model.collator.pooled_token)
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": not _SAMPLING.isdisjoint(sampling),
        "eos_token_id": [end],
        "pad_token_id": model.collator.pad_id,
        **sampling,
    }


def generation_inputs(
    model: CAFe, conversations: Sequence[Conversation], numbers: Sequence[int]
) -> dict[str, Any]:
    """Prompts padded on the left, as transformers' `generate` wants them."""
    rows, vision = model.collator.prompt_rows(conversations, numbers)
    rows = rows.to(model.device)
    length = rows.input_ids.shape[1]
    last = rows.pooled - torch.arange(len(conversations), device=model.device) * length
    shift = length - 1 - last
    index = torch.arange(length, device=model.device)[None] - shift[:, None]
    real = index >= 0

    def left(tensor: Tensor, padding: int) -> Tensor:
        """Move what is padded on the right, [rows, t] or [axes, rows, t], to the right."""
        shifted = tensor.gather(-1, index.clamp(min=0).expand_as(tensor))
        return shifted.masked_fill(~real, padding)

    ids = left(rows.input_ids, model.collator.pad_id)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": real.long()}
    if rows.positions.ndim == 3:
        inputs["position_ids"] = left(rows.positions, 0)
    if rows.sight_end is not None:
        placeholder = model.family.placeholder_id(model.processor)
        inputs["token_type_ids"] = (ids == placeholder).long()
    if len(rows.image_order) or len(rows.video_order):
        inputs["mm_encoder_outputs"] = model.encoder_outputs(
            rows, {k: v.to(model.device) for k, v in vision.items()}
        )
    return inputs


def buckets(conversations: Sequence[Conversation], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length, longest first (memory runs out early or never).

    Conversations about the same pictures stay together, for they share them.
    """

    def length(i: int) -> tuple[int, int]:
        parts = [p for message in conversations[i] for p in message.content]
        return sum(not isinstance(p, str) for p in parts), sum(
            len(p) for p in parts if isinstance(p, str)
        )

    groups: dict[object, list[int]] = {}
    for i in sorted(range(len(conversations)), key=length, reverse=True):
        parts = [p for message in conversations[i] for p in message.content]
        shown = tuple(part.key for part in parts if not isinstance(part, str))
        groups.setdefault(shown or i, []).append(i)
    order = [i for group in groups.values() for i in group]
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _answer_ids(model: CAFe, word: str) -> list[int]:
    """First tokens of a word as an answer may begin with it."""
    forms = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
    tokenizer = model.processor.tokenizer
    firsts = {tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in forms}
    # A lone space as first token (a tokenizer without " yes") says nothing about the word.
    return sorted(t for t in firsts if tokenizer.decode([t]).strip())


@contextmanager
def progress(label: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A function that is told of every so many inputs that are done, and a bar if wanted."""
    if not show:
        yield lambda count: None
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
