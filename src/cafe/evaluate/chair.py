"""CHAIR (Rohrbach et al., arXiv 1809.02156): how much of what captions name is not there.

    folder/instances_val2014.json  folder/captions_val2014.json      COCO's annotations
    folder/synonyms.txt                                              the table of words (`words.py`)
    folder/val2014/COCO_val2014_….jpg

An object is there if it is annotated, or if one of the reference captions names it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cafe.errors import DataError
from cafe.evaluate.coco import read_captions, read_instances
from cafe.evaluate.describe import describe
from cafe.evaluate.journal import Journal
from cafe.evaluate.scoring import Ratio
from cafe.evaluate.sources import local_image
from cafe.evaluate.task import Generate, Result
from cafe.evaluate.words import chair_mentions, coco_words
from cafe.types import Image

PROMPT = "Describe this image in detail."
MAX_NEW_TOKENS = 512

Mentions = Callable[[str], Collection[str]]
"""A text -> the objects that it names, repetitions included."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture and the objects in it."""

    id: str
    image: Image
    objects: frozenset[str]


def chair(
    generate: Generate,
    pictures: Sequence[Shown],
    mentions: Mentions,
    *,
    prompt: str = PROMPT,
    max_new_tokens: int = MAX_NEW_TOKENS,
    journal: Journal | None = None,
) -> Result:
    """Let the model describe each picture. Scores: see `chair_result`."""
    named = [(p.id, p.image) for p in pictures]
    texts = describe(generate, named, prompt, max_new_tokens, journal)
    return chair_result(texts, pictures, mentions)


def chair_result(texts: Sequence[str], pictures: Sequence[Shown], mentions: Mentions) -> Result:
    """Scores of descriptions: `chair_i` (mentions of absent objects / mentions), `chair_s`
    (descriptions with one / descriptions), `recall` (different objects named and there / there),
    `mean_mentions` and `mean_length_words`. (`cafe.metrics.chair_scores` defines them.)

    An empty description invents nothing, finds nothing, and is counted in the details.

    Raises:
        DataError: no pictures.
    """
    if not pictures:
        raise DataError("there are no pictures to describe")
    named = [list(mentions(text)) for text in texts]
    there = [picture.objects for picture in pictures]
    invented = [
        sum(name not in own for name in names) for names, own in zip(named, there, strict=True)
    ]
    items = {
        "mentions": np.array([len(names) for names in named]),
        "invented": np.array(invented),
        "any_invented": np.array([int(count > 0) for count in invented]),
        "found": np.array([len(set(n) & o) for n, o in zip(named, there, strict=True)]),
        "there": np.array([len(own) for own in there]),
        "words": np.array([len(text.split()) for text in texts]),
    }
    ratios = {
        "chair_i": Ratio("invented", "mentions"),
        "chair_s": Ratio("any_invented"),
        "recall": Ratio("found", "there"),
        "mean_mentions": Ratio("mentions"),
        "mean_length_words": Ratio("words"),
    }
    empty = sum(not text.strip() for text in texts)
    ids = tuple(picture.id for picture in pictures)
    return Result(len(texts), items, ratios, ids=ids, details={"empty_replies": empty})


def read_chair(folder: Path, limit: int | None = None) -> tuple[list[Shown], Mentions]:
    """COCO val2014 in the layout above, and the finder of mentions.

    Raises:
        DataError: a file or a picture is missing, or a class has no line in the table of words.
    """
    words = coco_words(folder / "synonyms.txt")
    instances = read_instances(folder / "instances_val2014.json")
    captions = read_captions(folder / "captions_val2014.json")
    unknown = [name for name in instances.classes if name.lower() not in words.forms]
    if unknown:
        raise DataError(f"{folder / 'synonyms.txt'}: no line names the class {unknown[0]!r}")
    pictures = []
    for name, classes in list(instances.objects.items())[:limit]:
        told = {o for text in captions.get(name, ()) for o in chair_mentions(words, text)}
        objects = frozenset(words.forms[c.lower()] for c in classes) | told
        pictures.append(Shown(name, local_image(folder / "val2014", name, name), objects))
    return pictures, lambda text: chair_mentions(words, text)
