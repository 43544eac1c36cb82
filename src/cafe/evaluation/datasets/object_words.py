"""Which objects a text names: a table of synonyms, and the rules of CHAIR for COCO's classes.

The table comes from a file of the user, one object a line, its name first:

    person, girl, boy, man, woman
    traffic light, street light
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cafe.errors import DataError


@dataclass(frozen=True, slots=True)
class ObjectWords:
    """Finds objects in texts, as whole words, the longest name first.

    forms     every form of a name, lower-case -> the object
    compounds two or more words that name something else than the object one of them names ("baby
              bird" is not a person) -> the words to read instead ("" for nothing)
    """

    forms: Mapping[str, str]
    compounds: Mapping[str, str] = field(default_factory=dict)

    def mentions(self, text: str) -> list[str]:
        """The objects that `text` names, in order, repetitions included."""
        words = _WORD.findall(text.lower().replace("’", "'"))
        names: list[str] = []
        start = 0
        while start < len(words):
            length, name = self._longest(words, start)
            if name:
                names.append(name)
            start += length
        return names

    def _longest(self, words: Sequence[str], start: int) -> tuple[int, str]:
        """Number of words from `start` on that form a name, and the object that they name."""
        for length in range(min(_LONGEST_NAME, len(words) - start), 0, -1):
            phrase = " ".join(words[start : start + length])
            if phrase in self.compounds:
                return length, self.forms.get(self.compounds[phrase], "")
            if phrase in self.forms:
                return length, self.forms[phrase]
        return 1, ""


_LONGEST_NAME = 3  # words
_WORD = re.compile(r"'s\b|[^\W_]+(?:(?!'s\b)['-][^\W_]+)*")
"""Words, with hyphens and apostrophes inside; the 's of a possessive is a word of its own."""

_ANIMALS = (
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "animal",
    "cub",
)
_COMPOUNDS = {
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
    "bow tie": "tie",
    "toilet seat": "toilet",
    "home plate": "",
    "train track": "",
}
"""CHAIR's special cases for COCO (Rohrbach et al. 2018, `utils/chair.py`)."""


def coco_words(file: Path) -> ObjectWords:
    """COCO's classes from a table of synonyms, with plurals and CHAIR's special cases.

    A word that stands in two lines counts for the later one, as in the official script.

    Raises:
        DataError: the file is missing or empty.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}); CHAIR needs a table of synonyms: one "
            'object a line, its name first, "person, man, woman"'
        ) from error
    forms: dict[str, str] = {}
    for line in lines:
        words = [word.strip().lower() for word in line.split(",") if word.strip()]
        forms |= dict.fromkeys(words, words[0]) if words else {}
    for word, name in list(
        forms.items()
    ):  # a word in the table is never taken for the plural of another
        for form in plurals(word):
            forms.setdefault(form, name)
    if not forms:
        raise DataError(f"{file}: no synonyms in it")
    compounds = _COMPOUNDS | {
        plural: single for key, single in _COMPOUNDS.items() for plural in plurals(key)
    }
    return ObjectWords(forms, compounds)


def chair_mentions(words: ObjectWords, text: str) -> list[str]:
    """The objects that a caption names, by CHAIR's rules: with a toilet, a seat is not a chair."""
    if re.search(r"\btoilets?\b", text.lower()):
        text = re.sub(r"\bseats?\b", " ", text, flags=re.IGNORECASE)
    return words.mentions(text)


def plurals(name: str) -> list[str]:
    """The likely plurals of a name, by the spelling of its last word.

    An irregular one first, then the regular one, which texts have too ("persons", "dobermans").
    """
    irregular = {
        "man": "men",
        "person": "people",
        "child": "children",
        "mouse": "mice",
        "goose": "geese",
        "foot": "feet",
        "knife": "knives",
        "sheep": "sheep",
    }
    head, _, last = name.rpartition(" ")
    before = f"{head} " if head else ""
    for ending, plural in irregular.items():
        if last.endswith(ending):
            irregular_plural = before + last[: len(last) - len(ending)] + plural
            return [irregular_plural, f"{name}s"]
    if last.endswith(("s", "x", "z", "ch", "sh")):
        return [before + last + "es"]
    if last.endswith("y") and len(last) > 1 and last[-2] not in "aeiou":
        return [before + last[:-1] + "ies"]
    if last.endswith(("f", "fe")):
        return [before + last.removesuffix("e")[:-1] + "ves", before + last + "s"]
    return [before + last + "s", *([before + last + "es"] if last.endswith("o") else [])]
