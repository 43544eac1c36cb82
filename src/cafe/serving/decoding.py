"""The answers that are being written: rows that come and go, each with its own settings.

`cafe.model.row_decoder` computes the logits of all rows together; here each row chooses its token,
turns tokens into text, and ends by itself: at its end token, its limit or its stop texts. A row
that fails ends with its error, and the others go on. Between two steps the model is free for other
work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cafe.model.inference import generation_settings
from cafe.model.prefix_cache import PrefixCache
from cafe.model.row_decoder import RowDecoder
from cafe.model.vlm import CAFe
from cafe.serving.detokenize import StreamDetokenizer
from cafe.serving.messages import Event, Prompt, WorkItem
from cafe.serving.sampling import RowSampler


@dataclass(eq=False, slots=True)
class _AnswerRow:
    """One answer that is being written.

    number   what the engine calls it
    sampler  chooses its tokens; None: the most probable ones
    token    the last one
    ended    it is to leave before the next step
    """

    number: int
    detokenizer: StreamDetokenizer
    sampler: RowSampler | None
    token: int = 0
    ended: bool = False


class ChatDecoding:
    """A `cafe.serving.messages.Decoding`: writes answers, each a token with every step."""

    def __init__(self, model: CAFe, prefixes: PrefixCache | None = None) -> None:
        """Raises FamilyError for a model whose cache cannot be joined."""
        self._model = model
        self._decoder = RowDecoder(model, prefixes)
        self._rows: list[_AnswerRow] = []
        self._config = _generation_config(model)

    def admit(self, items: Mapping[int, WorkItem]) -> list[Event]:
        """Read prompts, and write the first token of each answer.

        Raises:
            DataError: A prompt that cannot be read or is too long; then none has been admitted.
        """
        self._leave()
        numbers = list(items)
        admitted = self._decoder.admit(
            [item.conversation for item in items.values()],
            [item.number for item in items.values()],
        )
        try:
            added = [
                self._new_row(numbers[index], items[numbers[index]], tokens)
                for index, tokens in zip(admitted.order, admitted.tokens, strict=True)
            ]
        except BaseException:
            self._decoder.keep(range(len(self._rows)))
            raise
        self._rows += added
        return self._choose(added, admitted.logits)

    def step(self) -> list[Event]:
        """Write one token of every answer. Raises whatever the model raises."""
        self._leave()
        if not self._rows:
            return []
        return self._choose(self._rows, self._decoder.step([row.token for row in self._rows]))

    def drop(self, row: int) -> None:
        """Write no more of an answer; the others go on."""
        for one in self._rows:
            one.ended |= one.number == row

    def _leave(self) -> None:
        stay = [i for i, row in enumerate(self._rows) if not row.ended]
        self._decoder.keep(stay)
        self._rows = [self._rows[i] for i in stay]

    def _new_row(self, number: int, item: WorkItem, tokens: list[int]) -> _AnswerRow:
        prompt = item.content
        assert isinstance(prompt, Prompt)
        model, config = self._model, self._config
        processors = model.model._get_logits_processor(
            generation_config=config, input_ids_seq_length=len(tokens), device=str(model.device)
        )
        sampler = RowSampler.of(prompt, tokens, model.device, processors)
        detokenizer = StreamDetokenizer(
            number,
            prompt,
            lambda ids: model.processor.tokenizer.decode(ids, skip_special_tokens=True),
            end_ids=frozenset(config.eos_token_id),
            limit=min(prompt.max_new_tokens, model.collator.max_tokens - len(tokens)),
            prompt_tokens=len(tokens),
            logprobs=None if sampler is None else sampler.logprobs,
        )
        return _AnswerRow(number, detokenizer, sampler)

    @torch.inference_mode()
    def _choose(self, rows: list[_AnswerRow], logits: Tensor) -> list[Event]:
        """Choose the next token of each row by its logits [rows, vocabulary]; ended rows leave."""
        events = []
        for row, own, best in zip(rows, logits, logits.argmax(dim=-1).tolist(), strict=True):
            try:
                row.token = best if row.sampler is None else row.sampler(own)
                event = row.detokenizer.add(row.token)
            except Exception as error:
                event = Event(row.number, error=error)
            row.ended = event.answer is not None or event.error is not None
            events.append(event)
        self._leave()
        return events


def _generation_config(model: CAFe) -> Any:
    """What plain `generate` decodes with: generation_config.json may have penalties, too."""
    settings = generation_settings(model, 1, {"num_beams": 1})
    config, _ = model.model._prepare_generation_config(None, **settings)
    model.model._prepare_special_tokens(config, True, device=model.device)
    return config
