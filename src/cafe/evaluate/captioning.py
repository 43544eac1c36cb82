"""Captions against references: CIDEr-D and BLEU (how they are computed: `cafe.metrics.captions`).

Pictures and references are those of the retrieval task, in the same layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cafe.errors import DataError
from cafe.evaluate.data import Picture
from cafe.evaluate.describe import describe
from cafe.evaluate.journal import Journal
from cafe.evaluate.scoring import Ratio
from cafe.evaluate.sources import check_unique
from cafe.evaluate.task import Generate, Result
from cafe.metrics import bleu_columns, caption_words, cider_d

PROMPT = "Provide a one-sentence caption for the provided image."
MAX_NEW_TOKENS = 64


def captioning(
    generate: Generate,
    pictures: Sequence[Picture],
    *,
    prompt: str = PROMPT,
    journal: Journal | None = None,
) -> Result:
    """Ask for a caption of each picture. Scores: `cider_d`, in [0, 10], and `bleu1` to `bleu4`.

    CIDEr-D weighs words by how few of these pictures' references have them, so it has one value on
    a part of a data set and another on the whole; its interval leaves those weights as they are.

    Raises:
        DataError: no pictures, or two with one id.
    """
    if not pictures:
        raise DataError("there are no pictures to caption")
    check_unique([picture.id for picture in pictures], "captioning")
    shown = [(picture.id, picture.image) for picture in pictures]
    texts = describe(generate, shown, prompt, MAX_NEW_TOKENS, journal)
    said = [caption_words(text) for text in texts]
    references = [[caption_words(text) for text in picture.captions] for picture in pictures]
    columns = bleu_columns(said, references)
    items = {name: column.astype(np.int64) for name, column in columns.items()}
    return Result(
        len(pictures),
        {**items, "cider_d": cider_d(said, references)},
        {"cider_d": Ratio("cider_d")},
        derived="bleu",
        ids=tuple(picture.id for picture in pictures),
        details={"empty_replies": sum(not words for words in said)},
    )
