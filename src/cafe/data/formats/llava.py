r"""LLaVA conversations, also those of LLaMA-Factory ("sharegpt").

One record, from LLaVA's own pretraining data:

    {"id": "004539375", "image": "00453/004539375.jpg", "conversations": [
        {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
        {"from": "gpt", "value": "select luxury furniture 3 - inch gel memory foam mattress topper"}
    ]}

`image` is a path, a list of paths (also named `images`), or absent; so are `video` (`videos`) and
`audio` (`audios`), for which `<video>` and `<audio>` stand.
`negatives`, of this project, is a list of wrong captions, or answers, that are nearly right.
In pair mode the question is the query and the answer the target, which may show an image: so the
published code writes MMEB. Formats: https://github.com/haotian-liu/LLaVA,
docs/Finetune_Custom_Data.md; https://github.com/hiyouga/LLaMA-Factory, data/README.md.
"""

from __future__ import annotations

from cafe.data.formats.base import (
    NEGATIVES,
    Format,
    conversation_example,
    negative_captions,
)
from cafe.data.formats.tools import offered_tools
from cafe.data.formats.turns import ListedMedia, read_conversation
from cafe.data.media_paths import MediaResolver, media_value
from cafe.data.records import ReadOptions, Record
from cafe.types import Example


def _read(
    identity: str, record: Record, media: MediaResolver, options: ReadOptions
) -> tuple[Example, ...]:
    shown = ListedMedia(
        media.images(media_value(record, "image", "images")),
        media.videos(media_value(record, "video", "videos")),
        media.recordings(media_value(record, "audio", "audios")),
    )
    conversation = offered_tools(record) + read_conversation(
        record.get("conversations"),
        shown,
        media,
        field="conversations",
        answers_show=options.mode == "pair",
    )
    negatives = negative_captions(record) if options.mode != "chat" else ()
    return (conversation_example(identity, conversation, options, media.changes, negatives),)


LLAVA = Format(
    name="llava",
    layout="conversations, image",
    columns=frozenset(
        {"conversations", "image", "images", "video", "videos", "audio", "audios", "tools", "id"}
        | {*NEGATIVES}
    ),
    fits=lambda columns: "conversations" in columns,
    modes=("caption", "chat", "pair"),
    pair_prompt="none",
    read=_read,
)
