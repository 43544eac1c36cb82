"""MMEB from result files: the leaderboard report, the overall means, a score file per data set."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cafe.evaluation.mmeb.groups import MEASURE, Modality, overall_means
from cafe.evaluation.results import read_result
from cafe.files import write_json

if TYPE_CHECKING:
    from cafe.model.vlm import CAFe

REPORT_FILE = "mmeb-report.json"
OVERALL_FILE = "mmeb-v2.json"


def write_report(out: Path, name: str, model: CAFe) -> None:
    """MMEB's leaderboard report, its overall means, and a score file per data set.

    Made of the MMEB results that are in the folder.
    """
    scores: dict[Modality, dict[str, float]] = {}
    queries: dict[str, int] = {}
    for task in ("mmeb", "mmeb-video", "mmeb-visdoc"):
        if (out / f"{task}.json").is_file():
            record = read_result(out / f"{task}.json").record
            details = record["details"]
            scores[details["modality"]] = {
                data_set: record["scores"][data_set] for data_set in details["queries"]
            }
            queries |= details["queries"]
    if not scores:
        return
    about = {
        "model_name": Path(name).name,
        "model_backbone": model.model.config.model_type,
        "model_size": round(sum(p.numel() for p in model.parameters()) / 1e9, 3),
        "embedding_dimension": model.embedding_dimension,
        "max_length_tokens": model.collator.max_tokens,
        "model_release_date": "",
        "data_source": "Self-Reported",
        "url": "",
        "report_generated_date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    report = leaderboard_report(scores, queries, about)
    write_json(out / REPORT_FILE, report)
    write_json(out / OVERALL_FILE, overall_means(scores))
    metrics: Any = report["metrics"]
    for modality, of_sets in metrics.items():
        for data_set, values in of_sets.items():
            write_json(out / modality / f"{data_set}_score.json", values)


def leaderboard_report(
    results: Mapping[Modality, Mapping[str, float]],
    counts: Mapping[str, int],
    metadata: Mapping[str, object],
) -> dict[str, object]:
    """The JSON that MMEB's leaderboard takes.

    results   modality -> data set -> its score
    counts    data set -> queries
    metadata  model_name, model_backbone, model_size, embedding_dimension, max_length_tokens,
              model_release_date, data_source, url, report_generated_date
    """
    return {
        "metadata": dict(metadata),
        "metrics": {
            modality: {
                name: {MEASURE[modality]: value, "num_pred": counts[name], "num_data": counts[name]}
                for name, value in results.get(modality, {}).items()
            }
            for modality in MEASURE
        },
    }
