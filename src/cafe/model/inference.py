"""Encode and generate in batches: what the methods of `CAFe` call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from cafe.batching import prefetch_map
from cafe.model.families import Family
from cafe.model.head import LanguageHead
from cafe.model.rows.collate import Collator
from cafe.model.rows.rows import Rows
from cafe.types import Conversation

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Vision = dict[str, Tensor]
"""The vision tower's inputs for the distinct images of a batch."""

T = TypeVar("T")


class InferenceModel(LanguageHead, Protocol):
    """What inference needs of a model; `cafe.model.vlm.CAFe` has it.

    A protocol, so that the functions which `CAFe` calls do not import `CAFe`.

    model        transformers' `...ForConditionalGeneration`
    token_cost   see `cafe.model.rows.rows.shared_rows`
    """

    model: Any
    processor: Any
    family: Family
    collator: Collator

    @property
    def device(self) -> torch.device: ...

    @property
    def embedding_dimension(self) -> int: ...

    @property
    def token_cost(self) -> float: ...

    def __call__(self, rows: Rows, vision: Vision, *, read_only: bool = False) -> Tensor: ...

    def hidden_at(
        self, rows: Rows, vision: Vision, token_indices: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n hidden"]: ...

    def encoder_outputs(self, rows: Rows, vision: Vision) -> dict[str, Any]: ...

    def generate_tokens(self, **inputs: Any) -> Int[Tensor, "rows t"]: ...


def encode(
    model: InferenceModel,
    conversations: Sequence[Conversation],
    batch_size: int,
    prompt: str,
    *,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int], None] | None = None,
    numbers: Sequence[int] | None = None,
) -> Float[Tensor, "n hidden"]:
    """Embeddings before normalisation, float32 on `device`, in input order.

    Inputs are batched by length, so that short texts are not padded to long ones. Inputs of a batch
    with equal beginnings share them (`cafe.model.rows.rows.shared_rows`), and on a GPU the next
    batches are collated while it computes.

    Args:
        model: the model.
        conversations: the inputs.
        batch_size: inputs per forward.
        prompt: name of the embedding prompt (`cafe.model.rows.prompts.PROMPTS`).
        device: of the result.
        on_progress: called after each batch with the number of its inputs.
        numbers: what error messages call the inputs; None: 0, 1, ...
    """
    embeddings = torch.zeros(len(conversations), model.embedding_dimension, device=device)

    def collate(chosen: list[Conversation], batch: list[int]) -> tuple[Rows, Vision]:
        names = batch if numbers is None else [numbers[i] for i in batch]
        return model.collator.embedding_rows(chosen, prompt, names, model.token_cost)

    with torch.inference_mode():
        for batch, (rows, vision) in batches(model, conversations, batch_size, collate):
            embeddings[batch] = model.hidden_at(rows, vision).to(embeddings)
            if on_progress is not None:
                on_progress(len(batch))
    return embeddings


def batches(
    model: InferenceModel,
    conversations: Sequence[Conversation],
    batch_size: int,
    collate: Callable[[list[Conversation], list[int]], T],
) -> Iterator[tuple[list[int], T]]:
    """Indices of each batch (`length_buckets`), and what `collate` makes of its conversations."""
    batches = length_buckets(conversations, batch_size)

    def collated(batch: list[int]) -> T:
        return collate([conversations[i] for i in batch], batch)

    return zip(batches, prefetch_map(collated, batches, _threads(model)), strict=True)


def _threads(model: InferenceModel) -> int:
    """How many batches are collated while the model computes.

    On a CPU the model already uses every core: collating threads would compete with it, and lose
    more by waiting for the interpreter than they gain.
    """
    return 0 if model.device.type == "cpu" else 2


@torch.inference_mode()
def generate(
    model: InferenceModel,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    batch_size: int,
    sampling: dict[str, Any],
) -> list[str]:
    """Answers in input order."""
    answers = [""] * len(conversations)
    for batch in length_buckets(conversations, batch_size):
        inputs = generation_inputs(model, [conversations[i] for i in batch], batch)
        tokens = model.generate_tokens(
            **inputs, **generation_settings(model, max_new_tokens, sampling)
        )
        texts = model.processor.tokenizer.batch_decode(
            tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for i, text in zip(batch, texts, strict=True):
            answers[i] = text.strip()
    return answers


def stream(
    model: InferenceModel, conversation: Conversation, max_new_tokens: int, sampling: dict[str, Any]
) -> Iterator[str]:
    """One answer, piece by piece; joined, the pieces are what `generate` returns.

    Generation runs in a thread, and its errors are raised here. Closing the iterator early stops
    the generation.
    """
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    settings = generation_settings(model, max_new_tokens, sampling)
    if (settings.get("num_beams") or model.model.generation_config.num_beams or 1) > 1:
        # A beam search knows no token of its answer before the last: one piece.
        yield from generate(model, [conversation], max_new_tokens, 1, sampling)
        return
    inputs = generation_inputs(model, [conversation], [0])
    streamer = TextIteratorStreamer(
        model.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
    )
    failure: list[BaseException] = []
    consumer_gone = threading.Event()

    def stop_when_abandoned(tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(tokens),), consumer_gone.is_set(), device=tokens.device)

    def run() -> None:
        try:
            with torch.inference_mode():
                model.generate_tokens(
                    **inputs,
                    **settings,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([stop_when_abandoned]),
                )
        except BaseException as error:  # raised in the consumer's thread below
            failure.append(error)
            streamer.end()

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    try:
        yield from stripped_pieces(streamer)
    finally:
        consumer_gone.set()
        worker.join()
    if failure:
        raise failure[0]


def stripped_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of a text, without white space at the beginning and the end of the whole text."""
    started, pending = False, ""
    for piece in pieces:
        text = pending + piece
        text = text if started else text.lstrip()
        body = text.rstrip()
        pending = text[len(body) :]
        if body:
            started = True
            yield body


_UNASKED: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""What shapes the sampled distribution, with the defaults of transformers. Any of these implies
`do_sample=True` (transformers would only warn), and then the others have these values, not those of
generation_config.json: with top_k 1 there (as Qwen2-VL is published) no temperature has an effect.
"""


def generation_settings(
    model: InferenceModel, max_new_tokens: int, sampling: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of transformers' `generate`: greedy unless `sampling` implies sampling.

    What `sampling` asks for holds; generation_config.json has a say only where it asks for nothing.
    A temperature of 0 is greedy decoding.
    """
    end = model.processor.tokenizer.convert_tokens_to_ids(model.collator.pooled_token)
    shaping = sampling.keys() & _UNASKED.keys()
    if is_greedy(sampling):
        sampling = {k: v for k, v in sampling.items() if k not in shaping} | {"do_sample": False}
    elif shaping:
        sampling = _UNASKED | {"do_sample": True} | sampling
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
        "eos_token_id": [end],
        "pad_token_id": model.collator.pad_id,
        **sampling,
    }


def is_greedy(sampling: dict[str, Any]) -> bool:
    """Whether settings ask for no sampling, by a temperature of 0 or in words."""
    return sampling.get("temperature") == 0 or sampling.get("do_sample") is False


def generation_inputs(
    model: InferenceModel, conversations: Sequence[Conversation], numbers: Sequence[int]
) -> dict[str, Any]:
    """Prompts and image features for transformers' `generate`, which needs padding on the left."""
    rows, vision = model.collator.prompt_rows(conversations, numbers)
    rows = rows.to(model.device)
    length = rows.input_ids.shape[1]
    last = rows.pooled - torch.arange(len(conversations), device=model.device) * length
    shift = length - 1 - last
    index = torch.arange(length, device=model.device)[None] - shift[:, None]
    real = index >= 0

    def left_padded(tensor: Tensor, padding: int) -> Tensor:
        """[rows, t] or [axes, rows, t], with the padding moved from the right to the left."""
        shifted = tensor.gather(-1, index.clamp(min=0).expand_as(tensor))
        return shifted.masked_fill(~real, padding)

    ids = left_padded(rows.input_ids, model.collator.pad_id)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": real.long()}
    if rows.positions.ndim == 3:
        inputs["position_ids"] = left_padded(rows.positions, 0)
    if rows.visible_until is not None:
        family, processor = model.family, model.processor
        image, video = family.placeholder_id(processor), family.video_placeholder_id(processor)
        inputs[family.token_types] = ((ids == image) | (ids == video)).long()
    if any(rows.orders):
        inputs["mm_encoder_outputs"] = model.encoder_outputs(
            rows, {k: v.to(model.device) for k, v in vision.items()}
        )
    return inputs


def length_buckets(conversations: Sequence[Conversation], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first (memory runs out early or never).

    Conversations about the same images stay together, because they share them.
    """

    def length(i: int) -> tuple[int, int]:
        parts = [p for message in conversations[i] for p in message.content]
        return sum(not isinstance(p, str) for p in parts), sum(
            len(p) for p in parts if isinstance(p, str)
        )

    groups: dict[object, list[int]] = {}
    for i in sorted(range(len(conversations)), key=length, reverse=True):
        parts = [p for message in conversations[i] for p in message.content]
        images = tuple(part.key for part in parts if not isinstance(part, str))
        groups.setdefault(images or i, []).append(i)
    order = [i for group in groups.values() for i in group]
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
