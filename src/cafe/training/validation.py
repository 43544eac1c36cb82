"""The model of a run, measured on held-out examples.

Examples are collated and read as in training, so `language_loss` is the training's, and embeddings
are those that it contrasts. A query and a target belong together where any example pairs them;
equal ones count once. `untouched` keeps every trace of it out of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from cafe.batching import prefetch_map
from cafe.data.quarantine import Skipped
from cafe.errors import DataError
from cafe.metrics import alignment, effective_rank, modality_gap, two_way_ranks, uniformity
from cafe.model.rows.chunk import Chunk
from cafe.model.rows.collate import Collator
from cafe.model.vlm import CAFe
from cafe.objective import next_token_nll
from cafe.ranks import Rank
from cafe.training.distributed import any_rank
from cafe.training.evaluation_views import PairedSides
from cafe.training.held_out import HeldOut
from cafe.training.log import SampleAnswer
from cafe.training.state import random_state, set_random_state
from cafe.types import Conversation, Example, Image, Scores, content_key

if TYPE_CHECKING:
    from jaxtyping import Float

KS = (1, 5, 10)
GEOMETRY_ROWS = 1024
"""Number of queries and targets whose geometry is measured; its time grows with the square."""
SAMPLE_TOKENS = 64
"""Longest answer of a sample."""


class EvaluationStopped(Exception):
    """The run was asked to stop; the evaluation is made when it resumes."""


@dataclass(frozen=True, slots=True)
class _Collated:
    """A batch: the numbers of its examples that can be used, and why others cannot."""

    chunk: Chunk | None
    numbers: list[int]
    skipped: list[Skipped]


@dataclass(frozen=True, slots=True)
class _Read:
    """What was read of a batch: summed NLL and its tokens, and the embeddings of each pair."""

    nats: float = 0.0
    tokens: int = 0
    pairs: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class HeldOutScores:
    """What was measured.

    scores    the measures (`measure_names`)
    skipped   the examples that cannot be used
    sides     what was embedded; None: there are no pairs
    """

    scores: Scores
    skipped: list[Skipped]
    sides: PairedSides | None


@dataclass(frozen=True, slots=True)
class Validation:
    """How a run's model is measured on its held-out examples.

    vlm        the model, not wrapped
    collator   as in training, without what only the losses need
    held_out   the examples
    batch      number of examples per forward
    samples    number of examples that the model answers
    autocast   the context of every forward
    rank       this process among those that share the work
    sharded    every forward is a collective, so each rank makes all of them
    """

    vlm: CAFe
    collator: Collator
    held_out: HeldOut
    batch: int
    samples: int
    autocast: Callable[[], AbstractContextManager[object]]
    rank: Rank = field(default_factory=Rank)
    sharded: bool = False

    def scores(self, stopped: Callable[[], bool]) -> HeldOutScores:
        """Measure the model on all examples.

        Raises:
            DataError: Fewer than two pairs can be used.
            EvaluationStopped: `stopped` said so, on any rank.
        """
        count = len(self.held_out.examples)
        batches = [range(i, min(i + self.batch, count)) for i in range(0, count, self.batch)]

        def read(own: Sequence[range]) -> list[_Read]:
            threads = 0 if self.vlm.device.type == "cpu" else 2
            return [self._read(c, stopped) for c in prefetch_map(self._collated, own, threads)]

        parts = read(batches) if self.sharded else self.rank.share(batches, read)
        scores: Scores = {}
        sides: PairedSides | None = None
        if tokens := sum(part.tokens for part in parts):
            scores["language_loss"] = sum(part.nats for part in parts) / tokens
        if pairs := [pair for part in parts for pair in part.pairs]:
            numbers, query, target = zip(*pairs, strict=True)
            used = [self.held_out.examples[i] for i in numbers]
            try:
                scores |= pair_scores(used, np.stack(query), np.stack(target))
                sides = paired_sides(used, np.stack(query), np.stack(target))
            except (DataError, ValueError) as error:
                raise DataError(f"{self.held_out.name}: {error}") from error
        return HeldOutScores(scores, [item for part in parts for item in part.skipped], sides)

    @property
    def sampled(self) -> list[Example]:
        """The examples that the model answers, which are always the same."""
        asked = [e for e in self.held_out.examples if e.dialogues]
        if self.sharded or not asked or not self.samples:
            return []
        numbers = np.linspace(0, len(asked) - 1, min(self.samples, len(asked))).astype(int)
        return [asked[i] for i in numbers]

    @property
    def sample_prompts(self) -> list[Conversation]:
        """What is asked of them."""
        return [_prompt(example.dialogues[0]) for example in self.sampled]

    def answers(self) -> tuple[SampleAnswer, ...]:
        """What the model answers to a few examples."""
        chosen, prompts = self.sampled, self.sample_prompts
        if not chosen:
            return ()

        def generate(own: Sequence[Conversation]) -> list[str]:
            with self.autocast():
                answers: Any = self.vlm.generate(list(own), max_new_tokens=SAMPLE_TOKENS)
            return answers

        answers = self.rank.share(prompts, generate)
        return tuple(
            SampleAnswer(
                example.id, _written(prompt), example.dialogues[0][len(prompt)].text, answer
            )
            for example, prompt, answer in zip(chosen, prompts, answers, strict=True)
        )

    def _collated(self, batch: range) -> _Collated:
        """One chunk of the examples, without those that cannot be collated."""
        examples = self.held_out.examples
        try:
            return _Collated(self.collator([examples[i] for i in batch]), list(batch), [])
        except DataError:
            pass  # one of them is broken: find out which
        good: list[int] = []
        skipped: list[Skipped] = []
        for number in batch:
            try:
                self.collator([examples[number]])
                good.append(number)
            except DataError as error:
                record = f"id {examples[number].id!r}"
                skipped.append(Skipped(self.held_out.name, record, str(error)))
        chunk = self.collator([examples[i] for i in good]) if good else None
        return _Collated(chunk, good, skipped)

    def _read(self, collated: _Collated, stopped: Callable[[], bool]) -> _Read:
        """One forward. All that is kept of it is on the host."""
        stop = stopped()
        if any_rank(stop, self.vlm.device) if self.sharded else stop:
            raise EvaluationStopped
        if collated.chunk is None:
            return _Read(skipped=collated.skipped)
        chunk, head = collated.chunk.to(self.vlm.device), self.vlm.lm_head
        rows = chunk.rows
        with torch.no_grad(), self.autocast():
            hidden = self.vlm(rows, chunk.vision, read_only=True).flatten(0, 1)
            nll, tokens = next_token_nll(
                hidden[rows.label_source],
                rows.label_ids,
                head.weight,
                bias=head.bias,
                softcap=self.vlm.logit_softcap,
            )
        embeddings = hidden[rows.embedded_at].float().mean(dim=1).cpu().numpy()
        paired = [i for i in collated.numbers if self.held_out.examples[i].query is not None]
        sides = embeddings[: chunk.pairs], embeddings[chunk.pairs : 2 * chunk.pairs]
        return _Read(float(nll), tokens, list(zip(paired, *sides, strict=True)), collated.skipped)


@contextmanager
def untouched(vlm: CAFe, device: torch.device, *, compiled: bool = False) -> Iterator[None]:
    """A context in which the model may be used without a trace in the run that trains it.

    Dropout is off, and afterwards every module and random stream is as it was. A compiled model is
    not compiled for shapes that training never sees: compilation has a limit for each layer.
    """
    modes: list[tuple[nn.Module, bool]] = [(module, module.training) for module in vlm.modules()]
    streams = random_state(device)
    vlm.eval()
    try:
        if compiled:
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            yield
    finally:
        for module, training in modes:
            module.training = training
        set_random_state(streams, device)


# ---------------------------------------------------------------------- measures


def side_names(examples: Sequence[Example]) -> tuple[str, str]:
    """What queries and targets are called: image and text where all of them are."""
    kinds = {(_kind(e.query), _kind(e.target)) for e in examples if e.query and e.target}
    if len(kinds) == 1 and (pair := kinds.pop()) in {("image", "text"), ("text", "image")}:
        return pair
    return "query", "target"


def measure_names(examples: Sequence[Example]) -> list[str]:
    """The measures of these examples, in the order in which `Validation.scores` has them."""
    names = ["language_loss"] if any(example.dialogues for example in examples) else []
    if not any(example.query for example in examples):
        return names
    one, other = _ordered(side_names(examples))
    ways = ((one, other), (other, one))
    names += [f"{a}_to_{b}_recall@{k}" for a, b in ways for k in KS]
    names += ["modality_gap", "alignment"]
    return names + [
        f"{name}/{s}" for s in (one, other) for name in ("uniformity", "effective_rank")
    ]


def pair_scores(
    examples: Sequence[Example],
    query: Float[np.ndarray, "n d"],
    target: Float[np.ndarray, "n d"],
) -> Scores:
    """Retrieval both ways and the geometry of the sides, from an embedding of each side.

    `image_to_text_recall@k` is the share of images with a right text among the k nearest of all; a
    tie counts against the model (`cafe.metrics.ranking`). Geometry: `cafe.metrics.geometry`.

    Raises:
        DataError, ValueError: Fewer than two queries or targets, or embeddings without a direction.
    """
    paired = paired_sides(examples, query, target)
    names, sides = paired.names, dict(zip(paired.names, paired.embeddings, strict=True))
    ranks = two_way_ranks(*paired.embeddings, [sorted(own) for own in paired.right[0]])
    of_side = dict(zip(names, ranks, strict=True))
    one, other = _ordered(names)
    scores: Scores = {}
    for a, b in ((one, other), (other, one)):
        scores |= {f"{a}_to_{b}_recall@{k}": float((of_side[a] <= k).mean()) for k in KS}
    scores |= {"modality_gap": modality_gap(sides[one], sides[other])}
    scores |= {"alignment": alignment(_units(query), _units(target))}
    for side in (one, other):
        some = sides[side][:GEOMETRY_ROWS]
        scores |= {f"uniformity/{side}": uniformity(some)}
        scores |= {f"effective_rank/{side}": effective_rank(some)}
    return scores


def paired_sides(
    examples: Sequence[Example],
    query: Float[np.ndarray, "n d"],
    target: Float[np.ndarray, "n d"],
) -> PairedSides:
    """The distinct queries and targets, and which belong together; an embedding of each side.

    Raises:
        DataError: Fewer than two queries or targets.
    """
    shown = [e.query or () for e in examples], [e.target or () for e in examples]
    queries, query_of = _distinct([content_key(side) for side in shown[0]])
    targets, target_of = _distinct([content_key(side) for side in shown[1]])
    if min(len(queries), len(targets)) < 2:
        raise DataError("fewer than two different queries, or targets, can be used")
    right: tuple[list[set[int]], list[set[int]]] = (
        [set() for _ in queries],
        [set() for _ in targets],
    )
    for i, j in zip(query_of, target_of, strict=True):
        right[0][i].add(j)
        right[1][j].add(i)
    return PairedSides(
        side_names(examples),
        ([shown[0][i] for i in queries], [shown[1][i] for i in targets]),
        (_units(query)[queries], _units(target)[targets]),
        right,
    )


def _ordered(names: tuple[str, str]) -> tuple[str, str]:
    """Images first, whichever side they are."""
    return ("image", "text") if "image" in names else names


def _kind(side: Conversation | None) -> str:
    """image: a single one, without words; text; mixed."""
    parts = [part for message in side or () for part in message.content]
    shown = [part for part in parts if not isinstance(part, str)]
    if not shown:
        return "text"
    alone = len(shown) == 1 and all(not p.strip() for p in parts if isinstance(p, str))
    return "image" if alone and isinstance(shown[0], Image) else "mixed"


def _distinct(keys: Sequence[object]) -> tuple[list[int], list[int]]:
    """The first index of each distinct key, and for every key the number of its first."""
    number: dict[object, int] = {}
    first: list[int] = []
    for index, key in enumerate(keys):
        if key not in number:
            number[key] = len(first)
            first.append(index)
    return first, [number[key] for key in keys]


def _units(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


# ---------------------------------------------------------------------- samples


def _prompt(dialogue: Conversation) -> Conversation:
    return tuple(takewhile(lambda message: message.role != "assistant", dialogue))


def _written(prompt: Conversation) -> str:
    """The prompt as text; what it shows is named by its kind."""
    parts = (part for message in prompt for part in message.content)
    return " ".join(p if isinstance(p, str) else f"<{type(p).__name__.lower()}>" for p in parts)
