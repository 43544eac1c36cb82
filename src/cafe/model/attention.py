"""Facts of a model's attention: how far its layers see, and what it decodes with."""

from __future__ import annotations

import threading
from typing import Any

from cafe.errors import FamilyError


def layer_windows(config: Any) -> dict[str, int | None]:
    """How far each kind of layer of the language model sees, in tokens; None: to the beginning.

    Raises FamilyError for a kind of layer whose attention is neither full nor a sliding window.
    """
    text = config.get_text_config()
    if getattr(text, "use_bidirectional_attention", False):
        raise FamilyError(
            f"model type {config.model_type!r} with use_bidirectional_attention cannot generate"
        )
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return {"every": window}
    known = {"full_attention": None, "sliding_attention": window}
    for kind in kinds:
        if kind not in known:
            raise FamilyError(
                f"model type {config.model_type!r}: its {kind!r} layers cannot share a row; "
                f"cafe knows {' and '.join(known)}"
            )
    return {kind: known[kind] for kind in sorted(set(kinds))}


class WhileDecoding:
    """Within it, a model that is set to FlexAttention uses SDPA.

    transformers' `generate` gives FlexAttention one token at a time, for which it is compiled
    anew, and not at all on a CPU; SDPA gives the same values. Several threads may decode in turns
    (`cafe.serve.decoding`): the last to leave brings FlexAttention back. What is embedded
    meanwhile gets SDPA's mask, since masks are made for what the configuration says.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._inside = 0
        self._flex = False

    def __enter__(self) -> None:
        with _LOCK:
            if self._inside == 0 and self._config._attn_implementation == "flex_attention":
                self._set("sdpa")
                self._flex = True
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with _LOCK:
            self._inside -= 1
            if self._inside == 0 and self._flex:
                self._set("flex_attention")
                self._flex = False

    def _set(self, attention: str) -> None:
        """Of the language model; the vision tower keeps its own."""
        self._config._attn_implementation = {"": attention, "text_config": attention}


_LOCK = threading.Lock()
"""One for all models: a model with a lock of its own could not be copied."""
