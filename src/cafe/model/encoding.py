"""What `CAFe.encode` does: inputs become embeddings, mixed with captions, cut, and quantised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cafe.model import inference
from cafe.model.captions import (
    check_captions,
    inputs_and_captions,
    mixed,
    write_captions,
)
from cafe.model.inference import InferenceModel
from cafe.model.quantization import PRECISIONS, EmbeddingPrecision, quantized
from cafe.model.rows.inputs import Inputs, as_messages, is_many
from cafe.model.thoughts import (
    after_thoughts,
    checked_think,
    read_after_own_thoughts,
    warn_if_untrained,
)
from cafe.model.workers import ModelSource, encode_on
from cafe.progress import progress_bar
from cafe.types import Conversation


@dataclass(frozen=True, slots=True)
class Encoding:
    """The options of `CAFe.encode`, which describes them."""

    batch_size: int
    normalize: bool
    truncate_dim: int | None
    prompt_name: str
    precision: EmbeddingPrecision
    ranges: np.ndarray | None
    caption: bool | Sequence[str | None]
    caption_weight: float
    think: int | Sequence[str | None]
    devices: Sequence[str | torch.device]
    show_progress_bar: bool

    def width(self, dimension: int) -> int:
        """The number of coordinates that are kept. Raises ValueError for options out of range."""
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r}: use one of {', '.join(PRECISIONS)}")
        width = dimension if self.truncate_dim is None else self.truncate_dim
        if not 1 <= width <= dimension:
            raise ValueError(f"truncate_dim={width}: use 1 to {dimension}")
        return width


def encode_inputs(
    model: InferenceModel,
    source: ModelSource | None,
    inputs: Inputs,
    options: Encoding,
    device: torch.device,
) -> Tensor:
    """Embeddings on `device`, [n, d] in input order, or [d] for a single input.

    Args:
        model: the caller's.
        source: what it was loaded from, for `options.devices`; None: it was built.
        inputs: as for `CAFe.encode`.
        options: checked before any work is done.
        device: of the result.
    """
    width = options.width(model.embedding_dimension)
    conversations = as_messages(inputs)
    think = _think(model, options)
    captions = _captions(model, conversations, options)
    if isinstance(think, int) and think and options.devices:
        think = write_captions(model, conversations, options.batch_size, think)
    if not isinstance(think, int):
        if any(think):
            warn_if_untrained(model)
        conversations = after_thoughts(conversations, think)
    everything = inputs_and_captions(conversations, captions)
    with progress_bar("encode", len(everything), show=options.show_progress_bar, stays=True) as bar:
        asked = (everything, options.batch_size, options.prompt_name)
        if options.devices:
            vectors = encode_on(options.devices, model, source, *asked, bar.more)
        elif isinstance(think, int) and think:
            vectors, _ = read_after_own_thoughts(
                model, conversations, think, *asked[1:], device=device, on_progress=bar.more
            )
        else:
            vectors = inference.encode(model, *asked, device=device, on_progress=bar.more)
    vectors = mixed(vectors, captions, options.caption_weight)[:, :width]
    if options.normalize:
        vectors = torch.nn.functional.normalize(vectors, dim=1)
    vectors = vectors if is_many(inputs) else vectors[0]
    if options.precision != "float32":
        compact = quantized(vectors.cpu().numpy(), options.precision, options.ranges)
        vectors = torch.from_numpy(compact)
    return vectors.to(device)


def _think(model: InferenceModel, options: Encoding) -> int | Sequence[str | None]:
    """The thoughts, or the most tokens of those that the model writes; 0: there are none."""
    think = checked_think(model, options.think)
    if think != 0 and options.caption is not False:
        raise ValueError("caption and think are two ways to use the same text; choose one")
    return think


def _captions(
    model: InferenceModel, conversations: Sequence[Conversation], options: Encoding
) -> Sequence[str | None]:
    """One caption or None for each conversation, as given, or as the model writes it."""
    given = options.caption
    if isinstance(given, bool):
        none: list[str | None] = [None] * len(conversations)
        check_captions(none, len(conversations), options.caption_weight)
        given = write_captions(model, conversations, options.batch_size) if given else none
    return check_captions(given, len(conversations), options.caption_weight)
