"""The model that lmms-eval runs:

    lmms-eval --model cafe --model_args pretrained=demo/model --tasks mme,mmstar --batch_size 16

`CafeChat` answers; `CafeSimple` (`--force_simple`) is for tasks that need the likelihood of fixed
answers, which lmms-eval does not request from a chat model. Only lmms-eval imports this module.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]

from cafe.errors import DataError
from cafe.evaluation.harness.lmms_eval_requests import (
    GenerationSettings,
    conversation_of,
    question_of,
    settings_of,
)
from cafe.model.teacher_forced import score_examples
from cafe.model.vlm import CAFe
from cafe.types import Conversation, Example, Message

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Cafe(lmms):
    """Base of both models.

    pretrained   a directory, a hub id, or "tiny"
    adapter      LoRA or DoRA weights for it
    dtype        float32, bfloat16 or float16; by default float32 on a CPU, bfloat16 on a GPU
    """

    def __init__(
        self,
        pretrained: str,
        *,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        adapter: str | None = None,
        max_batch_size: int | None = None,  # lmms-eval passes it to every model
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise DataError(
                f"batch_size={batch_size}: give a number; cafe does not search for a batch size"
            )
        if dtype is not None and dtype not in DTYPES:
            raise DataError(f"dtype={dtype}: use one of {', '.join(DTYPES)}")
        if device is None and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        self.batch_size = int(batch_size)
        self.cafe = CAFe.from_pretrained(
            pretrained, device=device, adapter=adapter, dtype=DTYPES[dtype] if dtype else None
        )

    @property
    def device(self) -> torch.device:
        return self.cafe.device

    def generate_until_multi_round(self, requests: Any) -> list[str]:
        raise DataError("cafe does not answer lmms-eval's tasks of several rounds; leave them out")

    def _answers(self, asked: Sequence[tuple[Conversation, GenerationSettings]]) -> list[str]:
        """Answers in order; requests with equal settings are generated together."""
        answers = [""] * len(asked)
        groups: dict[GenerationSettings, list[int]] = {}
        for number, (_, settings) in enumerate(asked):
            groups.setdefault(settings, []).append(number)
        for settings, numbers in groups.items():
            texts = self.cafe.generate(
                [asked[number][0] for number in numbers],
                max_new_tokens=settings.max_new_tokens,
                batch_size=self.batch_size,
                **dict(settings.sampling),
            )
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = settings.cut(text)
        return answers

    def _document(self, task: str, split: str, number: int) -> Any:
        return self.task_dict[task][split][number]


class CafeChat(_Cafe):
    """Answers conversations, images and text in the order that the task has them in."""

    is_simple = False

    def generate_until(self, requests: Any) -> list[str]:
        asked = []
        for request in requests:
            _, to_messages, how, number, task, split = request.args
            messages = to_messages(self._document(task, split, number))
            asked.append((conversation_of(messages), settings_of(how)))
        return self._answers(asked)

    def loglikelihood(self, requests: Any) -> Any:
        raise DataError("a task that asks for likelihoods: run it with --force_simple")


class CafeSimple(_Cafe):
    """Answers a prompt with its images, and computes the likelihood of fixed answers."""

    is_simple = True

    def generate_until(self, requests: Any) -> list[str]:
        asked = []
        for request in requests:
            text, how, to_visuals, number, task, split = request.args
            visuals = to_visuals(self._document(task, split, number))
            asked.append((question_of(text, visuals), settings_of(how)))
        return self._answers(asked)

    def loglikelihood(self, requests: Any) -> list[Any]:
        """For each request the log-probability, in nats, of replying with exactly its continuation
        (the token that ends a reply included, as in lmms-eval's LLaVA), and whether greedy decoding
        does. Whitespace around a continuation, which lmms-eval adds, is stripped.
        """
        examples = [
            Example(id=f"request {number}", dialogues=(self._reply(*request.args),))
            for number, request in enumerate(requests)
        ]
        scored = score_examples(self.cafe, examples, batch_size=self.batch_size)
        pairs = [(-r.answers[0].nll_nats, r.answers[0].greedy) for r in scored]
        # lmms-eval 0.7.3 converts a bare pair to a string, and then fails to unpack it.
        return [GenerationResult(text=pair) for pair in pairs]

    def _reply(self, text: str, continuation: Any, *about: Any) -> Conversation:
        """A question with its continuation as the reply. `about` is empty where the task wants
        the likelihood of a continuation without a document.
        """
        visuals = None
        if about:
            to_visuals, number, task, split = about
            document = self._document(task, split, number)
            visuals = to_visuals(document)
            continuation = continuation(document) if callable(continuation) else continuation
        reply = Message("assistant", (str(continuation).strip(),))
        return (*question_of(text, visuals), reply)
