"""The typed tree of a run. Every key of a recipe is a field here, with its unit and its default.

Values are strict: `seed: "3"` is an error, not 3. Sections are frozen; a variant of a recipe is a
new recipe (`load_recipe` with overrides).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    model_validator,
)

from cafe.recipes.base import (
    Count,
    Name,
    NotNegative,
    Positive,
    Section,
    UserPath,
    check_distinct,
    save_yaml,
    share_of,
    to_yaml,
)
from cafe.recipes.optimization import Optimizer, Schedule, Tuning
from cafe.recipes.running import Checkpoint, Evaluate, Log
from cafe.recipes.source import DataSource


class Objective(Section):
    """The joint loss: contrastive_weight x contrastive + language_weight x language."""

    contrastive_weight: NotNegative = 1.0
    """Weight of the contrastive loss; 0 trains generation only."""
    language_weight: NotNegative = 1.0
    """Weight of the mean negative log-likelihood per answer token; 0 trains embeddings only."""
    match_weight: NotNegative = 0.0
    """Weight of the match question ("Does the image show …?") about each pair of an image and a
    text, and about the wrong text and image that its embeddings are nearest to; it trains what
    `rerank` asks. 0 is off."""
    thought_weight: NotNegative = 0.0
    """Weight of a second contrastive loss, of embeddings that are read after the model has said
    something about the input (`data.*.thoughts`); for `encode(think=…)`. 0 is off."""
    soft_label_weight: NotNegative = 0.0
    """Weight of the divergence (KL) of the similarities from a teacher's scores of the same
    candidates. 0 is off."""
    soft_labels: Literal["scores", "matcher"] = "scores"
    """The teacher. scores: stored in the data (`data.*.scores`). matcher: this model's own answers
    to the match questions of the step, for one more pass without gradient."""
    soft_label_temperature: Positive = 1.0
    """Divides the teacher's scores: 1 for log-odds or logits, about `temperature` for cosines."""
    latent_tokens: Annotated[int, Field(ge=0, le=64)] = 0
    """Learned tokens before the one that is pooled: room to compute an embedding in, without
    decoding. They become tokens of the saved model. 0: as the model is."""
    latent_pooling: Literal["last", "mean"] = "last"
    """last: an embedding is the state at the token after the latent ones. mean: the mean of their
    own states, which sentence-transformers reads as well, and vLLM does not."""
    multi_vector_weight: NotNegative = 0.0
    """Weight of a contrastive loss over the vectors of all tokens (MaxSim), which a projection of
    its own makes; for `encode_tokens`. 0 is off, and drops a projection."""
    multi_vector_dim: Count = 128
    """Dimension of these vectors."""
    multi_vector_dims: Annotated[list[Count], Field(min_length=1)] | None = None
    """Also train these vectors truncated to these numbers of dimensions."""
    multi_vector_temperature: Positive = 0.02
    """Divides the MaxSim scores; 0.02 is ColPali's."""
    contrastive: Literal["info_nce", "sigmoid"] = "info_nce"
    """info_nce: softmax over the batch (CAFe). sigmoid: each pair independently (SigLIP)."""
    temperature: Positive = 0.05
    """Divides the cosine similarities. 0.05 is the published scale of 20."""
    learn_temperature: bool = False
    """Learn the temperature, starting from `temperature`."""
    directions: Literal["both", "query_to_target", "target_to_query"] = "both"
    """Direction of the softmax; both is the mean of the two."""
    hardness: NotNegative = 0.0
    """Extra weight of negatives that resemble positives (LLaVE); 0 is off."""
    false_negative_margin: NotNegative | None = None
    """Negatives whose cosine exceeds the positive's by more are left out (0.1 is usual); null: none
    are."""
    same_side_negatives: bool = False
    """Other queries and other targets are negatives of a pair, too (Qwen3-Embedding)."""
    quantization_aware: (
        Annotated[list[Literal["int8", "binary"]], AfterValidator(check_distinct)] | None
    ) = None
    """Also train embeddings that are rounded to these precisions, for an index that stores them."""
    matryoshka_dims: Annotated[list[Count], Field(min_length=1)] | None = None
    """Also train embeddings truncated to these numbers of dimensions."""
    compat: Literal["none", "official"] = "none"
    """official: the published code's labels, prompts and scaling by processes (ChatML models)."""

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if self.contrastive_weight == self.language_weight == 0:
            raise ValueError("contrastive_weight and language_weight are both 0: nothing to learn")
        if self.match_weight and not self.contrastive_weight:
            raise ValueError(
                "match_weight needs embeddings, which find the wrong pairs to ask about; set "
                "contrastive_weight above 0, or match_weight: 0"
            )
        for name in ("false_negative_margin", "same_side_negatives", "quantization_aware"):
            value = getattr(self, name)
            if value is not None and value is not False and self.contrastive == "sigmoid":
                raise ValueError(f"{name} is for info_nce; set contrastive: info_nce, or drop it")
        if max(self.multi_vector_dims or [1]) > self.multi_vector_dim:
            raise ValueError(f"multi_vector_dims exceed multi_vector_dim, {self.multi_vector_dim}")
        if self.multi_vector_dims and not self.multi_vector_weight:
            raise ValueError(
                "multi_vector_dims are of token vectors; set multi_vector_weight above 0, or drop "
                "them"
            )
        if self.soft_label_weight and self.soft_labels == "matcher" and not self.match_weight:
            raise ValueError(
                "soft_labels: matcher needs match questions, which the matcher learns from; set "
                "match_weight above 0, or soft_labels: scores"
            )
        if self.latent_pooling == "mean" and not self.latent_tokens:
            raise ValueError(
                "latent_pooling: mean is of the latent tokens; set latent_tokens, or drop it"
            )
        contrastive = ("thought_weight", "soft_label_weight", "latent_tokens")
        contrastive += ("multi_vector_weight",)
        for name in ("match_weight", *contrastive):
            if getattr(self, name) and self.compat == "official":
                raise ValueError(f"compat is official, which has no {name}; set {name}: 0")
        for name in contrastive:
            if getattr(self, name) and not self.contrastive_weight:
                raise ValueError(
                    f"{name} is trained by a contrastive loss; set contrastive_weight above 0, or "
                    f"{name}: 0"
                )
        return self


class Batch(Section):
    """Contrastive batch size, what fits in memory, and how sequences become rows."""

    examples: Count
    """Examples per optimizer step over all processes, all contrasted with one another."""
    chunk: Count | None = None
    """Examples in memory at a time, per process; None: the process's whole share."""
    chunk_tokens: Count | None = None
    """Instead of chunk: tokens in memory at a time, those of images and padding included. Examples
    are sorted by the length of their rows. None: counted by chunk."""
    kept_chunks: Count = 8
    """Chunks of a step that stay in host memory for its second pass; the images of the others are
    decoded once more."""
    max_tokens: Count | None = None
    """Maximum sequence length; only text is truncated. None: the model's context."""
    max_frames: Count = 16
    """Maximum number of frames of a video, evenly spaced."""
    row_tokens: Count | None = None
    """Pack several examples into rows of up to N tokens; None: one row per example."""
    sharing: Literal["trie", "none"] = "trie"
    """trie: sequences share the tokens of their common prefix. none: each is its own row."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Processes that decode images; 0: the training process itself."""

    @model_validator(mode="after")
    def _check_chunk(self) -> Self:
        if self.chunk is not None and self.chunk_tokens is not None:
            raise ValueError("chunk and chunk_tokens are both set; set one of them (null unsets)")
        return self


class Recipe(Section):
    """One complete run."""

    model: Name
    """`tiny` (ships with the package), a directory, or a hub id."""
    output_dir: UserPath
    """Folder that the run writes to, relative to the working directory."""
    seed: int = 0
    """Random seed of weights, dropout and the order of the data."""
    data: Annotated[list[DataSource], Field(min_length=1)]
    """Sources of examples; several are sampled by weight."""
    merge_by_image: bool = False
    """Records about the same image share one row."""
    max_rejected: Annotated[float | int, share_of("records", 0.05)] = 0.05
    """Broken records that may be skipped; more end the run. A fraction, or a whole number."""
    objective: Objective = Objective()
    """The joint loss."""
    batch: Batch
    """Batch sizes."""
    optimizer: Optimizer
    """Learning rates and frozen parts."""
    tuning: Tuning = Tuning()
    """The model's own weights, or an adapter."""
    schedule: Schedule
    """Length of the run."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of forward and backward passes; weights and optimizer state stay fp32. auto: bf16
    on a GPU or CPU that has instructions for it, else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    offload_activations: bool = False
    """Keep gradient_checkpointing's activations in host memory: even less memory, even slower."""
    compile: bool = False
    """torch.compile each layer of the language model: minutes of compiling, then faster steps.
    Not with dropout."""
    sharding: Literal["none", "fsdp"] = "none"
    """fsdp: weights, gradients and optimizer state are sharded over the processes."""
    attention: Literal["sdpa", "eager", "flex_attention", "flash_attention_2"] = "sdpa"
    """Attention kernel. flash_attention_2 cannot share prefixes: it needs batch.sharing none."""
    evaluate: Evaluate | None = None
    """What is measured while the run goes on; None: nothing."""
    checkpoint: Checkpoint = Checkpoint()
    """When the state is saved."""
    log: Log = Log()
    """What is reported."""

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        if sum(source.weight for source in self.data) == 0:
            raise ValueError("data: every weight is 0; give one source a positive weight")
        thinks = any(source.thoughts is not None for source in self.data)
        if thinks != (self.objective.thought_weight > 0):
            raise ValueError(
                "data.*.thoughts and objective.thought_weight go together; set "
                + ("thought_weight above 0" if thinks else "thoughts of a source, e.g. answers")
            )
        scored = any(source.scores is not None for source in self.data)
        stored = self.objective.soft_labels == "scores" and self.objective.soft_label_weight > 0
        if scored != stored:
            raise ValueError(
                "data.*.scores and objective.soft_label_weight go together; set "
                + (
                    "soft_label_weight above 0, with soft_labels: scores"
                    if scored
                    else "scores of a source, the name of a column (or soft_labels: matcher)"
                )
            )
        return self

    @model_validator(mode="after")
    def _check_tuning(self) -> Self:
        if self.objective.latent_tokens and "language" in self.optimizer.freeze:
            raise ValueError(
                "objective.latent_tokens are learned, and optimizer.freeze has language; drop one"
            )
        if self.tuning.kind == "qlora" and self.sharding == "fsdp":
            raise ValueError("4-bit weights cannot be sharded; set sharding: none, or kind: lora")
        if self.tuning.kind != "full":
            if self.objective.latent_tokens:
                raise ValueError(
                    "objective.latent_tokens are learned rows of the token embedding, which no "
                    f"adapter trains; set tuning.kind: full instead of {self.tuning.kind}"
                )
            frozen = [p for p in self.optimizer.freeze if p in self.tuning.parts]
            frozen += [p for p in self.optimizer.freeze if p in self.tuning.full_parts]
            if frozen:
                raise ValueError(f"{frozen[0]} is in optimizer.freeze and in tuning; name it once")
        return self

    @model_validator(mode="after")
    def _check_evaluate(self) -> Self:
        best = self.checkpoint.best
        if self.evaluate is None:
            if best is not None:
                raise ValueError(
                    f"checkpoint.best is {best}, which nothing measures; add a section evaluate, "
                    "with every_steps and held_out or data"
                )
            return self
        if self.evaluate.patience is not None and best is None:
            raise ValueError(
                "evaluate.patience waits for a better value; name its measure in checkpoint.best, "
                "e.g. image_to_text_recall@1"
            )
        if self.evaluate.tasks and self.sharding == "fsdp":
            raise ValueError(
                "evaluate.tasks need whole weights; set sharding: none, or leave the tasks out"
            )
        return self

    @model_validator(mode="after")
    def _check_memory(self) -> Self:
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError(
                "offload_activations offloads what gradient_checkpointing keeps; set "
                "gradient_checkpointing: true"
            )
        return self

    @model_validator(mode="after")
    def _check_attention(self) -> Self:
        if self.attention != "flash_attention_2":
            return self
        if self.batch.sharing != "none" or self.batch.row_tokens is not None:
            raise ValueError(
                "attention is flash_attention_2, whose kernel supports no tree attention mask; set "
                "attention: flex_attention, which does, or batch.sharing: none without row_tokens"
            )
        if self.precision == "fp32":  # what auto means depends on the machine: checked in training
            raise ValueError("attention is flash_attention_2, which needs precision: bf16")
        return self

    def dump(self) -> str:
        """The resolved recipe as YAML, including defaults; loading it gives an equal tree."""
        return to_yaml(self.model_dump(mode="json"))

    def save(self, path: Path) -> None:
        """Write `dump()` to `path`, which is then itself a recipe (`save_yaml`)."""
        save_yaml(self.dump(), path)
