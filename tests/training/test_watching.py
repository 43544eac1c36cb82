"""A run as its log tells it: what is shown, also while it grows, and without a terminal."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cafe.errors import DataError
from cafe.training.watching import duration, run_status, sparkline, watch


def step_line(step: int, loss: float = 1.0, total: int | None = 10) -> str:
    values: dict[str, Any] = {
        "step": step,
        "loss": loss,
        "contrastive": loss / 4,
        "language": loss / 2,
        "gradient_norm": 1.5,
        "learning_rate": 1e-4,
        "examples_per_second": 8.0,
        "tokens_per_second": 900.0,
        "data_wait_share": 0.25,
        "seconds": 2.0,
    }
    return json.dumps(values | ({} if total is None else {"total": total})) + "\n"


def evaluation_line(step: int, **scores: float) -> str:
    return json.dumps({"step": step, "evaluation": scores, "seconds": 3.0}) + "\n"


def write(run: Path, *lines: str, mode: str = "a") -> Path:
    run.mkdir(exist_ok=True)
    with (run / "log.jsonl").open(mode) as file:
        file.write("".join(lines))
    return run


def shown(run: Path, **options: Any) -> str:
    out = io.StringIO()
    watch(run, console=Console(file=out, width=140), **options)
    return out.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Half done, with evaluations after steps 0, 2, 4, and a torn last line."""
    lines = [evaluation_line(0, **{"image_to_text_recall@1": 0.1, "modality_gap": 0.7})]
    for step in range(1, 6):
        lines.append(step_line(step, loss=6.0 - step))
        if step % 2 == 0:
            recall = {"image_to_text_recall@1": step / 10, "modality_gap": 0.5}
            lines.append(evaluation_line(step, **recall))
    lines.append('{"step": 5, "warning": "step 5: the loss is high"}\n')
    return write(tmp_path / "run", *lines, '{"step": 6, "lo')


def test_the_status_is_what_the_log_says(run: Path) -> None:
    status = run_status(run)
    assert (status.step, status.total, status.finished) == (5, 10, False)
    assert status.seconds_left == 5 * (2.0 + 6.0 / 5), "evaluations take their share"
    assert status.values("loss") == [5, 4, 3, 2, 1]
    assert status.values("match") == []
    assert status.measures() == ["image_to_text_recall@1", "modality_gap"]
    assert run_status(run / "log.jsonl").step == 5


def test_what_is_shown(run: Path) -> None:
    text = shown(run)
    for part in (
        "step 5/10 (50%), 16s left",
        "2.00 s/step, 8.0 examples/s, 25% waiting for data; learning rate 0.0001",
        "warning: step 5: the loss is high",
    ):
        assert part in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["loss"] == ["loss", "1.0000", "3.0000", "█▆▅▃▁"]
    assert rows["image_to_text_recall@1"][1:] == ["0.1000", "0.4000", "▁▃█"]
    assert "modality_gap" not in rows
    assert "modality_gap" in shown(run, measures=["modality_gap"])
    with pytest.raises(DataError, match="no measure 'recall'; there are image_to_text_recall@1"):
        shown(run, measures=["recall"])


def test_a_run_without_evaluations_and_of_an_earlier_version(tmp_path: Path) -> None:
    run = write(tmp_path / "run", step_line(1, total=None))
    assert run_status(run).seconds_left is None
    assert "step 1\n" in shown(run)
    assert "after steps" not in shown(run)
    assert "step 0" in shown(write(tmp_path / "new", ""))
    with pytest.raises(DataError, match="no such log; name the output_dir of a run"):
        watch(tmp_path / "nothing")


def test_an_early_stop_is_an_end_until_the_run_goes_on(run: Path) -> None:
    log = run / "log.jsonl"
    log.write_text(log.read_text().removesuffix('{"step": 6, "lo'))
    write(run, '{"step": 5, "stopped": "stopped after step 5 of 10: the last 2"}\n')
    assert run_status(run).finished
    assert "stopped after step 5 of 10: the last 2" in shown(run)
    write(run, step_line(6))
    assert not run_status(run).finished
    assert "stopped after" not in shown(run)


def test_it_follows_a_log_that_grows_is_torn_and_is_written_anew(run: Path) -> None:
    """As a resume does it: a new file, without the steps that are done again."""
    log, whole = run / "log.jsonl", step_line(6)

    def go_on() -> None:
        time.sleep(0.1)
        write(run, whole[len('{"step": 6, "lo') :])  # the rest of the torn line
        time.sleep(0.1)
        lines = log.read_text().splitlines(keepends=True)
        anew = log.with_name("anew")
        anew.write_text("".join(line for line in lines if json.loads(line)["step"] <= 3))
        anew.replace(log)
        for step in range(4, 11):
            time.sleep(0.02)
            write(run, step_line(step, loss=7.0))

    out = io.StringIO()
    writer = threading.Thread(target=go_on)
    writer.start()
    console = Console(file=out, width=140, force_terminal=True)
    status = watch(run, every_seconds=0.02, console=console)
    writer.join()
    assert status.finished
    assert status.values("loss") == [5, 4, 3] + 7 * [7.0]
    assert "step 6/10" in out.getvalue()
    assert "step 10/10, finished" in out.getvalue()


def test_curves_and_durations() -> None:
    assert sparkline([0, 1, 2, 3, 2, 1, 0, 7]) == "▁▂▃▄▃▂▁█"
    assert sparkline([1, 1, float("nan")]) == "▁▁!"
    assert sparkline([]) == ""
    assert sparkline(list(range(1000)), 8) == "▁▂▃▄▅▆▇█"
    assert [duration(s) for s in (4.4, 65, 3 * 3600 + 61, 90000)] == [
        "4s",
        "1m 5s",
        "3h 1m",
        "1d 1h",
    ]


def test_the_command_prints_it_once_where_nothing_can_be_redrawn(
    run: Path, command_line: Any
) -> None:
    code, out, _ = command_line("watch", run, "--measure", "modality_gap")
    assert code == 0
    assert "step 5/10 (50%), 16s left" in out
    assert "modality_gap" in out
    code, _, err = command_line("watch", run / "nowhere")
    assert code == 2
    assert "no such log" in err
