"""Schemas of `/v1/decisions`, OpenAI's: typed questions about one input."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cafe.serving.schema import ImagePart, ImageURL, Many, Neutral, Request, Text, TextPart

MAX_QUESTIONS = 400
MAX_OPTIONS = 255

NonEmptyText = Annotated[Text, Field(min_length=1)]


class InputText(Request):
    type: Literal["input_text", "output_text"]
    text: Text


class InputImage(Request):
    """An image; `image_url` and `detail` as in a chat."""

    unsupported: ClassVar[Neutral] = {"file_id": ()}

    type: Literal["input_image"]
    image_url: Text
    detail: Literal["auto", "low", "high", "original"] = "auto"


DecisionPart = Annotated[InputText | InputImage | TextPart | ImagePart, Field(discriminator="type")]
DecisionContent = Text | Many[DecisionPart]


def as_chat_content(content: DecisionContent) -> str | list[TextPart | ImagePart]:
    """The same with the parts of a chat."""
    if isinstance(content, str):
        return content
    parts: list[TextPart | ImagePart] = []
    for part in content:
        match part:
            case InputText():
                parts.append(TextPart(type="text", text=part.text))
            case InputImage():
                url = ImageURL(url=part.image_url, detail=part.detail)
                parts.append(ImagePart(type="image_url", image_url=url))
            case _:
                parts.append(part)
    return parts


class DecisionMessage(Request):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: DecisionContent


class Predicate(Request):
    """How probable it is that a statement about the input is true."""

    type: Literal["predicate"]
    name: Text | None = None
    instructions: DecisionContent


class Option(Request):
    """One answer to a choice."""

    value: bool | NonEmptyText
    description: Text | None = None


class Choice(Request):
    """Which of these answers is right."""

    type: Literal["choice"]
    name: Text | None = None
    instructions: DecisionContent
    choices: Annotated[list[Option], Field(min_length=2, max_length=MAX_OPTIONS)]


class Level(Request):
    """One level of a rating; its value is its place, from 0."""

    label: NonEmptyText
    description: Text | None = None


class Rating(Request):
    """Which of these levels, in order, the input has."""

    type: Literal["score"]
    name: Text | None = None
    instructions: DecisionContent
    levels: Annotated[list[Level], Field(min_length=2, max_length=MAX_OPTIONS)]


Question = Annotated[Predicate | Choice | Rating, Field(discriminator="type")]


class DecisionRequest(Request):
    """Questions about an input, a text or messages; each is answered by itself."""

    model: Text | None = None
    input: Text | Many[DecisionMessage]
    questions: Annotated[
        list[Question], Field(min_length=1, max_length=MAX_QUESTIONS, fail_fast=True)
    ]


Described = Text | dict[str, Any] | list[Any]
"""A text, or JSON that is shown to the model as such."""


class SystemOneQuestion(Request):
    """A question of `/v1/systemone`.

    criteria   of a noul (yes or no): what "true" and "false" mean; of a choice: its options, with
               what each means or null; of a score: its levels, the lowest first
    """

    type: Literal["noul", "choice", "score"]
    instructions: Described | None = None
    criteria: dict[Text, Described | None] | list[Described] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        expected = list if self.type == "score" else dict
        found = self.criteria if self.criteria is not None or self.type != "noul" else {}
        if not isinstance(found, expected):
            what = "a list of levels" if self.type == "score" else "an object of options"
            raise ValueError(f"the criteria of a {self.type} are {what}")
        if self.type == "noul" and not set(found) <= {"true", "false"}:
            raise ValueError("the criteria of a noul are those of true and of false")
        if self.type != "noul" and not 2 <= len(found) <= MAX_OPTIONS:
            raise ValueError(f"a {self.type} has 2 to {MAX_OPTIONS} criteria")
        if self.type != "noul" and "" in found:
            raise ValueError(f"a criterion of a {self.type} is empty")
        return self


class SystemOneRequest(Request):
    """Named questions about a state, which is a text or JSON."""

    unsupported: ClassVar[Neutral] = {
        **dict.fromkeys(("images", "audio", "videos"), ([],)),
        "assets": ({},),
    }

    model: Text | None = None
    state: Described
    questions: Annotated[
        dict[NonEmptyText, SystemOneQuestion], Field(min_length=1, max_length=MAX_QUESTIONS)
    ]
