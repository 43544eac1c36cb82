"""How weights are changed: which of them, by what rule, for how many steps."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, Strict, model_validator

from cafe.recipes.base import (
    Count,
    Fraction,
    ModelPart,
    Name,
    NotNegative,
    Positive,
    Section,
    share_of,
)


class Optimizer(Section):
    """AdamW, one learning rate per part of the model."""

    learning_rate: Positive
    """Peak rate of the language model, and of the parts without a rate of their own."""
    vision_learning_rate: Positive | None = None
    """Peak rate of the vision tower; None: learning_rate."""
    projector_learning_rate: Positive | None = None
    """Peak rate of the projector; None: learning_rate."""
    multi_vector_learning_rate: Positive | None = None
    """Peak rate of the projection of objective.multi_vector_weight; None: learning_rate."""
    freeze: list[ModelPart] = Field(default_factory=list)
    """Parts that are not trained."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay, of matrices only."""
    betas: Annotated[tuple[Fraction, Fraction], Strict(False)] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square."""
    epsilon: Positive = 1e-8
    """Added to the denominator of AdamW's update."""
    max_grad_norm: Positive | None = 1.0
    """Gradients are clipped to this global norm; None: never."""


def _default(section: type[Section], name: str) -> Any:
    return section.model_fields[name].get_default(call_default_factory=True)


class Tuning(Section):
    """Which weights are trained: the model's own, or an adapter's (LoRA and its variants)."""

    kind: Literal["full", "lora", "dora", "qlora"] = "full"
    """full: the model's own weights. qlora: LoRA on a 4-bit base (needs bitsandbytes)."""
    rank: Count = 16
    """Rank of each adapted matrix's update."""
    alpha: Count = 32
    """The update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    parts: list[ModelPart] = Field(default_factory=lambda: ["language"], min_length=1)
    """Parts whose linear layers are adapted. Other parts are frozen."""
    targets: Annotated[list[Name], Field(min_length=1)] | None = None
    """Adapt only these layers of the parts, e.g. [q_proj, v_proj]; None: every linear layer."""
    full_parts: list[Literal["vision", "projector"]] = Field(default_factory=list)
    """Parts that are fully trained next to the adapter, which then stores their weights too."""

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.kind == "full":
            changed = [name for name in self.model_fields_set if name != "kind"]
            changed = [n for n in changed if getattr(self, n) != _default(type(self), n)]
            if changed:
                raise ValueError(
                    f"kind is full, so there is no adapter that takes {sorted(changed)[0]}; set "
                    "kind to lora"
                )
        both = [part for part in self.full_parts if part in self.parts]
        if both:
            raise ValueError(f"{both[0]} is in parts and in full_parts; name it in one of them")
        return self


class Schedule(Section):
    """Length of the run, and the learning rate schedule."""

    steps: Count | None = None
    """Number of optimizer steps. Set this or epochs."""
    epochs: Positive | None = None
    """Number of passes over the data, which may be fractional. Set this or steps."""
    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay from the peak to zero along a cosine or a line, or none."""
    warmup: Annotated[float | int, share_of("steps", 0.03)] = 0.03
    """Linear warmup: a float below 1 is a fraction of all steps, a whole number counts steps."""

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            state = "neither is" if self.steps is None else "both are"
            raise ValueError(f"set exactly one of steps and epochs (null unsets); {state} set")
        return self
