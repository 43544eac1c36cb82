"""A source of examples: a recipe's `data` is a list of them, `evaluate.data` is one."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from cafe.recipes.base import Count, Name, NotNegative, Positive, Section, UserPath


class DataSource(Section):
    """One source of training examples."""

    path: Name
    """A file or folder of records, relative to the recipe's folder; shard-{000..127}.tar; or
    hub:OWNER/NAME[:CONFIG], a data set of the Hugging Face hub."""
    format: Literal["auto", "llava", "messages", "swift", "mmeb", "pairs", "captions"] = "auto"
    """Format of the records (`cafe.data.formats`); auto: detected from the columns."""
    mode: Literal["caption", "chat", "pair"] | None = None
    """caption: the image is the query, its caption the target. chat: conversations, no pair.
    pair: query and target as in the records. None: pair for formats that have no other mode, else
    caption."""
    language_loss: bool = True
    """Also train on the answers; false: contrastive pairs only."""
    embedding_prompt: Literal["compress", "none"] | None = None
    """Prompt appended to both sides of a pair. None: none if records have instructions (mmeb,
    conversations as pairs), else "Compress … in one word:"."""
    thoughts: Name | None = None
    """What the model says of an image before its embedding is read, for objective.thought_weight:
    "answers" (the first answer about it), or a file that `cafe think` wrote, relative to the
    recipe's folder. None: nothing."""
    scores: Name | None = None
    """Column of a teacher's scores, for objective.soft_labels: one number for the positive, then
    one for each negative. None: there are none."""
    groups: Name | None = None
    """File of ids that `cafe mine --batches` wrote, relative to the recipe's folder: examples of a
    group are alike, and share a batch. None: batches are random."""
    columns: dict[Name, Name] | None = None
    """Column names of the format -> those of this data set, e.g. {image: photo, text: title}."""
    split: Name | None = None
    """Split of the data set; None: train, or the only one."""
    image_root: UserPath | None = None
    """Folder of the image paths, relative to the recipe's folder; None: the file's own folder."""
    max_pixels: Count | None = None
    """Larger images (width x height) are downscaled before the model's processor sees them."""
    max_seconds: Positive | None = None
    """Of longer recordings only the beginning is heard. None: they are heard whole, and one that is
    longer than the model hears is skipped."""
    weight: NotNegative = 1.0
    """How often this source is sampled, relative to the others."""
    turns: Literal["conversation", "branches"] = "conversation"
    """branches: each question-answer pair about an image is a conversation of its own."""
    task: Name = "default"
    """Records about the same image are merged (merge_by_image) within a task only."""
    limit: Count | None = None
    """Use the first N records only."""

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if self.mode == "chat" and not self.language_loss:
            raise ValueError("mode chat without language_loss leaves nothing to learn")
        return self
