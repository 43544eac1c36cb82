"""How the files in `fixtures/` were made: run at version 0.1.0, commit 0fc1119.

    python tests/compat/make.py /fixtures

The folder is new and its name says nothing, for adapters, indexes, recipes and shards keep absolute
paths. What it holds at the end was copied here. It is not made again: it stands for what people
have on their disks. A format that changes gets new files beside these, made by this script.

All is made by the command line, but for the base: the bundled model's kind with a few thousand
random weights, so that checkpoints are small.
"""

from __future__ import annotations

import io
import json
import os
import runpy
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from cafe import CAFe, load_recipe

COLOURS = {
    "red": (230, 30, 30),
    "green": (30, 200, 60),
    "blue": (20, 60, 230),
    "white": (250, 250, 250),
    "black": (5, 5, 5),
    "yellow": (250, 220, 40),
}
CAPTION = "a {} square in the middle"
PROMPT = "Describe this image."
WIDTH = 16
SAVED_AT = 1_767_225_600 * 10**9
"""An evaluation knows a model's files by size and date, and no copy keeps dates."""

TRAIN = """\
model: model
output_dir: {out}
data: [{{path: data/train.jsonl, mode: caption}}]
objective: {{learn_temperature: true}}
batch: {{examples: 2, chunk: 1, workers: 0}}
optimizer: {{learning_rate: 3e-3}}
schedule: {{steps: 4}}
precision: fp32
checkpoint: {{every_steps: 2}}
log: {{progress: false}}
"""
LORA = "tuning: {kind: lora, rank: 2, alpha: 4, targets: [q_proj, v_proj]}\n"

RECIPES = ("caption.yaml", "demo.yaml", "mmeb-qwen3-vl-2b-lora.yaml")


def cafe(*arguments: str, fails: bool = False) -> str:
    """Run the command in this process, as `python -m cafe` does; its standard output."""
    sys.argv = ["cafe", *arguments]
    code, output = 0, io.StringIO()
    try:
        with redirect_stdout(output):
            runpy.run_module("cafe", run_name="__main__")
    except SystemExit as stop:
        code = int(stop.code or 0)
    if (code != 0) is not fails:
        raise SystemExit(f"cafe {' '.join(arguments)}: ended with {code}")
    return output.getvalue()


def keep_date(folder: str) -> None:
    for file in Path(folder).iterdir():
        os.utime(file, ns=(SAVED_AT, SAVED_AT))


def make_base(folder: Path) -> None:
    """Random weights that answer in more than one word: the layers outweigh the embedding."""
    bundled = CAFe.from_pretrained("tiny")
    processor, config = bundled.processor, bundled.model.config
    texts = [CAPTION.format(colour) for colour in COLOURS] * 20 + [PROMPT] * 20
    processor.tokenizer = processor.tokenizer.train_new_from_iterator(texts, vocab_size=300)
    size = {"height": 32, "width": 32}
    processor.image_processor.size = processor.video_processor.size = size
    processor.image_processor.image_grid_pinpoints = config.image_grid_pinpoints = [[32, 32]]
    processor.num_image_tokens = 4
    ids = processor.tokenizer.convert_tokens_to_ids
    processor.image_token_id = config.image_token_index = config.image_token_id = ids("<image>")
    processor.video_token_id = config.video_token_index = config.video_token_id = ids("<video>")
    for part in (config.vision_config, config.text_config):
        part.hidden_size, part.intermediate_size = WIDTH, 2 * WIDTH
        part.num_hidden_layers = part.num_attention_heads = 1
        part.initializer_range = 0.3
    config.vision_config.image_size, config.vision_config.patch_size = 32, 16
    text = config.text_config
    text.num_key_value_heads, text.vocab_size = 1, len(processor.tokenizer)
    text.head_dim = WIDTH
    text.layer_types = text.layer_types[:1]
    text.eos_token_id = processor.tokenizer.eos_token_id
    text.pad_token_id = processor.tokenizer.pad_token_id
    config.dtype = text.dtype = config.vision_config.dtype = torch.float32
    torch.manual_seed(0)
    model = type(bundled.model)(config).float()
    model.generation_config = bundled.model.generation_config
    model.generation_config.eos_token_id = text.eos_token_id
    model.generation_config.pad_token_id = text.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def picture(colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (24, 24), tuple(255 - value // 2 for value in colour))
    image.paste(colour, (6, 6, 18, 18))
    return image


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def make_data() -> None:
    """Six pictures with captions: for training (and a record without an answer), as data, as rows
    of a table in two states (the last picture of the first is broken).
    """
    folder = Path("data/pictures")
    folder.mkdir(parents=True)
    records, beside = [], []
    for number, (name, colour) in enumerate(COLOURS.items()):
        picture(colour).save(folder / f"{name}.png")
        turns = [
            {"from": "human", "value": f"<image>\n{PROMPT}"},
            {"from": "gpt", "value": CAPTION.format(name)},
        ]
        records.append({"id": name, "image": f"pictures/{name}.png", "conversations": turns})
        beside.append({"file_name": f"{name}.png", "text": CAPTION.format(name), "number": number})
    (folder / "metadata.jsonl").write_text(lines(beside))
    Path("data/captions.json").write_text(json.dumps(records, indent=1) + "\n")
    broken = {**records[0], "id": "silent", "conversations": records[0]["conversations"][:1]}
    Path("data/train.jsonl").write_text(lines([*records, broken]))
    mixed = [
        {"id": "words", "text": "a red square"},
        {"id": "picture", "image": "pictures/red.png"},
        {"id": "both", "text": "a blue square", "image": "pictures/blue.png"},
        {"id": "more", "text": "a large black square"},
        {"id": "last", "image": "pictures/white.png"},
    ]
    Path("data/mixed.jsonl").write_text(lines(mixed))
    make_table(Path("data/table-broken.parquet"), broken=True)
    make_table(Path("data/table.parquet"), broken=False)


def make_table(path: Path, *, broken: bool) -> None:
    """66 rows: descriptions are kept 64 at a time, so the first block is done before the last."""
    rows = []
    names = list(COLOURS)
    for number in range(66):
        stream = io.BytesIO()
        picture(COLOURS[names[number % 6]]).save(stream, "PNG")
        content = stream.getvalue()[:40] if broken and number == 65 else stream.getvalue()
        caption = [CAPTION.format(names[number % 6])]
        rows.append({"image": {"bytes": content, "path": None}, "caption": caption, "id": number})
    pq.write_table(pa.Table.from_pylist(rows), path)


def make_runs() -> None:
    """An adapter, its merged model, a whole run, and that run as it was when killed at step 3."""
    Path("whole.yaml").write_text(TRAIN.format(out="whole"))
    Path("lora.yaml").write_text(TRAIN.format(out="lora") + LORA)
    cafe("train", "lora.yaml", "optimizer.learning_rate=0.1")
    Path("lora/model").rename("adapter")
    cafe("export", "adapter", "--to", "merged", "--merge")
    keep_date("merged")
    cafe("train", "whole.yaml")
    shutil.copytree("whole", "run")
    shutil.rmtree("run/model")
    shutil.rmtree("run/checkpoints/step-000004")
    log = Path("run/log.jsonl")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))
    shutil.rmtree("whole/checkpoints")
    for path in [p for p in Path("whole/model").rglob("*") if p.is_file()]:
        if path.name not in ("config.json", "model.safetensors"):  # the rest is as in `model`
            path.unlink()
    shutil.rmtree("lora")


def make_indexes() -> None:
    cafe("index", "model", "data/pictures", "--to", "pictures.index")
    cafe("embed", "model", "data/mixed.jsonl", "--to", "mixed.index", "--shard-size", "2")
    found = cafe("search", "pictures.index", "a red square", "--model", "model", "--json")
    Path("search.json").write_text(found)
    cafe("embed", "model", "data/mixed.jsonl", "--out", "embeddings.parquet")
    cafe("embed", "model", "data/mixed.jsonl", "--out", "shards", "--shard-size", "2")
    Path("shards/00001.parquet").unlink()  # as killed before it


def make_results() -> None:
    """Two models on three tasks, their comparison, and an evaluation that failed half way."""
    tasks = {
        "retrieval": "data/captions.json",
        "caption": "data/captions.json",
        "captioning": "data/table.parquet",
    }
    for model, out in (("model", "results/base"), ("merged", "results/tuned")):
        for task, data in tasks.items():
            cafe("evaluate", model, "--task", task, "--data", data, "--json", out)
    Path("compare.txt").write_text(cafe("compare", "results/base", "results/tuned"))
    half = ("--data", "data/table-broken.parquet", "--json", "half")
    cafe("evaluate", "model", "--task", "captioning", *half, fails=True)
    Path("data/table-broken.parquet").unlink()


def make_recipes() -> None:
    """Recipes that ship, and what they mean."""
    shipped = Path(sys.modules[load_recipe.__module__].__file__ or "").parent
    Path("recipes").mkdir()
    for name in RECIPES:
        shutil.copy(shipped / name, f"recipes/{name}")
        resolved = load_recipe(Path("recipes") / name)
        resolved.save(Path(f"recipes/{Path(name).stem}-resolved.yaml"))


def processor_name() -> str:
    """Sums are the same bit for bit on one processor with one torch only."""
    known = Path("/proc/cpuinfo")
    told = known.read_text().splitlines() if known.is_file() else []
    return next((line.partition(":")[2].strip() for line in told if "model name" in line), "")


def make_answers() -> None:
    """What the models say and how they embed, for the test to find again."""
    shown = [Path(f"data/pictures/{name}.png") for name in COLOURS]
    inputs = [CAPTION.format("red"), PROMPT, *shown, {"text": "red", "image": shown[0]}]
    said = {}
    for name in ("model", "adapter", "merged"):
        core = CAFe.from_pretrained(name)
        np.save(f"{name}.npy", core.encode(inputs))
        said[name] = [
            cafe("generate", name, PROMPT, "--image", str(path), "--max-new-tokens", "12")
            for path in shown[:2]
        ]
    facts = {"torch": torch.__version__, "processor": processor_name()}
    Path("made.json").write_text(json.dumps({"made_with": facts, "said": said}, indent=2) + "\n")


def main(folder: Path) -> None:
    folder.mkdir()
    os.chdir(folder)
    torch.set_num_threads(1)  # sums in one order
    make_data()
    make_base(Path("raw"))
    cafe("export", "raw", "--to", "model")
    keep_date("model")
    shutil.rmtree("raw")
    make_runs()
    make_indexes()
    make_results()
    near = ("--range", "0-4", "--count", "2", "--relative-margin", "0")
    cafe("mine", "model", "data/captions.json", "--out", "mined.jsonl", *near)
    make_recipes()
    make_answers()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
