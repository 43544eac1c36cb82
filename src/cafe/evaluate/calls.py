"""What a `CAFe` gives to tasks: its methods with batch sizes, prompt and number format settled."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np
import torch

from cafe.evaluate.teacher_forced import Reading, read_examples
from cafe.types import Conversation, Example, Image

if TYPE_CHECKING:
    from cafe.model.vlm import CAFe

Precision = Literal["fp32", "bf16"]


class Calls(Protocol):
    """All that tasks ask of a model (`cafe.evaluate.task`)."""

    def encode(self, inputs: Sequence[Image | str | Conversation]) -> np.ndarray: ...
    def generate(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]: ...
    def read(self, examples: Sequence[Example]) -> list[Reading]: ...
    def with_prompt(self, prompt: str) -> Self:
        """The same, asking for embeddings with another prompt (`cafe.model.prompts`)."""
        ...


@dataclass(frozen=True, slots=True)
class ModelCalls:
    """`encode`, `generate` and `read` as `cafe.evaluate.task` describes them.

    precision   fp32: as the model's weights are. bf16: matrix products in bfloat16 (autocast),
                which is nearly twice as fast on recent CPUs; ties are a little more frequent
    encode_batch, generate_batch, read_batch    inputs, conversations and examples at once
    prompt      what asks for an embedding
    """

    model: CAFe
    precision: Precision = "fp32"
    encode_batch: int = 32
    generate_batch: int = 64
    read_batch: int = 16
    prompt: str = "compress"

    def with_prompt(self, prompt: str) -> Self:
        return replace(self, prompt=prompt)

    def encode(self, inputs: Sequence[Image | str | Conversation]) -> np.ndarray:
        with self._autocast():
            return self.model.encode(
                list(inputs), batch_size=self.encode_batch, prompt_name=self.prompt
            )

    def generate(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        messages: list[Any] = list(conversations)
        with self._autocast():
            answers = self.model.generate(
                messages, max_new_tokens=max_new_tokens, batch_size=self.generate_batch
            )
        assert isinstance(answers, list)  # a list of conversations went in
        return answers

    def read(self, examples: Sequence[Example]) -> list[Reading]:
        with self._autocast():
            return read_examples(self.model, examples, batch_size=self.read_batch)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(
            self.model.device.type, torch.bfloat16, enabled=self.precision == "bf16"
        )
