"""Generation in steps: one token for every row, then the model is free for other work.

transformers' `generate` is a loop that returns nothing before its end. Here it runs unchanged on a
thread of its own and waits, inside a stopping criterion, until the engine allows the next step. So
transformers keeps managing the key-value cache, positions and masks of every family, and yet
embeddings are served, and other generations start, between two tokens. The threads take turns: two
of them never compute at the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cafe.errors import DataError
from cafe.model.inference import generation_inputs, generation_settings
from cafe.model.vlm import CAFe
from cafe.serving.detokenize import StreamDetokenizer
from cafe.serving.messages import Event, Prompt, WorkItem
from cafe.serving.sampling import PerRowSampler


class Lockstep:
    """Runs a function on a thread of its own, but only while `advance` waits for it."""

    def __init__(self, run: Callable[[Callable[[], None]], None]) -> None:
        """`run` receives a function that it calls to pause."""
        self._run = run
        self._resume, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.finished = False

    def advance(self) -> None:
        """Run until the next pause or the end. Raises whatever the function raises."""
        if self.finished:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name="decoding", daemon=True)
            self._thread.start()
        else:
            self._resume.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def _main(self) -> None:
        try:
            self._run(self._pause)
        except BaseException as error:  # raised again by `advance`
            self._error = error
        finally:
            self.finished = True
            self._paused.release()

    def _pause(self) -> None:
        self._paused.release()
        self._resume.acquire()


class Generation:
    """Answers prompts as one batch, each with its own sampling, token limit and stop texts."""

    def __init__(self, model: CAFe, items: list[WorkItem]) -> None:
        self._model = model
        self._prompts = [i.content for i in items if isinstance(i.content, Prompt)]
        self._numbers = [item.number for item in items]
        self._detokenizers: list[StreamDetokenizer] = []
        self._done: set[int] = set()
        self._events: list[Event] = []
        self._lockstep = Lockstep(self._decode)

    @property
    def finished(self) -> bool:
        """Whether all rows have ended."""
        return self._lockstep.finished

    def step(self) -> list[Event]:
        """Decode one token of every row; the first step also reads the prompts.

        Raises:
            DataError: A prompt is too long.
        """
        self._events = []
        self._lockstep.advance()
        return self._events

    def drop(self, row: int) -> None:
        """Stop decoding a row; the others continue."""
        self._done.add(row)

    @torch.inference_mode()
    def _decode(self, pause: Callable[[], None]) -> None:
        from transformers import LogitsProcessorList, StoppingCriteriaList

        model, prompts = self._model, self._prompts
        inputs = generation_inputs(model, [p.conversation for p in prompts], self._numbers)
        settings = generation_settings(model, 1, {"num_beams": 1})  # tokens are sent at once
        limits = self._limits(inputs["attention_mask"])
        sampler = PerRowSampler(prompts, model.device)
        self._detokenizers = [
            StreamDetokenizer(
                row,
                prompt,
                lambda tokens: model.processor.tokenizer.decode(tokens, skip_special_tokens=True),
                end_ids=frozenset(settings["eos_token_id"]),
                limit=limit,
                prompt_tokens=prompt_tokens,
                logprobs=sampler.logprobs(row),
            )
            for row, (prompt, (prompt_tokens, limit)) in enumerate(
                zip(prompts, limits, strict=True)
            )
        ]

        def after_token(tokens: Tensor, scores: Any, **_: Any) -> Tensor:
            self._add_tokens(tokens[:, -1].tolist())
            if len(self._done) < len(tokens):
                pause()
            done = [row in self._done for row in range(len(tokens))]
            return torch.tensor(done, device=tokens.device)

        model.generate_tokens(
            **inputs,
            **settings | {"max_new_tokens": max(limit for _, limit in limits)},
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([after_token]),
        )

    def _limits(self, mask: Tensor) -> list[tuple[int, int]]:
        """Number of prompt tokens and longest answer of each row.

        A prompt that is too long has been truncated to the model's limit before, so one that
        reaches it is refused.
        """
        max_tokens = self._model.collator.max_tokens
        limits = []
        for number, prompt, count in zip(
            self._numbers, self._prompts, mask.sum(1).tolist(), strict=True
        ):
            if count >= max_tokens:
                raise DataError(
                    f"input {number}: the prompt leaves no room for an answer; the model's "
                    f"limit is {max_tokens} tokens in total"
                )
            limits.append((count, min(prompt.max_new_tokens, max_tokens - count)))
        return limits

    def _add_tokens(self, tokens: list[int]) -> None:
        for row, token in enumerate(tokens):
            if row not in self._done:
                event = self._detokenizers[row].add(token)
                self._events.append(event)
                if event.answer is not None:
                    self._done.add(row)
