"""Generation that can be stepped: a token for every row, then the model is free for others.

transformers' `generate` is a loop that gives nothing back before its end. Here it runs unchanged
on a thread of its own and waits, in a stopping criterion, until the engine lets it take the next
step. So the key-value cache, positions and masks of every family stay transformers' business, and
still embeddings are served, and other generations begin, between two tokens. The threads take
turns: never do two of them compute at a time.
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
from cafe.serve.transcript import Transcript
from cafe.serve.work import Event, Item, Prompt

COLDEST = 1e-4
"""Below this temperature, sampling is greedy (and dividing by it would overflow)."""


class Lockstep:
    """A function that runs on a thread of its own, but only while `advance` waits for it."""

    def __init__(self, run: Callable[[Callable[[], None]], None]) -> None:
        """`run` is given a function that it calls to pause."""
        self._run = run
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.finished = False

    def advance(self) -> None:
        """Run until the next pause or the end. Raises what the function raises."""
        if self.finished:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name="decoding", daemon=True)
            self._thread.start()
        else:
            self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def _main(self) -> None:
        try:
            self._run(self._pause)
        except BaseException as error:  # raised again by `advance`
            self._error = error
        finally:
            self.finished = True
            self._back.release()

    def _pause(self) -> None:
        self._back.release()
        self._go.acquire()


class Generation:
    """Prompts that are answered together, each with its own sampling, limit and stop texts."""

    def __init__(self, model: CAFe, items: list[Item]) -> None:
        self._model = model
        self._prompts = [i.content for i in items if isinstance(i.content, Prompt)]
        self._numbers = [item.number for item in items]
        self._transcripts: list[Transcript] = []
        self._done: set[int] = set()
        self._events: list[Event] = []
        self._lockstep = Lockstep(self._decode)

    @property
    def finished(self) -> bool:
        return self._lockstep.finished

    def step(self) -> list[Event]:
        """The first step reads the prompts. Raises DataError for one that is too long."""
        self._events = []
        self._lockstep.advance()
        return self._events

    def drop(self, row: int) -> None:
        self._done.add(row)

    @torch.inference_mode()
    def _decode(self, pause: Callable[[], None]) -> None:
        from transformers import LogitsProcessorList, StoppingCriteriaList

        model, prompts = self._model, self._prompts
        inputs = generation_inputs(model, [p.conversation for p in prompts], self._numbers)
        settings = generation_settings(model, 1, {})
        limits = self._limits(inputs["attention_mask"])
        self._transcripts = [
            Transcript(
                row,
                prompt,
                lambda tokens: model.processor.tokenizer.decode(tokens, skip_special_tokens=True),
                end_ids=frozenset(settings["eos_token_id"]),
                limit=limit,
                prompt_tokens=prompt_tokens,
            )
            for row, (prompt, (prompt_tokens, limit)) in enumerate(
                zip(prompts, limits, strict=True)
            )
        ]

        def after_token(tokens: Tensor, scores: Any, **_: Any) -> Tensor:
            self._read(tokens[:, -1].tolist())
            if len(self._done) < len(tokens):
                pause()
            done = [row in self._done for row in range(len(tokens))]
            return torch.tensor(done, device=tokens.device)

        model.decode(
            **inputs,
            **settings | {"max_new_tokens": max(limit for _, limit in limits)},
            logits_processor=LogitsProcessorList([Choice(prompts, model.device)]),
            stopping_criteria=StoppingCriteriaList([after_token]),
        )

    def _limits(self, mask: Tensor) -> list[tuple[int, int]]:
        """Prompt tokens and the longest answer of each row; what is too long has been cut."""
        most = self._model.collator.max_tokens
        limits = []
        for number, prompt, count in zip(
            self._numbers, self._prompts, mask.sum(1).tolist(), strict=True
        ):
            if count >= most:
                raise DataError(
                    f"input {number}: the prompt leaves no room for an answer; the model reads "
                    f"{most} tokens in all"
                )
            limits.append((count, min(prompt.max_new_tokens, most - count)))
        return limits

    def _read(self, tokens: list[int]) -> None:
        for row, token in enumerate(tokens):
            if row not in self._done:
                event = self._transcripts[row].add(token)
                self._events.append(event)
                if event.answer is not None:
                    self._done.add(row)


class Choice:
    """A logits processor that samples by itself, so that the rows of a batch may differ.

    It leaves a sampled row with one possible token and a greedy row as it is; `generate` then
    takes the likeliest token of each. A row's seed gives the same tokens in any company.
    """

    def __init__(self, prompts: list[Prompt], device: torch.device) -> None:
        self._rows: list[tuple[int, Prompt, torch.Generator]] = []
        for row, prompt in enumerate(prompts):
            if prompt.temperature >= COLDEST:
                generator = torch.Generator(device)
                if prompt.seed is None:
                    generator.seed()
                else:
                    generator.manual_seed(prompt.seed)
                self._rows.append((row, prompt, generator))

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        for row, prompt, generator in self._rows:
            p = probabilities(scores[row], prompt.temperature, prompt.top_p)
            chosen = torch.multinomial(p, 1, generator=generator)
            scores[row] = -torch.inf
            scores[row, chosen] = 0.0
        return scores


def probabilities(scores: Tensor, temperature: float, top_p: float) -> Tensor:
    """What is sampled from: [v], softmax of scores / temperature, cut to its nucleus.

    The nucleus is the smallest set of likeliest tokens whose probabilities reach `top_p`.
    """
    p = ((scores - scores.max()) / temperature).softmax(-1)
    if top_p >= 1:
        return p
    ordered, order = p.sort(descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    outside[0] = False  # top_p = 0 keeps the likeliest
    return p.scatter(-1, order, ordered.masked_fill(outside, 0.0))
