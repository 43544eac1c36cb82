"""Encode, generate and score: batches in, answers out. `CAFe` is the front of these functions."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cafe.errors import DataError
from cafe.model.prompts import MATCH_QUESTION
from cafe.types import Conversation, Image, Message

if TYPE_CHECKING:
    from cafe.model.vlm import CAFe


@torch.inference_mode()
def encode(
    model: CAFe,
    conversations: Sequence[Conversation],
    batch_size: int,
    prompt: str,
    progress: bool,
) -> np.ndarray:
    """Embeddings before normalisation, float32 [n, d], in input order.

    Inputs are batched by length, so short texts do not pay for long ones.
    """
    embeddings = np.zeros((len(conversations), model.embedding_dimension), dtype=np.float32)
    for batch in _progress(_buckets(conversations, batch_size), progress, "encode"):
        chosen = [conversations[i] for i in batch]
        rows, vision = model.collator.embedding_rows(chosen, prompt, batch)
        embeddings[batch] = _pooled(model, rows, vision).float().cpu().numpy()
    return embeddings


@torch.inference_mode()
def score(
    model: CAFe, query: Conversation, candidates: Sequence[Conversation], batch_size: int
) -> np.ndarray:
    """P("yes") against P("no") as the answer to the match question, float32 [n]."""
    yes, no = _answer_ids(model, "yes"), _answer_ids(model, "no")
    questions = [match_question(query, candidate) for candidate in candidates]
    scores = np.zeros(len(questions), dtype=np.float32)
    for batch in _buckets(questions, batch_size):
        rows, vision = model.collator.prompt_rows([questions[i] for i in batch], batch)
        log_p = model.lm_head(_pooled(model, rows, vision)).float().log_softmax(-1)
        odds = log_p[:, yes].logsumexp(-1) - log_p[:, no].logsumexp(-1)
        scores[batch] = odds.sigmoid().cpu().numpy()
    return scores


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
    for batch in _buckets(conversations, batch_size):
        inputs = _generation_inputs(model, [conversations[i] for i in batch], batch)
        tokens = model.model.generate(**inputs, **_settings(model, max_new_tokens, sampling))
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

    inputs = _generation_inputs(model, [conversation], [0])
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
                model.model.generate(
                    **inputs,
                    **_settings(model, max_new_tokens, sampling),
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


def _settings(model: CAFe, max_new_tokens: int, sampling: dict[str, Any]) -> dict[str, Any]:
    end = model.processor.tokenizer.convert_tokens_to_ids(model.collator.pooled_token)
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "eos_token_id": [end],
        "pad_token_id": model.collator.pad_id,
        **sampling,
    }


def _generation_inputs(
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


def _pooled(model: CAFe, rows: Any, vision: dict[str, Tensor]) -> Tensor:
    """States at the pooled places, [n, hidden]."""
    device = model.device
    rows = rows.to(device)
    hidden = model(rows, {k: v.to(device) for k, v in vision.items()})
    return hidden.flatten(0, 1)[rows.pooled]


def _buckets(conversations: Sequence[Conversation], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length, longest first (memory runs out early or never)."""

    def length(i: int) -> tuple[int, int]:
        parts = [p for message in conversations[i] for p in message.content]
        return sum(not isinstance(p, str) for p in parts), sum(
            len(p) for p in parts if isinstance(p, str)
        )

    order = sorted(range(len(conversations)), key=length, reverse=True)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _answer_ids(model: CAFe, word: str) -> list[int]:
    """First tokens of a word as an answer may begin with it."""
    forms = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
    tokenizer = model.processor.tokenizer
    firsts = {tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in forms}
    # A lone space as first token (a tokenizer without " yes") says nothing about the word.
    return sorted(t for t in firsts if tokenizer.decode([t]).strip())


def _progress(batches: Iterable[list[int]], show: bool, label: str) -> Iterable[list[int]]:
    if not show:
        return batches
    from rich.progress import track

    return track(list(batches), description=label)
