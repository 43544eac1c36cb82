"""Captions compared word by word with references: CIDEr-D and BLEU, as COCO's server defines them.

Both count n-grams of one to four words ("runs"). BLEU is sacrebleu's. CIDEr-D is implemented here,
because the two libraries that have it are not sound dependencies: pycocoevalcap (2020, the last
release; no stated licence) is 100 MB of Java archives, and aac-metrics installs audio models.
`caption_words` stands in for COCO's tokenizer, which needs Java too, so published numbers may
differ in the second decimal place.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cafe.errors import DataError

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Float, Int

__all__ = ["bleu_columns", "bleu_summary", "caption_words", "cider_d"]

LONGEST = 4
"""Words in the longest run that is counted."""

_SIGMA_WORDS = 6.0  # how quickly CIDEr-D forgives less as lengths differ
_WORD = re.compile(r"n't|'(?:s|m|d|ll|re|ve)\b|[^\W_]+?(?=n't)|[^\W_]+(?:[-.][^\W_]+)*")

Words = Sequence[str]


def caption_words(text: str) -> list[str]:
    """Lower-case words without punctuation, in the manner of the Penn Treebank.

    "A dog's ball, isn't it?" -> a dog 's ball is n't it
    """
    return _WORD.findall(text.lower().replace("’", "'"))


def cider_d(
    candidates: Sequence[Words], references: Sequence[Sequence[Words]]
) -> Float[np.ndarray, " n"]:
    """CIDEr-D (Vedantam et al., arXiv 1411.5726) of each caption, in [0, 10]; its mean is reported.

    A run of words weighs count × log(images / images with it in their references). For each length
    1..4 the cosine between caption and reference, the caption's weights clipped to the reference's,
    times exp(-(difference of lengths)² / 2·6²); the mean over lengths and references, times 10.

    Args:
        candidates: the words of one caption per image; none at all score 0.
        references: the words of at least one reference per image. Document frequencies are
            counted over these images, so a subset has other scores than the whole.

    Raises:
        DataError: an image without references.
        ValueError: no images, or two different numbers of them.
    """
    _check(candidates, references)
    counted = [[_runs(words) for words in own] for own in references]
    frequency = Counter(run for own in counted for run in set().union(*own))
    log_images = math.log(len(references))

    def weights(runs: Counter[tuple[str, ...]]) -> list[dict[tuple[str, ...], float]]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for run, times in runs.items():
            rarity = log_images - math.log(max(1, frequency[run]))
            vectors[len(run) - 1][run] = times * rarity
        return vectors

    scores = []
    for words, own, texts in zip(candidates, counted, references, strict=True):
        said = weights(_runs(words))
        similar = [
            _similarity(said, weights(runs)) * _length_penalty(len(words) - len(text))
            for runs, text in zip(own, texts, strict=True)
        ]
        scores.append(10 * sum(similar) / len(similar))
    return np.array(scores)


def bleu_columns(
    candidates: Sequence[Words], references: Sequence[Sequence[Words]]
) -> dict[str, Float[np.ndarray, "n ..."]]:
    """Per image, what `bleu_summary` needs the sums of, as sacrebleu counts it.

    bleu_matches, bleu_runs   [n, 4]: runs of 1..4 words that a reference has (each at most as often
                              as the reference that has most of it), and all runs
    bleu_words, bleu_reference_words   [n]: lengths of the caption and of the nearest reference

    Raises:
        DataError, ValueError: as in `cider_d`.
    """
    from sacrebleu.metrics.bleu import BLEU

    _check(candidates, references)
    # `effective_order` only silences a warning: of each image the counts are used, not the score.
    counter = BLEU(tokenize="none", max_ngram_order=LONGEST, effective_order=True)
    counted = [
        counter.sentence_score(" ".join(words), [" ".join(text) for text in own])
        for words, own in zip(candidates, references, strict=True)
    ]
    return {
        "bleu_matches": np.array([one.counts for one in counted], dtype=np.float64),
        "bleu_runs": np.array([one.totals for one in counted], dtype=np.float64),
        "bleu_words": np.array([one.sys_len for one in counted], dtype=np.float64),
        "bleu_reference_words": np.array([one.ref_len for one in counted], dtype=np.float64),
    }


def bleu_summary(
    sums: Mapping[str, Float[np.ndarray, " ..."]],
) -> dict[str, Float[np.ndarray, " ..."]]:
    """BLEU-1 to BLEU-4 (Papineni et al. 2002) from sums of `bleu_columns`, in [0, 1].

    Sums are [...], those of matches and runs [..., 4]; the scores are [...]. Not smoothed: without
    a single run of four words in common BLEU-4 is 0.
    """
    words, reference_words = sums["bleu_words"], sums["bleu_reference_words"]
    lengths = np.stack([words, reference_words], axis=-1)
    table = np.concatenate([sums["bleu_matches"], sums["bleu_runs"], lengths], axis=-1)
    scores = np.apply_along_axis(_bleu, -1, np.rint(table).astype(int))
    return {f"bleu{n}": scores[..., n - 1] for n in range(1, LONGEST + 1)}


def _bleu(counts: Int[np.ndarray, " 10"]) -> list[float]:
    """BLEU-1 to BLEU-4 from matches, runs and the two lengths."""
    from sacrebleu.metrics.bleu import BLEU

    *both, words, reference_words = counts.tolist()
    matches, runs = both[:LONGEST], both[LONGEST:]
    scores = [
        BLEU.compute_bleu(matches[:n], runs[:n], words, reference_words, max_ngram_order=n)
        for n in range(1, LONGEST + 1)
    ]
    return [one.score / 100 for one in scores]


def _runs(words: Words) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1)
    )


def _similarity(
    said: list[dict[tuple[str, ...], float]], reference: list[dict[tuple[str, ...], float]]
) -> float:
    total = 0.0
    for a, b in zip(said, reference, strict=True):
        norms = _norm(a.values()) * _norm(b.values())
        if norms:
            total += sum(min(w, b[run]) * b[run] for run, w in a.items() if run in b) / norms
    return total / LONGEST


def _norm(values: Iterable[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


def _length_penalty(difference_words: int) -> float:
    return math.exp(-(difference_words**2) / (2 * _SIGMA_WORDS**2))


def _check(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> None:
    if not candidates or len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} captions for {len(references)} images")
    for i, own in enumerate(references):
        if not own:
            raise DataError(f"image {i} has no reference caption; remove it")
