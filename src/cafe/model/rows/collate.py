"""Turns examples into chunks of rows: the only place that knows image tokens, labels and padding.

A `Collator` holds only settings (processor, family, limits), so a data loader can send it to its
workers. `cafe.model.rows.render` turns conversations into text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from cafe.errors import DataError, NoLabelledTokens
from cafe.model.families import Family
from cafe.model.rows.assembly import (
    DraftSequence,
    RowLayout,
    SequenceRole,
    concatenated,
    embedding_order,
)
from cafe.model.rows.chunk import Chunk, numbers_of, teacher_scores
from cafe.model.rows.cutting import kept_tokens
from cafe.model.rows.images import ImageInputs, named
from cafe.model.rows.lengths import PlaceholderLengths
from cafe.model.rows.matching import (
    ASKED_PER_PAIR,
    TEXT_TARGET,
    MatchSide,
    MatchSides,
    match_questions,
)
from cafe.model.rows.official import answers_labelled, official_labels
from cafe.model.rows.prompts import DEFAULT_PROMPT
from cafe.model.rows.protocol import CAFE_PROTOCOL, Protocol
from cafe.model.rows.render import RenderedSequence, Renderer
from cafe.model.rows.rows import Rows, hashes, identity, shared_rows
from cafe.model.rows.trie import TokenSequence
from cafe.types import Conversation, Example

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Int


@dataclass(frozen=True)  # without slots, so that cached_property works
class Collator:
    """Turns examples into `Chunk`s.

    processor, family   the model's own
    pooled_token        ends an assistant turn; embeddings are read there, or as `protocol` says
    protocol            how embeddings are asked for (`cafe.model.rows.protocol`)
    max_tokens          longest sequence; longer texts are cut, images never
    sharing             "trie": one row per example; "none": one row per sequence
    row_tokens          pack rows up to this length (for FlexAttention); None: one example a row
    dummy_image         add an unused image to a chunk without any, so that every rank runs the
                        vision tower and none waits for another
    max_frames          of a video, evenly spaced; a family without videos sees them as images
    official            system turn and labels as in the published code
    latent              the learned tokens before the pooled one, as text (`cafe.model.latent`)
    averages            how many latent tokens' states are averaged for an embedding; 0: it is the
                        state at the pooled token
    own_prompt          what the embedding prompt "compress" means for this model
    block_cost          the rows of a chunk are sorted by length and computed in blocks of similar
                        length, which saves padding; what each further block costs, in tokens
                        (`cafe.model.rows.blocks`). None: all rows are one block
    every_token         rows name every token of what is embedded (`cafe.model.multi_vector`)
    matching            chunks know what match questions can be asked (`cafe.model.rows.matching`)
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
    latent: str = ""
    averages: int = 0
    block_cost: int | None = None
    matching: bool = False
    every_token: bool = False
    protocol: Protocol = CAFE_PROTOCOL

    @cached_property
    def render(self) -> Renderer:
        return Renderer(
            self.processor,
            self.family,
            self.pooled_token,
            self.max_frames,
            self.official,
            self.own_prompt,
            self.latent,
            self.protocol,
        )

    @property
    def layout(self) -> RowLayout:
        """How sequences become rows."""
        return RowLayout(
            self.pad_id,
            self.sharing,
            self.row_tokens,
            self.block_cost,
            self.family.bidirectional_image_attention,
            self.averages,
            self.every_token,
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
        questions = [self._questions(example) for example in examples]
        sequences = [s for group in groups for s in group]
        images = self._images(sequences)
        asked = [s for own in questions for s in own if s is not None]
        self._tokenize([*sequences, *asked], images)
        for s in sequences:
            answers = s.rendered.answers
            if s.labelled_answers < answers:
                raise NoLabelledTokens(
                    f"{s.name}: {answers - s.labelled_answers} of its {answers} answers have no "
                    "labelled token: its text does not show them as answers"
                )
        whole = [[s.read() for s in group] for group in groups]
        embedded = [[s for s in group if s.role != "answer"] for group in whole]
        pairs = [e for e in examples if e.query is not None]
        scored, scores = teacher_scores(pairs)
        return Chunk(
            ids=tuple(example.id for example in examples),
            rows=self.layout.rows(whole, embedding_order(whole), images.orders),
            embedding_rows=self.layout.rows(embedded, embedding_order(embedded), images.orders),
            vision=images.inputs,
            pairs=len(pairs),
            target_ids=hashes([e.target_id or identity(e.target) for e in pairs]),
            query_ids=hashes([identity(e.query) for e in pairs]),
            content_ids=hashes([identity(e.target) for e in pairs]),
            negative_ids=hashes([identity(n) for e in pairs for n in e.negatives]),
            query_thoughts=numbers_of([e.query_thought for e in pairs]),
            target_thoughts=numbers_of([e.target_thought for e in pairs]),
            scored=scored,
            scores=scores,
            match=MatchSides.of(
                examples,
                [[None if s is None else s.tokens for s in own] for own in questions],
                whole,
                orders=images.orders,
                layout=self.layout,
                max_tokens=self.max_tokens,
            )
            if self.matching
            else None,
        )

    def row_lengths(self, example: Example) -> list[int]:
        """Numbers of tokens of the example's rows, before packing, without decoding its images.

        Raises:
            DataError: as `__call__`, but a damaged image is noticed only if its size is.
        """
        sequences = self._sequences(example)
        asked = [s for s in self._questions(example)[:1] if s is not None]
        media = [(s.name, s.rendered.images) for s in sequences]
        self._tokenize([*sequences, *asked], self._lengths.images(media))
        lengths = [len(row) for row in self.layout.merged([s.tokens for s in sequences])]
        added = [ASKED_PER_PAIR * len(MatchSide.of(TEXT_TARGET, 0, s.tokens).tail) for s in asked]
        return [lengths[0] + sum(added), *lengths[1:]] if lengths else lengths

    @cached_property
    def _lengths(self) -> PlaceholderLengths:
        return PlaceholderLengths(self.processor, self.family, self.max_frames)

    def _sequences(self, example: Example) -> list[DraftSequence]:
        """What is embedded, then every assistant turn, each a branch of the row."""
        sides: list[tuple[SequenceRole, Conversation | None]] = [
            ("query", example.query),
            ("target", example.target),
            *(("negative", negative) for negative in example.negatives),
            ("query_thought", example.query_thought),
            ("target_thought", example.target_thought),
        ]
        name, prompt = f"example {example.id!r}", example.embedding_prompt
        try:
            embedded = [
                DraftSequence(name, self.render.embedding(side, prompt), role)
                for role, side in sides
                if side is not None
            ]
            answers = [
                DraftSequence(name, rendered, "answer")
                for dialogue in example.dialogues
                for rendered in self.render.answers(dialogue)
            ]
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        return [*embedded, *answers]

    def _questions(self, example: Example) -> list[DraftSequence | None]:
        """The example's match questions; an empty list where they are not trained."""
        name = f"example {example.id!r}"
        return [
            None
            if question is None
            else DraftSequence(name, named(name, self.render.prompt, question), "question")
            for question in (match_questions(example) if self.matching else ())
        ]

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
            conversations, lambda c: self.render.embedding(c, prompt), numbers, token_cost, True
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
        embeds: bool = False,
    ) -> tuple[Rows, dict[str, Tensor], Int[Tensor, " l"]]:
        sequences = self._drafts(conversations, render, numbers)
        images = self._images(sequences)
        self._tokenize(sequences, images)
        groups = [[i] for i in range(len(sequences))]
        if token_cost is not None and self.sharing == "trie":
            groups = shared_rows([s.tokens.keys for s in sequences], token_cost)
        order = [i for group in groups for i in group]
        # Sequence order[j] comes j-th; argsort inverts the permutation.
        pooled = np.argsort(order).tolist()
        read = [[sequences[i].read() for i in group] for group in groups]
        layout = self.layout if embeds else replace(self.layout, averages=0)
        rows = layout.rows(read, pooled, images.orders)
        owners = [np.full(len(sequences[i].label_at), i) for i in order]
        return rows, images.inputs, torch.from_numpy(concatenated(owners))

    def prompt_tokens(
        self, conversations: Sequence[Conversation], numbers: Sequence[int] | None = None
    ) -> list[TokenSequence]:
        """The tokens of conversations to be answered, without decoding their images.

        Raises DataError as `prompt_rows`, but a damaged image is noticed only if its size is.
        """
        sequences = self._drafts(conversations, self.render.prompt, numbers)
        media = [(s.name, s.rendered.images) for s in sequences]
        self._tokenize(sequences, self._lengths.images(media))
        return [s.tokens for s in sequences]

    @staticmethod
    def _drafts(
        conversations: Sequence[Conversation],
        render: Callable[[Conversation], RenderedSequence],
        numbers: Sequence[int] | None,
    ) -> list[DraftSequence]:
        names = [f"input {n}" for n in (range(len(conversations)) if numbers is None else numbers)]
        return [
            DraftSequence(name, named(name, render, conversation))
            for name, conversation in zip(names, conversations, strict=True)
        ]

    # ------------------------------------------------------------------ tokens

    def _images(self, sequences: Sequence[DraftSequence]) -> ImageInputs:
        """The processed images of `sequences`."""
        return ImageInputs.of(
            [(s.name, s.rendered.images) for s in sequences],
            self.processor,
            self.family,
            self.dummy_image,
            self.max_frames,
        )

    def _tokenize(self, sequences: Sequence[DraftSequence], images: ImageInputs) -> None:
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
            # A question without its end asks nothing: a long one is not asked (`MatchSides.fits`).
            if len(tokens) > self.max_tokens and s.role != "question":
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
        self, sequence: DraftSequence, text: str, count: int, spans: np.ndarray
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
