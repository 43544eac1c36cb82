"""Turns examples into chunks of rows: the only place that knows image tokens, labels and padding.

A `Collator` holds only settings (processor, family, limits), so a data loader can send it to its
workers. `cafe.model.rows.render` turns conversations into text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from cafe.errors import DataError, NoLabelledTokens
from cafe.model.families import Family
from cafe.model.image_keys import visible_until
from cafe.model.rows.blocks import blocks_of
from cafe.model.rows.cutting import kept_tokens
from cafe.model.rows.images import ImageInputs, named
from cafe.model.rows.lengths import PlaceholderLengths
from cafe.model.rows.official import answers_labelled, official_labels
from cafe.model.rows.prompts import DEFAULT_PROMPT
from cafe.model.rows.render import RenderedSequence, Renderer
from cafe.model.rows.rows import Chunk, Rows, hashes, identity, shared_rows
from cafe.model.rows.trie import Row, TokenSequence, build_row, pack_rows, separate_rows, stack_rows
from cafe.types import Conversation, Example

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Int


@dataclass(frozen=True)  # without slots, so that cached_property works
class Collator:
    """Turns examples into `Chunk`s.

    processor, family   the model's own
    pooled_token        the token that ends an assistant turn; embeddings are read there
    max_tokens          longest sequence; longer texts are cut, images never
    sharing             "trie": one row per example; "none": one row per sequence
    row_tokens          pack rows up to this length (for FlexAttention); None: one example a row
    dummy_image         add an unused image to a chunk without any, so that every rank runs the
                        vision tower and none waits for another
    max_frames          of a video; they are evenly spaced. A family without videos sees them as
                        images
    official            system turn and labels as in the published code
    own_prompt          what the embedding prompt "compress" means for this model
    block_cost          the rows of a chunk are sorted by length and computed in blocks of similar
                        length, which saves padding; what each further block costs, in tokens
                        (`cafe.model.rows.blocks`). None: all rows are one block
    """

    processor: Any
    family: Family
    pooled_token: str
    max_tokens: int
    sharing: Literal["trie", "none"] = "trie"
    row_tokens: int | None = None
    dummy_image: bool = False
    max_frames: int = 16
    official: bool = False
    own_prompt: str = DEFAULT_PROMPT
    block_cost: int | None = None

    @cached_property
    def render(self) -> Renderer:
        return Renderer(
            self.processor,
            self.family,
            self.pooled_token,
            self.max_frames,
            self.official,
            self.own_prompt,
        )

    @property
    def _tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def pad_id(self) -> int:
        pad = self._tokenizer.pad_token_id
        return int(self._tokenizer.eos_token_id if pad is None else pad)

    # ------------------------------------------------------------------ training

    def __call__(self, examples: Sequence[Example]) -> Chunk:
        """Collate `examples` into one chunk.

        Raises:
            DataError: an example that cannot be used; the message names it.
            NoLabelledTokens: (a DataError) an answer without a labelled token.
        """
        groups = [self._sequences(example) for example in examples]
        sequences = [s for group in groups for s in group]
        images = self._images(sequences)
        self._tokenize(sequences, images)
        for s in sequences:
            answers = s.rendered.answers
            if s.labelled_answers < answers:
                raise NoLabelledTokens(
                    f"{s.name}: {answers - s.labelled_answers} of its {answers} answers have no "
                    "labelled token: its text does not show them as answers"
                )
        embedded = [[s for s in group if s.role != "answer"] for group in groups]
        pairs = [e for e in examples if e.query is not None]
        return Chunk(
            ids=tuple(example.id for example in examples),
            rows=self._rows(groups, _embedding_order(groups), images),
            embedding_rows=self._rows(embedded, _embedding_order(embedded), images),
            vision=images.inputs,
            pairs=len(pairs),
            target_ids=hashes([e.target_id or identity(e.target) for e in pairs]),
            query_ids=hashes([identity(e.query) for e in pairs]),
            content_ids=hashes([identity(e.target) for e in pairs]),
            negative_ids=hashes([identity(n) for e in pairs for n in e.negatives]),
        )

    def row_lengths(self, example: Example) -> list[int]:
        """Numbers of tokens of the example's rows, before packing, without decoding its images.

        Raises:
            DataError: as `__call__`, but a damaged image is noticed only if its size is.
        """
        sequences = self._sequences(example)
        media = [(s.name, s.rendered.images) for s in sequences]
        self._tokenize(sequences, self._lengths.images(media))
        return [len(row) for row in self._merged(sequences)]

    @cached_property
    def _lengths(self) -> PlaceholderLengths:
        return PlaceholderLengths(self.processor, self.family, self.max_frames)

    def _sequences(self, example: Example) -> list[_Sequence]:
        """Query, target, negatives, then every assistant turn, each a branch of the row."""
        sides: list[tuple[_Role, Conversation]] = [("negative", n) for n in example.negatives]
        if example.query is not None and example.target is not None:
            sides = [("query", example.query), ("target", example.target), *sides]
        name, prompt = f"example {example.id!r}", example.embedding_prompt
        try:
            embedded = [
                _Sequence(name, self.render.embedding(side, prompt), role) for role, side in sides
            ]
            answers = [
                _Sequence(name, rendered, "answer")
                for dialogue in example.dialogues
                for rendered in self.render.answers(dialogue)
            ]
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        return [*embedded, *answers]

    def _rows(
        self, groups: Sequence[Sequence[_Sequence]], pooled: Sequence[int], images: ImageInputs
    ) -> Rows:
        """The sequences of a group share their common beginning, unless `sharing` is "none".

        pooled   the sequences whose last token is `Rows.pooled`, in that order: indices into the
                 concatenated groups
        """
        sequences = [s for group in groups for s in group]
        if not sequences:
            return Rows.none()
        rows = [row for group in groups for row in self._merged(group)]
        if self.row_tokens is not None:
            rows = pack_rows(rows, self.row_tokens)
        # Rows are in the order of sequences, and are stacked in the order of their lengths.
        lengths = [len(row) for row in rows]
        order = (
            np.argsort(lengths, kind="stable")
            if self.block_cost is not None
            else np.arange(len(rows))
        )
        batch = stack_rows([rows[i] for i in order], self.pad_id)
        width = batch.input_ids.shape[1]
        # The flat index of every token of every sequence; argsort inverts the permutation.
        flat = [
            indices + r * width
            for r, row in zip(np.argsort(order).tolist(), rows, strict=True)
            for indices in row.token_indices
        ]
        labelled = [(at, s) for at, s in zip(flat, sequences, strict=True) if len(s.label_at)]
        image_order, video_order = images.orders(batch.keys)
        pooled_at = np.array([flat[i][-1] for i in pooled], dtype=np.int64)
        label_source = _concatenated([at[s.label_at - 1] for at, s in labelled])
        label_ids = _concatenated([s.tokens.tokens[s.label_at] for _, s in labelled])
        read = np.union1d(pooled_at, label_source)
        return Rows(
            input_ids=batch.input_ids,
            positions=batch.positions,
            subtree_end=batch.subtree_end,
            image_order=torch.tensor(image_order, dtype=torch.long),
            video_order=torch.tensor(video_order, dtype=torch.long),
            pooled=torch.from_numpy(pooled_at),
            label_source=torch.from_numpy(label_source),
            label_ids=torch.from_numpy(label_ids),
            visible_until=torch.from_numpy(visible_until(batch.keys))
            if self.family.bidirectional_image_attention
            else None,
            plain=all(len(row.token_indices) == 1 for row in rows),
            tokens=sum(len(row) for row in rows),
            read=torch.from_numpy(read),
            blocks=()
            if self.block_cost is None
            else blocks_of(batch.keys, sorted(lengths), self.block_cost, images.orders, read),
        )

    def _merged(self, group: Sequence[_Sequence]) -> list[Row]:
        """The rows of a group: one, or one for each sequence."""
        tokens = [s.tokens for s in group]
        if not tokens:
            return []
        return [build_row(tokens)] if self.sharing == "trie" else separate_rows(tokens)

    # ------------------------------------------------------------------ inference

    def embedding_rows(
        self,
        conversations: Sequence[Conversation],
        prompt: str = DEFAULT_PROMPT,
        numbers: Sequence[int] | None = None,
        token_cost: float | None = None,
    ) -> tuple[Rows, dict[str, Tensor]]:
        """Rows and vision tensors for embedding; `pooled` is in the order of `conversations`.

        Args:
            conversations: the inputs.
            prompt: name of the embedding prompt.
            numbers: what error messages call the conversations; None: 0, 1, ...
            token_cost: share rows where that is cheaper (`shared_rows`); None: one row for each.

        Raises:
            DataError: a conversation that cannot be used; the message gives its number.
        """
        return self._inference_rows(
            conversations, lambda c: self.render.embedding(c, prompt), numbers, token_cost
        )[:2]

    def prompt_rows(
        self,
        conversations: Sequence[Conversation],
        numbers: Sequence[int] | None = None,
        token_cost: float | None = None,
    ) -> tuple[Rows, dict[str, Tensor]]:
        """The same for conversations to be answered; `pooled` is the last token of each prompt."""
        return self._inference_rows(conversations, self.render.prompt, numbers, token_cost)[:2]

    def answer_rows(
        self,
        conversations: Sequence[Conversation],
        numbers: Sequence[int] | None = None,
        token_cost: float | None = None,
    ) -> tuple[Rows, dict[str, Tensor], Int[Tensor, " l"]]:
        """The same for conversations that end with an answer, whose tokens are labelled.

        Returns:
            Rows, vision tensors, and the conversation of each labelled token, int64 [l].

        Raises:
            DataError: also for an empty answer.
        """
        return self._inference_rows(
            conversations, lambda c: self.render.answers(c)[-1], numbers, token_cost
        )

    def _inference_rows(
        self,
        conversations: Sequence[Conversation],
        render: Callable[[Conversation], RenderedSequence],
        numbers: Sequence[int] | None,
        token_cost: float | None,
    ) -> tuple[Rows, dict[str, Tensor], Int[Tensor, " l"]]:
        names = [f"input {n}" for n in (range(len(conversations)) if numbers is None else numbers)]
        sequences = [
            _Sequence(name, named(name, render, conversation))
            for name, conversation in zip(names, conversations, strict=True)
        ]
        images = self._images(sequences)
        self._tokenize(sequences, images)
        groups = [[i] for i in range(len(sequences))]
        if token_cost is not None and self.sharing == "trie":
            groups = shared_rows([s.tokens.keys for s in sequences], token_cost)
        order = [i for group in groups for i in group]
        # Sequence order[j] comes j-th; argsort inverts the permutation.
        pooled = np.argsort(order).tolist()
        rows = self._rows([[sequences[i] for i in group] for group in groups], pooled, images)
        owners = [np.full(len(sequences[i].label_at), i) for i in order]
        return rows, images.inputs, torch.from_numpy(_concatenated(owners))

    # ------------------------------------------------------------------ tokens

    def _images(self, sequences: Sequence[_Sequence]) -> ImageInputs:
        """The processed images of `sequences`."""
        return ImageInputs.of(
            [(s.name, s.rendered.images) for s in sequences],
            self.processor,
            self.family,
            self.dummy_image,
            self.max_frames,
        )

    def _tokenize(self, sequences: Sequence[_Sequence], images: ImageInputs) -> None:
        """Fill in the tokens of `sequences`."""
        if not sequences:
            return
        prompts = [
            named(s.name, images.with_placeholders, s.rendered.text, s.rendered.images)
            for s in sequences
        ]
        texts = [prompt.text for prompt in prompts]
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        added = self._tokenizer.added_tokens_decoder
        control = [number for number, token in added.items() if token.special]
        for s, prompt, ids, offsets in zip(
            sequences, prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            tokens, keys, spans = named(
                s.name, images.expand, prompt, np.asarray(ids, dtype=np.int64), np.asarray(offsets)
            )
            if len(tokens) > self.max_tokens:
                kept = self._kept(s, prompt.text, len(tokens), spans)
                if kept is None:
                    self._tokenize([s], images)
                    continue
                tokens, keys, spans = tokens[kept], keys[kept], spans[kept]
            s.tokens = TokenSequence(tokens, keys, images.positions(keys))
            if s.rendered.labelled:
                begin = len(prompt.text) - s.rendered.labelled
                s.label_at = np.flatnonzero(spans[:, 1] > begin)
                s.labelled_answers = int(not np.isin(tokens[s.label_at], control).all())
                if self.official:
                    s.label_at = official_labels(prompt.text, tokens, spans, self._tokenizer)
                    s.labelled_answers = answers_labelled(prompt.text, spans)

    def _kept(
        self, sequence: _Sequence, text: str, count: int, spans: np.ndarray
    ) -> np.ndarray | None:
        """Which tokens of a too long sequence are kept: its longest texts lose their ends.

        None where they are too short for that: the sequence has lost its oldest turns instead.
        """
        kept = kept_tokens(sequence.rendered.texts, text, spans, count - self.max_tokens)
        if kept is None:
            share = 1 - self.max_tokens / count
            shorter = named(sequence.name, sequence.rendered.without_oldest, share)
            if shorter is not None:
                sequence.rendered = shorter
                return None
            raise DataError(
                f"{sequence.name}: {count} tokens, and max_tokens is {self.max_tokens}; images "
                "and prompts are never cut: raise max_tokens or use fewer or smaller images"
            )
        return kept


_Role = Literal["query", "target", "negative", "answer"]


@dataclass(slots=True, eq=False)
class _Sequence:
    """A sequence under construction: rendered first; tokens follow once images are counted.

    role   its part in the example; None outside training
    label_at   indices of the labelled tokens
    labelled_answers   how many answers have a labelled token other than control tokens
    """

    name: str
    rendered: RenderedSequence
    role: _Role | None = None
    tokens: TokenSequence = field(default_factory=lambda: TokenSequence.from_text([]))
    label_at: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    labelled_answers: int = 0


def _embedding_order(groups: Sequence[Sequence[_Sequence]]) -> list[int]:
    """Indices of the queries, then the targets, then the negatives among all sequences."""
    roles = [s.role for group in groups for s in group]
    wanted: tuple[_Role, ...] = ("query", "target", "negative")
    return [i for role in wanted for i, own in enumerate(roles) if own == role]


def _concatenated(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)
