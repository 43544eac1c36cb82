"""What a model says of pairs and answers: the odds of "yes", and how likely a text is.

`CAFe.score` and `CAFe.rerank` judge pairs by it, `best_of` answers (`cafe.model.best_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cafe.model.head import token_log_probs, token_logits
from cafe.model.inference import InferenceModel, Vision, batches
from cafe.model.rerank import RerankBy, named_answer_tokens
from cafe.model.rows.inputs import Input, Inputs, as_conversation, as_messages
from cafe.model.rows.matching import caption_dialogue, pair_question
from cafe.model.rows.rows import Rows
from cafe.types import Conversation

if TYPE_CHECKING:
    from jaxtyping import Float


@torch.inference_mode()
def log_odds(
    model: InferenceModel, questions: Sequence[Conversation], batch_size: int
) -> Float[Tensor, " n"]:
    """Log-odds, log P("yes") - log P("no"), of the answer to each question; float32 on the CPU.

    Questions about one image share it: its features are computed once per batch, and its tokens
    once per row.
    """
    result, odds = torch.zeros(len(questions)), yes_over_no(model)

    def collate(chosen: list[Conversation], batch: list[int]) -> tuple[Rows, Vision]:
        return model.collator.prompt_rows(chosen, batch, model.token_cost)

    for batch, (rows, vision) in batches(model, questions, batch_size, collate):
        result[batch] = odds(model.hidden_at(rows, vision)).to(result)
    return result


def judge(
    model: InferenceModel, query: Input, candidates: Inputs, batch_size: int, by: RerankBy
) -> Float[Tensor, " n"]:
    """What the model says of the query with each candidate.

    Args:
        model: the model.
        query: one side.
        candidates: the other sides.
        batch_size: pairs per forward.
        by: "question", for the log-odds of `pair_question`, whatever the sides are; or
            "likelihood", for log P(text | image) in nats, of the text as the image's caption.

    Returns:
        float32 on the CPU.

    Raises:
        DataError: an empty side; or, by likelihood, a pair that is not an image and a text.
        ValueError: another `by`.
    """
    conversation, others = as_conversation(query), as_messages(candidates)
    if by == "question":
        return log_odds(model, [pair_question(conversation, o) for o in others], batch_size)
    if by == "likelihood":
        dialogues = [caption_dialogue(conversation, other) for other in others]
        return log_likelihood(model, dialogues, batch_size)
    raise ValueError(f"by={by!r}: rerank by question or by likelihood")


def yes_over_no(
    model: InferenceModel,
) -> Callable[[Float[Tensor, "n hidden"]], Float[Tensor, " n"]]:
    """A function from states to log P("yes") - log P("no") as the beginning of what follows."""
    yes, no = yes_no_tokens(model)

    def odds(states: Tensor) -> Tensor:  # the softmax's normaliser cancels out
        logits = token_logits(model, states, [*yes, *no])
        return logits[:, : len(yes)].logsumexp(-1) - logits[:, len(yes) :].logsumexp(-1)

    return odds


@torch.inference_mode()
def log_likelihood(
    model: InferenceModel, conversations: Sequence[Conversation], batch_size: int
) -> Float[Tensor, " n"]:
    """Log P of the answer that ends each conversation, given what comes before it.

    In nats, summed over the answer's tokens and the token that ends it; float32 on the CPU.
    Answers to one conversation share its tokens and its images.

    Raises:
        DataError: an empty answer.
    """
    result = torch.zeros(len(conversations))

    def collate(chosen: list[Conversation], batch: list[int]) -> tuple[Rows, Vision, Tensor]:
        return model.collator.answer_rows(chosen, batch, model.token_cost)

    for batch, (rows, vision, owner) in batches(model, conversations, batch_size, collate):
        states = model.hidden_at(rows, vision, rows.label_source)
        log_p, _ = token_log_probs(model, states, rows.label_ids)
        result[batch] = torch.zeros(len(batch)).index_add(0, owner, log_p.cpu())
    return result


def yes_no_tokens(model: InferenceModel) -> tuple[list[int], list[int]]:
    """The tokens that begin a "yes", and those that begin a "no"; or the two that are named."""
    named = named_answer_tokens(model.model.config, model.processor.tokenizer)
    if named is not None:
        return [named[1]], [named[0]]
    return _answer_ids(model, "yes"), _answer_ids(model, "no")


def _answer_ids(model: InferenceModel, word: str) -> list[int]:
    """First tokens of the ways in which an answer may begin with `word`."""
    forms = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
    tokenizer = model.processor.tokenizer
    firsts = {tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in forms}
    # A lone space as first token (a tokenizer without " yes") says nothing about the word.
    return sorted(t for t in firsts if tokenizer.decode([t]).strip())
