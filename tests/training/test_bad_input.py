"""Broken data through `cafe train`: skipped with file, record and fix, or one error with them."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from helpers.runs import make_world

Records = list[dict[str, Any]]
BROKEN = 3  # the record that a case spoils

RECIPE = """\
model: {model}
output_dir: out
data: [{{path: captions.json, image_root: .}}]
batch: {{examples: 4, chunk: 2, workers: 0}}
optimizer: {{learning_rate: 1e-3}}
schedule: {{epochs: 1}}
precision: fp32
log: {{progress: false}}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight records with images of their own and a recipe, in the working directory."""
    (tmp_path / "images").mkdir()
    records = json.loads((world / "scenes" / "captions.json").read_text())[:8]
    for record in records:
        (tmp_path / record["image"]).write_bytes((world / "scenes" / record["image"]).read_bytes())
    (tmp_path / "captions.json").write_text(json.dumps(records))
    (tmp_path / "run.yaml").write_text(RECIPE.format(model=world / "model"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cafe_train(command_line: Any):
    """Runs `cafe train run.yaml …`: (exit code, stderr)."""

    def run(*overrides: str) -> tuple[int, str]:
        code, _, err = command_line("train", "run.yaml", *overrides)
        return code, err

    return run


def spoil(records: Records, **changes: Any) -> None:
    records[BROKEN] |= changes


def ask(records: Records, question: str) -> None:
    records[BROKEN]["conversations"][0]["value"] = question


def answer(records: Records, text: str) -> None:
    records[BROKEN]["conversations"][1]["value"] = text


def image(records: Records) -> Path:
    return Path(records[BROKEN]["image"])


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncated_jpeg(records: Records) -> None:
    PIL.Image.open(image(records)).convert("RGB").save(image(records), "JPEG")
    halve(image(records))


def cut_video(records: Records) -> None:
    Path("film.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(200))
    del records[BROKEN]["image"]
    spoil(records, video="film.mp4")
    ask(records, "<video>\nWhat is it?")


LEFT_OUT: dict[str, tuple[Callable[[Records], Any], str]] = {
    "truncated JPEG": (truncated_jpeg, "000003.png': cannot be decoded .*; replace or remove it"),
    "20,000 x 20,000": (
        lambda records: PIL.Image.new("1", (20_000, 20_000)).save(image(records)),
        "000003.png': far too large .*; make it smaller",
    ),
    "no such image": (
        lambda records: image(records).unlink(),
        "image 'images/000003.png': no such file in .*; put it there",
    ),
    "outside the folder": (
        lambda records: spoil(records, image="../../etc/hostname"),
        "'../../etc/hostname' is outside .*; move it there, or set image_root",
    ),
    "two markers, one image": (
        lambda records: ask(records, "<image><image>\nWhat?"),
        "number of <image> markers is 2, number of images is 1; they must be equal",
    ),
    "video": (cut_video, "film.mp4': cannot be decoded .*; replace or remove it"),
    "empty caption": (
        lambda records: answer(records, " "),
        "turn 2: the answer is empty; write it, or leave the record out",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_broken_record_is_left_out_counted_and_written_down(
    case: str, folder: Path, cafe_train: Any
) -> None:
    spoilt, reason = LEFT_OUT[case]
    records = json.loads(Path("captions.json").read_text())
    spoilt(records)
    Path("captions.json").write_text(json.dumps(records))
    code, told = cafe_train()
    assert code == 0
    assert "skipped: " in told
    (line,) = [json.loads(text) for text in Path("out/quarantine.jsonl").read_text().splitlines()]
    assert line["source"] == f"{folder}/captions.json"
    assert "id '000003'" in line["record"]
    assert re.search(reason, line["reason"], re.DOTALL)
    assert Path("out/model/model.safetensors").exists()


def test_a_line_that_is_not_json_is_left_out(folder: Path, cafe_train: Any) -> None:
    lines = [json.dumps(record) for record in json.loads(Path("captions.json").read_text())]
    lines[BROKEN] = lines[BROKEN][:-9]
    Path("captions.jsonl").write_text("\n".join(lines))
    assert cafe_train("data.0.path=captions.jsonl")[0] == 0
    line = json.loads(Path("out/quarantine.jsonl").read_text())
    assert (line["source"], line["record"]) == (f"{folder}/captions.jsonl", "line 4")
    assert re.search(r"not JSON \(.* at column \d+\); fix or remove it", line["reason"])


@pytest.mark.parametrize("case", ["1 x 1", "beyond the context"])
def test_what_is_odd_but_usable_is_used(case: str, folder: Path, cafe_train: Any) -> None:
    records = json.loads(Path("captions.json").read_text())
    if case == "1 x 1":
        PIL.Image.new("RGB", (1, 1), "red").save(image(records))
    else:
        answer(records, "a big red cat " * 2000)
    Path("captions.json").write_text(json.dumps(records))
    assert cafe_train()[0] == 0
    assert not Path("out/quarantine.jsonl").exists()


def broken_shard(folder: Path) -> None:
    with tarfile.open("s.tar", "w") as archive:
        for path in sorted(folder.glob("images/*.png")):
            for name, content in ((path.name, path.read_bytes()), (f"{path.stem}.txt", b"a cat")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    halve(Path("s.tar"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.0.path=s.tar"], r"s\.tar: broken after sample '\d+' \(.*\); fetch it again or lea"),
        (
            ["data.0.columns={image: photo}"],
            r"captions\.json: columns: image is 'photo', and there is no such column; there are co",
        ),
        (["attention=flash_attention_2"], "run.yaml: attention is flash_attention_2.*; set attent"),
        (
            ["objective.matryoshka_dims=[16, 1000]"],
            r"objective\.matryoshka_dims has 1000, and .* have 64 dimensions; use widths up to 64",
        ),
        (["batch.exmples=3"], "'batch.exmples=3': unknown recipe key .*; did you mean batch.exam"),
        (["max_rejected=0"], "1 of 8 records cannot be used, and 0 are allowed; fix the data. Th"),
    ],
)
def test_what_cannot_be_run_is_one_line(
    overrides: list[str], message: str, folder: Path, cafe_train: Any
) -> None:
    broken_shard(folder)
    (folder / "images" / "000003.png").unlink()
    code, told = cafe_train(*overrides)
    assert code == 2
    assert told.count("\n") == 1
    assert re.match(f"error: .*{message}", told)
    assert not Path("out/model").exists()
