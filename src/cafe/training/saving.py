"""The model of a run as a directory for every tool: the last one, and the best one on the way."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cafe.errors import TrainingError
from cafe.files import whole_directory, write_json
from cafe.model.checkpoint.adapter import adapter_of
from cafe.model.checkpoint.directory import save_checkpoint, weights_dtype
from cafe.model.rerank import TEMPERATURE_KEY
from cafe.model.rows.prompts import (
    TRAINED_PROMPTS_KEY,
    TRAINED_THOUGHTS_KEY,
    trained_thought_tokens,
)
from cafe.model.vlm import CAFe
from cafe.training.checkpoints import WRITE_ERRORS
from cafe.training.data import TrainingData
from cafe.training.distributed import any_rank, rank
from cafe.training.log import EvaluationRecord
from cafe.training.sharding import full_weights
from cafe.training.state import TrainingState, weights_of

EVALUATION = "evaluation.json"
"""In the directory of the best model: its step and its scores."""


@dataclass(frozen=True, slots=True)
class ModelSaver:
    """Writes the model of a run.

    vlm         the model, not wrapped
    base        what it was loaded from
    state       its state
    data        what it is trained on
    contrasts   whether embeddings are trained
    """

    vlm: CAFe
    base: str
    state: TrainingState
    data: TrainingData
    contrasts: bool

    def save(self, target: Path) -> None:
        """Write the model as it ends; it cannot be trained any more. A collective of all ranks.

        Training keeps its weights in float32, as the checkpoints do. A model whose base is in bf16
        is saved in bf16, half the size, as its users load it. An adapter is small and stays in
        float32.

        Raises:
            TrainingError: On all ranks, when it cannot be written.
        """
        weights = full_weights(weights_of(self.vlm.model)) if self.state.sharded else None
        if (
            weights is None and not self._adapted
        ):  # 4-bit weights cannot be cast, nor are they saved
            self.vlm.model.to(weights_dtype(self.base))
        self._write(target, weights)

    def save_best(self, target: Path, record: EvaluationRecord) -> None:
        """Write the model as it is now, in the same way, and go on; it replaces an earlier one.

        Raises:
            TrainingError: As `save`.
        """
        weights = None
        if self.state.sharded:
            weights = full_weights(weights_of(self.vlm.model))
        elif not self._adapted and rank() == 0:
            weights = {
                name: tensor.detach().to("cpu", weights_dtype(self.base), copy=True)
                for name, tensor in weights_of(self.vlm.model).items()
            }
        self._write(target, weights, record)

    def describe_training(self) -> None:
        """Note in the configuration what those who use the model should know of its training."""
        if not self.contrasts:
            return
        learned = self.state.contrast.temperature()
        number = learned.item() if isinstance(learned, Tensor) else learned
        config = self.vlm.model.config
        setattr(config, TEMPERATURE_KEY, number)  # reranking scales cosines by it
        setattr(config, TRAINED_PROMPTS_KEY, _prompts(self.data))
        _record_thoughts(self.vlm, self.data)

    @property
    def _adapted(self) -> bool:
        return adapter_of(self.vlm.model) is not None

    def _write(
        self,
        target: Path,
        weights: dict[str, Tensor] | None,
        record: EvaluationRecord | None = None,
    ) -> None:
        """Write the directory completely or not at all; rank 0 writes."""
        self.describe_training()
        failure: Exception | None = None
        if rank() == 0:
            try:
                with whole_directory(target) as unfinished:
                    if weights is None:
                        self.vlm.save_pretrained(unfinished)
                    else:
                        vlm, dtype = self.vlm, weights_dtype(self.base)
                        if not self._adapted:
                            weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
                        save_checkpoint(vlm.model, vlm.processor, vlm.collator, unfinished, weights)
                    if record is not None:
                        content = {"step": record.step, "scores": record.scores}
                        write_json(unfinished / EVALUATION, content)
            except WRITE_ERRORS as error:
                failure = error
        if any_rank(failure is not None, self.vlm.device):
            reason = "another rank failed" if failure is None else " ".join(str(failure).split())
            raise TrainingError(
                f"the model {target} cannot be written ({reason}); the last checkpoint is "
                "complete. Free space on that disk, then resume with --resume"
            ) from failure


def kept_step(directory: Path) -> int | None:
    """The step of the best model that is there; None: there is none."""
    try:
        return int(json.loads((directory / EVALUATION).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _prompts(data: TrainingData) -> list[str]:
    """Names of the embedding prompts of the pairs."""
    examples = (example for source in data.examples.sources for example in source.examples)
    return sorted({e.embedding_prompt for e in examples if e.query is not None})


def _record_thoughts(vlm: CAFe, data: TrainingData) -> None:
    """Note in the configuration how many tokens the longest thought has; 0 if it has no more."""
    examples = (example for source in data.examples.sources for example in source.examples)
    sides = (side for e in examples for side in (e.query_thought, e.target_thought) if side)
    longest = max((side[-1].text for side in sides), key=len, default="")
    tokens = len(vlm.processor.tokenizer(longest, add_special_tokens=False)["input_ids"])
    if tokens or trained_thought_tokens(vlm.model.config):
        setattr(vlm.model.config, TRAINED_THOUGHTS_KEY, tokens)
