"""The typed tree of a run. Every key of a recipe is a field here, with its unit and its default.

Values are strict: `seed: "3"` is an error, not 3. Sections are frozen; a variant of a recipe is a
new recipe (`load_recipe` with overrides).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    model_validator,
)

from cafe.recipes.yaml_text import to_yaml

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(min_length=1)]
Part = Literal["vision", "projector", "language"]
UserPath = Annotated[Path, Strict(False), AfterValidator(Path.expanduser)]


def _check_warmup(value: object) -> object:
    """One message for `float | int`, where pydantic would give two."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a share of all steps (0.03) or a number of steps (100)")
    if value < 0 or (isinstance(value, float) and value >= 1):
        raise ValueError("expected a share of all steps below 1.0, or a whole number of steps")
    return value


def _check_rejected(value: object) -> object:
    """As `_check_warmup`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a share of all records (0.05) or a number of records (100)")
    if value < 0 or (isinstance(value, float) and value >= 1):
        raise ValueError("expected a share of all records below 1.0, or a whole number of records")
    return value


class Section(BaseModel):
    """What all sections share: unknown keys are errors, values are not coerced."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class DataSource(Section):
    """One source of training examples."""

    path: Name
    """A file or folder of records, relative to the recipe's folder; shard-{000..127}.tar; or
    hub:OWNER/NAME[:CONFIG], a data set of the Hugging Face hub."""
    format: Literal["auto", "llava", "messages", "swift", "mmeb", "pairs", "captions"] = "auto"
    """What a record means (`cafe.data.formats`); auto: found by its columns."""
    mode: Literal["caption", "chat", "pair"] | None = None
    """caption: the picture is the query, its caption the target. chat: conversations, no pair.
    pair: query and target as the records give them. None: pair where the format has no other, else
    caption."""
    language_loss: bool = True
    """Also learn to write the answers; false: the pairs only."""
    embedding_prompt: Literal["compress", "none"] | None = None
    """What is added to both sides of a pair. None: nothing where records bring instructions (mmeb,
    conversations as pairs), else "Compress … in one word:"."""
    columns: dict[Name, Name] | None = None
    """Names that the formats know -> columns of this data set, e.g. {image: photo, text: title}."""
    split: Name | None = None
    """Of a data set that has several; None: train, or the only one."""
    image_root: UserPath | None = None
    """Where picture paths start, relative to the recipe's folder; None: the file's own folder."""
    max_pixels: Count | None = None
    """Larger pictures (width x height) are made smaller before the model's processor sees them."""
    weight: NotNegative = 1.0
    """How often this source is drawn, relative to the others."""
    turns: Literal["conversation", "branches"] = "conversation"
    """branches: every question-and-answer pair about the picture stands alone."""
    task: Name = "default"
    """Records about the same picture are merged (merge_by_image) within a task only."""
    limit: Count | None = None
    """Use the first so many records only."""

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if self.mode == "chat" and not self.language_loss:
            raise ValueError("mode chat without language_loss leaves nothing to learn")
        return self


class Objective(Section):
    """The joint loss: contrastive_weight x contrastive + language_weight x language."""

    contrastive_weight: NotNegative = 1.0
    """Weight of the contrastive loss; 0 trains generation only."""
    language_weight: NotNegative = 1.0
    """Weight of the mean negative log-likelihood per answer token; 0 trains embeddings only."""
    contrastive: Literal["info_nce", "sigmoid"] = "info_nce"
    """info_nce: softmax over the batch (CAFe). sigmoid: each pair on its own (SigLIP)."""
    temperature: Positive = 0.05
    """Divides the cosine similarities. 0.05 is the published scale of 20."""
    learn_temperature: bool = False
    """Learn the temperature, starting from `temperature`."""
    directions: Literal["both", "query_to_target", "target_to_query"] = "both"
    """Which side chooses among the other; both is the mean of the two."""
    hardness: NotNegative = 0.0
    """Extra weight of negatives that look like positives (LLaVE); 0 is off."""
    matryoshka_dims: Annotated[list[Count], Field(min_length=1)] | None = None
    """Also train embeddings cut to these numbers of dimensions."""
    compat: Literal["none", "official"] = "none"
    """official: the published code's labels, prompts and scaling by processes (ChatML models)."""

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if self.contrastive_weight == self.language_weight == 0:
            raise ValueError("contrastive_weight and language_weight are both 0: nothing to learn")
        return self


class Batch(Section):
    """What contrasts, what fits in memory, and how sequences become rows."""

    examples: Count
    """Examples of one optimizer step, over all processes: all of them contrast."""
    chunk: Count | None = None
    """Examples per process that are in memory at once; None: the process's whole share."""
    max_tokens: Count | None = None
    """Longest sequence; text is cut, image tokens never. None: the model's context."""
    max_frames: Count = 16
    """Frames of a video that the model sees, evenly spaced."""
    row_tokens: Count | None = None
    """Pack several examples into rows of so many tokens; None: one row per example."""
    sharing: Literal["trie", "none"] = "trie"
    """trie: sequences that begin alike share their tokens. none: each is its own row."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Processes that decode pictures; 0: the training process itself."""


class Optimizer(Section):
    """AdamW, one learning rate per part of the model."""

    learning_rate: Positive
    """Peak rate of the language model, and of every part without its own."""
    vision_learning_rate: Positive | None = None
    """Peak rate of the vision tower; None: learning_rate."""
    projector_learning_rate: Positive | None = None
    """Peak rate of the projector; None: learning_rate."""
    freeze: list[Part] = []
    """Parts that stay as they are."""
    weight_decay: NotNegative = 0.0
    """Decoupled; matrices only."""
    betas: Annotated[tuple[Share, Share], Strict(False)] = (0.9, 0.999)
    """Decay of the running mean of the gradient and of its square."""
    epsilon: Positive = 1e-8
    """Added to the denominator."""
    max_grad_norm: Positive | None = 1.0
    """Gradients are clipped to this global norm; None: never."""


class Tuning(Section):
    """Which weights learn: the model's own, or an adapter's beside them (LoRA and its kin)."""

    kind: Literal["full", "lora", "dora", "qlora"] = "full"
    """full: the weights themselves. qlora: LoRA on a base in 4 bits (needs bitsandbytes)."""
    rank: Count = 16
    """Rank of each adapted matrix's update."""
    alpha: Count = 32
    """The update is scaled by alpha / rank."""
    dropout: Share = 0.0
    """Of what the adapter reads."""
    parts: Annotated[list[Part], Field(min_length=1)] = ["language"]
    """Parts whose linear layers are adapted. Other parts stay as they are."""
    targets: Annotated[list[Name], Field(min_length=1)] | None = None
    """Only these layers of the parts, e.g. [q_proj, v_proj]; None: every linear layer."""
    full_parts: list[Literal["vision", "projector"]] = []
    """Parts that learn their own weights beside the adapter, which then holds those too."""

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.kind == "full":
            changed = [name for name in self.model_fields_set if name != "kind"]
            changed = [n for n in changed if getattr(self, n) != type(self).model_fields[n].default]
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
    """How long, and the learning rate's course."""

    steps: Count | None = None
    """Optimizer steps. Set this or epochs."""
    epochs: Positive | None = None
    """Passes over the data; a fraction is fine. Set this or steps."""
    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """From the peak to zero along a cosine or a line, or never."""
    warmup: Annotated[float | int, BeforeValidator(_check_warmup)] = 0.03
    """From zero to the peak: a float below 1 is a share of all steps, a whole number is steps."""

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            found = "neither is" if self.steps is None else "both are"
            raise ValueError(f"set exactly one of steps and epochs (null unsets); {found} set")
        return self


class Checkpoint(Section):
    """When the state of the run is saved."""

    every_steps: Count | None = None
    """None: at the end only (and when the run is interrupted)."""
    keep: Count = 2
    """The newest so many are kept."""


class Log(Section):
    """What the run tells."""

    every_steps: Count = 1
    """One line of the JSONL log per so many steps."""
    trackers: list[Name] = []
    """Trackers that accelerate knows, e.g. tensorboard or wandb."""
    progress: bool = True
    """Show a progress bar."""


class Recipe(Section):
    """One complete run."""

    model: Name
    """`tiny` (ships with the package), a directory, or a hub id."""
    output_dir: UserPath
    """Where the run writes, relative to the working directory."""
    seed: int = 0
    """Of weights, dropout and the order of the data."""
    data: Annotated[list[DataSource], Field(min_length=1)]
    """Where examples come from; several sources are mixed by weight."""
    merge_by_image: bool = False
    """Records about the same picture become branches of one row."""
    max_rejected: Annotated[float | int, BeforeValidator(_check_rejected)] = 0.05
    """Broken records that are left out before the run ends: a share, or a whole number."""
    objective: Objective = Objective()
    """The joint loss."""
    batch: Batch
    """Sizes."""
    optimizer: Optimizer
    """Learning rates and frozen parts."""
    tuning: Tuning = Tuning()
    """The model's own weights, or an adapter."""
    schedule: Schedule
    """Length of the run."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of forward and backward; weights and optimizer state stay fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    offload_activations: bool = False
    """What gradient_checkpointing keeps waits in the host's memory: still less, still slower."""
    compile: bool = False
    """torch.compile each layer of the language model: faster steps, after minutes of compiling.
    Not with dropout."""
    sharding: Literal["none", "fsdp"] = "none"
    """fsdp: each process holds a piece of weights, gradients and optimizer state, not all."""
    attention: Literal["sdpa", "eager", "flex_attention", "flash_attention_2"] = "sdpa"
    """Attention kernel. flash_attention_2 cannot share tokens: it needs batch.sharing none."""
    checkpoint: Checkpoint = Checkpoint()
    """When the state is saved."""
    log: Log = Log()
    """What is reported."""

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        if sum(source.weight for source in self.data) == 0:
            raise ValueError("data: every weight is 0; give one source a positive weight")
        return self

    @model_validator(mode="after")
    def _check_tuning(self) -> Self:
        if self.tuning.kind == "qlora" and self.sharding == "fsdp":
            raise ValueError("weights in 4 bits cannot be cut; set sharding: none, or kind: lora")
        if self.tuning.kind != "full":
            frozen = [p for p in self.optimizer.freeze if p in self.tuning.parts]
            frozen += [p for p in self.optimizer.freeze if p in self.tuning.full_parts]
            if frozen:
                raise ValueError(f"{frozen[0]} is in optimizer.freeze and in tuning; name it once")
        return self

    @model_validator(mode="after")
    def _check_memory(self) -> Self:
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError(
                "offload_activations moves what gradient_checkpointing keeps; set that to true too"
            )
        return self

    @model_validator(mode="after")
    def _check_attention(self) -> Self:
        if self.attention != "flash_attention_2":
            return self
        if self.batch.sharing != "none" or self.batch.row_tokens is not None:
            raise ValueError(
                "attention is flash_attention_2, whose kernel takes no mask of branches; set "
                "attention: flex_attention, which does, or batch.sharing: none without row_tokens"
            )
        if self.precision == "fp32":
            raise ValueError("attention is flash_attention_2, which needs precision: bf16")
        return self

    def dump(self) -> str:
        """The resolved recipe as YAML, defaults included; it loads again to an equal tree."""
        return to_yaml(self.model_dump(mode="json"))

    def save(self, path: Path) -> None:
        """Write `dump()` to `path`, which then is a recipe itself."""
        path.write_text(self.dump(), encoding="utf-8")
