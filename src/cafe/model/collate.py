"""Examples -> chunks of rows: the only place that knows pictures' tokens, labels and padding.

A `Collator` holds nothing but facts (processor, family, settings), so a data loader's workers can
carry it. How a conversation becomes text is `cafe.model.rendering`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cafe.errors import DataError
from cafe.model.families import Family
from cafe.model.identity import hashes, identity
from cafe.model.official import official_labels
from cafe.model.packing import shared_rows
from cafe.model.pictures import Pictures, named
from cafe.model.prompts import DEFAULT_PROMPT
from cafe.model.rendering import RenderedSequence, Renderer
from cafe.model.rows import Chunk, Rows
from cafe.model.trie import (
    Row,
    TokenSequence,
    build_row,
    pack_rows,
    separate_rows,
    sight_ends,
    stack_rows,
)
from cafe.types import Conversation, Example


@dataclass(frozen=True, slots=True)
class Collator:
    """Turns examples into `Chunk`s.

    processor, family   the model's own
    pooled_token        the token that ends an assistant turn; embeddings are read there
    max_tokens          longest sequence; longer texts are cut, pictures never
    sharing             "trie": one row per example; "none": one row per sequence
    row_tokens          pack rows up to this length (for FlexAttention); None: one example a row
    dummy_image         add an unused picture to a chunk without any, so that every rank runs the
                        vision tower and none waits for another
    max_frames          of a video; they are evenly spaced. A family without videos sees them as
                        pictures
    official            system turn and labels as the published code has them
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

    @property
    def render(self) -> Renderer:
        return Renderer(
            self.processor, self.family, self.pooled_token, self.max_frames, self.official
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
        """Collate `examples` into one chunk. Raises DataError naming the example."""
        per_example = [
            [_Sequence(f"example {e.id!r}", r) for r in self._render_example(e)] for e in examples
        ]
        pictures = self._tokenize([s for group in per_example for s in group])

        pairs = [e for e in examples if e.query is not None]
        groups = [_by_role(group) for group in per_example]
        embeddings_only = [[s for s in group if s.rendered.pooled] for group in per_example]
        return Chunk(
            ids=tuple(example.id for example in examples),
            rows=self._rows(per_example, groups, pictures),
            embedding_rows=self._rows(embeddings_only, groups, pictures),
            vision=pictures.inputs,
            pairs=len(pairs),
            target_ids=hashes([e.target_id or identity(e.target) for e in pairs]),
            negative_ids=hashes([identity(n) for e in pairs for n in e.negatives]),
        )

    def _render_example(self, example: Example) -> list[RenderedSequence]:
        """Query, target, negatives, then every assistant turn: a branch each."""
        try:
            sides = [] if example.query is None else [example.query, example.target]
            rendered = [
                self.render.embedding(side, example.embedding_prompt)
                for side in (*sides, *example.negatives)
                if side is not None
            ]
            for dialogue in example.dialogues:
                rendered.extend(self.render.answers(dialogue))
        except DataError as error:
            raise DataError(f"example {example.id!r}: {error}") from error
        return rendered

    def _rows(
        self,
        per_example: list[list[_Sequence]],
        groups: list[_Roles],
        pictures: Pictures,
    ) -> Rows:
        rows: list[Row] = []
        of_row: list[_Sequence] = []
        for group in filter(None, per_example):
            tokens = [s.tokens for s in group]
            rows.extend([build_row(tokens)] if self.sharing == "trie" else separate_rows(tokens))
            of_row.extend(group)
        if not rows:
            return Rows.none()
        if self.row_tokens is not None:
            rows = pack_rows(rows, self.row_tokens)
        batch = stack_rows(rows, self.pad_id)
        width = batch.input_ids.shape[1]
        flat: dict[int, np.ndarray] = {}
        sequences = iter(of_row)
        for r, row in enumerate(rows):
            for place in row.places:
                flat[id(next(sequences))] = place + r * width
        pooled = [
            flat[id(s)][-1]
            for role in ("queries", "targets", "negatives")
            for group in groups
            for s in getattr(group, role)
        ]
        source = [flat[id(s)][s.label_at - 1] for s in of_row if len(s.label_at)]
        labels = [s.tokens.tokens[s.label_at] for s in of_row if len(s.label_at)]
        image_order, video_order = pictures.orders(batch.keys)
        return Rows(
            input_ids=batch.input_ids,
            positions=batch.positions,
            subtree_end=batch.subtree_end,
            image_order=torch.tensor(image_order, dtype=torch.long),
            video_order=torch.tensor(video_order, dtype=torch.long),
            pooled=torch.tensor(pooled, dtype=torch.long),
            label_source=_concatenated(source),
            label_ids=_concatenated(labels),
            sight_end=torch.from_numpy(sight_ends(batch.keys))
            if self.family.pictures_see_themselves
            else None,
            plain=all(len(row.places) == 1 for row in rows),
        )

    # ------------------------------------------------------------------ inference

    def embedding_rows(
        self,
        conversations: Sequence[Conversation],
        prompt: str = DEFAULT_PROMPT,
        numbers: Sequence[int] | None = None,
        token_cost: float | None = None,
    ) -> tuple[Rows, dict[str, Tensor]]:
        """`pooled` holds the places of the conversations' embeddings, in order.

        numbers      what errors call the conversations; None: 0, 1, …
        token_cost   share rows where that is cheaper (`shared_rows`); None: one row for each
        """
        rendered = [self.render.embedding(c, prompt) for c in conversations]
        return self._read_rows(rendered, numbers, token_cost)[:2]

    def prompt_rows(
        self,
        conversations: Sequence[Conversation],
        numbers: Sequence[int] | None = None,
        token_cost: float | None = None,
    ) -> tuple[Rows, dict[str, Tensor]]:
        """The same for conversations that wait for an answer; `pooled` is their last token."""
        prompts = [replace(self.render.prompt(c), pooled=True) for c in conversations]
        return self._read_rows(prompts, numbers, token_cost)[:2]

    def answer_rows(
        self,
        conversations: Sequence[Conversation],
        numbers: Sequence[int] | None = None,
        token_cost: float | None = None,
    ) -> tuple[Rows, dict[str, Tensor], Tensor]:
        """The same for conversations that end with an answer, whose tokens are labelled.

        Third comes which conversation each labelled token is of, int64 [l].
        Raises DataError for an answer that is empty.
        """
        rendered = [self.render.answers(c)[-1] for c in conversations]
        return self._read_rows(rendered, numbers, token_cost)

    def _read_rows(
        self,
        rendered: Sequence[RenderedSequence],
        numbers: Sequence[int] | None,
        token_cost: float | None,
    ) -> tuple[Rows, dict[str, Tensor], Tensor]:
        numbers = range(len(rendered)) if numbers is None else numbers
        sequences = [_Sequence(f"input {n}", r) for n, r in zip(numbers, rendered, strict=True)]
        pictures = self._tokenize(sequences)
        groups = [_Roles(queries=[s], targets=[], negatives=[]) for s in sequences]
        rows = [[i] for i in range(len(sequences))]
        if token_cost is not None and self.sharing == "trie":
            rows = shared_rows([s.tokens.keys for s in sequences], token_cost)
        read = self._rows([[sequences[i] for i in row] for row in rows], groups, pictures)
        whose = [np.full(len(sequences[i].label_at), i) for row in rows for i in row]
        return read, pictures.inputs, _concatenated(whose)

    # ------------------------------------------------------------------ tokens

    def _tokenize(self, sequences: Sequence[_Sequence]) -> Pictures:
        """Fill in the tokens of `sequences`; returns the pictures they show."""
        pictures = Pictures.of(
            [(s.name, s.rendered.images) for s in sequences],
            self.processor,
            self.family,
            self.dummy_image,
            self.max_frames,
        )
        if not sequences:
            return pictures
        shown = [
            named(s.name, pictures.show, s.rendered.text, s.rendered.images) for s in sequences
        ]
        texts = [prompt.text for prompt in shown]
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        for s, prompt, ids, offsets in zip(
            sequences, shown, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            tokens, keys, spans = named(
                s.name, pictures.fill, prompt, np.asarray(ids, dtype=np.int64), np.asarray(offsets)
            )
            if len(tokens) > self.max_tokens:
                kept = self._kept(s, prompt.text, len(tokens), spans)
                tokens, keys, spans = tokens[kept], keys[kept], spans[kept]
            s.tokens = TokenSequence(tokens, keys, pictures.positions(keys))
            if s.rendered.labelled:
                begin = len(prompt.text) - s.rendered.labelled
                s.label_at = np.flatnonzero(spans[:, 1] > begin)
                if self.official:
                    s.label_at = official_labels(prompt.text, tokens, spans, self._tokenizer)
        return pictures

    def _kept(self, sequence: _Sequence, text: str, count: int, spans: np.ndarray) -> np.ndarray:
        """Which tokens stay when a sequence is too long: the longest text loses its end."""
        excess = count - self.max_tokens
        begin = text.rfind(sequence.rendered.longest)
        end = begin + len(sequence.rendered.longest)
        cuttable = np.flatnonzero((spans[:, 0] >= begin) & (spans[:, 1] <= end))
        if begin < 0 or len(cuttable) <= excess:
            raise DataError(
                f"{sequence.name}: {count} tokens, and max_tokens is {self.max_tokens}; pictures "
                "and prompts are never cut: raise max_tokens or use fewer or smaller pictures"
            )
        kept = np.ones(count, dtype=bool)
        kept[cuttable[-excess:]] = False
        return kept


@dataclass(slots=True, eq=False)
class _Sequence:
    """A sequence in the making: rendered first, tokens later, once pictures are counted."""

    name: str
    rendered: RenderedSequence
    tokens: TokenSequence = field(default_factory=lambda: TokenSequence.from_text([]))
    label_at: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class _Roles:
    queries: list[_Sequence]
    targets: list[_Sequence]
    negatives: list[_Sequence]


def _by_role(group: Sequence[_Sequence]) -> _Roles:
    pooled = [s for s in group if s.rendered.pooled]
    return _Roles(queries=pooled[:1], targets=pooled[1:2], negatives=pooled[2:])


def _concatenated(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64))
