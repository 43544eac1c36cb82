"""Which texts of a sequence are cut, and by how much, when it is longer than the model reads.

Images and what the template writes are never cut: without its image or its turn ends a sequence
means something else. The longest text loses its end; where that is not enough, every long text
does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Bool, Int

SHORTEST_CUT = 32
"""Where several texts are cut, none becomes shorter than this number of tokens."""


def kept_tokens(
    texts: Sequence[str], rendered: str, spans: Int[np.ndarray, "t 2"], excess: int
) -> Bool[np.ndarray, " t"] | None:
    """Which tokens of a sequence remain when `excess` of them are cut.

    Args:
        texts: its pieces of text, in order, as they stand in `rendered`.
        rendered: the rendered conversation.
        spans: the first and last + 1 character of `rendered` of each token.
        excess: number of tokens to cut.

    Returns:
        None where the texts are too short for it.
    """
    longest = max(texts, key=len, default="")
    inside = [_tokens_within(rendered.rfind(longest), longest, spans)]
    if len(inside[0]) <= excess:
        inside = [_tokens_within(begin, one, spans) for begin, one in _places(rendered, texts)]
    cut = tokens_to_cut([len(tokens) for tokens in inside], excess)
    if cut is None:
        return None
    kept = np.ones(len(spans), dtype=bool)
    for tokens, number in zip(inside, cut, strict=True):
        kept[tokens[len(tokens) - number :]] = False
    return kept


def tokens_to_cut(lengths: Sequence[int], excess: int) -> list[int] | None:
    """How many tokens each text loses, `excess` in all: the longest become equally long.

    None where nothing of the only text would remain, or less than `SHORTEST_CUT` of several.
    """
    least = SHORTEST_CUT if len(lengths) > 1 else 1

    def cut_to(longest: int) -> int:
        return sum(max(0, length - longest) for length in lengths)

    if cut_to(least) < excess:
        return None
    longest = bisect_left(range(max(lengths)), -excess, key=lambda tokens: -cut_to(tokens))
    cut = [max(0, length - longest) for length in lengths]
    missing = excess - sum(cut)
    for i, length in enumerate(lengths):  # fewer than there are texts of this length
        if missing and length >= longest:
            cut[i], missing = cut[i] + 1, missing - 1
    return cut


def _places(rendered: str, texts: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Where each text stands, in order."""
    end = 0
    for text in texts:
        begin = rendered.find(text, end)
        if text and begin >= 0:
            yield begin, text
            end = begin + len(text)


def _tokens_within(begin: int, text: str, spans: Int[np.ndarray, "t 2"]) -> Int[np.ndarray, " n"]:
    """Indices of the tokens of a text that begins at `begin`; none if that is negative."""
    end = begin + len(text) if begin >= 0 else -1
    return np.flatnonzero((spans[:, 0] >= begin) & (spans[:, 1] <= end))
