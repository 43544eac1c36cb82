"""Continuous decoding: one token for all rows at a time, and rows that come and go between tokens.

transformers' `generate` reads a batch and decodes it to the end of its longest answer. Here prompts
are read in a batch of their own and then join those that are being decoded (`RowCache`); each row
leaves when its answer has ended. All else is as in `generate`: the same inputs, the same forward,
the same logits for each row.

What is read of an image's beginning is taken from the prefix cache where it has been read before
(`cafe.model.prefix_cache`): only the tokens after it are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cafe.errors import DataError
from cafe.model.attention import SdpaWhileGenerating, stateful_layers
from cafe.model.head import next_token_logits
from cafe.model.inference import InferenceModel, generation_inputs
from cafe.model.prefix_cache import Digests, Prefix, PrefixCache, image_digests, prefix_key
from cafe.model.row_cache import RowCache, new_cache
from cafe.model.rows.trie import TokenSequence
from cafe.types import Conversation

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(eq=False, slots=True)
class _ReadPrompts:
    """Prompts that were read, ready to join the rows.

    order    which of the prompts each row is
    tokens   of each row's prompt
    next     int64 [rows] or [axes, rows], the position of each row's next token
    logits   float32 [rows, vocabulary], of that token
    """

    order: list[int]
    tokens: list[list[int]]
    cache: RowCache
    next: Tensor
    logits: Tensor


@dataclass(frozen=True, slots=True)
class AdmittedPrompts:
    """Prompts that have become the last rows.

    order    which of the given prompts each new row is
    tokens   of each row's prompt
    logits   float32 [new rows, vocabulary], of the first token of each answer
    """

    order: list[int]
    tokens: list[list[int]]
    logits: Float[Tensor, "rows vocabulary"]


@dataclass(eq=False, slots=True)
class RowDecoder:
    """The rows that are being decoded; for one thread.

    prefixes   what was read of images before; None: every prompt is read whole
    """

    model: InferenceModel
    prefixes: PrefixCache | None = None
    _cache: RowCache | None = field(default=None, init=False)
    _next: Tensor = field(default_factory=lambda: torch.zeros(0), init=False)
    _sdpa: SdpaWhileGenerating = field(init=False)

    def __post_init__(self) -> None:
        """Raises FamilyError for a model whose cache cannot be joined."""
        config = self.model.model.config
        new_cache(config)
        self._sdpa = SdpaWhileGenerating(config)
        if stateful_layers(config):  # their states cannot be cut at the end of an image
            self.prefixes = None

    def __len__(self) -> int:
        return 0 if self._cache is None else len(self._cache)

    @torch.inference_mode()
    def admit(
        self, conversations: Sequence[Conversation], numbers: Sequence[int]
    ) -> AdmittedPrompts:
        """Read prompts, which become the last rows; if that fails, nothing has changed.

        Args:
            conversations: the prompts.
            numbers: what error messages call them.

        Raises:
            DataError: a prompt that cannot be read, or leaves no room for an answer.
        """
        with self._sdpa:
            read = self._read(conversations, numbers)
            for part in read[1:]:
                read[0].cache.join(part.cache)
            logits = torch.cat([part.logits for part in read])
            following = torch.cat([part.next for part in read], dim=-1)
            if self._cache is None:
                self._cache, self._next = read[0].cache, following
            else:
                self._cache.join(read[0].cache)
                self._next = torch.cat([self._next, following], dim=-1)
        return AdmittedPrompts(
            [i for part in read for i in part.order],
            [t for part in read for t in part.tokens],
            logits,
        )

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Float[Tensor, "rows vocabulary"]:
        """Add a token to every row; returns the logits of the ones after these, float32."""
        assert self._cache is not None, "there are rows"
        ids = torch.tensor(tokens, device=self.model.device)[:, None]
        with self._sdpa:
            states = self._forward(
                self._cache, ids, torch.ones_like(ids).bool(), self._next[..., None]
            )
            self._next = self._next + 1
            return next_token_logits(self.model, states[:, -1])

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; the others leave."""
        if not rows:
            self._cache, self._next = None, torch.zeros(0)
        elif self._cache is not None and list(rows) != list(range(len(self._cache))):
            self._cache.select(rows)
            self._next = self._next[..., list(rows)]

    # ------------------------------------------------------------------ prompts

    def _read(
        self, conversations: Sequence[Conversation], numbers: Sequence[int]
    ) -> list[_ReadPrompts]:
        """Prompts whose beginning nobody has read, then those that begin like one of them."""
        first: dict[Digests, int] = {}
        whole, known = [], []
        for i, conversation in enumerate(conversations):
            prefixes = self.prefixes
            images = () if prefixes is None else image_digests(conversation)
            if prefixes is not None and images and (prefixes.knows(images) or images in first):
                known.append(i)
            else:
                first[images] = i
                whole.append(i)

        def read_whole(chosen: list[int]) -> _ReadPrompts:
            return self._whole(
                [conversations[i] for i in chosen], [numbers[i] for i in chosen], chosen
            )

        parts = [read_whole(whole)] if whole else []
        if not known:
            return parts
        assert self.prefixes is not None
        sequences = self.model.collator.prompt_tokens(
            [conversations[i] for i in known], [numbers[i] for i in known]
        )
        self._check_room([s.tokens for s in sequences], [numbers[i] for i in known])
        begun: list[tuple[int, TokenSequence, Prefix]] = []
        unknown = []
        for i, sequence in zip(known, sequences, strict=True):
            end = self._prefix_end(sequence.tokens)
            key = prefix_key(image_digests(conversations[i]), sequence.tokens[:end])
            prefix = self.prefixes.find(key)
            if prefix is None:
                unknown.append(i)
            else:
                begun.append((i, sequence, prefix))
        parts += [read_whole(unknown)] if unknown else []
        return [*parts, self._continued(begun)] if begun else parts

    def _whole(
        self, conversations: list[Conversation], numbers: list[int], order: list[int]
    ) -> _ReadPrompts:
        """Read prompts from their first token on, and keep the beginnings of those with images."""
        inputs = generation_inputs(self.model, conversations, numbers)
        ids, real = inputs.pop("input_ids"), inputs.pop("attention_mask").bool()
        tokens = [row[own].tolist() for row, own in zip(ids, real, strict=True)]
        self._check_room(tokens, numbers)
        positions = inputs.pop("position_ids", None)
        if positions is None:
            positions = (real.cumsum(1) - 1).clamp(min=0)
        cache = RowCache(self.model.model.config, real[:, :0])
        states = self._forward(cache, ids, real, positions, **inputs)
        for row, (own, conversation) in enumerate(zip(tokens, conversations, strict=True)):
            images = () if self.prefixes is None else image_digests(conversation)
            end = self._prefix_end(own) if images else 0
            if self.prefixes is not None and 0 < end < len(own):
                prefix = Prefix(images, end, cache.beginning(row, end))
                self.prefixes.add(prefix_key(images, own[:end]), prefix)
        logits = next_token_logits(self.model, states[:, -1])
        return _ReadPrompts(order, tokens, cache, positions[..., -1] + 1, logits)

    def _continued(self, begun: list[tuple[int, TokenSequence, Prefix]]) -> _ReadPrompts:
        """Read what follows the beginnings that are known.

        Padding is on the right here, so that each row stays in one piece: layers that see a window
        count columns.
        """
        device = self.model.device
        cache = RowCache.of_beginnings(self.model.model.config, [p.layers for _, _, p in begun])
        counts = [len(sequence.tokens) - prefix.tokens for _, sequence, prefix in begun]
        longest = max(counts)
        ids, positions = [], []
        for (_, sequence, prefix), count in zip(begun, counts, strict=True):
            own = sequence.positions
            depth = np.arange(len(sequence.tokens))
            following = (depth if own is None else own)[..., prefix.tokens :]
            padding = (0, longest - count)
            ids.append(np.pad(sequence.tokens[prefix.tokens :], padding))
            positions.append(np.pad(following, [(0, 0)] * (following.ndim - 1) + [padding]))
        ends = torch.tensor(counts, device=device)
        real = torch.arange(longest, device=device) < ends[:, None]
        at = torch.from_numpy(np.stack(positions, axis=-2)).to(device)
        states = self._forward(cache, torch.from_numpy(np.stack(ids)).to(device), real, at)
        rows = torch.arange(len(begun), device=device)
        cache.align_right()
        return _ReadPrompts(
            [i for i, _, _ in begun],
            [sequence.tokens.tolist() for _, sequence, _ in begun],
            cache,
            at[..., rows, ends - 1] + 1,
            next_token_logits(self.model, states[rows, ends - 1]),
        )

    def _forward(
        self,
        cache: RowCache,
        ids: Int[Tensor, "rows new"],
        real: Tensor,
        positions: Tensor,
        **images: Any,
    ) -> Float[Tensor, "rows new hidden"]:
        return self.model.model.model(
            input_ids=ids,
            attention_mask=cache.add_columns(real),
            position_ids=positions,
            past_key_values=cache.cache,
            use_cache=True,
            **images,
        ).last_hidden_state

    def _prefix_end(self, tokens: Sequence[int] | np.ndarray) -> int:
        """The number of tokens up to the end of the last image; 0: there is none."""
        family, processor = self.model.family, self.model.processor
        shown = (family.placeholder_id(processor), family.video_placeholder_id(processor))
        at = np.flatnonzero(np.isin(np.asarray(tokens), shown))
        return int(at[-1]) + 1 if len(at) else 0

    def _check_room(
        self, tokens: Sequence[Sequence[int] | np.ndarray], numbers: Sequence[int]
    ) -> None:
        """A prompt that is too long has been truncated to the model's limit before, so one that
        reaches it is refused.
        """
        most = self.model.collator.max_tokens
        for own, number in zip(tokens, numbers, strict=True):
            if len(own) >= most:
                raise DataError(
                    f"input {number}: the prompt leaves no room for an answer; the model's "
                    f"limit is {most} tokens in total"
                )
