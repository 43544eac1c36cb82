"""What tasks may ask of a model, and the three classes that answer.

    ModelCalls         a `CAFe`, with batch sizes, prompt and number format fixed
    CachedCalls        asks the calls that it wraps only once per input
    DistributedCalls   shares each call among the ranks that torchrun started

The bundled world's tasks share images and captions: their embeddings serve retrieval, MMEB and the
gap, and one description serves CHAIR and THRONE. So a cache pays, but only for sets that fit in
memory.

Ranks: `torchrun --nproc-per-node N -m cafe evaluate …`. Tasks do not know of them: they make the
same calls on every rank and get all answers (`cafe.ranks`), and only rank 0 writes results.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeVar

import numpy as np
import torch

from cafe.model import teacher_forced
from cafe.model.captions import CAPTION_TOKENS, CAPTION_WEIGHT
from cafe.model.judging import log_likelihood, log_odds
from cafe.model.rerank import trained_temperature
from cafe.model.rows.matching import caption_dialogue, match_question
from cafe.model.teacher_forced import TeacherForcedScores
from cafe.precision import ComputePrecision, warn_if_emulated
from cafe.ranks import Rank
from cafe.types import Conversation, Example, Image, content_key, user

if TYPE_CHECKING:
    from cafe.model.vlm import CAFe

T = TypeVar("T")

UseOfCaptions = bool | Literal["think"]
"""Whether images are embedded with the model's own captions: averaged with them (True), or read
after them ("think")."""


def caption_settings(caption: UseOfCaptions) -> dict[str, Any]:
    """What a result file says about them; nothing where there are none."""
    if not caption:
        return {}
    weight = {"caption_weight": CAPTION_WEIGHT} if caption is True else {}
    return {"caption": caption, **weight}


class Calls(Protocol):
    """The functions of a model that tasks use (`cafe.evaluation.task` describes them)."""

    def encode(self, inputs: Sequence[Image | str | Conversation]) -> np.ndarray: ...
    def encode_tokens(self, inputs: Sequence[Image | str]) -> list[np.ndarray]: ...
    def generate(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]: ...
    def score_examples(self, examples: Sequence[Example]) -> list[TeacherForcedScores]: ...
    def match_odds(self, pairs: Sequence[tuple[Image, str]]) -> np.ndarray: ...
    def log_likelihood(self, pairs: Sequence[tuple[Image, str]]) -> np.ndarray: ...
    @property
    def temperature(self) -> float:
        """That the embeddings were trained with (`cafe.model.rerank`)."""
        ...

    def with_prompt(self, prompt: str) -> Self:
        """A copy that embeds with another prompt (`cafe.model.rows.prompts`)."""
        ...

    def with_captions(self, caption: UseOfCaptions) -> Self:
        """A copy that embeds images with the model's own captions, or after them."""
        ...


@dataclass(frozen=True, slots=True)
class ModelCalls:
    """`encode`, `generate` and `score_examples` as `cafe.evaluation.task` describes them.

    precision   fp32: the precision of the model's weights, on every CPU, so that a result does not
                depend on its instructions. bf16: matrix products in bfloat16 (autocast), nearly
                twice as fast on recent CPUs; ties are a little more frequent
    encode_batch, generate_batch, score_batch    inputs, conversations and examples per batch
    prompt      name of the embedding prompt (`cafe.model.rows.prompts`)
    caption     embed images with the model's own captions
    """

    model: CAFe
    precision: ComputePrecision = "fp32"
    encode_batch: int = 32
    generate_batch: int = 64
    score_batch: int = 16
    prompt: str = "compress"
    caption: UseOfCaptions = False

    def __post_init__(self) -> None:
        if self.precision == "bf16":
            warn_if_emulated(self.model.device)

    def with_prompt(self, prompt: str) -> Self:
        return replace(self, prompt=prompt)

    def with_captions(self, caption: UseOfCaptions) -> Self:
        return replace(self, caption=caption)

    def encode(self, inputs: Sequence[Image | str | Conversation]) -> np.ndarray:
        with self._autocast():
            return self.model.encode(
                list(inputs),
                batch_size=self.encode_batch,
                prompt_name=self.prompt,
                caption=self.caption is True,
                think=CAPTION_TOKENS if self.caption == "think" else 0,
            )

    def encode_tokens(self, inputs: Sequence[Image | str]) -> list[np.ndarray]:
        with self._autocast():
            return self.model.encode_tokens(
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

    def score_examples(self, examples: Sequence[Example]) -> list[TeacherForcedScores]:
        with self._autocast():
            return teacher_forced.score_examples(self.model, examples, batch_size=self.score_batch)

    def match_odds(self, pairs: Sequence[tuple[Image, str]]) -> np.ndarray:
        questions = [match_question(user(image), user(text)) for image, text in pairs]
        with self._autocast():
            return log_odds(self.model, questions, 4 * self.score_batch).numpy()

    def log_likelihood(self, pairs: Sequence[tuple[Image, str]]) -> np.ndarray:
        dialogues = [caption_dialogue(user(image), user(text)) for image, text in pairs]
        with self._autocast():
            return log_likelihood(self.model, dialogues, 4 * self.score_batch).numpy()

    @property
    def temperature(self) -> float:
        return trained_temperature(self.model.model.config)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(
            self.model.device.type, torch.bfloat16, enabled=self.precision == "bf16"
        )


@dataclass(frozen=True, slots=True)
class CachedCalls:
    """A model's calls; each embedding and each reply is computed once.

    known    key of a call -> its value
    inputs   kept alive, because images are identified by object identity
    """

    calls: Calls
    prompt: str = ""
    caption: UseOfCaptions = False
    known: dict[Hashable, Any] = field(default_factory=dict)
    inputs: list[object] = field(default_factory=list)

    def with_prompt(self, prompt: str) -> Self:
        return replace(self, calls=self.calls.with_prompt(prompt), prompt=prompt)

    def with_captions(self, caption: UseOfCaptions) -> Self:
        return replace(self, calls=self.calls.with_captions(caption), caption=caption)

    def encode(self, inputs: Sequence[Image | str | Conversation]) -> np.ndarray:
        keys = [("encode", self.prompt, self.caption, content_key(v)) for v in inputs]
        return np.stack(self._all(keys, inputs, self.calls.encode))

    def encode_tokens(self, inputs: Sequence[Image | str]) -> list[np.ndarray]:
        return self.calls.encode_tokens(inputs)

    def generate(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        keys = [("generate", max_new_tokens, content_key(value)) for value in conversations]
        return self._all(keys, conversations, lambda new: self.calls.generate(new, max_new_tokens))

    def score_examples(self, examples: Sequence[Example]) -> list[TeacherForcedScores]:
        return self.calls.score_examples(examples)

    def match_odds(self, pairs: Sequence[tuple[Image, str]]) -> np.ndarray:
        return self.calls.match_odds(pairs)

    def log_likelihood(self, pairs: Sequence[tuple[Image, str]]) -> np.ndarray:
        return self.calls.log_likelihood(pairs)

    @property
    def temperature(self) -> float:
        return self.calls.temperature

    def _all(
        self, keys: list[Any], values: Sequence[T], do: Callable[[list[T]], Iterable[Any]]
    ) -> list[Any]:
        new = {key: value for key, value in zip(keys, values, strict=True) if key not in self.known}
        if new:
            self.inputs.extend(new.values())
            self.known.update(zip(new, do(list(new.values())), strict=True))
        return [self.known[key] for key in keys]


@dataclass(frozen=True, slots=True)
class DistributedCalls:
    """A model's calls, each shared among the ranks."""

    calls: Calls
    rank: Rank

    def with_prompt(self, prompt: str) -> Self:
        return replace(self, calls=self.calls.with_prompt(prompt))

    def with_captions(self, caption: UseOfCaptions) -> Self:
        return replace(self, calls=self.calls.with_captions(caption))

    def encode(self, inputs: Sequence[Image | str | Conversation]) -> np.ndarray:
        return np.stack(self.rank.share(inputs, lambda own: list(self.calls.encode(own))))

    def encode_tokens(self, inputs: Sequence[Image | str]) -> list[np.ndarray]:
        return self.rank.share(inputs, self.calls.encode_tokens)

    def generate(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        return self.rank.share(conversations, lambda own: self.calls.generate(own, max_new_tokens))

    def score_examples(self, examples: Sequence[Example]) -> list[TeacherForcedScores]:
        return self.rank.share(examples, self.calls.score_examples)

    def match_odds(self, pairs: Sequence[tuple[Image, str]]) -> np.ndarray:
        shared = self.rank.share(pairs, lambda own: list(self.calls.match_odds(own)))
        return np.asarray(shared, dtype=np.float32)

    def log_likelihood(self, pairs: Sequence[tuple[Image, str]]) -> np.ndarray:
        shared = self.rank.share(pairs, lambda own: list(self.calls.log_likelihood(own)))
        return np.asarray(shared, dtype=np.float32)

    @property
    def temperature(self) -> float:
        return self.calls.temperature
