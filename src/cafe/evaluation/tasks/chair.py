"""CHAIR (Rohrbach et al., arXiv 1809.02156): which objects that captions name are not in the image.

    folder/instances_val2014.json  folder/captions_val2014.json      COCO's annotations
    folder/synonyms.txt                                              see `object_words`
    folder/val2014/COCO_val2014_….jpg

An object is present if it is annotated, or if one of the reference captions names it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from cafe.errors import DataError
from cafe.evaluation.asking import describe
from cafe.evaluation.datasets.coco import read_captions, read_instances
from cafe.evaluation.datasets.object_words import chair_mentions, coco_words
from cafe.evaluation.datasets.rows import local_image
from cafe.evaluation.journal import Journal
from cafe.evaluation.scoring import Ratio
from cafe.evaluation.task import Generate, TaskResult
from cafe.metrics import chair_columns
from cafe.types import Image

PROMPT = "Describe this image in detail."
MAX_NEW_TOKENS = 512

Mentions = Callable[[str], Collection[str]]
"""A text -> the objects that it names, repetitions included."""


@dataclass(frozen=True, slots=True)
class AnnotatedImage:
    """An image and the objects in it."""

    id: str
    image: Image
    objects: frozenset[str]


def chair(
    generate: Generate,
    images: Sequence[AnnotatedImage],
    mentions: Mentions,
    *,
    prompt: str = PROMPT,
    max_new_tokens: int = MAX_NEW_TOKENS,
    journal: Journal | None = None,
) -> TaskResult:
    """Have the model describe each image. Scores: see `chair_result`."""
    named = [(p.id, p.image) for p in images]
    texts = describe(generate, named, prompt, max_new_tokens, journal)
    return chair_result(texts, images, mentions)


def chair_result(
    texts: Sequence[str], images: Sequence[AnnotatedImage], mentions: Mentions
) -> TaskResult:
    """Scores of descriptions: `chair_i` (mentions of absent objects / mentions), `chair_s`
    (descriptions with one / descriptions), `recall` (distinct objects named and present / present),
    `mean_mentions` and `mean_length_words`. (`cafe.metrics.chair_columns` counts them.)

    An empty description hallucinates nothing and recalls nothing; the details count them.

    Raises:
        DataError: no images.
    """
    if not images:
        raise DataError("there are no images to describe")
    items = chair_columns(
        [list(mentions(text)) for text in texts],
        [image.objects for image in images],
        [len(text.split()) for text in texts],
    )
    ratios = {
        "chair_i": Ratio("invented", "mentions"),
        "chair_s": Ratio("any_invented"),
        "recall": Ratio("found", "there"),
        "mean_mentions": Ratio("mentions"),
        "mean_length_words": Ratio("words"),
    }
    empty = sum(not text.strip() for text in texts)
    ids = tuple(image.id for image in images)
    return TaskResult(len(texts), items, ratios, ids=ids, details={"empty_replies": empty})


def read_chair(folder: Path, limit: int | None = None) -> tuple[list[AnnotatedImage], Mentions]:
    """COCO val2014 in the layout above, and the finder of mentions.

    Raises:
        DataError: a file or an image is missing, or a class has no line in the table of words.
    """
    words = coco_words(folder / "synonyms.txt")
    instances = read_instances(folder / "instances_val2014.json")
    captions = read_captions(folder / "captions_val2014.json")
    unknown = [name for name in instances.classes if name.lower() not in words.forms]
    if unknown:
        raise DataError(f"{folder / 'synonyms.txt'}: no line names the class {unknown[0]!r}")
    images = []
    for name, classes in list(instances.objects.items())[:limit]:
        named_in_captions = {
            o for text in captions.get(name, ()) for o in chair_mentions(words, text)
        }
        objects = frozenset(words.forms[c.lower()] for c in classes) | named_in_captions
        images.append(AnnotatedImage(name, local_image(folder / "val2014", name, name), objects))
    return images, lambda text: chair_mentions(words, text)
