"""Texts for experiment trackers. Numbers go to all of them by accelerate; texts, each in its way.

    tensorboard, comet_ml   a text for each sample
    wandb, trackio          one text for each sample, in the row of its step
    mlflow                  an artifact for each step

The trackers of accelerate that know numbers only (aim, clearml, dvclive, swanlab) get no samples;
`log.jsonl` always has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cafe.training.log import Sample

_TEXTS = frozenset({"tensorboard", "comet_ml", "wandb", "trackio"})
"""Trackers whose `log` of accelerate takes strings."""


def track_samples(trackers: Iterable[Any], samples: Sequence[Sample], step: int) -> None:
    """Give the answers of an evaluation to the trackers that take texts.

    Args:
        trackers: accelerate's, of this run.
        samples: What the model answered.
        step: Number of steps that were done.
    """
    texts = {f"samples/{number}": sample_text(sample) for number, sample in enumerate(samples)}
    for tracker in trackers:
        if tracker.name in _TEXTS:
            tracker.log(texts, step=step)
        elif tracker.name == "mlflow":
            import mlflow  # type: ignore[import-not-found]

            mlflow.log_text("\n\n".join(texts.values()), f"samples/step-{step:06d}.md")


def sample_text(sample: Sample) -> str:
    """A sample as people read it; Markdown, which trackers render."""
    return (
        f"**{sample.id}** {sample.prompt}\n\n"
        f"model: {sample.answer}\n\n"
        f"reference: {sample.reference}"
    )
