"""Data sets in the published layouts, small: four records each, over four images.

Each writer makes a folder of its own and returns what a recipe's `path` would be.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

COLOURS = ("red", "green", "blue", "yellow")
TEXTS = ("a big red cat", "a cat at the top left", "yes, a cat", "no red cat here")
QUESTION = "What is it?"
REQUEST = "Find it:"


def image_bytes(number: int, kind: str = "PNG") -> bytes:
    """An image of 40 x 30 pixels, of one colour."""
    stream = io.BytesIO()
    PIL.Image.new("RGB", (40, 30), COLOURS[number]).save(stream, kind)
    return stream.getvalue()


def write_images(folder: Path) -> Path:
    """images/0.png to images/3.png."""
    (folder / "images").mkdir(parents=True)
    for number in range(4):
        (folder / "images" / f"{number}.png").write_bytes(image_bytes(number))
    return folder


def write_json(path: Path, records: list[Any]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    else:
        path.write_text(json.dumps(records), encoding="utf-8")
    return path


def hugging_face_struct(number: int) -> dict[str, Any]:
    """An image as `datasets` stores it."""
    return {"bytes": image_bytes(number), "path": f"{number}.png"}


IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


# ---------------------------------------------------------------------- records


def llava_records() -> list[dict[str, Any]]:
    return [
        {
            "id": f"llava-{n}",
            "image": f"images/{n}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\n{QUESTION}"},
                {"from": "gpt", "value": TEXTS[n]},
            ],
        }
        for n in range(4)
    ]


def llava(folder: Path) -> Path:
    return write_json(write_images(folder) / "data.json", llava_records())


def sharegpt(folder: Path) -> Path:
    """LLaMA-Factory: `images` is a list, no newline after the marker."""
    records = [
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": f"<image>{QUESTION}"},
                {"from": "gpt", "value": TEXTS[n]},
            ],
            "images": [f"images/{n}.png"],
        }
        for n in range(4)
    ]
    return write_json(write_images(folder) / "data.jsonl", records)


def mixture(folder: Path) -> Path:
    llava(folder)
    write_json(folder / "more.jsonl", llava_records())
    text = """\
datasets:
  - json_path: data.json
    sampling_strategy: "first:50%"
  - json_path: {folder}/more.jsonl
    sampling_strategy: end:3
"""
    (folder / "mixture.yaml").write_text(text.format(folder=folder))
    return folder / "mixture.yaml"


def openai(folder: Path) -> Path:
    records = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": f"images/{n}.png"}},
                        {"type": "text", "text": QUESTION},
                    ],
                },
                {"role": "assistant", "content": TEXTS[n]},
            ]
        }
        for n in range(4)
    ]
    return write_json(write_images(folder) / "data.jsonl", records)


def trl(folder: Path) -> Path:
    """Parquet as `datasets` writes it: images inside, parts with all keys of all parts."""
    folder.mkdir(parents=True)
    messages = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": TEXTS[n]}]},
        ]
        for n in range(4)
    ]
    table = pa.table(
        {
            "images": pa.array([[hugging_face_struct(n)] for n in range(4)], pa.list_(IMAGE)),
            "messages": pa.array(messages),
        }
    )
    pq.write_table(table, folder / "train.parquet", row_group_size=2)
    return folder / "train.parquet"


def swift(folder: Path) -> Path:
    records = [
        {
            "messages": [{"role": "user", "content": f"<image>{REQUEST}"}],
            "images": [f"images/{n}.png"],
            "positive_messages": [[{"role": "user", "content": TEXTS[n]}]],
            "positive_images": [[]],
            "negative_messages": [
                [{"role": "user", "content": "<image>"}],
                [{"role": "user", "content": "no"}],
            ],
            "negative_images": [[f"images/{(n + 1) % 4}.png"], []],
        }
        for n in range(4)
    ]
    return write_json(write_images(folder) / "data.jsonl", records)


def mmeb(folder: Path) -> Path:
    """Images to texts, and the last row a text to an image."""
    marker = "<|image_1|>\n"
    rows: list[tuple[str, str, str, str, str, str]] = [
        (f"{marker}{REQUEST} \n", f"images/{n}.png", f"{TEXTS[n]}\n", "", "", "") for n in range(3)
    ]
    target = f"{marker}Represent the given image.\n"
    rows.append((f"{REQUEST} {TEXTS[3]}\n", "", target, "images/3.png", target, "images/0.png"))
    names = ["qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"]
    path = write_images(folder) / "original-00000-of-00001.parquet"
    pq.write_table(pa.table([list(c) for c in zip(*rows, strict=True)], names=names), path)
    return path


def mmeb_eval(folder: Path) -> Path:
    rows = {
        "qry_text": [f"<|image_1|>\n{REQUEST}\n"] * 4,
        "qry_img_path": [f"images/{n}.png" for n in range(4)],
        "tgt_text": [[TEXTS[n], TEXTS[(n + 1) % 4]] for n in range(4)],
        "tgt_img_path": [["", ""]] * 4,
    }
    path = write_images(folder) / "test-00000-of-00001.parquet"
    pq.write_table(pa.table(rows), path)
    return path


def sentence_transformers(folder: Path) -> Path:
    """Parquet with images inside, some rows without a second negative."""
    folder.mkdir(parents=True)
    table = pa.table(
        {
            "anchor": pa.array(TEXTS),
            "positive": pa.array([hugging_face_struct(n) for n in range(4)], IMAGE),
            "negative_1": pa.array([hugging_face_struct((n + 1) % 4) for n in range(4)], IMAGE),
            "negative_2": pa.array([TEXTS[(n + 2) % 4] if n else None for n in range(4)]),
        }
    )
    pq.write_table(table, folder / "pairs.parquet")
    return folder / "pairs.parquet"


def flag_embedding(folder: Path) -> Path:
    """Paths of images, and several positives."""
    records = [
        {
            "query": {"text": REQUEST, "image": f"images/{n}.png"},
            "pos": [TEXTS[n], f"images/{n}.png"],
            "neg": [f"images/{(n + 1) % 4}.png"],
        }
        for n in range(4)
    ]
    return write_json(write_images(folder) / "data.jsonl", records)


def image_folder(folder: Path) -> Path:
    records = [{"file_name": f"images/{n}.png", "text": TEXTS[n]} for n in range(4)]
    write_json(write_images(folder) / "metadata.jsonl", records)
    return folder


def image_folder_csv(folder: Path) -> Path:
    write_images(folder)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption"])
        writer.writerows([f"images/{n}.png", TEXTS[n]] for n in range(4))
    return folder


def caption_lines(folder: Path) -> Path:
    """As Flickr8k.token.txt, its images in images/."""
    lines = [f"{n}.png#0\t{TEXTS[n]}\n" for n in range(4)]
    (write_images(folder) / "captions.token").write_text("".join(lines), encoding="utf-8")
    return folder / "captions.token"


def coco_captions(folder: Path) -> Path:
    content = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(4)],
        "annotations": [{"id": 9 - n, "image_id": n, "caption": TEXTS[n]} for n in range(4)],
    }
    path = write_images(folder) / "captions_val.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def text_beside(folder: Path) -> Path:
    write_images(folder)
    for n in range(4):
        (folder / "images" / f"{n}.txt").write_text(TEXTS[n] + "\n", encoding="utf-8")
    return folder


def column_map(folder: Path) -> Path:
    """Columns that no format knows: `title` and `photo`."""
    records = [{"title": TEXTS[n], "photo": f"images/{n}.png", "year": n} for n in range(4)]
    return write_json(write_images(folder) / "data.jsonl", records)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def webdataset(folder: Path) -> Path:
    """Two shards of two: image, text and JSON, as img2dataset writes them."""
    folder.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for n in (2 * shard, 2 * shard + 1):
                add(archive, f"{n:09d}.jpg", image_bytes(n, "JPEG"))
                add(archive, f"{n:09d}.json", json.dumps({"key": f"{n:09d}", "width": 40}).encode())
                add(archive, f"{n:09d}.txt", TEXTS[n].encode())
    return folder / "{00000..00001}.tar"


def saved_to_disk(folder: Path) -> Path:
    from datasets import Dataset, DatasetDict

    records = {"image": [hugging_face_struct(n) for n in range(4)], "caption": list(TEXTS)}
    DatasetDict({"train": Dataset.from_dict(records)}).save_to_disk(str(folder))
    return folder


LAYOUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "llava": (llava, "llava"),
    "sharegpt": (sharegpt, "llava"),
    "mixture": (mixture, "llava"),
    "openai": (openai, "messages"),
    "trl": (trl, "messages"),
    "swift": (swift, "swift"),
    "mmeb": (mmeb, "mmeb"),
    "sentence_transformers": (sentence_transformers, "pairs"),
    "flag_embedding": (flag_embedding, "pairs"),
    "image_folder": (image_folder, "captions"),
    "image_folder_csv": (image_folder_csv, "captions"),
    "webdataset": (webdataset, "captions"),
    "saved_to_disk": (saved_to_disk, "captions"),
    "caption_lines": (caption_lines, "captions"),
    "coco_captions": (coco_captions, "captions"),
    "text_beside": (text_beside, "captions"),
}
"""Name -> how to write it, and the format that it is found to be."""
