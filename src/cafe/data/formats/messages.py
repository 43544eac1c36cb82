"""OpenAI messages, as TRL's data sets and many others hold them.

One record, with images in a separate column (`{"type": "image"}` takes the next of them) or in the
parts themselves (a path or a data URL):

    {"images": ["a.jpg"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A red mug."}]}]}

    {"messages": [
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "a.jpg"}},
            {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A red mug."}]}

Where `content` is a string, `<image>` in it takes the next image. A recording is a part of type
`audio`, or `input_audio` with its data in base64, as OpenAI's; `audios` and `<audio>` as for
images. For tools see `cafe.data.formats.tools`. Format:
https://huggingface.co/docs/trl/dataset_formats#vision-datasets.
"""

from __future__ import annotations

from cafe.data.formats.base import Format, conversation_example
from cafe.data.formats.tools import offered_tools
from cafe.data.formats.turns import ListedMedia, read_conversation
from cafe.data.media_paths import MediaResolver, media_value
from cafe.data.records import ReadOptions, Record
from cafe.types import Example


def _read(
    identity: str, record: Record, media: MediaResolver, options: ReadOptions
) -> tuple[Example, ...]:
    shown = ListedMedia(
        media.images(media_value(record, "images", "image"), "images"),
        media.videos(media_value(record, "videos", "video"), "videos"),
        media.recordings(media_value(record, "audios", "audio"), "audios"),
    )
    conversation = offered_tools(record) + read_conversation(
        record.get("messages"),
        shown,
        media,
        field="messages",
        parts=True,
        answers_show=options.mode == "pair",
    )
    return (conversation_example(identity, conversation, options, media.changes),)


MESSAGES = Format(
    name="messages",
    layout="messages, images",
    columns=frozenset(
        {"messages", "image", "images", "video", "videos", "audio", "audios", "tools", "id"}
    ),
    fits=lambda columns: "messages" in columns and "positive_messages" not in columns,
    modes=("caption", "chat", "pair"),
    pair_prompt="none",
    read=_read,
)
